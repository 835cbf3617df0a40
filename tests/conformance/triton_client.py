"""What the public examples of tritonclient do, and more, in checks of our own.

    python triton_client.py 127.0.0.1:8000 127.0.0.1:8001            # every fixture model
    python triton_client.py 127.0.0.1:8000 127.0.0.1:8001 control    # loads and unloads `simple`

A process of its own: tritonclient's protos and ours register the same names. Prints a line for each
check and `N passed of N`.
"""

import queue
import sys
import traceback
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient import utils
from tritonclient.utils import InferenceServerException

HTTP, GRPC = sys.argv[1:3]
ANSWER_S = 30
NUMBERS = np.arange(16, dtype=np.int32).reshape(1, 16)
ONES = np.ones((1, 16), np.int32)
VALUES = [11, 7, 5, 3, 2, 0, 1]
BYTES = 64
Side = tuple[Any, Any]
"""(module, client): gRPC and HTTP have the same API."""
Check = Any
"""A function of a `Side`."""
EACH: list[Check] = []
STREAMED: list[Check] = []
CONTROLLED: list[Check] = []


def to(checks: list[Check]) -> Callable[[Check], Check]:
    def add(one: Check) -> Check:
        checks.append(one)
        return one

    return add


def given(side: Side, *tensors: tuple[str, Any]) -> list[Any]:
    inputs = []
    for name, values in tensors:
        asked = side[0].InferInput(name, values.shape, utils.np_to_triton_dtype(values.dtype))
        asked.set_data_from_numpy(values)
        inputs.append(asked)
    return inputs


def pair(side: Side, kind: Any = np.int32) -> list[Any]:
    return given(side, ("INPUT0", NUMBERS.astype(kind)), ("INPUT1", ONES.astype(kind)))


def texts(values: Any) -> Any:
    return np.array([str(one).encode() for one in values.reshape(-1)], object).reshape(values.shape)


def refused(words: str, call: Callable[[], Any]) -> None:
    said = "it was answered"
    try:
        call()
    except InferenceServerException as error:
        said = error.message()
    assert words in said, said


def is_sum(answer: Any) -> None:
    assert np.array_equal(answer.as_numpy("OUTPUT0"), NUMBERS + ONES)
    assert np.array_equal(answer.as_numpy("OUTPUT1"), NUMBERS - ONES)


@to(EACH)
def sums(side: Side) -> None:
    client = side[1]
    is_sum(client.infer("simple", pair(side), request_id="mine", headers={"test": "1"}))
    wanted = [side[0].InferRequestedOutput("OUTPUT1")]
    answer = client.infer("simple", pair(side), model_version="1", outputs=wanted)
    assert answer.as_numpy("OUTPUT0") is None
    answer = client.infer("simple_int8", pair(side, np.int8))
    assert answer.as_numpy("OUTPUT0").dtype == np.int8
    assert np.array_equal(answer.as_numpy("OUTPUT0"), NUMBERS + ONES)


@to(EACH)
def counts_are_there_at_once(side: Side) -> None:
    def count() -> int:
        told = side[1].get_inference_statistics("simple")
        stats = told["model_stats"] if isinstance(told, dict) else told.model_stats
        (one,) = stats
        return int(one["inference_count"] if isinstance(one, dict) else one.inference_count)

    before = count()
    side[1].infer("simple", pair(side))
    assert count() == before + 1


@to(EACH)
def what_is_there_is_told(side: Side) -> None:
    client = side[1]
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("simple")
    assert client.is_model_ready("simple", "1")
    assert not client.is_model_ready("nobody")
    server, model = client.get_server_metadata(), client.get_model_metadata("simple")
    assert (server["name"] if isinstance(server, dict) else server.name) == "triton"
    assert (model["name"] if isinstance(model, dict) else model.name) == "simple"
    told = client.get_model_config("simple")
    rows = told["max_batch_size"] if isinstance(told, dict) else told.config.max_batch_size
    assert rows == 8
    refused("Request for unknown model", lambda: client.get_model_metadata("nobody"))
    refused("Request for unknown model", lambda: client.infer("nobody", pair(side)))


