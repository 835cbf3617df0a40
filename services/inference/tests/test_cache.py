"""What the cache gives is what was registered; it stays within its bound; without S3 it serves."""

import os
from pathlib import Path
from threading import Thread

import pytest

from libs.contracts.artifacts import Signature, Tensor, digest_of
from libs.objectstore import ObjectStore, Unavailable
from services.inference import models
from services.inference.cache import Cache
from services.inference.tests.stage import register
from services.inference.tests.test_models import graph

SAME = Signature([Tensor("x", "FP32", [-1, 2])], [Tensor("y", "FP32", [-1, 2])])


def kept(cache: Cache, payload: bytes) -> str:
    cache.put(digest_of(payload), payload)
    return digest_of(payload)


def test_what_was_kept_is_given_back(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "deep" / "cache")
    digest = kept(cache, b"graph")
    assert cache.get(digest) == b"graph"
    assert cache.get("0" * 64) is None


@pytest.mark.parametrize("found", [b"grapH", b"", b"graph and more"])
def test_what_does_not_match_its_name_is_thrown_away(tmp_path: Path, found: bytes) -> None:
    cache = Cache(tmp_path)
    digest = kept(cache, b"graph")
    cache.path(digest).write_bytes(found)
    assert cache.get(digest) is None
    assert not cache.path(digest).exists()


def test_the_least_recently_used_goes(tmp_path: Path) -> None:
    cache = Cache(tmp_path, bytes_max=30)
    digests = [kept(cache, letter * 10) for letter in (b"a", b"b", b"c")]
    for age_s, digest in zip((300, 200, 100), digests, strict=True):
        os.utime(cache.path(digest), (1_000_000 - age_s,) * 2)
    assert cache.get(digests[0]) == b"a" * 10
    digests.append(kept(cache, b"d" * 10))
    assert [cache.get(digest) is not None for digest in digests] == [True, False, True, True]


def test_what_a_killed_process_left_is_room_too(tmp_path: Path) -> None:
    left = tmp_path / "tmpabc.part"
    left.write_bytes(b"x" * 25)
    os.utime(left, (0, 0))
    digest = kept(Cache(tmp_path, bytes_max=30), b"a" * 10)
    assert [path.name for path in tmp_path.iterdir()] == [digest]


def test_what_is_larger_than_the_bound_is_not_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path, bytes_max=5)
    assert cache.get(kept(cache, b"larger")) is None


def test_a_folder_that_is_gone_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    assert cache.get(kept(cache, b"graph")) is None
    assert "is not kept" in caplog.text


def test_replicas_share_a_folder(tmp_path: Path) -> None:
    """Of what several write and evict at once, nothing is ever half there."""
    payloads = [bytes([number]) * 1000 for number in range(20)]
    wrong: list[str] = []

    def use() -> None:
        cache = Cache(tmp_path, bytes_max=5000)
        for payload in payloads * 5:
            digest = kept(cache, payload)
            if cache.get(digest) not in (None, payload):
                wrong.append(digest)

    threads = [Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5000


class Shelf(ObjectStore):
    """A dictionary; `away` as when nobody answers."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.away = False

    async def get(self, key: str) -> bytes:
        if self.away:
            raise Unavailable("S3 is away")
        self.fetched.append(key)
        return self.blobs[key]

    async def put(self, key: str, payload: bytes) -> None:
        self.blobs[key] = payload

    async def exists(self, key: str) -> bool:
        return key in self.blobs


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
async def manifest(shelf: Shelf) -> str:
    target = await register(shelf, 1, 100, graph("Identity", "FP32", ["rows", 2]), SAME)
    return target.digest


async def test_with_s3_away_what_was_loaded_once_loads_again(
    tmp_path: Path, shelf: Shelf, manifest: str
) -> None:
    first = await models.load(shelf, manifest, Cache(tmp_path))
    shelf.away = True
    again = await models.load(shelf, manifest, Cache(tmp_path))
    assert again.signature == first.signature
    assert again.digest == manifest
    with pytest.raises(Unavailable):
        await models.load(shelf, manifest)


def spoil(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")


async def test_a_corrupt_file_is_fetched_again(tmp_path: Path, shelf: Shelf, manifest: str) -> None:
    cache = Cache(tmp_path)
    await models.load(shelf, manifest, cache)
    spoil(tmp_path)
    shelf.fetched.clear()
    await models.load(shelf, manifest, cache)
    assert len(shelf.fetched) == 2
    shelf.away = True
    await models.load(shelf, manifest, cache)
