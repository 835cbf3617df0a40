"""Objects in S3, through the `minio` client; artifacts lie under their sha256.

Every call runs in a thread, is bounded in time, and raises `Unavailable` when the store cannot
be reached, which whoever called may try again.
"""

import asyncio
import io
from collections.abc import Callable
from typing import Any, TypeVar

import urllib3
from minio import Minio
from minio.error import S3Error

from libs.contracts.artifacts import Blob, blob_of, digest_of
from libs.objectstore.metrics import ANSWERED, FAILURES

T = TypeVar("T")
TIMEOUT_S = 5
READ_TIMEOUT_S = 30
CONNECTIONS_MAX = 16
TRANSIENT_STATUS_MIN = 500


class Unavailable(ConnectionError):
    """The store did not answer, or said it cannot now."""


class Missing(KeyError):
    """No object under that key."""


class Corrupt(ValueError):
    """The bytes under a digest are not the bytes of that digest."""


class ObjectStore:
    """One bucket."""

    def __init__(
        self, endpoint: str, access_key: str, secret_key: str, bucket: str, secure: bool = False
    ) -> None:
        self.bucket = bucket
        self.client = Minio(
            endpoint,
            access_key=access_key,
            secret_key=secret_key,
            secure=secure,
            region="us-east-1",
            http_client=urllib3.PoolManager(
                timeout=urllib3.Timeout(connect=TIMEOUT_S, read=READ_TIMEOUT_S),
                maxsize=CONNECTIONS_MAX,
                retries=False,
            ),
        )

    async def create_bucket(self) -> None:
        """Makes the bucket unless it is there."""
        if not await self.call(self.client.bucket_exists, self.bucket):
            try:
                await self.call(self.client.make_bucket, self.bucket)
            except S3Error as error:
                if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise

    async def ready(self) -> bool:
        """Whether it answers now, and knows us."""
        try:
            return await self.exists("ready") or True
        except (Unavailable, S3Error):
            return False

    async def put(self, key: str, payload: bytes) -> None:
        """Durable when it returns."""
        await self.call(self.client.put_object, self.bucket, key, io.BytesIO(payload), len(payload))

    async def get(self, key: str) -> bytes:
        """Raises `Missing`."""
        return await self.call(self.get_object, key)

    def get_object(self, key: str) -> bytes:
        response = self.client.get_object(self.bucket, key)
        try:
            return response.read()
        finally:
            response.close()
            response.release_conn()

    async def exists(self, key: str) -> bool:
        try:
            await self.call(self.client.stat_object, self.bucket, key)
        except Missing:
            return False
        return True

    async def list(self, prefix: str) -> list[str]:
        """Keys under the prefix, sorted."""

        def list_objects() -> list[str]:
            found = self.client.list_objects(self.bucket, prefix=prefix, recursive=True)
            return sorted(item.object_name or "" for item in found)

        return await self.call(list_objects)

    async def delete(self, key: str) -> None:
        """Nothing happens where there is nothing."""
        await self.call(self.client.remove_object, self.bucket, key)

    async def put_blob(self, payload: bytes, rows: int = 0) -> Blob:
        """Stores bytes under their sha256; storing them again changes nothing."""
        blob = blob_of(payload, rows)
        if not await self.exists(key_of(blob.digest)):
            await self.put(key_of(blob.digest), payload)
        return blob

    async def get_blob(self, digest: str) -> bytes:
        """Raises `Missing`, or `Corrupt` when the bytes do not match their name."""
        payload = await self.get(key_of(digest))
        actual = digest_of(payload)
        if actual != digest:
            raise Corrupt(f"artifact {digest}: {len(payload)} bytes with sha256 {actual}")
        return payload

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        try:
            with ANSWERED.labels(function.__name__).time():
                return await asyncio.to_thread(function, *arguments)
        except S3Error as error:
            if error.code in ("NoSuchKey", "NoSuchBucket"):
                raise Missing(str(error)) from error
            FAILURES.labels(function.__name__).inc()
            if error.response is not None and error.response.status >= TRANSIENT_STATUS_MIN:
                raise Unavailable(str(error)) from error
            raise
        except urllib3.exceptions.HTTPError as error:
            FAILURES.labels(function.__name__).inc()
            raise Unavailable(f"S3 at {self.client._base_url.host}: {error}") from error


def key_of(digest: str) -> str:
    return f"artifacts/{digest}"
