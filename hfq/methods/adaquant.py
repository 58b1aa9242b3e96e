"""AdaQuant (arXiv 2006.10518): every layer tuned by gradient descent on its own output, widths by an integer program
over measured losses, then channel statistics and biases of the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from hfq.config import HfqConfig, option
from hfq.errors import ConfigError
from hfq.report import Report

__all__ = ["AdaQuantConfig", "quantize"]

_RATES = {"lr_weight": 1e-5, "lr_bias": 1e-3, "lr_range": 1e-3, "lr_input": 1e-1}  # as published, in absolute units


@dataclass(kw_only=True, eq=False, repr=False)
class AdaQuantConfig(HfqConfig):
    """Layer-wise calibration and integer programming.

    Args:
        mode: "parallel" tunes every layer on the float model's own inputs; "sequential" behind the finished ones.
        steps, batch_size, holdout: of tuning a layer; the held-out share picks the best iterate.
        lr_weight, lr_bias, lr_range, lr_input: rates of weight, bias, and ranges of weight and input; ``None`` for
            those of ``lr_mode``.
        lr_mode: "relative" counts rates in units of what they move (1e-3 each); "absolute" as published (1e-5, 1e-3,
            1e-3, 1e-1).
        relu_aware: where a ReLU follows, what counts is what passes it.
        input_range: first range of the inputs: "mean" of the samples' extremes, or their "extreme".
        first_bits: width of a layer that reads the model's input, unless it is overridden.
        widths: of the integer program; weights and inputs of a layer have one width.
        target_size: size of all weights as a share of 32 bits; sets the program's budget.
        max_loss: the other form of the program: the smallest model whose losses add up to this at most.
        target_operations: also bound multiplications times both widths, as a share of all of them at the largest.
        statistics: channels whose mean and variance are tuned: of convolutions that took a normalisation in ("norms"),
            of all packed layers with a bias ("all"), or none ("off").
        statistics_passes, statistics_momentum: over the data; ``None`` takes the mean over all batches.
        bias_steps, bias_lr: of tuning all biases for the model's prediction; 0 does not.
        attention, attention_steps: quantize both products of attentions (those that are not causal), ranges learned.
        scale_dtype: of stored scales of weights.
        layer_bits: layer → width; filled in by the program, or given.
    """

    method = "adaquant"
    supports_activation_bits = True

    activation_bits: int = option(4, range=(2, 8), also=(16,), per_module=True)
    calibration_samples: int = option(1000, range=(1, 1 << 20))
    calibration_batch_size: int = option(50, range=(1, 1 << 16))
    mode: str = option("parallel", choices=("parallel", "sequential"))
    steps: int = option(1000, range=(0, 1_000_000))
    batch_size: int = option(50, range=(1, 4096))
    holdout: float = option(0.1, range=(0.0, 0.9))
    lr_weight: float | None = option(None, range=(0.0, 1.0))
    lr_bias: float | None = option(None, range=(0.0, 1.0))
    lr_range: float | None = option(None, range=(0.0, 1.0))
    lr_input: float | None = option(None, range=(0.0, 1.0))
    lr_mode: str = option("relative", choices=("relative", "absolute"))
    relu_aware: bool = True
    input_range: str = option("mean", choices=("mean", "extreme"))
    first_bits: int = option(8, range=(1, 8))
    widths: Sequence[int] = (8, 4)
    target_size: float | None = option(None, range=(0.0, 1.0))
    max_loss: float | None = option(None, range=(0.0, 1e6))
    target_operations: float | None = option(None, range=(0.0, 1.0))
    statistics: str = option("norms", choices=("norms", "all", "off"))
    statistics_passes: int = option(1, range=(1, 1000))
    statistics_momentum: float | None = option(0.1, range=(0.0, 1.0))
    bias_steps: int = option(0, range=(0, 1_000_000))
    bias_lr: float = option(0.1, range=(0.0, 10.0))
    attention: bool = True
    attention_steps: int = option(50, range=(0, 100_000))
    scale_dtype: str = option("float32", choices=("float32", "float16", "bfloat16"))
    layer_bits: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._chosen = False  # whether a run, not the user, filled in layer_bits
        super().__post_init__()

    def check(self) -> None:
        if not self.widths or not all(type(b) is int and 2 <= b <= 8 for b in self.widths):
            raise ConfigError(f"widths={self.widths}: widths from 2 to 8 are needed")
        if self.target_size is not None and self.max_loss is not None:
            raise ConfigError("target_size and max_loss are two forms of the program: give one")

    def override_for(self, name: str) -> dict[str, Any]:
        """The chosen widths, under the user's own."""
        bits = (self.layer_bits or {}).get(name)
        chosen = {} if bits is None else {"bits": bits} if self.activation_bits == 16 else {
            "bits": bits, "activation_bits": bits}  # fmt: skip
        return {**chosen, **super().override_for(name)}

    def inputs_for(self, name: str) -> int:
        return self.value_for(name, "activation_bits")

    @property
    def rates(self) -> dict[str, float]:
        """The four learning rates."""
        given = {name: getattr(self, name) for name in _RATES}
        return {name: value if value is not None else _RATES[name] if self.lr_mode == "absolute" else 1e-3
                for name, value in given.items()}


