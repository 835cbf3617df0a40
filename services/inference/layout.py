"""The folder that `leptonic serve` is given: which models lie in it, and what they ask for.

Triton's layout (`<model>/config.pbtxt`, `<model>/<version>/model.onnx`), MLServer's
`model-settings.json`, and plain `.onnx` files.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from libs.contracts.protos.model_config_pb2 import ModelConfig
from services.inference import mlserver, modelconfig
from services.inference.modelconfig import Misconfigured

CONFIG_FILE = "config.pbtxt"
GRAPH = ".onnx"
LABEL_BYTES_MAX = 16 << 20


class Found(NamedTuple):
    """A model that is there, whether it can be served or not."""

    name: str
    place: Path
    """Its folder, its `model-settings.json`, or its `.onnx` file."""


class Version(NamedTuple):
    number: int
    file: Path
    """Of the model: ONNX, or Python."""


class Plan(NamedTuple):
    """What a model's files ask for."""

    name: str
    config: ModelConfig
    """As written; a graph's tensors may be missing."""
    backend: str
    versions: list[Version]
    folder: Path
    """Where label files and warm-up data lie."""
    promised: mlserver.Settings | None = None
    """What the graph's tensors must be, where MLServer's settings say so."""
    keeps: object = None
    """With which the files go."""


class Absent(Misconfigured):
    """There is no folder at all."""


def find(root: Path) -> list[Found]:
    """By name. Raises `Misconfigured` when there is nothing that could be a model, `OSError`
    when it cannot be read."""
    if not root.exists():
        raise Absent(f"{root}: there is no such file or folder")
    found = {one.name: one for one in found_in(root)}
    if not found:
        raise Misconfigured(
            f"{root}: no model: neither <model>/<version>/model.onnx, <model>/config.pbtxt, "
            f"model-settings.json nor *.onnx"
        )
    return [found[name] for name in sorted(found)]


def found_in(root: Path) -> Iterator[Found]:
    if root.is_file():
        yield at_file(root)
        return
    if is_model(root):
        yield at_folder(root.resolve())
        return
    for entry in sorted(root.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield at_folder(entry)
        elif entry.suffix == GRAPH:
            yield at_file(entry)


def at_file(path: Path) -> Found:
    if path.name == mlserver.FILE:
        return at_folder(path.resolve().parent)
    if path.suffix != GRAPH:
        raise Misconfigured(f"{path}: neither a folder, an .onnx file nor {mlserver.FILE}")
    return Found(path.stem, path)


def at_folder(folder: Path) -> Found:
    settings = folder / mlserver.FILE
    if os.path.isfile(settings):  # no, where nobody may look
        return Found(mlserver.name_of(settings), settings)
    return Found(folder.name, folder)


def is_model(folder: Path) -> bool:
    """Itself a model, not a folder of models."""
    return (
        (folder / CONFIG_FILE).is_file()
        or (folder / mlserver.FILE).is_file()
        or any(has_file(version) for version in versions_in(folder).values())
    )


def has_file(folder: Path) -> bool:
    return any((folder / file).exists() for file in modelconfig.MODEL_FILES.values())


def read(found: Found, override: ModelConfig | None = None) -> Plan:
    """`override` stands for the configuration in the folder. Raises `Misconfigured`."""
    try:
        if found.place.is_dir():
            return read_folder(found, override)
        if found.place.name == mlserver.FILE:
            return read_settings(found, override)
        config = override or ModelConfig()
        versions = [Version(1, found.place)]
        return Plan(
            found.name, named(config, found), modelconfig.ONNX, versions, found.place.parent
        )
    except OSError as error:
        raise Misconfigured(f"{error.filename}: {error.strerror}") from error


def read_folder(found: Found, override: ModelConfig | None) -> Plan:
    config = override or written(found.place / CONFIG_FILE)
    folders = versions_in(found.place)
    if not folders:
        raise Misconfigured(f"{found.place}: no version: a folder named 1 holds the first")
    chosen = modelconfig.chosen_versions(config.version_policy, folders)
    backend = modelconfig.backend_of(config, {path.name for path in folders[chosen[-1]].iterdir()})
    file = inside(modelconfig.file_of(config, backend), "default_model_filename")
    versions = [Version(number, folders[number] / file) for number in chosen]
    for version in versions:
        if not version.file.is_file():
            raise Misconfigured(f"{version.file}: there is no such file")
    return Plan(found.name, named(config, found), backend, versions, found.place)


def written(path: Path) -> ModelConfig:
    if not path.exists():
        return ModelConfig()
    try:
        return modelconfig.parse(path.read_text(), str(path))
    except UnicodeDecodeError as error:
        raise Misconfigured(f"{path}: not UTF-8 text: {error}") from error


def read_settings(found: Found, override: ModelConfig | None) -> Plan:
    settings = mlserver.read(found.place)
    config = override or mlserver.config_of(settings)
    version = Version(mlserver.number_of(settings), mlserver.graph_of(settings, found.place))
    folder = found.place.parent
    return Plan(found.name, named(config, found), modelconfig.ONNX, [version], folder, settings)


def named(config: ModelConfig, found: Found) -> ModelConfig:
    if not config.name:
        config.name = found.name
    return config


def versions_in(folder: Path) -> dict[int, Path]:
    """As Triton counts: folders named by a number that does not begin with 0."""
    return {
        int(path.name): path
        for path in folder.iterdir()
        if path.name.isascii()
        and path.name.isdigit()
        and not path.name.startswith("0")
        and path.is_dir()
    }


def numbers_of(found: Found) -> set[int]:
    return set(versions_in(found.place)) if found.place.is_dir() else set()


def labels_of(config: ModelConfig, folder: Path) -> dict[str, list[str]]:
    """Output -> the names of its classes, one a line. Raises `Misconfigured`."""
    return {
        output.name: lines_of(folder / inside(output.label_filename, "label_filename"))
        for output in config.output
        if output.label_filename
    }


def inside(name: str, field: str) -> str:
    """A path in the model's folder. Raises `Misconfigured`: a client may say the configuration."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise Misconfigured(f"{field} '{name}' leads out of the model's folder")
    return name


def lines_of(path: Path) -> list[str]:
    try:
        if path.stat().st_size > LABEL_BYTES_MAX:
            raise Misconfigured(f"{path}: more than {LABEL_BYTES_MAX} bytes of labels")
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Misconfigured(f"label_filename: {path}: {error}") from error


def stamp_of(place: Path) -> tuple[tuple[str, int, int], ...]:
    """What changes when any file of a model does: names, sizes and times."""
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    return tuple(
        (path.as_posix(), stat.st_size, stat.st_mtime_ns)
        for path in files
        if (stat := stat_of(path)) is not None and "__pycache__" not in path.parts
    )


def stat_of(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:  # replaced while we looked
        return None
