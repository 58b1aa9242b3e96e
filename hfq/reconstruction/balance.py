"""Outlier channels of activations, moved into the weights that read them, through the proven pairs of a block."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from hfq.calibration.outliers import InputRanges, Rule, channel_scales
from hfq.graph.absorb import Matrix
from hfq.graph.links import Link, Pair
from hfq.graph.pairs import PairReport
from hfq.report import Report
from hfq.transforms.scale import apply_scale, classes_of

__all__ = ["KINDS", "balance", "measurable"]

KINDS = ("norm", "vo", "updown")


def measurable(pairs: PairReport, block: str, kinds: Collection[str] = KINDS) -> dict[str, nn.Module]:
    """The modules of a block whose input ranges :func:`balance` needs: one reader a proven pair, by name."""
    links = [link for kind in kinds for pair in pairs.proven(kind, block) if (link := _reader(pair)) is not None]
    return {link.name: link.part.module for link in links}


def _reader(pair: Pair) -> Link | None:
    """A reader of the pair that is called with what flows through it (banks of experts compute that inside)."""
    found = [link for link in pair.readers if isinstance(link.part, Matrix) and link.part.weight.ndim == 2]
    return found[0] if found else None


@torch.no_grad()
def balance(
    pairs: PairReport, block: str, ranges: InputRanges, rule: Rule, report: Report | None = None,
    kinds: Collection[str] = KINDS,
) -> dict[str, int]:
    """Scale the outlier channels of every proven pair of a block down, in place; the block computes the same.

    Channels that share a scale (values that several heads read) take the largest of theirs. Pairs that cannot be
    scaled are notes of the report.

    Args:
        ranges: of the modules that :func:`measurable` named.

    Returns:
        Number of scaled channels by the first member of each pair that was scaled.
    """
    done: dict[str, int] = {}
    read: set[str] = set()
    for kind in kinds:
        for pair in pairs.proven(kind, block):
            link = _reader(pair)
            found = None if link is None or link.name not in ranges.ranges else ranges.range(link.name)
            reason = ""
            if link is None or found is None:
                reason = "its inputs were not measured"
            elif link.name in read:
                reason = "another pair has scaled these inputs"
            if reason:
                _note(report, pair, reason)
                continue
            assert link is not None and found is not None
            read.add(link.name)
            vector = classes_of(link, channel_scales(*found, rule).cpu(), pair.classes)
            changed = int((vector != 1).sum())
            if changed:
                apply_scale(pair, vector)
                done[pair.members[0]] = changed
        for pair in pairs.refused(kind, block):
            _note(report, pair, pair.reason)
    return done


def _note(report: Report | None, pair: Any, reason: str) -> None:
    if report is not None:
        place = pair.members[0] if pair.members else pair.place
        report.note(f"{place} ({pair.kind}) is not scaled: {reason}")
