"""System shared memory that clients registered: POSIX regions of this machine, by name.

Tensors are copied out of a region and into it with `pread` and `pwrite`, not through a mapping: a
client may cut its file short at any time, and to touch a page that is gone kills a process.
"""

import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import grpc

from libs.doors import Exhausted, Internal, Invalid, NotFound, Refused
from services.inference import tensors

FOLDER = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lies
KEY = re.compile(r"/?([^/\0]{1,254})")
OTHERS = ("PostgreSQL.", "sem.")
"""What a database shares between its processes, and semaphores, begin so."""
REGIONS_MAX = 1024
REGION = "shared_memory_region"
BYTE_SIZE = "shared_memory_byte_size"
OFFSET = "shared_memory_offset"
Parameters = Mapping[str, bool | int | float | str]


class AlreadyRegistered(Refused):
    code = grpc.StatusCode.ALREADY_EXISTS


class Region:
    """A registered part of a shared memory object. Open as long as somebody holds it."""

    def __init__(self, name: str, key: str, offset: int, byte_size: int, handle: int) -> None:
        self.name = name
        self.key = key
        self.offset = offset
        self.byte_size = byte_size
        self.handle = handle

    def __del__(self) -> None:
        os.close(self.handle)


class Window(NamedTuple):
    """Where one tensor lies in a region."""

    region: Region
    offset: int
    """From the region's start."""
    byte_size: int

    def read(self, input: str, datatype: str, shape: Sequence[int]) -> bytes:
        """As many bytes as such a tensor has: a whole region is not copied for a small one."""
        size = tensors.size_of(datatype, shape)
        if size not in (None, self.byte_size):
            raise Invalid(
                f"input byte size mismatch for input '{input}'. "
                f"Expected {size}, got {self.byte_size}"
            )
        raw = os.pread(self.region.handle, self.byte_size, self.region.offset + self.offset)
        if len(raw) < self.byte_size:
            raise Invalid(
                f"shared memory region '{self.region.name}' holds {len(raw)} of the "
                f"{self.byte_size} bytes at offset {self.offset}: it was cut short"
            )
        return raw

    def write(self, output: str, raw: bytes) -> None:
        if len(raw) > self.byte_size:
            raise Internal(
                f"shared memory size specified with the request for output '{output}' "
                f"({self.byte_size} bytes) should be at least {len(raw)} bytes to hold the results"
            )
        start = self.region.offset + self.offset
        if os.fstat(self.region.handle).st_size < start + len(raw):
            raise Invalid(f"shared memory region '{self.region.name}' was cut short")
        os.pwrite(self.region.handle, raw, start)

    def parameters(self, raw: bytes) -> dict[str, int | str]:
        """What the answer says instead of the values."""
        said: dict[str, int | str] = {REGION: self.region.name, BYTE_SIZE: len(raw)}
        return said | ({OFFSET: self.offset} if self.offset else {})


class SharedMemory:
    """The registered regions. Every problem is a `Refused`."""

    def __init__(self) -> None:
        self.regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        if not name:
            raise Invalid("a region needs a name", "name")
        if name in self.regions:
            raise AlreadyRegistered(f"shared memory region '{name}' already in manager")
        if len(self.regions) == REGIONS_MAX:
            raise Exhausted(f"{REGIONS_MAX} shared memory regions are registered already")
        region = Region(name, key, offset, byte_size, opened(key))
        size = os.fstat(region.handle).st_size
        if offset < 0 or byte_size < 1 or offset + byte_size > size:
            raise Invalid(
                f"failed to register shared memory region '{name}': invalid args: "
                f"{byte_size} bytes at offset {offset} of {size}"
            )
        self.regions[name] = region

    def unregister(self, name: str) -> None:
        """All of them for "". One that is not there is fine."""
        if name:
            self.regions.pop(name, None)
        else:
            self.regions.clear()

    def status(self, name: str) -> list[Region]:
        """All of them for ""."""
        if not name:
            return list(self.regions.values())
        if name not in self.regions:
            raise NotFound(f"Unable to find system shared memory region: '{name}'")
        return [self.regions[name]]

    def window(self, tensor: str, parameters: Parameters) -> Window | None:
        """Where a tensor's parameters say that it lies; None when they do not."""
        check_kinds(tensor, parameters)
        if REGION not in parameters:
            if BYTE_SIZE in parameters or OFFSET in parameters:
                raise Invalid(f"'{REGION}' must be specified for tensor '{tensor}'")
            return None
        if BYTE_SIZE not in parameters:
            raise Invalid(f"'{BYTE_SIZE}' must be specified along with '{REGION}' for '{tensor}'")
        name = str(parameters[REGION])
        return self.within(name, int(parameters[BYTE_SIZE]), int(parameters.get(OFFSET, 0)))

    def within(self, name: str, byte_size: int, offset: int) -> Window:
        region = self.regions.get(name)
        if region is None:
            raise NotFound(f"Unable to find shared memory region: '{name}'")
        if not 0 <= offset < region.byte_size:
            raise Invalid(
                f"Invalid offset for shared memory region: '{name}': "
                f"{offset} of {region.byte_size} bytes"
            )
        if not 0 <= byte_size <= region.byte_size - offset:
            raise Invalid(
                f"Invalid offset + byte size for shared memory region: '{name}': "
                f"{offset} + {byte_size} of {region.byte_size} bytes"
            )
        return Window(region, offset, byte_size)


def check_kinds(tensor: str, parameters: Parameters) -> None:
    for name, kind, said in (
        (REGION, str, "string"),
        (BYTE_SIZE, int, "int64"),
        (OFFSET, int, "int64"),
    ):
        value = parameters.get(name, kind())
        if not isinstance(value, kind) or isinstance(value, bool):
            raise Invalid(
                f"invalid value type for '{name}' parameter for tensor '{tensor}', "
                f"expected {said}_param."
            )


def opened(key: str) -> int:
    """A descriptor of the POSIX shared memory object, for reading and writing."""
    named = KEY.fullmatch(key)
    if named is None or named[1] in (".", ".."):
        raise Invalid(f"Unable to open shared memory region: '{key}': not the name of one", "key")
    if named[1].startswith(OTHERS):
        raise Invalid(
            f"Unable to open shared memory region: '{key}': it is another program's", "key"
        )
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        handle = os.open(FOLDER / named[1], flags)
    except (OSError, ValueError) as error:
        raise Invalid(f"Unable to open shared memory region: '{key}': {error}", "key") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Invalid(f"Unable to open shared memory region: '{key}': not shared memory", "key")
    return handle
