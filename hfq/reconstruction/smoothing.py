"""Channel scales at every place of a decoder block where they cancel: from the ranges alone, or learned block by block.

Norm to readers, value to output, query and key, gate and up through the activation, up to down. Learned scales and
ranges of the weights follow the block's output with everything quantized; what is learned is merged into the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hfq.formats import ActivationSpec, QuantSpec
from hfq.graph.decoder import DecoderBlock
from hfq.graph.links import Pair
from hfq.layers import attention
from hfq.layers.fake import fake_inputs, fake_outputs
from hfq.reconstruction.transformed import BlockTransform, Options, fit_transformed
from hfq.report import Report

__all__ = ["Learning", "quantized_stream", "smooth_block"]


@dataclass(frozen=True)
class Learning:
    """How scales and ranges are learned; without epochs the starting scales are used and ranges are not learned.

    ``unit_bits`` are those of the two inputs of a gated unit; 16, or more than a byte, leaves them alone.
    """

    epochs: int = 20
    lr: float = 5e-3
    clip_lr: float = 1e-2
    batch_size: int = 1
    alpha: float = 0.5
    activation_bits: int = 8
    kv_bits: int = 8
    unit_bits: int = 8

    def options(self, biased: bool = False) -> Options:
        """What a block learns; where its norms have biases (``biased``) and something is learned, shifts as well."""
        place: Any = "vector" if self.epochs else "off"
        return Options(
            norm="vector", value="vector", query=place, product="vector", gate=place,
            shift=bool(self.epochs) and biased, alpha=self.alpha, heads="first", clip=bool(self.epochs),
        )  # fmt: skip


@contextmanager
def quantized_stream(model: Any, sites: Sequence[Any], block: DecoderBlock, learning: Learning) -> Iterator[None]:
    """Inside, the float block sees quantized inputs of its linears and of its gated unit, as its integer form will."""
    grid = ActivationSpec(bits=learning.activation_bits)
    unit = [block.gate, block.up] if block.gate is not None and learning.unit_bits <= 8 else []
    outputs = {model.get_submodule(name): ActivationSpec(bits=learning.unit_bits) for name in unit}
    with fake_inputs({site.module: grid for site in sites}), fake_outputs(outputs):
        yield


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
    biased = block.norm1.bias is not None and block.norm2.bias is not None
    transform = BlockTransform(step, pairs, spec_for, learning.options(biased), generator)
    for what, reason in transform.reasons.items():
        report.note(f"{what} is not scaled: {reason}")
    if learning.epochs:
        len(step.outputs)  # of the float attention
        query, key = (ActivationSpec(bits=bits) for bits in (learning.activation_bits, learning.kv_bits))
        name = block.query.rpartition(".")[0]
        attention.install(model, name, attention.AttentionQuant(block.size, query=query, key=key, value=key))
        with quantized_stream(model, step.block.sites, block, learning):
            fit = fit_transformed(
                step, transform, epochs=learning.epochs, lr=learning.lr, clip_lr=learning.clip_lr,
                batch_size=learning.batch_size, shuffle=True, generator=generator, checks=learning.epochs,
            )
        report.curves[block.name] = [fit.initial, *fit.curve]
    codes = transform.freeze()
    maps: list[Any] = list(transform.maps)
    scaled = [one.pair.activation for one in maps if one.pair.kind == "gate"]
    block.scale = scaled[0] if scaled else None
    return {name: one.scale[:, 0].float() for name, one in codes.items()} if learning.epochs else {}
