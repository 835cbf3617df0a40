"""Whatever a ModelInferRequest holds, it is a request that the model takes, or it is refused."""

from typing import Any

import hypothesis
from hypothesis import strategies as st

from libs.contracts.artifacts import Signature, Tensor
from libs.contracts.protos import open_inference_pb2 as oip
from libs.doors import Refused
from services.inference import calls, protocol
from services.inference.sharedmemory import SharedMemory
from services.inference.tensors import CONTENTS, DTYPES
from services.inference.tests.desk import Own, opened

SIZES = st.one_of(st.integers(-2, 4), st.sampled_from([1 << 31, 1 << 62, (1 << 63) - 1]))
NAMES = st.sampled_from(["x", "y", "z", "", "é"])
KINDS = st.sampled_from([*sorted(DTYPES), "", "FP8"])
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
PARAMETERS = st.dictionaries(
    st.sampled_from(
        ["timeout", "priority", "sequence_id", "shared_memory_region", "shared_memory_byte_size",
         "shared_memory_offset", "classification", "triton_enable_empty_final_response", "own"]
    ),
    st.one_of(
        st.just({}),
        st.booleans().map(lambda one: {"bool_param": one}),
        INT64.map(lambda one: {"int64_param": one}),
        st.floats().map(lambda one: {"double_param": one}),
        st.text(max_size=4).map(lambda one: {"string_param": one}),
    ),
    max_size=2,
)  # fmt: skip
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "bool_contents": st.booleans(),
    "int_contents": st.integers(-(1 << 31), (1 << 31) - 1),
    "int64_contents": INT64,
    "uint_contents": st.integers(0, (1 << 32) - 1),
    "uint64_contents": st.integers(0, (1 << 64) - 1),
    "fp32_contents": st.floats(width=32),
    "fp64_contents": st.floats(),
    "bytes_contents": st.binary(max_size=3),
}
SIGNATURE = Signature([Tensor("x", "INT8", [-1, 2]), Tensor("y", "BYTES", [-1])], [])


@st.composite
def tensors(draw: st.DrawFn) -> oip.ModelInferRequest.InferInputTensor:
    tensor = oip.ModelInferRequest.InferInputTensor(
        name=draw(NAMES), datatype=draw(KINDS), shape=draw(st.lists(SIZES, max_size=3))
    )
    add(tensor.parameters, draw(PARAMETERS))
    if draw(st.booleans()):
        field = draw(st.sampled_from([CONTENTS.get(tensor.datatype, "bool_contents"), *VALUES]))
        getattr(tensor.contents, field).extend(draw(st.lists(VALUES[field], max_size=4)))
    return tensor


def add(parameters: Any, drawn: dict[str, dict[str, Any]]) -> None:
    for name, value in drawn.items():
        parameters[name].CopyFrom(oip.InferParameter(**value))


@st.composite
def requests(draw: st.DrawFn) -> oip.ModelInferRequest:
    """Near enough to a good one that every check is reached."""
    request = oip.ModelInferRequest(model_name="m", id=draw(st.text(max_size=3)))
    x = oip.ModelInferRequest.InferInputTensor(name="x", datatype="INT8", shape=[1, 2])
    y = oip.ModelInferRequest.InferInputTensor(name="y", datatype="BYTES", shape=[1])
    request.inputs.extend(draw(st.lists(st.one_of(st.just(x), st.just(y), tensors()), max_size=3)))
    raw = st.one_of(st.just(b"\1\2"), st.just(b"\1\0\0\0a"), st.binary(max_size=9))
    request.raw_input_contents.extend(draw(st.lists(raw, max_size=3)))
    add(request.parameters, draw(PARAMETERS))
    for name in draw(st.lists(NAMES, max_size=2)):
        add(request.outputs.add(name=name).parameters, draw(PARAMETERS))
    return request


class Nobody:
    """A client without metadata and without a deadline."""

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return []

    def time_remaining(self) -> None:
        return None


async def test_any_request_is_taken_or_refused() -> None:
    taken = 0
    async with opened() as desk:
        await desk.serve("m", Own(SIGNATURE, lambda inputs: inputs))
        served = desk.endpoints.served("m", "")

        @hypothesis.settings(max_examples=500, deadline=None)
        @hypothesis.given(requests())
        @hypothesis.example(
            oip.ModelInferRequest(
                model_name="m",
                inputs=[
                    oip.ModelInferRequest.InferInputTensor(name="x", datatype="INT8", shape=[1, 2]),
                    oip.ModelInferRequest.InferInputTensor(name="y", datatype="BYTES", shape=[1]),
                ],
                raw_input_contents=[b"\1\2", b"\1\0\0\0a"],
            )
        )
        def ask(request: oip.ModelInferRequest) -> None:
            nonlocal taken
            try:
                call, _ = protocol.call_of(request, SharedMemory(), Nobody())
                asked = calls.accepted(call, served)
            except Refused:
                return
            taken += 1
            assert asked.inputs["x"].shape == (asked.rows, 2)
            assert asked.inputs["y"].shape == (asked.rows,)

        ask()
    assert taken