@to(EACH)
def texts_are_bytes(side: Side) -> None:
    client = side[1]
    inputs = given(side, ("INPUT0", texts(NUMBERS)), ("INPUT1", texts(ONES)))
    answer = client.infer("simple_string", inputs)
    assert np.array_equal(answer.as_numpy("OUTPUT0").astype(np.int32), NUMBERS + ONES)
    held = np.array([[b"he\0llo", b"", b"\0\1\2\3"]], object)
    answer = client.infer("simple_identity", given(side, ("INPUT0", held)))
    assert np.array_equal(answer.as_numpy("OUTPUT0"), held)


@to(EACH)
def the_highest_classes_have_their_labels(side: Side) -> None:
    image = np.full((1, 3, 224, 224), 0.5, np.float32)
    wanted = [side[0].InferRequestedOutput("fc6_1", class_count=3)]
    answer = side[1].infer("densenet_onnx", given(side, ("data_0", image)), outputs=wanted)
    rows = answer.as_numpy("fc6_1").reshape(-1)
    assert len(rows) == 3
    for row in rows:
        _, index, label = row.decode().split(":")
        assert label == f"LABEL {index}"


@to(EACH)
def shared_memory_takes_and_gives(side: Side) -> None:
    """By the file below it: tritonclient's own helper asks for a package that is gone."""
    client, key = side[1], f"/leptonic_{uuid.uuid4().hex}"
    region = Path("/dev", "shm", key[1:])
    region.write_bytes(NUMBERS.tobytes() + ONES.tobytes() + bytes(2 * BYTES))
    try:
        client.register_system_shared_memory("all", key, 4 * BYTES)
        inputs, outputs = pair(side), [side[0].InferRequestedOutput(f"OUTPUT{n}") for n in (0, 1)]
        for place, one in enumerate((*inputs, *outputs)):
            one.set_shared_memory("all", BYTES, offset=place * BYTES)
        client.infer("simple", inputs, outputs=outputs)
        found = np.frombuffer(region.read_bytes(), np.int32).reshape(4, 16)
        assert np.array_equal(found[2:], np.concatenate([NUMBERS + ONES, NUMBERS - ONES]))
        client.unregister_system_shared_memory("all")
        refused("all", lambda: client.infer("simple", inputs, outputs=outputs))
    finally:
        region.unlink()


@to(EACH)
def sequences_keep_their_own_state(side: Side) -> None:
    for sequence in (1000, str(uuid.uuid4())):
        answers = in_sequence(side, "simple_sequence", sequence)
        assert answers == [1, *VALUES]
    assert in_sequence(side, "simple_dyna_sequence", 1001) == [1, *VALUES[:-1], VALUES[-1] + 1001]
    sums = np.cumsum([0, *VALUES]).tolist()
    told = in_sequence(side, "simple_string_dyna_sequence", "1002")
    assert told == [*sums[:-1], sums[-1] + 1002]


def in_sequence(side: Side, model: str, sequence: int | str) -> list[int]:
    answers = []
    for position, value in enumerate([0, *VALUES]):
        answer = side[1].infer(
            model,
            given(side, ("INPUT", np.array([[value]], np.int32))),
            sequence_id=sequence,
            sequence_start=position == 0,
            sequence_end=position == len(VALUES),
        )
        answers.append(int(answer.as_numpy("OUTPUT")[0, 0]))
    return answers


@to(EACH)
def a_sequence_begins_with_its_start(side: Side) -> None:
    asked = given(side, ("INPUT", np.array([[1]], np.int32)))
    refused("START", lambda: side[1].infer("simple_sequence", asked, sequence_id=77))
    refused("correlation ID", lambda: side[1].infer("simple_sequence", asked))


@to(EACH)
def compressed_bodies_are_read(side: Side) -> None:
    if side[0] is tritonclient.grpc:
        is_sum(side[1].infer("simple", pair(side), compression_algorithm="gzip"))
        return
    for algorithm in ("gzip", "deflate"):
        answer = side[1].infer(
            "simple",
            pair(side),
            request_compression_algorithm=algorithm,
            response_compression_algorithm=algorithm,
        )
        is_sum(answer)


