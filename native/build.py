"""Compiles leptonic_native, leptonic_ops and leptonic_placement: `build.py install [NAME]` into
this interpreter, `build.py wheel [NAME]` as wheels in dist/native, `build.py sanitized` the checks
of `make native-sanitized`, and runs them.

g++ alone: a build system would be more than what it builds.
"""

import base64
import hashlib
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nanobind

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = ROOT / "build" / "native"
VERSION = "0.1.0"
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))
LIBRARIES = "leptonic_native.libs"
"""In a wheel: libnghttp2, for machines that have none."""
RPATH = f"-Wl,-rpath,$ORIGIN/{LIBRARIES}"
NGHTTP2 = "libnghttp2.so.14"
CHECKS = HERE / "checks"
SANITIZERS = ("address,undefined", "thread")
ROUNDS = 200_000
FLAGS = ("-std=c++20", "-O2", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing")
WARNINGS = ("-Wall", "-Wextra", "-Wno-missing-field-initializers")


@dataclass(frozen=True)
class Extension:
    """A module, and what of this folder it is made of."""

    name: str
    binding: tuple[Path, ...]
    """What knows Python, or onnxruntime; the checks go without."""
    core: tuple[Path, ...]
    is_module: bool = True
    """For Python; else a library that is found as one."""
    linking: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    """Shared libraries that its wheel carries."""


PLACING = tuple(sorted(HERE.glob("placement*")))
OPERATORS = (HERE / "conv_pool.cpp", HERE / "dense.cpp")
FRONT = Extension(
    "leptonic_native",
    (HERE / "module.cpp", HERE / "batches.cpp"),
    tuple(
        path
        for path in sorted(HERE.glob("*.cpp"))
        if path.stem not in ("module", "batches", "ops") and path not in (*PLACING, *OPERATORS)
    ),
    linking=(RPATH, "-lnghttp2"),
    carried=(NGHTTP2,),
)
OPS = Extension("leptonic_ops", (HERE / "ops.cpp",), OPERATORS, is_module=False)
PLACEMENT = Extension(
    "leptonic_placement",
    (HERE / "placement_module.cpp",),
    tuple(path for path in PLACING if path.suffix == ".cpp" and path.stem != "placement_module"),
)
EXTENSIONS = {one.name: one for one in (PLACEMENT, OPS, FRONT)}


def fingerprint(one: Extension) -> str:
    """Of everything the extension is made from."""
    parts = [sys.version, nanobind.__version__, *FLAGS, *one.linking]
    for path in [*one.binding, *one.core, *sorted(HERE.glob("*.h")), Path(__file__)]:
        parts += [path.name, path.read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def includes() -> list[str]:
    nano = Path(nanobind.include_dir())
    robin = Path(nanobind.source_dir()).parent / "ext" / "robin_map" / "include"
    folders = (Path(sysconfig.get_paths()["include"]), nano, robin)
    return [f"-isystem{folder}" for folder in folders]


def compiled(source: Path, folder: Path, flags: Sequence[str]) -> Path:
    """Its object file; an older one is taken when nothing that it is made from has changed."""
    target = folder / f"{source.stem}.o"
    makings = [source, Path(__file__), *HERE.glob("*.h"), *CHECKS.glob("*.h")]
    newest = max(path.stat().st_mtime for path in makings)
    if not target.exists() or target.stat().st_mtime < newest:
        command = ["g++", *flags, *WARNINGS, "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
    return target


def linked(
    sources: Sequence[Path], target: Path, compiling: Sequence[str], linking: Sequence[str]
) -> Path:
    folder = target.parent
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: compiled(source, folder, compiling), sources))
    if not target.exists() or max(o.stat().st_mtime for o in objects) > target.stat().st_mtime:
        command = ["g++", *map(str, objects), *linking, "-o", str(target)]
        subprocess.run(command, check=True)
    return target


def folder_for(flags: Sequence[str]) -> Path:
    """Objects that another Python, nanobind or set of flags made are not taken for these."""
    makers = "\0".join([sys.version, nanobind.__version__, *flags])
    return BUILD / hashlib.sha256(makers.encode()).hexdigest()[:12]


def built(one: Extension) -> Path:
    """Nothing is done when nothing has changed."""
    flags = [*FLAGS, *includes()]
    target = folder_for(flags) / f"{one.name}{SUFFIX}"
    stamp = target.with_name(f"{one.name}.fingerprint")
    now = fingerprint(one)
    if not (target.exists() and stamp.exists() and stamp.read_text() == now):
        nano = [Path(nanobind.source_dir()) / "nb_combined.cpp"] if one.is_module else []
        linked([*nano, *one.binding, *one.core], target, flags, ["-shared", "-s", *one.linking])
        stamp.write_text(now)
    return target


def checked(sanitizers: str, rounds: int, seed: int) -> None:
    """Raises `CalledProcessError` for what the checks or the sanitizers find."""
    flags = ["-std=c++20", "-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    target = folder_for(flags) / "checks"
    sources = [*sorted(CHECKS.glob("*.cpp")), *FRONT.core, *PLACEMENT.core, *OPS.core]
    program = linked(sources, target, flags, [flags[3], "-lnghttp2"])
    subprocess.run([str(program), str(seed), str(rounds)], check=True)


def install(library: Path) -> str:
    """Replaces, never overwrites: a process may have the old one mapped."""
    target = Path(sysconfig.get_paths()["platlib"]) / library.name
    if target.exists() and target.read_bytes() == library.read_bytes():
        return "built already"
    fresh = target.with_suffix(".new")
    fresh.write_bytes(library.read_bytes())
    fresh.rename(target)
    return "built"


def shared_library(name: str) -> bytes:
    asked = ["g++", f"-print-file-name={name}"]
    found = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    return Path(found).read_bytes()


def wheel(one: Extension, library: Path) -> Path:
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    folder = f"{one.name}-{VERSION}.dist-info"
    files = {
        library.name: library.read_bytes(),
        **{f"{LIBRARIES}/{name}": shared_library(name) for name in one.carried},
        f"{folder}/METADATA": (
            f"Metadata-Version: 2.1\nName: {one.name}\nVersion: {VERSION}\n"
        ).encode(),
        f"{folder}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: leptonic\nRoot-Is-Purelib: false\n"
            f"Tag: {tag}-{tag}-{platform}\n"
        ).encode(),
    }
    record = [f"{name},sha256={digest(data)},{len(data)}" for name, data in files.items()]
    files[f"{folder}/RECORD"] = "\n".join([*record, f"{folder}/RECORD,,", ""]).encode()
    target = ROOT / "dist" / "native" / f"{one.name}-{VERSION}-{tag}-{tag}-{platform}.whl"
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return target


def digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["sanitized", *rest]:
            rounds, seed = int(rest[0]) if rest else ROUNDS, int(rest[1]) if rest[1:] else 1
            for sanitizers in SANITIZERS:
                checked(sanitizers, rounds, seed)
        case ["install", *names]:
            for name in names or EXTENSIONS:
                print(f"{name}: {install(built(EXTENSIONS[name]))}")
        case ["wheel", *names]:
            for name in names or EXTENSIONS:
                print(wheel(EXTENSIONS[name], built(EXTENSIONS[name])).relative_to(ROOT))
