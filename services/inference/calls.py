"""One inference request and its answer, whatever door it came through."""

import uuid
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from libs.contracts.artifacts import Tensor
from libs.doors import Invalid
from services.inference import domain, modelconfig, tensors
from services.inference.models import Model
from services.inference.served import Served
from services.inference.tensors import Array, Arrays, Given, Unfit

Parameter = bool | int | float | str
WHOLE_MAX = (1 << 63) - 1
"""What every front can count with."""
VALUE_BYTES = 8


class Call(NamedTuple):
    """One inference request."""

    model: str
    """As named on the door: `digits`, or `<project>.digits`."""
    version: str
    """"" for whichever the split chooses."""
    id: str
    given: Sequence[Given]
    outputs: Sequence[str]
    """Those asked for; all of them when empty."""
    deadline_ns: int
    """Of `time.monotonic_ns`; 0 for none."""
    traceparent: str
    parameters: Mapping[str, Parameter] = {}
    """`timeout` (us), `priority`, `sequence_id`, `sequence_start`, `sequence_end`, and others."""
    classes: Mapping[str, int] = {}
    """Output -> how many of its highest classes are asked for instead of it."""
    forwarded: bool = False
    """By another replica: answered here or not at all."""

    @property
    def bytes_by_value(self) -> int:
        """Of the inputs that are no numbers lying in a row."""
        size = 0
        for one in self.given:
            if one.values is not None:
                size += len(one.values) * VALUE_BYTES
            elif one.raw is not None and one.datatype == "BYTES":
                size += len(one.raw)
        return size


class Answer(NamedTuple):
    model: str
    version: str
    id: str
    outputs: list[tuple[Tensor, Array]]
    labels: Mapping[str, Sequence[str]]
    """Output -> the names of its classes, by the version that answered: it may be gone by now."""
    traceparent: str
    classified: bool = False
    """Another replica has already made classes of what `Call.classes` says."""


class Asked(NamedTuple):
    """A request that the version takes."""

    inputs: Arrays
    rows: int
    outputs: list[Tensor]
    id: str
    timeout_us: int
    priority: int


def accepted(call: Call, served: Served) -> Asked:
    """Raises `Invalid`, which names what was wrong."""
    model = served.model
    try:
        inputs = tensors.accept(
            call.model, served.signature, call.given, model.batched, text=is_text(model)
        )
    except Unfit as error:
        raise Invalid(str(error)) from error
    rows = rows_of(model, inputs)
    if rows > served.rows_max:
        raise Invalid(
            f"inference request batch-size must be <= {served.rows_max} for '{call.model}', "
            f"got {rows}"
        )
    times = whole(call, "timeout"), whole(call, "priority")
    return Asked(inputs, rows, asked_for(call, served), id_of(call), *times)


def is_text(model: Model) -> bool:
    """onnxruntime's strings are UTF-8; a user's own code takes any bytes."""
    return model.platform == modelconfig.PLATFORMS[modelconfig.ONNX]


def asked_for(call: Call, served: Served) -> list[Tensor]:
    known = {tensor.name: tensor for tensor in served.signature.outputs}
    for name in call.outputs:
        if name not in known:
            raise Invalid(
                f"unexpected inference output '{name}' for model '{call.model}': "
                f"it gives {tensors.listed(known)}"
            )
    return [known[name] for name in call.outputs or known]


def id_of(call: Call) -> str:
    """The client's own, else a new one."""
    if call.id and not domain.is_id(call.id):
        limit = f"at most {domain.ID_CHARACTERS_MAX} printable characters"
        raise Invalid(f"{limit}, got {len(call.id)}", "id")
    return call.id or uuid.uuid4().hex


def rows_of(model: Model, inputs: Arrays) -> int:
    return len(next(iter(inputs.values()))) if model.batched and inputs else 1


def whole(call: Call, name: str) -> int:
    """A parameter that is a number from 0 to `WHOLE_MAX`; 0 when it is not there."""
    value = call.parameters.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= WHOLE_MAX:
        problem = f"a whole number from 0 to {WHOLE_MAX}, got {str(value)[:40]}"
        raise Invalid(problem, f"parameters.{name}")
    return value
