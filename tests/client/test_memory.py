"""Memory goes back every few passes, and only where the system can take it."""

import ctypes

import pytest

from fltac.client import memory


def test_it_goes_back_every_few_passes() -> None:
    has = hasattr(ctypes.CDLL(None), "malloc_trim")
    assert [memory.give_back(number) for number in range(1, 9)] == [False, False, False, has, False, False, False, has]


def test_a_system_without_it_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_: None) -> object:
        return object()

    memory._trim.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", nothing)
    assert not memory.give_back(memory.PASSES)
    memory._trim.cache_clear()
