"""MixDQ (arXiv 2405.17873): UNets of few steps on stored ranges, with the first token of the text exact, and widths by
layer: what is drawn is scored by pictures, how well by the output, each with an integer program of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hfq.config import option
from hfq.errors import ConfigError, DataError
from hfq.graph import select
from hfq.report import Report
from hfq.widths import WidthsConfig

__all__ = ["MixDQConfig", "quantize"]


@dataclass(kw_only=True, eq=False, repr=False)
class MixDQConfig(WidthsConfig):
    """Min-max weights and inputs, and with ``target_bits`` or ``target_activation_bits`` widths by layer.

    Args:
        first_token: keep keys and values of a first token that is the same for every prompt exact.
        split_shortcut: grids of their own for both halves of a convolution's input that joins a skip.
        ema: what stays of the ends of a range when another call is seen.
        range_bits: width of the weights behind which ranges are measured.
        protected: share of each group's layers, rounded up, whose inputs stay floats: the most sensitive ones.
        content: patterns of the layers that say what is drawn (attention to the text, perceptrons).
        images: score those by pictures, and choose plans by pictures; without, everything by the output of the model.
            Pictures need ``hfq.quantize_pipeline``.
        score_images, plan_images, score_rows: how many, and rows of the calls that outputs are scored on, at most.
        target_bits, target_activation_bits: mean widths; ``None`` has ``bits`` and ``activation_bits`` everywhere.
        content_widths, quality_widths, activation_widths: to choose from.
        ratios, activation_ratios: ends of the scan of mean content width over mean quality width.
        ratio_points, activation_ratio_points, mean_points: of the scan; means go down to ``target - slack``.
        slack, tolerance: in bits; a group's mean is met up to ``tolerance``.
        conditioning: filled in by the run: digests of the text encoders; loading refuses others.
    """

    method = "mixdq"
    supports_activation_bits = True

    bits: int = option(8, range=(1, 8), also=(16,), per_module=True)
    activation_bits: int = option(8, range=(2, 8), also=(16,), per_module=True)
    symmetric: bool = option(True, per_module=True)
    first_token: bool = True
    split_shortcut: bool = True
    ema: float = option(0.95, range=(0.0, 1.0))
    range_bits: int = option(8, range=(1, 8), also=(16,))
    protected: float = option(0.01, range=(0.0, 1.0))
    content: Sequence[str] = option(["ff", "attn2"])
    images: bool = True
    score_images: int = option(32, range=(1, 1 << 16))
    plan_images: int = option(1, range=(1, 1 << 16))
    score_rows: int = option(32, range=(1, 1 << 20))
    target_bits: float | None = option(None, range=(1.0, 8.0))
    target_activation_bits: float | None = option(None, range=(2.0, 8.0))
    content_widths: Sequence[int] = option([2, 4, 8])
    quality_widths: Sequence[int] = option([4, 8])
    activation_widths: Sequence[int] = option([4, 8])
    ratios: Sequence[float] = option([0.46, 1.36])
    activation_ratios: Sequence[float] = option([0.94, 1.09])
    ratio_points: int = option(10, range=(1, 1000))
    activation_ratio_points: int = option(20, range=(1, 1000))
    mean_points: int = option(10, range=(1, 1000))
    slack: float = option(0.3, range=(0.0, 4.0))
    tolerance: float = option(0.02, range=(0.0, 1.0))
    conditioning: Mapping[str, str] | None = None

    def check(self) -> None:
        super().check()
        if self.group_size != -1:
            raise ConfigError(f"group_size={self.group_size}: mixdq has one range an output channel (-1)")
        for name, least in (("content_widths", 1), ("quality_widths", 1), ("activation_widths", 2)):
            widths = getattr(self, name)
            if not widths or not all(least <= bits <= 8 for bits in widths):
                raise ConfigError(f"{name}={list(widths)}: widths from {least} to 8 are needed")
        if any(len(ends) != 2 or not 0 < ends[0] <= ends[1] for ends in (self.ratios, self.activation_ratios)):
            raise ConfigError("ratios, activation_ratios: two ends above zero, the lower one first, are needed of each")
        if self.target_activation_bits is not None and self.activation_bits == 16:
            raise ConfigError("target_activation_bits with activation_bits=16: inputs are floats")

    ranges_file = property(lambda self: self.work_dir and Path(self.work_dir) / "ranges.safetensors")

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        return not (self.ranges_file and self.ranges_file.exists())

    def is_content(self, name: str) -> bool:
        return select.first_match(name, self.content) is not None

    def plan(self, model: Any, ask: Sequence[str] = ()) -> Any:
        """Every convolution and linear, the first and the last ones too."""
        from hfq import graph

        every = [site.name for site in graph.read(model).every_site if site.kind in ("conv", "linear", "transposed")]
        return super().plan(model, [*ask, *select.exactly(every)])

    def known(self, names: Sequence[str], data: Any) -> dict[str, Any]:
        """What ranges and scores depend on, besides the widths that are asked for."""
        own = {f: getattr(self, f) for f in ("first_token", "split_shortcut", "ema", "range_bits", "symmetric")}
        return own | {"sites": list(names), **({} if data is None else {"data": data.sha256})}


def quantize(model: Any, data: Any, config: MixDQConfig, report: Report) -> None:
    """Ranges, then who keeps float inputs, then both programs and the scan, for weights and for inputs; pack."""
    from hfq.allocation import cost
    from hfq.reconstruction.direct import WholeModel, unpackable

    plan = config.plan(model)
    for site in [site for site in plan.sites if unpackable(site)]:
        report.refuse(site.name, unpackable(site), kind=site.kind, numel=site.numel)
    sites = [site for site in plan.sites if site.name not in report.rows]
    config.check_layers([*(site.name for site in sites), *plan.skipped])
    if not sites:
        return
    layers = _layers(plan, sites, model, data, config)
    if not config.fixed:
        config.choose(None)
        config.choose(_choose(model, data, layers, config))
    if layers.tokens:
        config.conditioning = config._surroundings and config._surroundings.conditioning()
    elif config.first_token:
        report.note("no first token is the same in all calls: nothing of the text is kept exact")
    config.average_bits = cost.averages(sites, config.spec_for)
    report.totals |= {name: getattr(config, name) for name in ("bit_map", "average_bits", "conditioning")}
    whole = WholeModel(model, report)
    for site in sites:
        with config.placement(site.module):
            layers.pack(whole, site.name, config.spec_for(site.name).bits, config.inputs_for(site.name))
            report.rows[site.name].extra["group"] = "content" if config.is_content(site.name) else "quality"


def _layers(plan: Any, sites: Sequence[Any], model: Any, data: Any, config: MixDQConfig) -> Any:
    """Steps 2 to 5: grids of both halves behind skips, first tokens, ranges; kept in ``work_dir`` for other plans."""
    from hfq.graph import joins, trace
    from hfq.reconstruction import ranged

    known, file = config.known([site.name for site in sites], data), config.ranges_file
    if file and file.exists():
        return ranged.load(file, sites, config.spec_for, known)
    call = config.one_call(model, data)
    cuts = joins.find(plan, trace.record(plan, call)) if config.split_shortcut else {}
    layers = ranged.calibrate(model, data, sites, config.spec_for, cuts=cuts, first_token=config.first_token,
                              keep=config.ema, weight_bits=config.range_bits)
    if file:
        layers.save(file, known)
    return layers


def _choose(model: Any, data: Any, layers: Any, config: MixDQConfig) -> dict[str, dict[str, int]]:
    """Steps 6 to 11."""
    from hfq.allocation import grouped

    judge, names = _judge(model, data, layers, config), list(layers.sites)
    weights, inputs = ({name: config.value_for(name, field) for name in names} for field in ("bits", "activation_bits"))
    free = [name for name in names if inputs[name] != 16 and "activation_bits" not in config.override_for(name)]
    if config.protected and free:
        at = 8 if config.target_activation_bits is not None else config.activation_bits
        scores = judge.scores("inputs", {name: [at] for name in free})
        floats = grouped.protect({name: row[at] for name, row in scores.items()}, config.is_content, config.protected)
        inputs |= dict.fromkeys(floats, 16)
        free = [name for name in free if name not in floats]

    how = partial(grouped.Scan, slack=config.slack, means=config.mean_points, tolerance=config.tolerance)
    if config.target_bits is not None:
        candidates = {name: config.content_widths if config.is_content(name) else config.quality_widths
                      for name in names if "bits" not in config.override_for(name)}  # fmt: skip
        weights |= grouped.scan(
            judge.scores("weights", candidates), {name: site.numel for name, site in layers.sites.items()},
            config.is_content, how(config.target_bits, tuple(config.ratios), config.ratio_points),
            lambda found: judge.loss({**weights, **found}, {}), "target_bits")  # fmt: skip
    if config.target_activation_bits is not None:
        inputs |= grouped.scan(
            judge.scores("inputs", dict.fromkeys(free, config.activation_widths)), layers.elements, config.is_content,
            how(config.target_activation_bits, tuple(config.activation_ratios), config.activation_ratio_points),
            lambda found: judge.loss(weights, {**inputs, **found}), "target_activation_bits")  # fmt: skip
    return {name: {"bits": weights[name], "activation_bits": inputs[name]} for name in names}


def _judge(model: Any, data: Any, layers: Any, config: MixDQConfig) -> Any:
    from hfq.allocation.grouped import Judge
    from hfq.allocation.measured import ScoreBook
    from hfq.calibration import trajectories
    from hfq.evaluation.similarity import signal_to_noise, structural_similarity

    def nothing(count: int) -> Any:
        raise DataError("pictures choose the widths: quantize with hfq.quantize_pipeline, or say images=False")

    draw = nothing if config._surroundings is None else config._surroundings.draw
    known = config.known(list(layers.sites), data)
    known |= {name: getattr(config, name) for name in ("content", "images", "score_images", "score_rows", "seed")}
    book = ScoreBook(None if config.work_dir is None else f"{config.work_dir}/scores.json", known)
    return Judge(model, layers.simulated, None if data is None else trajectories.evenly(data, config.score_rows),
                 draw if config.images else None, content=config.is_content, similarity=structural_similarity,
                 quality=signal_to_noise, book=book, images=config.score_images, plan_images=config.plan_images,
                 progress=config.walk_options()["progress"])  # fmt: skip
