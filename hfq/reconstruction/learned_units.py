"""The weights of a model, unit by unit: gates learned against a float copy in step, hardened, their codes kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hfq.calibration.reference import Reference
from hfq.calibration.step import Step
from hfq.calibration.walk import generator, walk
from hfq.reconstruction import loop, phases
from hfq.reconstruction.phases import Course, Ranges, Rounded
from hfq.report import Report

__all__ = ["learn"]


def learn(
    plan: Any, reference: Any, data: Sequence[Mapping[str, Any]], how: Ranges, course: Course, report: Report, *,
    seed: int = 0, after: Callable[[Step, Mapping[str, Rounded]], None] | None = None, **options: Any,
) -> dict[str, Rounded]:
    """Learn the rounding of every unit on what enters it behind the units that were rounded before.

    The float layers hold the rounded weights afterwards, unless ``after`` packs them.

    Args:
        plan: of the model, in units and in execution order.
        reference: the same of a float copy, whose outputs are the targets.
        seed: of the mini-batches.
        after: called with every unit whose weights are hard, and everything that is rounded so far.
        options: of :func:`hfq.calibration.walk.walk`.

    Returns:
        Codes by site. Curves of the losses are in the report.
    """
    rounded: dict[str, Rounded] = {}

    def restored(step: Step, kept: Any) -> None:
        rounded.update(phases.held(kept, how.spec_for))

    with Reference(reference, data) as floats:
        for step in walk(plan, data, report=report, restored=restored, **options):
            gates, targets = phases.roundings(step, how), floats.step(step.block.name).outputs
            curve = phases.fit_weights(step, gates, targets, course, generator(seed, step.index))
            report.curves[step.block.name] = loop.thinned(curve)
            phases.harden(step, gates)
            rounded.update(phases.held(step.kept, how.spec_for))
            if after is not None:
                after(step, rounded)
    return rounded
