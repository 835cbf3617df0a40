"""Bodies over HTTP, compressed: gzip and deflate (zlib's form of it), both ways. Pure."""

import gzip
import zlib

import grpc

from libs.doors import Invalid, Refused

EITHER = zlib.MAX_WBITS | 32
"""zlib's own number for: gzip or zlib, as its first bytes say."""
LEVEL = 1
"""Tensors compress little; this one is several times faster than the usual 6."""
WORTH_BYTES = 1024
CODINGS = ("gzip", "deflate")


class TooLarge(Refused):
    code = grpc.StatusCode.INVALID_ARGUMENT

    @property
    def http_status(self) -> int:
        return 413


class UnknownCoding(Refused):
    code = grpc.StatusCode.INVALID_ARGUMENT

    @property
    def http_status(self) -> int:
        return 415


def decompressed(body: bytes, coding: str, bytes_max: int) -> bytes:
    """Raises `Refused` for another coding, for what is not of it, and past `bytes_max`."""
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return body
    if coding not in CODINGS:
        raise UnknownCoding(f"{coding!r} is not one of gzip, deflate", "Content-Encoding")
    stream = zlib.decompressobj(EITHER)
    try:
        plain = stream.decompress(body, bytes_max + 1)
    except zlib.error as error:
        raise Invalid(f"the body is not {coding}: {error}", "Content-Encoding") from error
    if len(plain) > bytes_max:
        raise TooLarge(f"more than {bytes_max} bytes", "body")
    if not stream.eof or stream.unused_data:
        problem = "it goes on after its end" if stream.eof else "it is cut short"
        raise Invalid(f"the body is not {coding}: {problem}", "Content-Encoding")
    return plain


def coding_for(accepted: str, size: int) -> str:
    """What to compress an answer of so many bytes with, by `Accept-Encoding`; "" for nothing."""
    if size < WORTH_BYTES:
        return ""
    weights = dict(map(weight_of, accepted.lower().split(",")))
    best = max(CODINGS, key=lambda coding: weights.get(coding, 0.0))
    return best if weights.get(best, 0.0) > 0 else ""


def weight_of(item: str) -> tuple[str, float]:
    """`gzip;q=0.5` -> ("gzip", 0.5); a weight that is none counts as 0."""
    name, _, parameter = item.partition(";")
    key, _, weight = parameter.partition("=")
    if key.strip() != "q":
        return name.strip(), 1.0
    try:
        return name.strip(), float(weight)
    except ValueError:
        return name.strip(), 0.0


def compressed(body: bytes, coding: str) -> bytes:
    return gzip.compress(body, LEVEL) if coding == "gzip" else zlib.compress(body, LEVEL)
