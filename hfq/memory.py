"""Memory of this process: its peak over a stretch of code, and giving what is not needed back to the system.

The peak is that of anonymous memory: files mapped into memory do not count.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["PeakMemory", "anonymous_bytes", "give_back", "page_out"]

_STATUS = Path("/proc/self/status")
_MAPS = Path("/proc/self/maps")
_MADV_PAGEOUT = 21  # of Linux 5.4: unlike MADV_DONTNEED it loses nothing, whatever lies there


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


def page_out(tensor: torch.Tensor) -> int:
    """Let go of the pages of a mapped file that hold ``tensor``; they are read again if somebody asks for them.

    Codes that were read from a checkpoint and laid out otherwise for a kernel would be in memory twice, as other
    tensors keep the file mapped. Memory that is no file's is left alone.

    Returns:
        Bytes of whole pages that the system was told about; 0 where it cannot be told.
    """
    madvise, start, size = _madvise(), tensor.data_ptr(), tensor.nbytes
    if madvise is None or tensor.device.type != "cpu" or not _is_of_a_file(start, start + size):
        return 0
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
    return last - first if first < last and madvise(first, last - first, _MADV_PAGEOUT) == 0 else 0


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function  # type: ignore[no-any-return]


def _is_of_a_file(start: int, end: int) -> bool:
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        first, last = (int(address, 16) for address in addresses.split("-"))
        if first <= start and end <= last:
            return inode != "0"
    return False
