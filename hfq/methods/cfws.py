"""CFWS (arXiv 2312.10588): merged kernels as a coarse centre and a fine rest, thresholds by an improved KL metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hfq.config import HfqConfig, option
from hfq.errors import ConfigError, DataError
from hfq.report import Report

__all__ = ["CFWSConfig", "quantize"]

_NO_CONVOLUTION = "no convolution to split: the method is for networks whose branches were merged into convolutions"


@dataclass(kw_only=True, eq=False, repr=False)
class CFWSConfig(HfqConfig):
    """Two integer convolutions for each merged 3 x 3 kernel; static symmetric activations, one scale a tensor.

    Weights are symmetric, one scale an output channel; other layers than split ones have plain 8-bit weights.

    Args:
        extract_center: the coarse part is the centre tap alone; off, it is the whole kernel rounded, and the fine part
            what that leaves (twice the work).
        coarse_per_channel: every output channel has a coarse step of its own, else the largest serves all.
        centers: ``{pattern: side}`` of the centre that a smaller branch was merged into, by module name; 3 x 3 kernels
            have a centre of 1, other kernels are not split unless they are named here.
        auto_split_threshold: a layer is split if the median over its channels of max|W| / max|W_fine| is at least this.
        act_metric: thresholds of activations by "kl_improved", "kl", "minmax" or "mse".
        o_abs: histograms of magnitudes; off, of positive numbers only (a ReLU follows).
        kl_stride: bins between two candidate thresholds.
        stream: "float" collects all histograms in one pass of the float model (the paper's two steps); "quantized"
            collects each layer's with all layers before it quantized.
        bias_bits: 32 leaves biases as floats; 16 rounds them to a symmetric grid, as the reference code does.
    """

    method = "cfws"
    supports_activation_bits: ClassVar[bool] = True

    bits: int = option(8, range=(2, 8), also=(16,), per_module=True)
    symmetric: bool = option(True, choices=(True,), per_module=True)
    group_size: int = option(-1, choices=(-1,), per_module=True, why="cfws has one scale an output channel")
    activation_bits: int = option(8, range=(2, 8), also=(16,), per_module=True)
    calibration_samples: int = option(32, range=(1, 1 << 20))
    calibration_batch_size: int = option(32, range=(1, 1 << 16))
    extract_center: bool = option(True)
    coarse_per_channel: bool = option(True)
    centers: Mapping[str, Any] = option({})
    auto_split_threshold: float = option(4.0, range=(0.0, 1e6), per_module=True)
    act_metric: str = option("kl_improved", choices=("kl_improved", "kl", "minmax", "mse"))
    o_abs: bool = option(True)
    kl_stride: int = option(4, range=(1, 16))
    stream: str = option("float", choices=("float", "quantized"))
    bias_bits: int = option(32, choices=(16, 32))

    def check(self) -> None:
        wrong = {name for values in self.overrides.values() for name in values} & {"zero_point", "scale_dtype"}
        if wrong:
            raise ConfigError(f"overrides: {min(wrong)!r} of a single module: the form of scales is that of cfws")
        for pattern, side in self.centers.items():
            if not isinstance(pattern, str) or type(side) is not int or not 1 <= side <= 31:
                raise ConfigError(f"centers[{pattern!r}]={side!r}: a module pattern and a side from 1 to 31 are needed")

    def center_for(self, name: str) -> int | None:
        """Declared side of the centre of the module ``name``; later patterns win."""
        from hfq.graph import select

        return next((side for pattern, side in reversed(self.centers.items()) if select.matches(name, pattern)), None)


def quantize(model: Any, data: Any, config: CFWSConfig, report: Report) -> None:
    """Merge branches and normalisations, find thresholds, then split and pack layer by layer, in place."""
    from torch import nn

    from hfq.calibration import sequence
    from hfq.reconstruction import splitting
    from hfq.transforms.fold import fold_batch_norms
    from hfq.transforms.merge import merge_branches

    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        _nothing_to_do(config.plan(model), report)
        return
    if not len(data):
        raise DataError("cfws needs calibration images: no batches were given")
    # 0. One convolution for the branches of a block, normalisations in it.
    asked = {site.name for site in config.plan(model).sites}
    known = {name for name, _ in model.named_modules()}
    before = sequence.outputs(model, data[0])
    merged = merge_branches(model, lambda: sequence.outputs(model, data[0]))
    if merged:
        report.note(f"branches merged before quantization: {', '.join(name or 'the model' for name in merged)}")
    folded = fold_batch_norms(config.plan(model), config.one_call(model, data))
    # 1. The layers, in the order in which they run.
    sites = sequence.order(model, data[0], _asked(config.plan(model), config, asked, known, report))
    for name in sorted(asked - {site.name for site in sites}):
        report.leave(name, "its branch was merged into another convolution", kind="conv")
    # 4. Thresholds: of the float model in one pass, or of the stream as it is when a layer's turn comes.
    spec = {site.name: _activation(config, site.name) for site in sites}
    measured = [site for site in sites if spec[site.name] is not None]

    def observer(site: Any) -> Any:
        bits = config.value_for(site.name, "activation_bits")
        return splitting.observer_of(config.act_metric, bits, positive=not config.o_abs, stride=config.kl_stride)

    ahead = {} if config.stream == "quantized" else sequence.watch(model, data, measured, observer)
    # 2, 3, 5. Split, round, and go on with quantized outputs.
    for site in sites:
        found = spec[site.name] and (ahead or sequence.watch(model, data, [site], observer, stop=True))[site.name]
        with config.placement(site.module):
            splitting.pack_site(
                model, site, config.spec_for(site.name).bits, report,
                taps=splitting.taps_of(site.module, config.center_for(site.name), not config.extract_center),
                least_gain=config.value_for(site.name, "auto_split_threshold") if config.extract_center else 0.0,
                per_channel=config.coarse_per_channel, activation=spec[site.name],
                params=splitting.parameters_of(found, spec[site.name]) if found else None, bias_bits=config.bias_bits,
                extra={"folded": folded[site.name]} if site.name in folded else {},
            )
    after = sequence.outputs(model, data[0])
    report.totals["output_error"] = float((before - after).norm() / before.norm().clamp(min=1e-30))


def _activation(config: CFWSConfig, name: str) -> Any:
    from hfq.formats import ActivationSpec

    bits = config.value_for(name, "activation_bits")
    return None if bits == 16 else ActivationSpec(bits, True, "tensor", dynamic=False)


def _asked(plan: Any, config: CFWSConfig, asked: set[str], known: set[str], report: Report) -> list[Any]:
    """The sites that were asked for, and those that took their branches in: a merged convolution stands for them.

    Whether a site is a head is told by the model as it was; afterwards a stage may look like one.
    """
    from hfq.graph import select

    found = []
    for site in plan.every_site:
        parent = site.name.rpartition(".")[0]
        merged = site.name not in known and any(name.startswith(f"{parent}.") for name in asked)
        pattern = select.first_match(site.name, config.modules_to_not_convert or ())
        if site.name in asked or (merged and pattern is None and config.spec_for(site.name) is not None):
            found.append(site)
        elif site.name not in report.rows:
            report.leave(site.name, plan.skipped.get(site.name, "its branches stay float"), kind=site.kind)
    return found


def _nothing_to_do(plan: Any, report: Report) -> None:
    report.note(_NO_CONVOLUTION)
    for site in plan.sites:
        report.leave(site.name, _NO_CONVOLUTION, kind=site.kind, numel=site.numel)
