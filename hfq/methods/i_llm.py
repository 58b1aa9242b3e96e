"""I-LLM (arXiv 2405.17849): a decoder that computes with integers only, smoothed block by block before that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hfq.config import HfqConfig, option
from hfq.errors import ConfigError, QuantizationError
from hfq.report import Report

__all__ = ["ILLMConfig", "quantize"]

_PROBE_TOKENS = 32


@dataclass(kw_only=True, eq=False, repr=False)
class ILLMConfig(HfqConfig):
    """Integer-only inference: embedding, blocks, head and cache; nothing of the model stays float.

    Weights are symmetric with a scale an output channel. Activations have a scale and a zero point a token, keys and
    values static scales from the calibration data.

    Args:
        bits, activation_bits: of the linear layers; ``overrides`` may set ``bits`` for single modules, the embedding
            and the head included (both have ``outer_bits`` otherwise).
        kv_bits: of keys and values; 16 takes ``activation_bits``.
        outer_bits: of embedding and head.
        alpha: exponent of the smoothing scales where they start.
        qk_alpha: share of the keys' spread over channels that their static scales take.
        epochs: of learned smoothing a block; 0 keeps the analytic scales.
        lr, clip_lr, batch_size: of the learning.
        clip_range: the softmax sees differences to the maximum down to minus this.
        nonlinear_bits: inputs of the gated unit and the softmax; 16 leaves the softmax's accumulators as they are.
        sigmoid_bits, probability_bits: outputs of sigmoid and softmax.
        mantissa_bits: of the scale of a token.
        weight_clip: search of the weight ranges where they are not learned.
    """

    method = "i_llm"
    supports_activation_bits = True
    supports_kv_bits = True

    bits: int = option(8, range=(2, 8), per_module=True)
    activation_bits: int = option(8, range=(2, 8))
    kv_bits: int = option(16, range=(2, 8), also=(16,))
    symmetric: bool = option(True, choices=(True,), why="integer products of i_llm have no zero points of weights")
    group_size: int = option(-1, choices=(-1,), why="i_llm has one scale an output channel")
    outer_bits: int = option(8, range=(2, 8))
    calibration_samples: int = option(128, range=(1, 1 << 20))
    calibration_seqlen: int = option(2048, range=(1, 1 << 20))
    alpha: float = option(0.5, range=(0.0, 1.0))
    qk_alpha: float = option(0.3, range=(0.0, 1.0))
    epochs: int = option(20, range=(0, 10000))
    lr: float = option(5e-3, range=(0.0, 1.0))
    clip_lr: float = option(1e-2, range=(0.0, 1.0))
    batch_size: int = option(1, range=(1, 1 << 16))
    clip_range: float = option(15.0, range=(1.0, 64.0))
    nonlinear_bits: int = option(8, range=(6, 16))
    sigmoid_bits: int = option(8, range=(8, 16))
    probability_bits: int = option(16, range=(8, 16))
    mantissa_bits: int = option(8, range=(8, 16))
    weight_clip: str = option("none", choices=("none", "mse", "percentile"))

    def check(self) -> None:
        if self.modules_to_not_convert:
            raise ConfigError("modules_to_not_convert: an integer-only model has no module that stays float")
        if self.kv_cache is not None:
            raise ConfigError("kv_cache: an integer-only model stores keys and values as its own integers: use kv_bits")
        wrong = sorted({name for values in self.overrides.values() for name in values} - {"bits"})
        if wrong:
            raise ConfigError(f"overrides: {wrong[0]!r} of a single module: i_llm sets only bits there, its codes are "
                              "symmetric with a scale an output channel")

    def spec_of(self, name: str, outer: bool) -> Any:
        """Grid of a matrix; embedding and head have bits of their own."""
        from dataclasses import replace

        spec: Any = self.spec_for(name)
        if outer and "bits" not in self.override_for(name):
            spec = replace(spec, bits=self.outer_bits)
        return replace(spec, scale_dtype="float32")


def quantize(model: Any, data: Any, config: ILLMConfig, report: Report) -> None:
    """Read and prove the decoder, smooth and measure every block, and put the integer decoder in its place."""
    from contextlib import ExitStack

    from hfq.calibration.walk import generator, walk
    from hfq.layers import attention
    from hfq.reconstruction.integer import attention_ranges
    from hfq.reconstruction.smoothing import Learning, quantized_stream, smooth_block

    if any(p.is_meta for p in model.parameters()):
        raise QuantizationError("i_llm needs the whole model in memory: load it without offloading")
    plan, pairs, decoder = _read(model, data, config)
    packer = _packer(decoder, config, report)
    names = {block.name: block for block in decoder.blocks}
    learning = Learning(
        epochs=config.epochs, lr=config.lr, clip_lr=config.clip_lr, batch_size=config.batch_size, alpha=config.alpha,
        activation_bits=config.activation_bits, kv_bits=packer.numbers.kv_bits, unit_bits=config.nonlinear_bits,
    )
    streams = ("quantized", "float") if config.epochs else ("quantized",)
    with ExitStack() as stack:
        # What is learned in a block starts from what the quantized blocks before it give, inputs included.
        def follow(step: Any) -> None:
            if config.epochs:
                stack.enter_context(quantized_stream(model, step.block.sites, names[step.block.name], learning))

        def restored(step: Any, kept: Any) -> None:
            packer.again(names[step.block.name], step.block.module, kept)
            follow(step)

        walking = {**config.walk_options(), "restored": restored}
        for step in walk(plan, data, streams=streams, report=report, **walking):
            block = names[step.block.name]
            steps = smooth_block(
                model, step, block, [pair for pair in pairs if pair.place == block.name], config.spec_for, learning,
                generator=generator(config.seed, step.index), report=report,
            )  # fmt: skip
            tokens = sum(step.hidden(i)[..., 0].numel() for i in range(len(step)))
            ranges = attention_ranges(decoder, block, step)
            step.kept = ranges.keep(steps)
            packer.block(block, ranges, steps, tokens)
            if config.epochs:
                packer.follow(step, block)
            follow(step)
    attention.uninstall(model)
    environment = config._environment
    if environment is not None and environment.untie is not None:
        environment.untie(model, decoder.head)
    packer.finish()


def _read(model: Any, data: Any, config: ILLMConfig) -> tuple[Any, Any, Any]:
    """The proven decoder, its plan, and the pairs that can be smoothed."""
    import torch

    from hfq.calibration import capture
    from hfq.graph import gates, pairs, trace, twin
    from hfq.graph.decoder import read_decoder

    row = capture.row_of(data[0])
    if "input_ids" not in row:
        raise QuantizationError("i_llm needs a causal language model and data with input_ids")
    ids = row["input_ids"][:, :_PROBE_TOKENS].to(capture.device_of(model))

    def call() -> Any:
        with capture.quiet(model), torch.no_grad():
            return model(input_ids=ids)

    plan = config.plan(model)
    found = trace.order_groups(plan, call)
    known = pairs.discover(plan, found, seed=config.seed)
    decoder = read_decoder(plan, found, known, call, _limit(model))
    twin.prove(decoder, ids, call().logits)
    known.pairs += gates.discover_gates(plan, found, seed=config.seed)
    return plan, known, decoder


def _limit(model: Any) -> int:
    """Positions that the model is made for; a window of attention is not supported beyond its width."""
    config = model.config.get_text_config(decoder=True) if hasattr(model.config, "get_text_config") else model.config
    limit = int(getattr(config, "max_position_embeddings", 0) or 2048)
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True)
    return min(limit, int(window)) if window and used else limit


def _packer(decoder: Any, config: ILLMConfig, report: Report) -> Any:
    from hfq.formats import dyadic
    from hfq.layers.integer_block import Numbers
    from hfq.reconstruction.integer import Packer
    from hfq.rounding import nearest

    numbers = Numbers(
        activation_bits=config.activation_bits,
        kv_bits=config.activation_bits if config.kv_bits == 16 else config.kv_bits,
        mantissa_bits=config.mantissa_bits, nonlinear_bits=config.nonlinear_bits, sigmoid_bits=config.sigmoid_bits,
        probability_bits=config.probability_bits, clip=dyadic.fit(config.clip_range),
    )
    outer = {decoder.embed, decoder.head, decoder.positions}
    return Packer(
        decoder, numbers, lambda name: config.spec_of(name, name in outer),
        lambda weight, spec: nearest.grid_of(weight, spec, clip=config.weight_clip)[0][:, 0],
        config.qk_alpha, report,
    )
