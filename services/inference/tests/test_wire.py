"""ModelInfer read from its bytes means what protobuf says it means, remembered or not."""

from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from libs.contracts.artifacts import Signature, Tensor
from libs.contracts.protos import open_inference_pb2 as oip
from services.inference import wire
from services.inference.front import Lane

PAIR = Signature(
    [Tensor("a", "FP32", [-1, 2]), Tensor("b", "INT64", [-1])],
    [Tensor("s", "FP32", [-1, 2]), Tensor("t", "INT64", [-1])],
)
LANE = Lane("pair", "7", PAIR, batched=True, opaque=False)


def request(rows: int = 1, value: int = 0, **about: Any) -> oip.ModelInferRequest:
    a, b = np.full((rows, 2), value, np.float32), np.full(rows, value, np.int64)
    inputs: Any = [
        {"name": "b", "datatype": "INT64", "shape": [rows]},
        {"name": "a", "datatype": "FP32", "shape": [rows, 2]},
    ]
    raws = [b.tobytes(), a.tobytes()]
    given: dict[str, Any] = {"model_name": "pair", "inputs": inputs, "raw_input_contents": raws}
    return oip.ModelInferRequest(**{**given, **about})


def agrees(read: wire.Read, sent: oip.ModelInferRequest) -> bool:
    ask = read.ask
    return (
        (ask.model, ask.version, read.id) == (sent.model_name, sent.model_version, sent.id)
        and ask.names == tuple(one.name for one in sent.inputs)
        and ask.shapes == tuple(tuple(one.shape) for one in sent.inputs)
        and ask.outputs == tuple(one.name for one in sent.outputs)
        and [bytes(raw) for raw in read.raws] == list(sent.raw_input_contents)
    )


REQUESTS = st.builds(
    request,
    rows=st.integers(1, 3),
    value=st.integers(0, 3),
    id=st.sampled_from(["", "a", "b", "ab", "*", "x" * 36, "y" * 36]),
    model_version=st.sampled_from(["", "7", "x" * 36]),
    outputs=st.sampled_from([[], [{"name": "t"}]]),
)


@given(st.lists(REQUESTS, max_size=12))
def test_a_memory_never_confuses_requests(sent: list[oip.ModelInferRequest]) -> None:
    reader = wire.Reader()
    for one in sent * 2:
        read = reader.read(one.SerializeToString())
        assert read is not None
        assert agrees(read, one)


@given(REQUESTS, st.integers(0, 400), st.integers(0, 255))
def test_a_changed_byte_is_read_as_protobuf_reads_it(
    sent: oip.ModelInferRequest, at: int, byte: int
) -> None:
    reader, message = wire.Reader(), bytearray(sent.SerializeToString())
    reader.read(bytes(message))
    message[at % len(message)] = byte
    read = reader.read(bytes(message))
    if read is not None:
        try:
            parsed = oip.ModelInferRequest.FromString(bytes(message))
        except DecodeError:
            pytest.fail("protobuf does not read it")
        assert agrees(read, parsed)


@given(REQUESTS, st.data())
def test_a_truncated_message_is_nobodys(sent: oip.ModelInferRequest, data: st.DataObject) -> None:
    reader, message = wire.Reader(), sent.SerializeToString()
    reader.read(message)
    short = message[: data.draw(st.integers(0, len(message) - 1))]
    read = reader.read(short)
    assert read is None or agrees(read, oip.ModelInferRequest.FromString(short))


def test_the_id_is_no_part_of_what_is_remembered() -> None:
    reader = wire.Reader()
    asks = {
        id(found.ask)
        for n in range(100)
        if (found := reader.read(request(id=f"{n:032x}").SerializeToString()))
    }
    assert len(asks) == 1
    assert reader.remembered == 1


def test_what_is_remembered_is_bounded() -> None:
    reader = wire.Reader()
    for n in range(3 * wire.REMEMBERED_MAX):
        assert reader.read(request(model_version=str(n)).SerializeToString()) is not None
        assert reader.remembered <= wire.REMEMBERED_MAX
        known = sum(len(p.asks) for places in reader.places.values() for p in places)
        assert known <= wire.REMEMBERED_MAX


def test_contents_go_in_the_order_of_the_signature() -> None:
    read = wire.Reader().read(request(rows=3, value=5).SerializeToString())
    assert read is not None
    fit = read.ask.fit("lane", LANE)
    assert fit == wire.Fit((1, 0), ((3, 2), (3,)), 3, (0, 1))
    assert read.ask.fits == {"lane": fit}


@pytest.mark.parametrize(
    "about",
    [
        {"raw_input_contents": [bytes(8)]},
        {"raw_input_contents": [bytes(8), bytes(7)]},
        {"raw_input_contents": [bytes(8), bytes(9)]},
        {"outputs": [{"name": "z"}]},
        {"outputs": [{"name": "s"}, {"name": "s"}]},
        {"parameters": {"sequence_id": {"int64_param": 3}}},
        {"parameters": {"timeout": {"int64_param": -1}}},
        {"id": "\n"},
        {"id": "x" * 257},
    ],
)
def test_anything_else_fits_nowhere(about: dict[str, Any]) -> None:
    read = wire.Reader().read(request(**about).SerializeToString())
    assert read is None or read.ask.fit("lane", LANE) is None


@given(
    id=st.text(min_size=1, max_size=200),
    place=st.sampled_from(["", "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"]),
    rows=st.integers(1, 300),
    outputs=st.sampled_from([(0,), (1,), (0, 1)]),
)
def test_an_answer_is_what_protobuf_would_write(
    id: str, place: str, rows: int, outputs: tuple[int, ...]
) -> None:
    contents = [[bytes(8 * rows), bytes(rows * [1] * 8)][index] for index in outputs]
    reply = wire.reply_of(LANE, outputs, rows, [(2,), ()])
    wanted = oip.ModelInferResponse(model_name="pair", model_version="7", id=id)
    if place:
        wanted.parameters["traceparent"].string_param = place
    for index in outputs:
        tensor = PAIR.outputs[index]
        shape = [rows, 2] if index == 0 else [rows]
        wanted.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
    wanted.raw_output_contents.extend(contents)
    written = b"".join(wire.written(reply, id, place, contents))
    assert written == wanted.SerializeToString(deterministic=True)
