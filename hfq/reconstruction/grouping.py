"""Inputs of packed layers, and operands of attentions, in groups by noise level: from observed ends to the parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from hfq.calibration import clusters
from hfq.calibration.clusters import Grouping
from hfq.calibration.extremes import Attention, Extremes, Observed
from hfq.errors import QuantizationError
from hfq.formats import groups
from hfq.kernels.grouped_products import Probabilities
from hfq.layers import products
from hfq.layers.banks import InputBanks
from hfq.layers.conv import QConv2d
from hfq.layers.grouped_attention import OPERANDS, GroupedAttention
from hfq.layers.one_weight import OneWeight
from hfq.layers.times import NoiseLevels
from hfq.report import Report

__all__ = ["Groups", "attach_attention", "attach_inputs", "banks_of"]


@dataclass(frozen=True)
class Groups:
    """How groups are made.

    Attributes:
        count: of a bank.
        ranges: of a group: "minmax" or "mean".
        axis: see :func:`hfq.calibration.clusters.choose_axis`.
        seed: of k-means.
        start: attention to another sequence leaves its first key as it is: "always", "auto" (where it has more than
            half of the attention) or "never".
    """

    count: int = 8
    ranges: Literal["minmax", "mean"] = "minmax"
    axis: str = "spread"
    seed: int = 0
    start: Literal["always", "auto", "never"] = "always"


def grouping_of(
    ends: Extremes, bits: int, how: Groups, columns: int, *, rows: bool = True, unfolded: bool = False
) -> Grouping:
    """The groups of one input at one noise level.

    Args:
        columns: that the product sums over.
        rows: whether rows may be grouped.
        unfolded: of a convolution: output positions are the last axis of its unfolded input, and win only if they are
            better; of all others columns are.
    """
    options: Any = {"how": how.ranges, "seed": how.seed, "largest": groups.largest_zero(columns, bits)}
    if ends.columns is None or how.count == 1:
        return clusters.group("tensor", ends.whole, how.count, bits, **options)
    made: dict[str, tuple[Any, Grouping, Any]] = {
        "columns": ("columns", clusters.group("columns", ends.columns, how.count, bits, **options), ends.columns)}
    if ends.rows is None or not rows:
        return made["columns"][1]
    made["rows"] = ("rows", clusters.group("rows", ends.rows, how.count, bits, **options), ends.rows)
    first, second = ("rows", "columns") if unfolded else ("columns", "rows")
    return clusters.choose_axis(made[first], made[second], how.axis)


def banks_of(
    seen: Mapping[int, Extremes], levels: NoiseLevels, bits: int, how: Groups, columns: int, *, unfolded: bool = False
) -> InputBanks:
    """A bank for every noise level; a level at which nothing was seen takes the nearest one at which something was.

    Rows are grouped only where they were as many in every call.
    """
    lengths = {len(one.rows[0]) for one in seen.values() if one.rows is not None}
    rows = len(lengths) == 1 and not any(one.ragged for one in seen.values())
    made = {level: grouping_of(ends, bits, how, columns, rows=rows, unfolded=unfolded) for level, ends in seen.items()}
    given = []
    for index, level in enumerate(levels.levels):
        near = min(made, key=lambda i: (i != index, abs(levels.levels[i] - level)))
        one = made[near]
        given.append((one.axis, one.labels, one.scale, one.zero))
    return InputBanks.of(given, bits, levels)


def attach_inputs(
    model: nn.Module, observed: Observed, levels: NoiseLevels, bits_for: Callable[[str], int], how: Groups,
    report: Report, *, allow_partial: bool = False,
) -> list[str]:
    """Code the inputs of packed layers in groups; rows of the report say so. Names of the layers.

    Args:
        bits_for: width of a layer's inputs.
        allow_partial: a layer whose input cannot be in groups keeps floats, with a reason.

    Raises:
        QuantizationError: there is such a layer.
    """
    done = []
    for name, seen in observed.inputs.items():
        layer, row = model.get_submodule(name), report.rows[name]
        assert isinstance(layer, OneWeight)
        columns, bits = layer.slots["weight"].columns, bits_for(name)
        part = banks_of(seen, levels, bits, how, columns, unfolded=isinstance(layer, QConv2d))
        row.tokens = row.tokens or sum(one.seen for one in seen.values())
        row.asked = {"activation_bits": bits, **row.asked}
        try:
            layer.group_inputs(part)
        except QuantizationError as error:
            if not allow_partial:
                raise QuantizationError(f"{error}; let it keep floats with overrides {{{name!r}: "
                                        "{'activation_bits': 16}}, or accept it with allow_partial=True") from error
            row.reason = f"its input stays float: {error}"
            continue
        row.bits = (row.bits or 0.0) + 8 * part.nbytes / row.numel
        row.extra["activation"] = part.describe()
        done.append(name)
    return done


def attach_attention(
    model: nn.Module, name: str, one: Attention, levels: NoiseLevels, bits: int, how: Groups,
    probabilities: Probabilities, report: Report,
) -> bool:
    """Compute an attention on groups of its operands; ``False`` (with a note) where that cannot be.

    Args:
        one: what was seen of it.
        bits: of queries, keys and values.
        probabilities: whether the first key is left out is found here.
    """
    if products.causal(model.get_submodule(name)):
        report.note(products.NOT_CAUSAL)
        return False
    wanted = how.start == "always" or (how.start == "auto" and one.share > 0.5)
    first = one.cross and "rest" in one.operands and wanted
    sides = {"query": "query", "key": "rest" if first else "key", "value": "value"}
    parts = {side: banks_of(one.operands[sides[side]], levels, bits, how, one.head_dim) for side in OPERANDS}
    what = Probabilities(probabilities.spec, probabilities.whole, first, probabilities.renormalise)
    part = GroupedAttention(one.head_dim, parts, what)
    device = next((p.device for p in model.get_submodule(name).parameters()), torch.device("cpu"))
    told = {"first_key": "float" if first else "coded", "first_share": round(one.share, 4)}
    products.install(model, name, part.to(device), report, extra=told)
    return True

