"""Runs that are killed in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hfq.calibration.step import Step


@contextmanager
def killed(after: int) -> Iterator[None]:
    """The quantization inside is killed when it would replace a layer after so many."""
    own, seen = Step.swap, []

    def stop(self: Step, site: Any, *args: Any, **kwargs: Any) -> Any:
        if len(seen) == after:
            raise KeyboardInterrupt
        seen.append(site)
        return own(self, site, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Step, "swap", stop)
        yield
