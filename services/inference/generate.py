"""Triton's generate extension: a flat JSON object in, and one out for each answer.

`{"text_input": "hello", "temperature": 0.5}`: a key that is an input of the model is that tensor,
any other is a parameter.
"""

import contextlib
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from libs.contracts.artifacts import Signature, Tensor
from libs.doors import Invalid
from services.inference.bodies import json_values
from services.inference.calls import Answer, Call, Parameter
from services.inference.tensors import Given

OWN = ("id", "parameters")


def call_of(
    model: str, version: str, signature: Signature, body: Mapping[str, Any], traceparent: str
) -> Call:
    """Raises `Invalid`."""
    named = body.get("parameters") or {}
    if not isinstance(named, dict):
        raise Invalid("an object", "parameters")
    values = {**named, **{name: value for name, value in body.items() if name not in OWN}}
    inputs = {tensor.name: tensor for tensor in signature.inputs}
    given = [given_of(tensor, values[name]) for name, tensor in inputs.items() if name in values]
    parameters = {n: parameter_of(n, value) for n, value in values.items() if n not in inputs}
    asked = body.get("id", "")
    if not isinstance(asked, str):
        raise Invalid("a string", "id")
    return Call(model, version, asked, given, [], 0, traceparent, parameters)


def given_of(tensor: Tensor, value: Any) -> Given:
    values = value if isinstance(value, list) else [value]
    return Given(tensor.name, tensor.datatype, padded(tensor, len(values)), values=values)


def padded(tensor: Tensor, count: int) -> Sequence[int]:
    """The tensor's shape with so many values: the last free dimension takes what the fixed ones
    leave, the other free ones are 1."""
    left = count // (math.prod(size for size in tensor.shape if size > 0) or 1)
    shape = []
    for size in reversed(tensor.shape):
        shape.append(size if size > 0 else left)
        left = left if size > 0 else 1
    return shape[::-1]


def parameter_of(name: str, value: Any) -> Parameter:
    if not isinstance(value, bool | int | float | str):
        raise Invalid("a parameter is a string, a number, true or false", name)
    return value


def fields_of(answer: Answer) -> dict[str, Any]:
    """A tensor of one value is that value."""
    fields: dict[str, Any] = {"model_name": answer.model, "model_version": answer.version}
    for tensor, array in answer.outputs:
        values = json_values(tensor, array)
        fields[tensor.name] = values[0] if len(values) == 1 else values
    return fields


async def only(answers: AsyncGenerator[Answer, None]) -> Answer:
    """Whatever would come after a second one is not computed for nobody. Raises `Refused`."""
    found = []
    async with contextlib.aclosing(answers) as coming:
        async for answer in coming:
            found.append(answer)
            if len(found) > 1:
                break
    if len(found) != 1:
        said = "more" if found else "none"
        raise Invalid(
            f"generate expects model to produce exactly 1 response, got {said}: use generate_stream"
        )
    return found[0]
