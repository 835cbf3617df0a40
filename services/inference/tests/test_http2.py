"""Frames and header blocks: what is written is read again, and what is remembered is still true."""

import struct
import zlib

import pytest
from hpack import Decoder, Encoder
from hypothesis import given
from hypothesis import strategies as st

from services.inference import frames, rpcs
from services.inference.frames import Fault, Header, Heads, Malformed

TEXT = st.binary(min_size=1, max_size=300)
REQUEST = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", rpcs.MODEL_INFER.encode()),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
]


@given(st.lists(st.tuples(TEXT, TEXT), max_size=10))
def test_a_block_is_read_as_it_was_written(headers: list[Header]) -> None:
    decoder = Decoder()
    assert [tuple(one) for one in decoder.decode(frames.block(headers), raw=True)] == headers
    assert not decoder.header_table.dynamic_entries


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.booleans()), max_size=60))
def test_remembered_blocks_mean_what_they_meant(said: list[tuple[int, int, bool]]) -> None:
    """However the client's table changes meanwhile, and however small it is."""
    encoder, heads = Encoder(), Heads(list)
    encoder.header_table_size = 200
    for name, value, huffman in said:
        headers = [(b"name-%d" % name, b"value-%d" % value), (b":method", b"POST")]
        block = encoder.encode(headers, huffman=huffman)
        assert (heads.known.get(block) or heads.read(block)) == headers


@pytest.mark.parametrize("bits", rpcs.WINDOW_BITS.values())
def test_a_compressed_message_that_is_cut_short_is_none(bits: int) -> None:
    packer = zlib.compressobj(wbits=bits)
    packed = packer.compress(bytes(1000)) + packer.flush()
    assert rpcs.inflated(packed, bits) == bytes(1000)
    for size in (len(packed) - 1, len(packed) - 5, 0):
        with pytest.raises(ValueError, match="is cut short"):
            rpcs.inflated(packed[:size], bits)


def test_a_client_that_repeats_itself_is_remembered() -> None:
    encoder, heads = Encoder(), Heads(list)
    first = encoder.encode(REQUEST)
    heads.read(first)
    assert not heads.known
    again = encoder.encode(REQUEST)
    assert heads.read(again) == REQUEST
    assert heads.known == {again: REQUEST}
    heads.read(encoder.encode([(b"new", b"entry")]))
    assert not heads.known


def test_remembered_blocks_are_bounded() -> None:
    heads = Heads(list)
    for n in range(3 * frames.HEADS_MAX):
        heads.read(frames.block([(b"a", b"%d" % n)]))
        assert len(heads.known) <= frames.HEADS_MAX


def test_headers_that_grow_when_they_are_read_are_refused() -> None:
    encoder = Encoder()
    large = [(b"a", bytes(3000))]
    encoder.encode(large)
    block = encoder.encode(large * 30)
    assert len(block) == 30
    heads = Heads(list)
    heads.read(Encoder().encode(large))
    with pytest.raises(Fault):
        heads.read(block)


@pytest.mark.parametrize(
    "headers",
    [
        REQUEST[1:],
        [*REQUEST, (b":authority", b"late")],
        [REQUEST[0], *REQUEST],
        [*REQUEST, (b"Upper", b"case")],
        [*REQUEST, (b"connection", b"close")],
        [*REQUEST, (b"te", b"gzip")],
        [(b":status", b"200"), *REQUEST],
    ],
)
def test_a_request_that_is_none_is_malformed(headers: list[Header]) -> None:
    with pytest.raises(Malformed):
        rpcs.head_of(headers, ())


@pytest.mark.parametrize(
    ("timeout", "ns"),
    [
        (b"1H", 3600 * 10**9),
        (b"2M", 120 * 10**9),
        (b"10m", 10**7),
        (b"99999999n", 99999999),
        (b"0u", 1),
    ],
)
def test_a_timeout_is_read(timeout: bytes, ns: int) -> None:
    assert rpcs.head_of([*REQUEST, (b"grpc-timeout", timeout)], ()).timeout_ns == ns


@pytest.mark.parametrize(
    ("given_token", "is_let_in"),
    [
        (b"Bearer secret", True),
        (b"bearer secret", True),
        (b"Bearer", False),
        (b"Bearer secre", False),
        (b"Bearer secrets", False),
        (b"Basic secret", False),
        (b"", False),
    ],
)
def test_a_token_is_one_of_those_known(given_token: bytes, is_let_in: bool) -> None:
    head = rpcs.head_of([*REQUEST, (b"authorization", given_token)], [b"other", b"secret"])
    assert bool(head.refusal) is not is_let_in


@given(st.integers(0, 1 << 20))
def test_lengths_are_written_as_hpack_reads_them(size: int) -> None:
    block = b"\x00" + frames.length(1) + b"a" + frames.length(size) + bytes(size)
    [(_, value)] = Decoder(1 << 22).decode(block, raw=True)
    assert len(value) == size


def test_the_opening_is_settings_and_a_window() -> None:
    word, flags, stream = frames.FRAME.unpack_from(frames.HELLO)
    assert (word & 255, word >> 8, flags, stream) == (frames.SETTINGS, len(frames.HELLO) - 9, 0, 0)
    told = dict(struct.iter_unpack(">HI", frames.HELLO[9:]))
    assert told[frames.STREAMS] == frames.STREAMS_MAX
    assert frames.FRAME.unpack_from(frames.OPEN) == (4 << 8 | frames.WINDOW_UPDATE, 0, 0)
