"""Memory that the passes leave in pieces goes back to the system.

Passes of packed rows have ever new sizes, and glibc keeps what was freed in holes that the next sizes do not fit. After
each pass giving the holes back would cost noticeable time, after every few it does not.
"""

import ctypes
from collections.abc import Callable
from functools import cache

PASSES = 4
"""Between two times."""


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; None elsewhere."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return found


def give_back(passes: int) -> bool:
    """Gives free memory back if it is time to, after so many passes; tells whether it did."""
    trim = _trim()
    if trim is None or passes % PASSES:
        return False
    trim(0)
    return True
