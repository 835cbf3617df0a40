"""Who is measured: how each is prepared, started and spoken to, in the order of the table."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench.peers import triton
from bench.peers.environments import PEERS, ROOT, installed, ran
from bench.peers.models import SHAPES

SERVED = Path(__file__).with_name("served")
MODELS = PEERS / "models"
TOKEN = "bench-peers-token"  # noqa: S105 - of a server that lives for seconds on loopback
OURS, FALLBACK, BEST = "ours", "ours-python", "triton-cpp"
ROWS_MAX = 64
WAIT_MAX_S = 0.001


class Turn(NamedTuple):
    names: list[str]
    """Models to serve."""
    port: int
    port_2: int
    """For the door that is not measured."""
    otlp_endpoint: str
    """host:port that takes traces."""


class Start(NamedTuple):
    command: list[str]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Peer:
    name: str
    label: str
    start: Callable[[Turn], Start]
    """Raises `Unavailable`."""
    wire: str = "grpc"
    alone: bool = False
    """One model a process: its way."""
    models: tuple[str, ...] = field(default=tuple(SHAPES))
    token: str = ""


def environment_of(turn: Turn, extra: Mapping[str, str]) -> dict[str, str]:
    mine = {
        "PATH": os.environ["PATH"],
        "HOME": str(PEERS / "home"),
        "BENCH_MODELS": str(MODELS),
        "BENCH_NAMES": ",".join(turn.names),
        "BENCH_PORT": str(turn.port),
        "BENCH_PORT_2": str(turn.port_2),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return {**mine, **extra}


def script(environment: str, name: str, **extra: str) -> Callable[[Turn], Start]:
    def start(turn: Turn) -> Start:
        python = installed(environment) / "bin" / "python"
        return Start([str(python), str(SERVED / name)], environment_of(turn, extra))

    return start


def triton_with(backend: str) -> Callable[[Turn], Start]:
    def start(turn: Turn) -> Start:
        command, extra = triton.command(backend, turn.names, turn.port)
        return Start(command, environment_of(turn, extra))

    return start


def pytriton(turn: Turn) -> Start:
    python = installed("pytriton") / "bin" / "python"
    command = [str(python), str(SERVED / "pytriton_server.py")]
    return Start(command, environment_of(turn, triton.search_paths()))


def mlserver(turn: Turn) -> Start:
    """One process and no parallel workers: there is one core."""
    folder = PEERS / "mlserver-models"
    settings = {
        "host": "127.0.0.1", "grpc_port": turn.port, "http_port": turn.port_2,
        "parallel_workers": 0, "debug": False, "metrics_endpoint": None,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(settings))
    for old in folder.glob("*/model-settings.json"):
        old.unlink()
    for name in turn.names:
        model = {
            "name": name, "implementation": "mlserver_runtime.Onnx",
            "max_batch_size": ROWS_MAX, "max_batch_time": WAIT_MAX_S,
        }  # fmt: skip
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "model-settings.json").write_text(json.dumps(model))
    binary = installed("mlserver") / "bin" / "mlserver"
    return Start(
        [str(binary), "start", str(folder)], environment_of(turn, {"PYTHONPATH": str(SERVED)})
    )


def bentoml(turn: Turn) -> Start:
    binary = installed("bentoml") / "bin" / "bentoml"
    command = [str(binary), "serve", "bento_service:Onnx", "--working-dir", str(SERVED)]
    command += ["--host", "127.0.0.1", "--port", str(turn.port)]
    extra = {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(PEERS / "bentoml-home")}
    return Start(command, environment_of(turn, {**extra, "PYTHONPATH": str(SERVED)}))


def grpc_echo(turn: Turn) -> Start:
    """A floor, for who has the compiler's package: apt-get install libgrpc++-dev."""
    source, binary = Path(__file__).with_name("grpc_echo") / "echo.cc", PEERS / "grpc_echo"
    if not binary.exists() or binary.stat().st_mtime < source.stat().st_mtime:
        flags = ran(["pkg-config", "--cflags", "--libs", "grpc++"]).split()
        more = ["-labsl_synchronization"]
        ran(["g++", "-std=c++17", "-O2", "-o", str(binary), str(source), *flags, *more])
    return Start([str(binary), str(turn.port)], environment_of(turn, {}))


def ours(front: str) -> Callable[[Turn], Start]:
    """What `leptonic serve` becomes, on Triton's layout: with a token, metrics and traces."""

    def start(turn: Turn) -> Start:
        folder = triton.repository("onnxruntime", turn.names)
        command = [sys.executable, "-m", "services.inference.serve", str(folder)]
        command += [f"--grpc-port={turn.port}", f"--http-port={turn.port_2}", "--metrics-port=0"]
        command += [f"--token={TOKEN}", f"--otlp-endpoint={turn.otlp_endpoint}"]
        extra = {"LEPTONIC_INFERENCE_FRONT": front, "PYTHONPATH": str(ROOT)}
        return Start(command, environment_of(turn, extra))

    return start


EVERYONE = [
    Peer(BEST, "Triton, C++ front and C++ onnxruntime backend", triton_with("onnxbench")),
    Peer("triton-python", "Triton, C++ front, Python backend", triton_with("python")),
    Peer("pytriton", "PyTriton", pytriton),
    Peer("kserve", "KServe's Python server", script("kserve", "kserve_server.py")),
    Peer("mlserver", "MLServer with batching", mlserver),
    Peer("litserve", "LitServe with batching (HTTP)", script("litserve", "litserve_server.py"),
         wire="http", alone=True),
    Peer("bentoml", "BentoML with batching (HTTP)", bentoml, wire="http", alone=True),
    Peer("ray", "Ray Serve gRPC with batching",
         script("ray", "ray_server.py", PYTHONPATH=f"{ROOT}:{SERVED}",
                RAY_USAGE_STATS_ENABLED="0"), alone=True),
    Peer("aio", "grpc.aio with uvloop, nothing around the model",
         script("aio", "aio.py", PYTHONPATH=str(ROOT))),
    Peer("grpc-echo", "a grpc++ echo", grpc_echo, wire="echo", models=("identity",)),
    Peer(OURS, "Leptonic", ours("native"), token=TOKEN),
    Peer(FALLBACK, "Leptonic, pure Python", ours("python"), token=TOKEN),
]  # fmt: skip
PYTHON_PEERS = ("pytriton", "kserve", "mlserver", "litserve", "bentoml", "ray")


def selected(names: str) -> list[Peer]:
    """Raises `ValueError`, which lists the names."""
    known = {peer.name: peer for peer in EVERYONE}
    wanted = [name for name in names.split(",") if name] or list(known)
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise ValueError(f"ONLY={','.join(unknown)}: known are {', '.join(known)}")
    return [known[name] for name in wanted]
