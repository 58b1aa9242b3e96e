"""Inputs of linears divided channel by channel, their weights multiplied: by what makes the input, or online."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hfq.graph.links import Pair
from hfq.graph.pairs import PairReport
from hfq.graph.read import Site
from hfq.layers.parts import ChannelScale, DividedInput
from hfq.transforms.scale import apply_scale, classes_of

__all__ = ["KINDS", "Division", "divide_inputs"]

KINDS = ("norm", "vo", "updown", "direct")


@dataclass
class Division:
    """What was done to the input that some linears share.

    Attributes:
        vector: float32 ``[K]``, what the input is divided by.
        into: what takes the division ("the norm model.layers.0.input_layernorm", ...); empty if the layers do it.
        parts: the online parts by site name.
        reason: why the layers do it.
    """

    vector: torch.Tensor
    into: str = ""
    parts: dict[str, ChannelScale] = field(default_factory=dict)
    reason: str = ""


@torch.no_grad()
def divide_inputs(
    sites: Sequence[Site], vector: torch.Tensor, pairs: PairReport, block: str, *, fold: bool = True
) -> Division:
    """Divide the shared input of ``sites`` by ``vector`` and multiply the columns of their weights, in place.

    The model computes the same. Where the graph has proven that something in the block makes just this input, it takes
    the division, and channels that share a scale there take the largest of theirs; else each linear gets an online
    part: its float module divides by a hook until ``step.swap`` of a walk takes it along, and statistics that are
    hooked later see the divided input.

    Args:
        sites: linears of one block that read the same tensor.
        vector: ``[K]``, finite and above zero.
        pairs: of ``graph.pairs.discover``.
        block: name of their block.
        fold: look for a pair.
    """
    names = {site.name for site in sites}
    reason = "not asked to fold"
    if fold:
        found = [pair for kind in KINDS for pair in pairs.proven(kind, block) if _serves(pair, names)]
        for pair in found:
            link = next(link for link in pair.readers if link.name in names)
            scales = classes_of(link, vector.double().cpu(), pair.classes)
            apply_scale(pair, scales)
            return Division(scales[link.index.cpu()].float(), ", ".join(source.name for source in pair.sources))
        refused = [pair.reason for kind in KINDS for pair in pairs.refused(kind, block)
                   if names & {link.name for link in pair.readers}]  # fmt: skip
        reason = "; ".join(dict.fromkeys(refused)) or "nothing in the block makes just this input"
    vector = vector.float()
    made = Division(vector, reason=reason)
    for site in sites:
        part = ChannelScale(1 / vector.to(site.weight.device))
        weight = site.weight
        shape = (-1, 1) if site.kind == "transposed" else (1, -1)
        # The stored vector is what divides: its own reciprocal goes into the weight.
        weight.copy_((weight.double() / part.vector.double().view(shape)).to(weight.dtype))
        site.module.register_forward_pre_hook(DividedInput(part), with_kwargs=True)
        made.parts[site.name] = part
    return made


def _serves(pair: Pair, names: set[str]) -> bool:
    """Whether the pair scales the whole input of all these linears."""
    readers = {link.name: link for link in pair.readers}
    return names <= set(readers) and all(bool((readers[name].index >= 0).all()) for name in names)

