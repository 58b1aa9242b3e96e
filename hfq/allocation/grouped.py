"""Layers in two groups with a metric each: what is drawn ("content", by pictures) and how well ("quality", by outputs).

One layer at one width at a time gives the scores; the two groups share a mean width by :mod:`hfq.allocation.ratios`,
and of all plans of the scan the one is taken whose pictures are nearest to the float model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from hfq.allocation import measured, ratios
from hfq.allocation.measured import ScoreBook
from hfq.allocation.ratios import Group
from hfq.errors import DataError

__all__ = ["Judge", "Scan", "protect", "scan"]

Widths = Mapping[str, int]


@dataclass(frozen=True)
class Scan:
    """Which shares of a mean width are tried.

    Attributes:
        target, slack: means go from ``target - slack`` up to ``target`` in ``means`` points.
        ends, points: of the mean width of the content over that of the quality.
        tolerance: in bits, of each group's mean.
    """

    target: float
    ends: tuple[float, float]
    points: int = 10
    slack: float = 0.3
    means: int = 10
    tolerance: float = 0.02


class Judge:
    """Scores of single layers, and the loss of whole plans; nothing is computed that is not asked for.

    Args:
        model: the float model.
        simulated: ``simulated(weights, inputs)`` is a context in which it computes at widths.
        batches: calls whose outputs are compared; ``None`` if all scores are known.
        draw: ``draw(count)`` gives pictures ``[N, C, H, W]`` of the model as it is; ``None`` compares outputs only.
        content: whether a layer belongs to the content.
        similarity: of pictures and reference, one number a picture, higher is better.
        quality: of lists of outputs and references, higher is better.
        book: scores that are known.
        images, plan_images: pictures for a score, and for a plan.
        progress: makes progress bars.
    """

    def __init__(
        self, model: nn.Module, simulated: Callable[..., AbstractContextManager[None]],
        batches: Sequence[Mapping[str, Any]] | None, draw: Callable[[int], torch.Tensor] | None, *,
        content: Callable[[str], bool], similarity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        quality: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], float], book: ScoreBook,
        images: int = 32, plan_images: int = 1, progress: Callable[[int, str], Any] | None = None,
    ) -> None:
        self.model, self.simulated, self.batches, self.draw = model, simulated, batches, draw
        self.content, self.similarity, self.quality, self.book = content, similarity, quality, book
        self.images, self.plan_images, self.progress = images, plan_images, progress

    @cached_property
    def _outputs(self) -> list[torch.Tensor]:
        return self._now()

    @cached_property
    def _pictures(self) -> torch.Tensor:
        assert self.draw is not None
        return self.draw(max(self.images, self.plan_images))

    def _now(self) -> list[torch.Tensor]:
        if self.batches is None:
            raise DataError("widths are chosen by what the model gives for recorded calls: pass data, or the widths")
        return measured.outputs(self.model, self.batches)

    def scores(self, what: str, widths: Mapping[str, Sequence[int]]) -> dict[str, dict[int, float]]:
        """Name → bits → loss (the negative score) of single layers, all others float.

        Args:
            what: "weights" or "inputs".
        """
        def score(name: str, bits: int) -> float:
            drawn = self.draw is not None and self.content(name)
            wanted = self._pictures[: self.images] if drawn else self._outputs  # of the float model
            with self.simulated(**{what: {name: bits}}):
                if drawn:
                    assert self.draw is not None
                    return float(self.similarity(self.draw(self.images), wanted).mean())
                return self.quality(self._now(), wanted)  # type: ignore[arg-type]

        by = {name: "pictures" if self.draw is not None and self.content(name) else "outputs" for name in widths}
        found = {}
        for metric in sorted(set(by.values())):
            own = {name: row for name, row in widths.items() if by[name] == metric}
            found |= measured.measure(own, score, self.book, prefix=f"{what}/{metric}/", progress=self.progress)
        return {name: {bits: -value for bits, value in found[name].items()} for name in widths}

    def loss(self, weights: Widths, inputs: Widths) -> float:
        """How far the model at these widths is from the float one: squared error of pictures, else of its output."""
        wanted = self._outputs if self.draw is None else self._pictures[: self.plan_images]
        with self.simulated(weights=weights, inputs=inputs):
            if self.draw is None:
                return -self.quality(self._now(), wanted)  # type: ignore[arg-type]
            return float((self.draw(self.plan_images) - wanted).square().mean())  # type: ignore[operator]


def protect(scores: Mapping[str, float], content: Callable[[str], bool], share: float) -> list[str]:
    """The layers of each group with the largest losses: ``share`` of the group, rounded up."""
    found = []
    for side in (True, False):
        own = [name for name in scores if content(name) is side]
        worst = sorted(own, key=lambda name: -scores[name])
        found += worst[: math.ceil(share * len(own) - 1e-9)]
    return found


def scan(
    scores: Mapping[str, Mapping[int, float]], sizes: Mapping[str, float], content: Callable[[str], bool], how: Scan,
    loss: Callable[[Widths], float], what: str,
) -> dict[str, int]:
    """Widths by name: of the plans of a scan the one of least loss.

    Raises:
        ConfigError: no plan of the scan is possible.
    """
    groups = []
    for side in (True, False):
        own = {name: row for name, row in scores.items() if content(name) is side}
        widths = sorted({bits for row in own.values() for bits in row}) or [2, 8]
        groups.append(Group(own, {name: sizes[name] for name in own}, widths[0], widths[-1]))
    means = ratios.line(how.target - how.slack, how.target, how.means)
    shares = ratios.line(*how.ends, how.points)
    found = list(ratios.plans(groups[0], groups[1], means, shares, how.tolerance))
    return dict(ratios.best(found, lambda plan: loss(plan.bits), what, how.target).bits)
