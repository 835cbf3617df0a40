"""A batch holds what its requests gave, and answers only with what the signature promises; Python's
and C++'s batcher alike."""

import gc

import numpy as np
import pytest

from libs.contracts.artifacts import Signature, Tensor
from libs.contracts.pipeline import Batching
from services.inference.front import Lane
from services.inference.tensors import DTYPES, Arrays
from services.inference.tests.callers import (
    LOOSE,
    QUIET,
    Caller,
    Make,
    asked,
    both,
    configured,
    joined,
    marks,
    run,
    taken,
)


@both
def test_a_batch_is_gathered_in_order_and_contiguous(make: Make) -> None:
    batcher = configured(make, Batching())
    wide = np.arange(24, dtype=np.int64).reshape(3, 8)
    for x in (wide[:2, ::4], wide[2:, :2]):
        batcher.join({"x": x, "ok": np.array([True] * len(x))}, len(x), Caller())
    inputs = taken(batcher).inputs()
    assert inputs.keys() == {"x", "ok"}
    assert inputs["x"].tolist() == [[0, 4], [8, 12], [16, 17]]
    assert inputs["ok"].tolist() == [True] * 3
    assert all(array.flags.c_contiguous for array in inputs.values())


@both
def test_only_equal_shapes_share_a_batch(make: Make) -> None:
    batcher = make(LOOSE)
    batcher.configure(Batching(), QUIET)
    for width in (3, 1, 3, 2, 1):
        batcher.join({"x": np.full((1, width), width, np.float32)}, 1, Caller())
    shapes = [taken(batcher).inputs()["x"].shape for _ in range(3)]
    assert shapes == [(2, 3), (2, 1), (1, 2)]


@both
def test_without_rows_each_request_runs_alone_and_answers_in_any_shape(make: Make) -> None:
    whole = Signature([Tensor("x", "FP32", [2, 2])], [Tensor("y", "FP32", [-1])])
    batcher = make(Lane("whole", "1", whole, batched=False, opaque=False))
    batcher.configure(Batching(max_batch_size=8, preferred_batch_size=(4,)), QUIET)
    told: list[tuple[Arrays, int, int]] = []

    class Whole(Caller):
        def answered(self, outputs: Arrays, start: int, stop: int, *rest: object) -> None:
            told.append((outputs, start, stop))

    for mark in (1, 2):
        batcher.join({"x": np.full((2, 2), mark, np.float32)}, 1, Whole())
    for mark in (1, 2):
        batch = taken(batcher)
        assert (batch.rows, batch.inputs()["x"].tolist()) == (1, [[mark, mark]] * 2)
        batch.answer({"y": np.full(7, mark, np.float32)})
    assert [(outputs["y"].tolist(), start, stop) for outputs, start, stop in told] == [
        ([1.0] * 7, 0, 1),
        ([2.0] * 7, 0, 1),
    ]


@both
@pytest.mark.parametrize("datatype", sorted(DTYPES))
def test_every_datatype_goes_in_and_out_as_it_is(make: Make, datatype: str) -> None:
    one = Signature([Tensor("x", datatype, [-1, 2])], [Tensor("x", datatype, [-1, 2])])
    batcher = make(Lane("m", "1", one, batched=True, opaque=datatype == "BYTES"))
    batcher.configure(Batching(), QUIET)
    told: list[Arrays] = []

    class Kept(Caller):
        def answered(self, outputs: Arrays, start: int, stop: int, *rest: object) -> None:
            told.append({name: array[start:stop] for name, array in outputs.items()})

    given = [np.array([[0, row]]).astype(DTYPES[datatype]) for row in range(3)]
    for x in given:
        batcher.join({"x": x}, 1, Kept())
    batch = taken(batcher)
    batch.answer(batch.inputs())
    assert [one["x"].dtype for one in told] == [DTYPES[datatype]] * 3
    assert [one["x"].tolist() for one in told] == [x.tolist() for x in given]


@both
def test_arrays_that_were_asked_with_live_as_long_as_the_batch_needs_them(make: Make) -> None:
    batcher = configured(make, Batching())
    for mark in (1, 2):
        batcher.join(asked(mark), 1, Caller(mark))
    gc.collect()
    batch = taken(batcher)
    assert marks(batch.inputs()) == [1, 2]


@both
@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (lambda y: {"y": y["y"]}, "'twice' is missing"),
        (lambda y: y | {"y": y["y"][:-1]}, r"'y' has shape \[2, 2\] for 3 rows"),
        (lambda y: y | {"twice": np.float32(1).reshape(())}, r"'twice' has shape \[\] for 3 rows"),
        (lambda y: y | {"twice": y["twice"].astype(np.float64)}, "'twice' has float64"),
        (lambda y: y | {"y": y["y"].astype(">i8")}, "'y' has >i8"),
    ],
    ids=["missing", "rows", "scalar", "datatype", "byte-order"],
)
def test_outputs_that_do_not_fit_answer_nobody_and_the_batch_can_still_fail(
    make: Make, broken: object, text: str
) -> None:
    batcher = configured(make, Batching())
    callers = joined(batcher, 1, 2)
    batch = taken(batcher)
    outputs = broken(run(batch.inputs()))  # type: ignore[operator]
    with pytest.raises(ValueError, match=text):
        batch.answer(outputs)
    assert not any(caller.told for caller in callers)
    assert batcher.counts().success_count == 0
    batch.fail(13, "it does not fit")
    assert all(caller.told == [(13, "it does not fit")] for caller in callers)


@both
def test_an_output_that_nobody_declared_is_ignored(make: Make) -> None:
    batcher = configured(make, Batching())
    (caller,) = joined(batcher, 1)
    batch = taken(batcher)
    batch.answer(run(batch.inputs()) | {"more": np.zeros(7)})
    assert caller.answer
