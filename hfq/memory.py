"""Peak anonymous memory of a stretch of code, by sampling: files mapped into memory do not count."""

from __future__ import annotations

import threading
from pathlib import Path

__all__ = ["PeakMemory", "anonymous_bytes"]

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
