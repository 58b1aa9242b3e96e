"""Channel scales at every place of a decoder block where they cancel: from the ranges alone, or learned block by block.

Norm to readers, value to output, query and key, gate and up through the activation, up to down. Learned scales and
ranges of the weights follow the block's output with everything quantized; what is learned is merged into the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hfq.formats import ActivationSpec, QuantSpec
from hfq.graph.decoder import DecoderBlock
from hfq.graph.links import Pair
from hfq.layers import attention
from hfq.reconstruction.transformed import BlockTransform, Options, fit_transformed
from hfq.report import Report

__all__ = ["Learning", "smooth_block"]


@dataclass(frozen=True)
class Learning:
    """How scales and ranges are learned; without epochs the starting scales are used and ranges are not learned."""

    epochs: int = 20
    lr: float = 5e-3
    clip_lr: float = 1e-2
    batch_size: int = 1
    alpha: float = 0.5
    activation_bits: int = 8
    kv_bits: int = 8

    @property
    def options(self) -> Options:
        place: Any = "vector" if self.epochs else "off"
        return Options(
            norm="vector", value="vector", query=place, product="vector", gate=place, shift=False, alpha=self.alpha,
            heads="first", clip=bool(self.epochs),
        )


def smooth_block(
    model: Any, step: Any, block: DecoderBlock, pairs: Sequence[Pair], spec_for: Callable[[str], QuantSpec | None],
    learning: Learning, *, generator: torch.Generator, report: Report,
) -> dict[str, torch.Tensor]:
    """Smooth the block of ``step`` in place; its function stays.

    Args:
        model: the whole model (its attention is quantized while the block learns).
        block: of the decoder; ``scale`` is filled in where the activation got scales.
        pairs: of the block, or of all blocks.
        spec_for: grids of the weights.
        learning: how.
        generator: of the order of the samples and of the proof.
        report: gets notes for what cannot be scaled, and the loss curve.

    Returns:
        Learned sizes of a code ``[N]`` by site; empty where nothing was learned.
    """
    transform = BlockTransform(step, pairs, spec_for, learning.options, generator)
    for what, reason in transform.reasons.items():
        report.note(f"{what} is not scaled: {reason}")
    if learning.epochs:
        len(step.outputs)  # of the float attention
        query, key = (ActivationSpec(bits=bits) for bits in (learning.activation_bits, learning.kv_bits))
        name = block.query.rpartition(".")[0]
        attention.install(model, name, attention.AttentionQuant(block.size, query=query, key=key, value=key))
        fit = fit_transformed(
            step, transform, epochs=learning.epochs, lr=learning.lr, clip_lr=learning.clip_lr,
            batch_size=learning.batch_size, shuffle=True, generator=generator, checks=learning.epochs,
            activations={site.module: query for site in step.block.sites},
        )
        report.curves[block.name] = [fit.initial, *fit.curve]
    codes = transform.freeze()
    maps: list[Any] = list(transform.maps)
    scaled = [one.pair.activation for one in maps if one.pair.kind == "gate"]
    block.scale = scaled[0] if scaled else None
    return {name: one.scale[:, 0].float() for name, one in codes.items()} if learning.epochs else {}
