"""MLServer's `model-settings.json`, as far as an ONNX graph can stand for the model."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec

from libs.contracts.artifacts import Signature, Tensor
from libs.contracts.protos.model_config_pb2 import ModelConfig
from services.inference.modelconfig import Misconfigured

FILE = "model-settings.json"
GRAPH = "model.onnx"
MICROSECONDS = 1_000_000


class Metadata(msgspec.Struct, frozen=True):
    """A tensor as it is told to clients; the rows come first."""

    name: str
    datatype: str
    shape: list[int]


class Parameters(msgspec.Struct, frozen=True):
    uri: str = ""
    version: str = ""


class Settings(msgspec.Struct, frozen=True):
    """What counts here of what MLServer reads."""

    name: str = ""
    implementation: str = ""
    parameters: Parameters = Parameters()
    inputs: list[Metadata] = []
    outputs: list[Metadata] = []
    max_batch_size: int = 0
    max_batch_time: float = 0.0
    """Seconds."""


def read(path: Path) -> Settings:
    """Raises `Misconfigured`, which names the field."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Settings)
    except msgspec.DecodeError as error:
        raise Misconfigured(f"{path}: {error}") from error


def name_of(path: Path) -> str:
    """What it says, else its folder's; also of a file that cannot be read further."""
    try:
        return read(path).name or path.parent.name
    except (Misconfigured, OSError):
        return path.parent.name


def graph_of(settings: Settings, path: Path) -> Path:
    """The ONNX file; a relative `uri` begins at the settings. Raises `Misconfigured`."""
    said = urlsplit(settings.parameters.uri or GRAPH)
    if said.scheme not in ("", "file"):
        raise Misconfigured(f"{path}: parameters.uri '{said.geturl()}': only local files are read")
    file = path.parent / unquote(said.path)
    if file.is_dir():
        file /= GRAPH
    if file.suffix != ".onnx":
        raise Misconfigured(
            f"{path}: implementation '{settings.implementation}' with parameters.uri "
            f"'{settings.parameters.uri}' is not served here: ONNX graphs are (*.onnx)"
        )
    if not file.is_file():
        raise Misconfigured(f"{path}: parameters.uri: there is no {file}")
    return file


def number_of(settings: Settings) -> int:
    """Versions are numbers here: `v2` and `2` are 2, anything else, and nothing, is 1."""
    digits = settings.parameters.version.lstrip("vV")
    return int(digits) if digits.isascii() and digits.isdigit() and int(digits) > 0 else 1


def config_of(settings: Settings) -> ModelConfig:
    """Its adaptive batching in Triton's words; the tensors are the graph's."""
    config = ModelConfig()
    if settings.max_batch_size > 1:
        config.max_batch_size = settings.max_batch_size
    if settings.max_batch_time:
        delay = int(settings.max_batch_time * MICROSECONDS)
        config.dynamic_batching.max_queue_delay_microseconds = delay
    return config


def check(settings: Settings, signature: Signature) -> None:
    """The graph is what the settings promise. Raises `Misconfigured`, which names the field."""
    for field, promised, known in (
        ("inputs", settings.inputs, signature.inputs),
        ("outputs", settings.outputs, signature.outputs),
    ):
        for one in promised:
            check_tensor(f"{FILE}: {field}", one, {tensor.name: tensor for tensor in known})


def check_tensor(field: str, promised: Metadata, known: dict[str, Tensor]) -> None:
    tensor = known.get(promised.name)
    if tensor is None:
        raise Misconfigured(
            f"{field}: no '{promised.name}' in the graph, it has {', '.join(known)}"
        )
    if promised.datatype != tensor.datatype:
        raise Misconfigured(
            f"{field}: '{promised.name}' datatype {promised.datatype}, the graph has "
            f"{tensor.datatype}"
        )
    fits = len(promised.shape) == len(tensor.shape) and all(
        -1 in pair or pair[0] == pair[1] for pair in zip(promised.shape, tensor.shape, strict=True)
    )
    if not fits:
        raise Misconfigured(
            f"{field}: '{promised.name}' shape {promised.shape}, the graph has {tensor.shape}"
        )