@to(STREAMED)
def a_decoupled_model_answers_ten_times(side: Side) -> None:
    values = np.arange(100, 110, dtype=np.int32)
    inputs = given(
        side,
        ("IN", values),
        ("DELAY", np.zeros(10, np.uint32)),
        ("WAIT", np.array([0], np.uint32)),
    )
    answers = streamed(side, [{"model_name": "repeat_int32", "inputs": inputs}], 10)
    assert [int(one.as_numpy("OUT")[0]) for one in answers] == values.tolist()


@to(STREAMED)
def sequences_share_a_stream(side: Side) -> None:
    requests = [
        {
            "model_name": "simple_sequence",
            "inputs": given(side, ("INPUT", np.array([[value]], np.int32))),
            "request_id": f"{sequence}_{position}",
            "sequence_id": sequence,
            "sequence_start": position == 0,
            "sequence_end": position == len(VALUES),
        }
        for sequence in (2000, 2001)
        for position, value in enumerate([0, *VALUES])
    ]
    answers = streamed(side, requests, len(requests))
    for sequence in ("2000", "2001"):
        own = [one for one in answers if one.get_response().id.startswith(sequence)]
        assert [int(one.as_numpy("OUTPUT")[0, 0]) for one in own] == [1, *VALUES]


@to(STREAMED)
def an_error_is_an_answer_of_a_stream(side: Side) -> None:
    bad = {"model_name": "nobody", "inputs": pair(side)}
    good = {"model_name": "simple", "inputs": pair(side)}
    error, answer = streamed(side, [bad, good], 2)
    assert "Request for unknown model" in error.message()
    is_sum(answer)


def streamed(side: Side, requests: Sequence[dict[str, Any]], count: int) -> list[Any]:
    answers: queue.Queue[Any] = queue.Queue()
    side[1].start_stream(callback=lambda result, error: answers.put(error or result))
    try:
        for request in requests:
            side[1].async_stream_infer(**request)
        return [answers.get(timeout=ANSWER_S) for _ in range(count)]
    finally:
        side[1].stop_stream()


@to(CONTROLLED)
def models_come_and_go(side: Side) -> None:
    client = side[1]
    index = client.get_model_repository_index()
    assert len(index if isinstance(index, list) else index.models) == 2
    client.load_model("simple")
    is_sum(client.infer("simple", pair(side)))
    refused("failed to load", lambda: client.load_model("simple", config='"parameters": {{'))
    client.load_model("simple", config='{"max_batch_size":"16"}')
    told = client.get_model_config("simple")
    rows = told["max_batch_size"] if isinstance(told, dict) else told.config.max_batch_size
    assert rows == 16
    files = {f"file:{'A' * 256}": b"a"}
    refused("Invalid file path", lambda: client.load_model("simple", config="{}", files=files))
    client.unload_model("simple")
    assert not client.is_model_ready("simple")
    refused("failed to load", lambda: client.load_model("nobody"))


def passes(problem: BaseException | None, name: str) -> bool:
    sys.stdout.write(f"{'FAILED' if problem else 'passed'}  {name}\n")
    if problem:
        traceback.print_exception(problem, file=sys.stdout)
    return not problem


def main() -> int:
    each, streams = (CONTROLLED, []) if sys.argv[3:] == ["control"] else (EACH, STREAMED)
    with ThreadPoolExecutor(1) as thread:  # gevent, below HTTP, stays on one
        http = thread.submit(tritonclient.http.InferenceServerClient, HTTP).result()
        grpc = tritonclient.grpc, tritonclient.grpc.InferenceServerClient(GRPC)
        checks = [("grpc", one, grpc) for one in (*each, *streams)]
        checks += [("http", one, (tritonclient.http, http)) for one in each]
        passed = sum(
            [
                passes(thread.submit(one, side).exception(), f"{word} {one.__name__}")
                for word, one, side in checks
            ]
        )
    sys.stdout.write(f"{passed} passed of {len(checks)}\n")
    return int(passed < len(checks))


if __name__ == "__main__":
    sys.exit(main())
