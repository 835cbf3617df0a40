"""The door `python -m services.scheduler.replay`: files as people have them are read, what cannot
be replayed is told in one line, and known durations are used."""

import csv
from pathlib import Path

import pytest

from bench import philly
from services.scheduler import replay
from services.scheduler.traces import BadTrace

NODES = "sn,cpu_milli,memory_mib,gpu,model\n"
PODS = "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec\n"
JOBS = "timestamp,duration,num_gpus,gpu_time,cluster\n"
VCS = "vc,node num\n"
GOOD = {
    "nodes": NODES + "n0,64000,262144,4,P100\nn1,64000,262144,4,P100\nn2,64000,262144,4,P100\n",
    "pods": PODS + "a,1,1,1,500,\n",
    "jobs": JOBS + "2017-10-01 00:00:10,60,8,480,a\n",
    "vcs": VCS + "a,2\nb,1\n",
}


def door(folder: Path, *options: str, **files: str) -> list[dict[str, str]]:
    """Each of `files` is given as the option of its name; -> the decisions."""
    arguments = list(options)
    for name, text in files.items():
        path = folder / f"{name}.csv"
        path.write_bytes(text.encode())
        arguments += [f"--{name}", str(path)]
    if "--out" not in arguments:
        arguments += ["--out", str(folder / "out.csv")]
    replay.main(arguments)
    with (folder / "out.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_files_as_spreadsheets_and_data_frames_write_them_are_read(tmp_path: Path) -> None:
    """A byte order mark, CRLF, whole numbers with a point, names that come twice."""
    nodes = "\ufeffsn,cpu_milli,memory_mib,gpu,model,rack\r\ncpu,8000.0,1000.0,0,,1\r\n"
    nodes += "t4,8000,1000,2.0,T4,2\r\n\r\np100,8000,1000,1,P100,3\r\n"
    pods = PODS.replace("\n", "\r\n") + "a,1000,1,1.0,600,V100|P100\r\na,1000,1,1,600,P100|V100\r\n"
    pods += "b,1000,1,2,1000,T4\r\nc,6000.0,1,0,0,\r\nd,6000,1,0,0,\r\ne,6000,1,0,0,\r\n"
    pods += "f,6000,1,0,0,\r\ng,1,1,3,1000,\r\n"
    decided = door(tmp_path, "--order", "given", nodes=nodes, pods=pods)
    assert [(one["name"], one["node"], one["gpus"]) for one in decided[:3]] == [
        ("a", "p100", "0"),
        ("a", "", ""),
        ("b", "t4", "0|1"),
    ]
    assert sorted(one["node"] for one in decided[3:6]) == ["cpu", "p100", "t4"]
    assert [(one["name"], one["node"], one["gpus"]) for one in decided[6:]] == [
        ("f", "", ""),
        ("g", "", ""),
    ]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"nodes": ""}, "nodes.csv, line 1: no column 'sn'; expected sn, cpu_milli,"),
        ({"nodes": NODES}, "nodes.csv: no nodes"),
        ({"nodes": NODES + "n,1,1,1,\nn,1,1,1,\n"}, "nodes.csv: node 'n' twice"),
        ({"nodes": NODES + "n,1,1,65,\n"}, "line 2, column 'gpu': an integer from 0 to 64, got"),
        ({"nodes": NODES + "n,1,,1,\n"}, "column 'memory_mib': an integer from 0 to"),
        ({"pods": ""}, "pods.csv, line 1: no column 'name'"),
        ({"pods": PODS + "a,1.5,1,0,0,\n"}, "column 'cpu_milli': an integer from 0 to"),
        ({"pods": PODS + "a,inf,1,0,0,\n"}, "column 'cpu_milli': an integer from 0 to"),
        ({"pods": PODS + 'a,1,1,0,0,"T4\n'}, "pods.csv, line 2: unexpected end of data"),
        ({"jobs": JOBS + "2017-10-01,1,13,1,a\n"}, "job-1: needs 13 GPUs, the cluster has 12"),
        ({"jobs": JOBS + "2017-10-01,1,1,1,c\n"}, "virtual cluster 'c' is none of a, b"),
        ({"vcs": VCS + "a,1\na,2\n"}, "vcs.csv: virtual cluster 'a' twice"),
        ({"out": "nowhere/out.csv"}, "nowhere/out.csv: No such file or directory"),
    ],
)
def test_what_cannot_be_replayed_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: dict[str, str], said: str
) -> None:
    options = ["--out", str(tmp_path / wrong["out"])] if "out" in wrong else []
    names = ("nodes", "pods") if "pods" in wrong or not {"jobs", "vcs"} & wrong.keys() else None
    files = {name: wrong.get(name, GOOD[name]) for name in names or ("nodes", "jobs", "vcs")}
    with pytest.raises(SystemExit) as caught:
        door(tmp_path, *options, **files)
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("python -m services.scheduler.replay: ")
    assert said in told
    assert told.count("\n") == 1


def test_known_durations_are_used_and_unknown_ones_are_not_told(tmp_path: Path) -> None:
    """A head waits for the whole node: who is through before passes it, who is not does not."""
    jobs = JOBS + "".join(
        f"2017-10-01 00:00:0{at},{duration},{gpus},1,a\n"
        for at, duration, gpus in [(0, 100, 5), (1, 50, 8), (2, 90, 1), (3, 500, 2)]
    )
    nodes = NODES + "n0,64000,262144,8,\n"
    started = {
        durations: {
            one["job"]: one["started_s"]
            for one in door(tmp_path, "--durations", durations, nodes=nodes, jobs=jobs)
        }
        for durations in ("known", "unknown")
    }
    at_once = {"job-1": "0.000", "job-3": "2.000"}
    assert started["known"] == at_once | {"job-2": "100.000", "job-4": "150.000"}
    assert started["unknown"] == at_once | {"job-2": "503.000", "job-4": "3.000"}


def test_virtual_clusters_divide_all_gpus_of_any_cluster(tmp_path: Path) -> None:
    """Of 12, which no nodes of 8 make; one that borrows may have them all."""
    jobs = JOBS + "2017-10-01,60,12,1,b\n2017-10-01,60,8,1,a\n2017-10-01,60,4,1,b\n"
    decided = door(tmp_path, nodes=GOOD["nodes"], jobs=jobs, vcs=GOOD["vcs"])
    assert {one["outcome"] for one in decided} >= {"done"}
    assert {one["nodes"].count("|") + 1 for one in decided if one["job"] == "job-1"} == {3}


def test_the_benchmark_of_a_file_tells_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "jobs.csv"
    path.write_text(JOBS + "2017-10-01,1,648,1,a\n")
    with pytest.raises(BadTrace, match="job-1: needs 648 GPUs, the cluster has 640"):
        philly.of_file(path)
