"""What the comparison with the peers counts as an answer, and when it says that a target is met."""

from pathlib import Path

import msgspec
import pytest

from bench.peers import load, peers, table
from bench.peers.__main__ import Plan, Run, begun
from bench.peers.rounds import Record

PRINTED = """
finished in 1.30s, 1113.00 req/s, 146.06KB/s
requests: 1113 total, 1113 started, 1113 done, {succeeded} succeeded, {failed} failed, 0 errored, 0 timeout
status codes: {good} 2xx, 0 3xx, 0 4xx, {bad} 5xx
traffic: 146.06KB (149567) total, 5.07KB (5187) headers (space savings 95.81%), 81KB ({data}) data
"""  # noqa: E501 - as h2load prints it
TARGET = load.Target("http://127.0.0.1:1/", (), False, Path("body"), answer_bytes=75)


def printed(succeeded: int = 1113, failed: int = 0, bad: int = 0, data: int = 1113 * 75) -> str:
    return PRINTED.format(
        succeeded=succeeded, failed=failed, bad=bad, good=succeeded - bad, data=data
    )


def test_a_run_whose_answers_are_all_whole_counts() -> None:
    assert load.rate_of(printed(), TARGET) == 1113.0


@pytest.mark.parametrize(
    "text",
    [
        printed(succeeded=0),
        printed(failed=1),
        printed(bad=1),
        printed(data=1100 * 70),
        "h2load: connection refused",
    ],
)
def test_one_bad_answer_spoils_a_run(text: str) -> None:
    with pytest.raises(load.Spoiled):
        load.rate_of(text, TARGET)


def test_streams_are_spread_over_eight_connections() -> None:
    shapes = [load.connections(concurrency, http1=False) for concurrency in (1, 8, 64)]
    assert shapes == [(1, 1), (8, 1), (8, 8)]
    assert load.connections(64, http1=True) == (64, 1)


def test_a_ratio_is_the_middle_one_of_the_rounds_that_both_have() -> None:
    assert table.ratio({0: 8.0, 1: 9.0, 2: 30.0, 3: 1.0}, {0: 1.0, 1: 1.0, 2: 1.0}) == 9.0
    assert table.ratio({0: 8.0}, {1: 1.0}) is None


def test_a_target_is_met_not_met_or_not_measured() -> None:
    slow = record("triton-cpp", {"mlp c64": 10.0})
    figures = table.Figures([slow, record("ours", {"mlp c64": 81.0, "mlp c8": 20.0})])
    verdicts = {one.what.split(":")[0]: one.verdict for one in table.against_triton(figures)}
    assert verdicts["mlp c64"] == "met"
    assert verdicts["mlp c8"] == "not measured"
    assert table.Target("p99 over p50", 3.1, at_most=3.0).verdict == "NOT MET"


def test_a_peer_that_cannot_be_measured_is_in_the_table_with_its_reason() -> None:
    lost = Record(round=0, server="ray", names=["mlp"], failed="unavailable: no wheel")
    assert "Ray Serve gRPC with batching: mlp: unavailable: no wheel" in "".join(
        table.table(table.Figures([lost]))
    )


def test_an_unknown_peer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="ONLY=nobody: known are triton-cpp"):
        peers.selected("ours,nobody")


def record(server: str, rates: dict[str, float]) -> Record:
    return Record(round=0, server=server, names=["mlp"], rates=rates)


@pytest.mark.parametrize(
    ("commit", "again", "kept"),
    [("a", False, ["triton-cpp", "ours", "ray"]), ("b", False, ["ray"]), ("a", True, [])],
)
def test_a_run_that_was_stopped_goes_on_where_it_still_counts(
    tmp_path: Path, commit: str, again: bool, kept: list[str]
) -> None:
    plan = Plan("", ["mlp"], 1.0, 5)
    failed = Record(round=0, server="kserve", names=["mlp"], failed="not ready")
    records = [*(record(name, {"mlp c64": 10.0}) for name in ("triton-cpp", "ours", "ray")), failed]
    state = tmp_path / "run.json"
    state.write_bytes(msgspec.json.encode(Run(plan, "a", records, 0.0)))
    assert [one.server for one in begun(state, plan, commit, again).records] == kept
    assert begun(state, msgspec.structs.replace(plan, runs=6), commit, again).records == []
