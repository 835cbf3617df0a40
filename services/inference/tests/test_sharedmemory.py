"""Registered regions: what is read and written lies inside them, whatever a client says or does."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from libs.doors import Internal, Invalid, NotFound
from services.inference.sharedmemory import FOLDER, AlreadyRegistered, Parameters, SharedMemory

NAMES = itertools.count()
PLACE: Parameters = {
    "shared_memory_region": "in",
    "shared_memory_byte_size": 4,
    "shared_memory_offset": 2,
}


@pytest.fixture
def file() -> Iterator[Path]:
    path = FOLDER / f"leptonic-test-{os.getpid()}-{next(NAMES)}"
    path.write_bytes(bytes(range(16)))
    yield path
    path.unlink()


@pytest.fixture
def memory(file: Path) -> SharedMemory:
    made = SharedMemory()
    made.register("in", f"/{file.name}", 4, 8)
    return made


@pytest.mark.parametrize("name", ["PostgreSQL.1234", "sem.lock"])
def test_what_is_another_programs_is_not_opened(name: str) -> None:
    path = FOLDER / f"{name}-{os.getpid()}"
    path.write_bytes(bytes(16))
    try:
        with pytest.raises(Invalid, match="it is another program's"):
            SharedMemory().register("in", f"/{path.name}", 0, 16)
    finally:
        path.unlink()


def test_a_window_is_read_and_written_where_it_lies(memory: SharedMemory, file: Path) -> None:
    window = memory.window("x", PLACE)
    assert window is not None
    assert window.read("x", "UINT8", [4]) == bytes([6, 7, 8, 9])
    assert window.read("x", "BYTES", [1]) == bytes([6, 7, 8, 9])
    window.write("x", b"abc")
    assert file.read_bytes() == bytes(range(6)) + b"abc" + bytes(range(9, 16))
    assert window.parameters(b"abc") == {**PLACE, "shared_memory_byte_size": 3}
    assert memory.window("x", {"binary_data": True}) is None


@pytest.mark.parametrize(("datatype", "shape", "size"), [("FP32", [2], 8), ("INT8", [1, 3], 3)])
def test_a_tensor_of_another_size_is_not_read(
    memory: SharedMemory, datatype: str, shape: list[int], size: int
) -> None:
    window = memory.window("x", PLACE)
    assert window is not None
    with pytest.raises(Invalid, match=f"for input 'x'. Expected {size}, got 4"):
        window.read("x", datatype, shape)


@pytest.mark.parametrize(
    ("offset", "byte_size", "problem"),
    [
        (0, 9, "Invalid offset \\+ byte size for shared memory region: 'in'"),
        (7, 2, "Invalid offset \\+ byte size"),
        (8, 0, "Invalid offset for shared memory region: 'in'"),
        (-1, 2, "Invalid offset for"),
        (0, -1, "Invalid offset \\+ byte size"),
        (0, 1 << 63, "Invalid offset \\+ byte size"),
    ],
)
def test_no_window_reaches_out_of_its_region(
    memory: SharedMemory, offset: int, byte_size: int, problem: str
) -> None:
    with pytest.raises(Invalid, match=problem):
        memory.within("in", byte_size, offset)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"shared_memory_region": 3}, "'shared_memory_region' parameter .* expected string_param"),
        ({"shared_memory_byte_size": "4"}, "'shared_memory_byte_size' .* expected int64_param"),
        ({"shared_memory_offset": True}, "'shared_memory_offset' .* expected int64_param"),
    ],
)
def test_parameters_are_of_their_kind(
    memory: SharedMemory, change: Parameters, problem: str
) -> None:
    with pytest.raises(Invalid, match=problem):
        memory.window("x", {**PLACE, **change})


def test_region_and_size_go_together(memory: SharedMemory) -> None:
    with pytest.raises(Invalid, match="'shared_memory_byte_size' must be specified along with"):
        memory.window("x", {"shared_memory_region": "in"})
    with pytest.raises(Invalid, match="'shared_memory_region' must be specified"):
        memory.window("x", {"shared_memory_byte_size": 4})


@pytest.mark.parametrize(
    "key", ["", "/", "..", "/../passwd", "a/b", "//etc", "x\0y", "z" * 255, "é" * 200, "missing"]
)
def test_only_a_name_of_shared_memory_is_opened(key: str) -> None:
    with pytest.raises(Invalid, match="Unable to open shared memory region"):
        SharedMemory().register("in", key, 0, 1)


def test_no_link_and_no_folder_is_followed(file: Path) -> None:
    link = file.with_suffix(".link")
    link.symlink_to("/etc/hostname")
    folder = file.with_suffix(".folder")
    folder.mkdir()
    try:
        for one in (link, folder):
            with pytest.raises(Invalid, match="Unable to open shared memory region"):
                SharedMemory().register("in", one.name, 0, 1)
    finally:
        link.unlink()
        folder.rmdir()


@pytest.mark.parametrize(("offset", "byte_size"), [(0, 17), (16, 1), (-1, 4), (0, 0), (1 << 64, 1)])
def test_a_region_lies_within_its_file(file: Path, offset: int, byte_size: int) -> None:
    memory = SharedMemory()
    with pytest.raises(Invalid, match="failed to register shared memory region 'in': invalid args"):
        memory.register("in", file.name, offset, byte_size)
    assert not memory.regions


def test_a_name_is_taken_once_and_free_again(memory: SharedMemory, file: Path) -> None:
    with pytest.raises(AlreadyRegistered, match="'in' already in manager"):
        memory.register("in", file.name, 0, 16)
    memory.register("other", file.name, 0, 16)
    assert [(r.name, r.offset, r.byte_size) for r in memory.status("")] == [
        ("in", 4, 8),
        ("other", 0, 16),
    ]
    assert [r.key for r in memory.status("in")] == [f"/{file.name}"]
    memory.unregister("in")
    memory.unregister("in")
    with pytest.raises(NotFound, match="Unable to find system shared memory region: 'in'"):
        memory.status("in")
    with pytest.raises(NotFound, match="Unable to find shared memory region: 'in'"):
        memory.window("x", PLACE)
    memory.unregister("")
    assert memory.status("") == []


def test_who_holds_a_window_may_use_it_after_the_region_is_gone(memory: SharedMemory) -> None:
    window = memory.within("in", 2, 0)
    handle = window.region.handle
    memory.unregister("")
    assert window.read("x", "UINT8", [2]) == bytes([4, 5])
    del window
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)


def test_a_file_cut_short_is_an_error_and_no_signal(memory: SharedMemory, file: Path) -> None:
    window = memory.within("in", 8, 0)
    os.truncate(file, 6)
    with pytest.raises(Invalid, match="holds 2 of the 8 bytes at offset 0: it was cut short"):
        window.read("x", "UINT8", [8])
    with pytest.raises(Invalid, match="was cut short"):
        window.write("x", b"12345678")
    assert file.stat().st_size == 6


def test_an_output_that_does_not_fit_is_not_written(memory: SharedMemory, file: Path) -> None:
    with pytest.raises(Internal, match=r"for output 'y' \(4 bytes\) should be at least 5 bytes"):
        memory.within("in", 4, 0).write("y", b"12345")
    assert file.read_bytes() == bytes(range(16))
