"""What lives long is looked at by the collector once, and garbage among it goes in the end."""

import gc
import weakref

import pytest

from services.scheduler import garbage
from stack.testing import eventually


class Loop:
    """Refers to itself: nothing but the collector frees it."""

    def __init__(self) -> None:
        self.own = self


def test_what_a_full_collection_leaves_is_not_looked_at_again() -> None:
    with garbage.spared():
        living = Loop()
        assert any(one is living for one in gc.get_objects())
        gc.collect()
        assert not any(one is living for one in gc.get_objects())
    assert any(one is living for one in gc.get_objects())
    assert gc.get_freeze_count() == 0


def test_what_was_read_while_it_paused_is_spared_at_once() -> None:
    with garbage.spared():
        with garbage.paused():
            assert not gc.isenabled()
            living = Loop()
        assert gc.isenabled()
        assert not any(one is living for one in gc.get_objects())
    assert any(one is living for one in gc.get_objects())


async def test_garbage_that_was_spared_goes_at_a_thaw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "THAW_S", 0.5)
    with garbage.spared():
        left = Loop()
        gone = weakref.ref(left)
        gc.collect()
        del left

        async def is_gone() -> bool:
            gc.collect()
            return gone() is None

        await eventually(is_gone)
