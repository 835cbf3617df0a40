"""Triton's `model_warmup`: requests that a version answers before it is served."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from libs.contracts.artifacts import Signature
from libs.contracts.protos.model_config_pb2 import ModelConfig, ModelWarmup
from libs.doors.serve import MESSAGE_BYTES_MAX
from services.inference import modelconfig, tensors
from services.inference.calls import is_text
from services.inference.instances import Instances
from services.inference.layout import inside
from services.inference.modelconfig import Misconfigured
from services.inference.models import Crashed, Model, RunFailed, Unloadable, zeros
from services.inference.tensors import DTYPES, LENGTH, Arrays, Given, Unfit

FOLDER = "warmup"
"""Beside the versions, where Triton looks for the data."""
RUNS_MAX = 1000
"""Of one sample: a client's configuration may ask for any number."""
SEED = 0
HALF_BITS = 16
"""BF16 is the upper half of an FP32."""


def warm_up(model: Model, config: ModelConfig, folder: Path) -> None:
    """Each sample as often as it says, by every worker. Raises `Misconfigured`, `Unloadable`."""
    for sample in config.model_warmup:
        try:
            inputs = inputs_of(sample, model, config, folder)
            for worker in model.workers if isinstance(model, Instances) else [model]:
                for _ in range(max(1, sample.count)):
                    answer(worker, inputs)
        except (Misconfigured, Unfit) as error:
            raise Misconfigured(f"model_warmup '{sample.name}': {error}") from error
        except (Crashed, RunFailed) as error:
            raise Unloadable(f"model_warmup '{sample.name}': {error}") from error


def answer(model: Model, inputs: Arrays) -> None:
    if not model.decoupled:
        model.run(inputs)
        return
    for _ in model.stream(inputs):
        """Whatever it is."""


def inputs_of(sample: ModelWarmup, model: Model, config: ModelConfig, folder: Path) -> Arrays:
    """What only the server sends, a sequence's controls and states, is zero unless it is said.

    Raises `Misconfigured`, `Unfit`.
    """
    for problem in problems(sample, config):
        raise Misconfigured(problem)
    rows = max(1, sample.batch_size)
    lead = [rows] if model.batched else []
    given = [
        Given(name, datatype_of(said), [*lead, *said.dims], raw_of(said, rows, folder) * rows)
        for name, said in sorted(sample.inputs.items())
    ]
    listed = {one.name for one in config.input} | set(sample.inputs)
    known = [one for one in model.signature.inputs if one.name in listed]
    inputs = tensors.accept(config.name, Signature(known, []), given, model.batched, is_text(model))
    hidden = [one for one in model.signature.inputs if one.name not in listed]
    return inputs | {one.name: np.repeat(zeros(one), rows, 0) for one in hidden}


def problems(sample: ModelWarmup, config: ModelConfig) -> Iterator[str]:
    if sample.batch_size > max(1, config.max_batch_size):
        yield f"batch_size {sample.batch_size}, and max_batch_size is {config.max_batch_size}"
    if sample.count > RUNS_MAX:
        yield f"count {sample.count}: at most {RUNS_MAX} are run"
    for name, said in sample.inputs.items():
        if said.WhichOneof("input_data_type") is None:
            yield f"input '{name}' says none of zero_data, random_data and input_data_file"
        if datatype_of(said) not in DTYPES:
            yield f"input '{name}': data_type is missing"
        elif any(size < 1 for size in said.dims):
            yield f"input '{name}': dims {list(said.dims)} must be at least 1"
        elif row_bytes(said) * max(1, sample.batch_size) > MESSAGE_BYTES_MAX:
            yield f"input '{name}': dims {list(said.dims)} are more than a request may hold"


def datatype_of(said: ModelWarmup.Input) -> str:
    return modelconfig.datatype_of(said.data_type)


def row_bytes(said: ModelWarmup.Input) -> int:
    """A text is empty."""
    size = tensors.size_of(datatype_of(said), said.dims)
    return LENGTH.size * math.prod(said.dims) if size is None else size


def raw_of(said: ModelWarmup.Input, rows: int, folder: Path) -> bytes:
    """One row, as it would come with a request; a text is never random."""
    if said.HasField("input_data_file"):
        return content_of(folder / FOLDER / inside(said.input_data_file, "input_data_file"), rows)
    datatype = datatype_of(said)
    if said.random_data and datatype != "BYTES":
        return random_of(datatype, math.prod(said.dims))
    return bytes(row_bytes(said))


def content_of(file: Path, times: int) -> bytes:
    """Raises `Misconfigured`."""
    try:
        if file.stat().st_size * times > MESSAGE_BYTES_MAX:
            raise Misconfigured(f"{file}: more than {MESSAGE_BYTES_MAX} bytes in {times} rows")
        return file.read_bytes()
    except OSError as error:
        raise Misconfigured(f"input_data_file: {file}: {error.strerror}") from error


def random_of(datatype: str, count: int) -> bytes:
    """From 0 to 1: a number may be the place of something in a table."""
    draw = np.random.default_rng(SEED)
    if datatype == "BF16":
        return (draw.random(count, np.float32).view(np.uint32) >> HALF_BITS).astype("<u2").tobytes()
    if DTYPES[datatype].kind == "f":
        return draw.random(count).astype(DTYPES[datatype]).tobytes()
    return draw.integers(0, 2, count).astype(DTYPES[datatype]).tobytes()
