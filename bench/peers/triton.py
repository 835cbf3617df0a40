"""Triton from PyTriton's wheel: its server, its Python backend, and the C++ one built here."""

import os
import shutil
from pathlib import Path
from sysconfig import get_config_var

from bench.peers.environments import PEERS, Unavailable, installed, ran, site_packages
from bench.peers.models import SHAPES, Reference

SOURCES = Path(__file__).with_name("triton_onnx")
SERVED = Path(__file__).with_name("served")
BACKENDS = PEERS / "triton-backends"
ROWS_MAX = 64
CONFIG = """{engine}
max_batch_size: {rows_max}
input [ {{ name: "features" data_type: TYPE_FP32 dims: {given} }} ]
output [ {{ name: "scores" data_type: TYPE_FP32 dims: {made} }} ]
dynamic_batching {{ }}
"""
ONE_INSTANCE = "instance_group [ { count: 1 kind: KIND_CPU } ]\n"
"""Triton's; of a model without one Leptonic runs as many batches at once as it has cores."""


def command(backend: str, names: list[str], port: int) -> tuple[list[str], dict[str, str]]:
    """Without its HTTP and metrics doors, which would cost it time."""
    packages = site_packages(installed("pytriton"))
    binary = packages / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    build_onnxbench(packages)
    link_python(packages)
    options = {
        "model-repository": repository(backend, list(SHAPES)),
        "backend-directory": BACKENDS,
        "model-control-mode": "explicit",
        "grpc-address": "127.0.0.1",
        "grpc-port": port,
        "allow-http": "false",
        "allow-metrics": "false",
        "log-info": "false",
    }
    line = [str(binary), *(f"--{name}={value}" for name, value in options.items())]
    line += [f"--load-model={name}" for name in names]
    return line, search_paths()


def search_paths() -> dict[str, str]:
    """The Python backend's stub takes its packages from the first Python of PATH, whatever
    PYTHONPATH says, and must find that Python's own library: of 3.11.2 it cannot run 3.11.7."""
    environment = installed("pytriton")
    libraries = [site_packages(environment) / "nvidia_pytriton.libs", get_config_var("LIBDIR")]
    path = f"{environment / 'bin'}:{os.environ['PATH']}"
    return {"LD_LIBRARY_PATH": ":".join(map(str, libraries)), "PATH": path}


def repository(backend: str, names: list[str]) -> Path:
    """In Triton's layout, with just these models."""
    folder = PEERS / f"repository-{backend}"
    for old in folder.glob("*"):
        if old.name not in names:
            shutil.rmtree(old)
    for name in names:
        write_model(folder / name, name, backend)
    return folder


def write_model(folder: Path, name: str, backend: str) -> None:
    version = folder / "1"
    version.mkdir(parents=True, exist_ok=True)
    if backend == "python":
        shutil.copy(SERVED / "triton_model.py", version / "model.py")
        shutil.copy(SERVED / "models.py", version)
    else:
        shutil.copy(PEERS / "models" / f"{name}.onnx", version / "model.onnx")
    made = list(Reference(PEERS / "models", name).session.get_outputs()[0].shape[1:])
    ours = backend == "onnxruntime"
    engine = 'platform: "onnxruntime_onnx"' if ours else f'backend: "{backend}"'
    text = CONFIG.format(engine=engine, rows_max=ROWS_MAX, given=list(SHAPES[name]), made=made)
    (folder / "config.pbtxt").write_text(text if ours else text + ONE_INSTANCE)


def build_onnxbench(packages: Path) -> None:
    library = next((packages / "onnxruntime" / "capi").glob("libonnxruntime.so.*"), None)
    if library is None:
        raise Unavailable("the onnxruntime wheel has no libonnxruntime.so")
    target = BACKENDS / "onnxbench" / "libtriton_onnxbench.so"
    sources = list(SOURCES.iterdir())
    if target.exists() and target.stat().st_mtime > max(one.stat().st_mtime for one in sources):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    define = f'-DONNXRUNTIME_LIBRARY="{library}"'
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-fPIC", "-shared", define]
    ran(["g++", *flags, "-o", str(target), str(SOURCES / "backend.cc"), "-ldl"])


def link_python(packages: Path) -> None:
    server = packages / "pytriton" / "tritonserver"
    version = packages.parent.name.removeprefix("python")
    folder = BACKENDS / "python"
    folder.mkdir(parents=True, exist_ok=True)
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    for source in (*(server / "backends" / "python").iterdir(), stub):
        if not (folder / source.name).exists():
            shutil.copy(source, folder)
