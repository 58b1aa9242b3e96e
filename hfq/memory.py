"""Anonymous memory of this process: its peak over a stretch of code, and giving what is free back to the system.

Files mapped into memory do not count.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from pathlib import Path

__all__ = ["PeakMemory", "anonymous_bytes", "give_back"]

_STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int | None:
    """Anonymous resident memory of this process; ``None`` where the system does not tell."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


class PeakMemory:
    """``with PeakMemory() as memory: ...``; then ``memory.peak`` is the highest level above the one at entry."""

    def __init__(self, interval: float = 0.02) -> None:
        self.interval = interval
        self.peak: int | None = None
        self._start: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def _sample(self) -> None:
        now = anonymous_bytes()
        if now is not None and self._start is not None:
            self.peak = max(self.peak or 0, now - self._start)

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self._sample()

    def __enter__(self) -> PeakMemory:
        self._start = anonymous_bytes()
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, name="hfq-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._sample()


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
