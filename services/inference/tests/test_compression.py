"""Compressed bodies: what comes back is what went in, and nothing grows past its bound."""

import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.doors import Invalid, Refused
from services.inference.compression import (
    CODINGS,
    WORTH_BYTES,
    TooLarge,
    UnknownCoding,
    coding_for,
    compressed,
    decompressed,
)

MAX = 1 << 16


@given(st.binary(max_size=MAX), st.sampled_from(CODINGS))
def test_both_ways(body: bytes, coding: str) -> None:
    assert decompressed(compressed(body, coding), coding, MAX) == body


def status_of(body: bytes, coding: str) -> int:
    try:
        return 200 if len(decompressed(body, coding, MAX)) <= MAX else 500
    except Refused as error:
        return error.http_status


@given(st.binary(max_size=200), st.sampled_from(CODINGS))
def test_any_bytes_are_bytes_or_a_refusal(body: bytes, coding: str) -> None:
    assert status_of(body, coding) in (200, 400, 413)


def test_a_bomb_stops_at_the_bound() -> None:
    bomb = gzip.compress(bytes(100 * MAX))
    assert len(bomb) < MAX
    with pytest.raises(TooLarge, match=f"more than {MAX} bytes"):
        decompressed(bomb, "gzip", MAX)


def test_what_is_cut_short_or_goes_on_is_refused() -> None:
    whole = zlib.compress(b"tensor" * 100)
    for body, said in ((whole[:-1], "cut short"), (whole + b"x", "goes on after its end")):
        with pytest.raises(Invalid, match=said):
            decompressed(body, "deflate", MAX)


def test_another_coding_is_no_bad_request_but_an_unsupported_one() -> None:
    with pytest.raises(UnknownCoding, match="'br' is not one of gzip, deflate") as error:
        decompressed(b"", "br", MAX)
    assert error.value.http_status == 415
    assert decompressed(b"as it is", "identity", MAX) == b"as it is"


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("", ""),
        ("identity", ""),
        ("br, zstd", ""),
        ("gzip, deflate", "gzip"),
        ("deflate", "deflate"),
        ("gzip;q=0.1, deflate;q=0.5", "deflate"),
        ("GZIP;q=0", ""),
        ("gzip;q=much", ""),
        ("gzip;q=nan", ""),
        (",;=,gzip;", "gzip"),
    ],
)
def test_an_answer_is_compressed_as_the_client_weighs_it(accepted: str, coding: str) -> None:
    assert coding_for(accepted, WORTH_BYTES) == coding
    assert coding_for(accepted, WORTH_BYTES - 1) == "", "short ones never are"
