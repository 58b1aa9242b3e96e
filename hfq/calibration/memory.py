"""Give freed memory back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

__all__ = ["give_back"]


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (OSError, TypeError, AttributeError):
        return None  # not glibc


def give_back() -> None:
    """Return free pages of the allocator to the system.

    glibc keeps what was freed between live allocations. Block after block, weights and activations of slightly other
    sizes leave holes, and the process grows with depth although nothing is alive. Costs milliseconds.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
