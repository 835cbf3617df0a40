"""Artifacts lie under their sha256, on a real S3 server."""

import pytest

from libs.contracts.artifacts import blob_of
from libs.objectstore import Corrupt, Missing, ObjectStore, Unavailable, key_of
from stack import ports


async def test_what_was_put_is_read_back(objects: ObjectStore) -> None:
    await objects.put("parts/a", b"bytes")
    assert await objects.get("parts/a") == b"bytes"
    assert await objects.exists("parts/a")
    assert not await objects.exists("parts/b")


async def test_a_missing_key_is_named(objects: ObjectStore) -> None:
    with pytest.raises(Missing, match="NoSuchKey"):
        await objects.get("nowhere")


async def test_a_blob_lies_under_its_digest_and_is_stored_once(objects: ObjectStore) -> None:
    first = await objects.put_blob(b"weights", rows=3)
    again = await objects.put_blob(b"weights", rows=3)
    assert first == again == blob_of(b"weights", 3)
    assert await objects.list("artifacts/") == [key_of(first.digest)]
    assert await objects.get_blob(first.digest) == b"weights"


async def test_bytes_that_do_not_match_their_digest_are_refused(objects: ObjectStore) -> None:
    blob = await objects.put_blob(b"weights")
    await objects.put(key_of(blob.digest), b"weightz")
    with pytest.raises(Corrupt, match=blob.digest):
        await objects.get_blob(blob.digest)


async def test_listing_is_by_prefix_and_sorted(objects: ObjectStore) -> None:
    for key in ("x/2", "x/1", "y/1"):
        await objects.put(key, b"")
    assert await objects.list("x/") == ["x/1", "x/2"]
    await objects.delete("x/1")
    await objects.delete("x/1")
    assert await objects.list("x/") == ["x/2"]


async def test_making_a_bucket_again_changes_nothing(objects: ObjectStore) -> None:
    await objects.put("kept", b"1")
    await objects.create_bucket()
    assert await objects.get("kept") == b"1"


async def test_a_store_that_is_away_is_unavailable_not_an_unknown_error() -> None:
    (port,) = ports.free(1)
    with pytest.raises(Unavailable, match="S3 at"):
        await ObjectStore(f"127.0.0.1:{port}", "k", "s", "bucket").get("x")