def quantize(model: Any, data: Any, config: AdaQuantConfig, report: Report) -> None:
    """Fold normalisations; tune layers, choose widths, tune again in order if asked; statistics; biases."""
    from hfq.calibration import gradients
    from hfq.reconstruction import layerwise, renormalise
    from hfq.reconstruction.sites import Tuner
    from hfq.training import biases
    from hfq.transforms.fold import fold_batch_norms

    if config._chosen:
        config.layer_bits, config._chosen = None, False
    plan = config.plan(model)
    if not plan.sites:
        return
    before = renormalise.of_norms(model)
    folded = fold_batch_norms(plan, config.one_call(model, data))  # B
    whole = _asks_program(config) or config.bias_steps  # statistics are compared by a share of the predictions
    compared = config.statistics == "all" or (config.statistics == "norms" and bool(before))
    wanted = gradients.predictions(model, data) if whole else gradients.first(model, data) if compared else []
    course = layerwise.Course(config.steps, config.batch_size, relative=config.lr_mode == "relative",
                              holdout=config.holdout, **config.rates)
    with closing(Tuner(plan, data, config, course, report, relu=config.relu_aware,
                       extreme=config.input_range == "extreme")) as tuner:
        if tuner.first is not None and "bits" not in config.override_for(tuner.first):
            config.layer_bits, config._chosen = {tuner.first: config.first_bits, **(config.layer_bits or {})}, True
        if _asks_program(config):
            config.layer_bits, config._chosen = _program(tuner, wanted, config, report), True  # C and E
        products = _products(model, plan, data, config, report)
        found = tuner.sequential() if config.mode == "sequential" else tuner.parallel()  # D, or C
        if config.layer_bits is not None:
            report.totals["layer_bits"] = dict(config.layer_bits)
    for install in products:
        install()
    targets = {name: before[norm] for name, norm in folded.items() if name in found}
    if config.statistics == "all":
        targets |= {name: renormalise.Statistics(layer.mean, layer.variance) for name, layer in found.items()
                    if name not in targets and layer.bias is not None}
    if targets and config.statistics != "off":  # F
        told = renormalise.renormalise(
            model, targets, data, passes=config.statistics_passes, momentum=config.statistics_momentum,
            loss=(lambda: gradients.divergence(model, data[: len(wanted)], wanted)) if wanted else None)
        if told is not None:
            report.totals["statistics"] = {"before": told[0], "after": told[1], "kept": told[1] <= told[0]}
    if config.bias_steps:  # G
        curve = biases.tune(model, data, wanted, steps=config.bias_steps, lr=config.bias_lr,
                            batch_size=config.batch_size, seed=config.seed)
        report.curves["biases"] = curve


def _asks_program(config: AdaQuantConfig) -> bool:
    return not (config.target_size is None and config.max_loss is None and config.target_operations is None)


def _program(tuner: Any, wanted: Any, config: AdaQuantConfig, report: Report) -> dict[str, int]:
    """Part E: the loss of each layer at each width in a model that has the largest width elsewhere."""
    from hfq.allocation import program

    fixed = {site.name: config.spec_for(site.name).bits for site in tuner.sites
             if "bits" in config.override_for(site.name)}  # fmt: skip
    free = [site for site in tuner.sites if site.name not in fixed]
    widths = sorted(set(config.widths), reverse=True)
    losses = tuner.losses({site.name: widths for site in free}, wanted)
    report.totals["width_losses"] = losses
    size = {site.name: {b: float(site.numel * b) for b in widths} for site in free}
    held = float(sum(site.numel * fixed[site.name] for site in tuner.sites if site.name in fixed))
    if config.max_loss is not None:
        chosen = program.allocate(size, losses, config.max_loss)
    else:
        whole = float(sum(site.numel for site in tuner.sites))
        costs, budgets = {}, {}
        if config.target_size is not None:
            costs["size"], budgets["size"] = size, config.target_size * 32 * whole - held
        if config.target_operations is not None:
            macs, top = tuner.macs, widths[0]
            costs["operations"] = {site.name: {b: macs[site.name] * b * b for b in widths} for site in free}
            budgets["operations"] = (config.target_operations * top * top * sum(macs.values())
                                     - sum(macs[name] * bits * bits for name, bits in fixed.items()))
        chosen = program.allocate(losses, costs, budgets)
    return {**fixed, **chosen}


def _products(model: Any, plan: Any, data: Any, config: AdaQuantConfig, report: Report) -> list[Any]:
    """Attentions with quantized linears: ranges of their products, learned on the float model, for later."""
    from hfq.reconstruction.sites import learn_products

    if not config.attention or config.activation_bits == 16:
        return []
    return learn_products(model, plan, data, config.activation_bits, config.inputs_for, config.one_call(model, data),
                          report, steps=config.attention_steps, lr=config.rates["lr_input"], seed=config.seed,
                          relative=config.lr_mode == "relative", extreme=config.input_range == "extreme")
