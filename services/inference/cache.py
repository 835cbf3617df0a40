"""Artifacts on this machine's disk, under their sha256: what was served once loads without S3.

Replicas share the folder. A file is whole or not there; what no longer matches its name is thrown
away. The graphs lie there as they were registered: saving onnxruntime's optimised one would spare a
45 MB ResNet-18 50 of 100 ms, fits one processor only, and no digest that anybody signed covers it.
"""

import contextlib
import logging
import os
import tempfile
from pathlib import Path

from libs.contracts.artifacts import digest_of

log = logging.getLogger(__name__)
BYTES_MAX = 8 << 30


class Cache:
    def __init__(self, folder: Path, bytes_max: int = BYTES_MAX) -> None:
        self.folder = folder
        self.bytes_max = bytes_max
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        return self.folder / digest

    def get(self, digest: str) -> bytes | None:
        """Verified; None when it has to be fetched."""
        path = self.path(digest)
        try:
            payload = path.read_bytes()
            actual = digest_of(payload)
            if actual == digest:
                os.utime(path)
                return payload
            log.error("cache: %s holds sha256 %s and is thrown away", path, actual)
            path.unlink()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("cache: %s", error)
        return None

    def put(self, digest: str, payload: bytes) -> None:
        """Best effort: a full disk stops no model."""
        if len(payload) > self.bytes_max:
            return
        try:
            self.write(self.path(digest), payload)
            self.make_room(digest)
        except OSError as error:
            log.warning("cache: %s is not kept: %s", digest, error)

    def write(self, path: Path, payload: bytes) -> None:
        descriptor, written = tempfile.mkstemp(dir=self.folder, suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(payload)
            os.replace(written, path)
        except OSError:
            os.unlink(written)
            raise

    def make_room(self, latest: str) -> None:
        """The least recently used go first, what a killed process left half-written among them."""
        found = sorted(self.files(), key=lambda one: (one[0].name == latest, one[1].st_mtime))
        total = sum(state.st_size for _, state in found)
        for path, state in found:
            if total <= self.bytes_max:
                return
            path.unlink(missing_ok=True)
            total -= state.st_size

    def files(self) -> list[tuple[Path, os.stat_result]]:
        """Another replica may remove one meanwhile."""
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append((path, path.stat()))
        return found
