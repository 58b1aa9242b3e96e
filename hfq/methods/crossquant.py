"""CrossQuant (arXiv 2410.07505): activations with a step from their token and their channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from hfq.compose import ComposedConfig
from hfq.config import option
from hfq.errors import ConfigError
from hfq.report import Report

__all__ = ["CrossQuantConfig", "quantize"]

_LEAKS = (
    "mode='dynamic' takes a channel's range from the whole call: a token's numbers depend on the others, and a token "
    "alone is hardly rounded at all. Use it to analyse whole sequences, and mode='static' to generate"
)


@dataclass(kw_only=True, eq=False, repr=False)
class CrossQuantConfig(ComposedConfig):
    """The step of element (i, j) is ``t_i ** alpha * c_j ** (1 - alpha) / (2 ** (bits - 1) - 1)``.

    ``t`` is the largest magnitude of the token, ``c`` that of the channel. Weights are symmetric, per channel at 8
    bits; at 4 bits the paper uses groups of 128 (``group_size=128``).

    Args:
        mode: "static" takes the channels' ranges from calibration data, moves ``c ** (1 - alpha)`` into the weights
            before they are rounded, and multiplies integers; "dynamic" (the paper's study) takes them from each call,
            leaves the weights as they are, and multiplies floats.
        alpha: share of the token; 1 quantizes per token, 0 per channel.
        alpha_search: for each input, the one of 0, 0.15, 0.35, 0.55, 0.75, 1 and ``alpha`` with the least output error.
        token_scale: in static mode, the step of a token is "tight", from the divided token (nothing is clamped), or
            "paper", ``t ** alpha`` of the token before the division (fake quantization in floats).
        percentile: 100 takes a channel's largest magnitude; below, that percentile of its magnitudes.
        fold: let norms and linears take the division where the graph proves it; else every layer divides its input.
        solver: weights by "rtn" (round to nearest) or "gptq".
        clip: search of the weights' ranges, done after the factors have moved: "none" or "mse".
        group_scale: "int" makes the scales of a row's groups small multiples of one step, for a single sum of integers.
        percdamp: of the solver.
        backend: a method that takes the place of ``solver``, as its Config or a dict: the factors move first, in the
            float model, and ``CBQConfig(...)``, say, then learns weights and its own steps of the divided inputs.
    """

    method = "crossquant"
    supports_activation_bits: ClassVar[bool] = True
    supports_kv_bits: ClassVar[bool] = True

    bits: int = option(8, range=(1, 8), also=(16,), per_module=True)
    symmetric: bool = option(True, per_module=True)
    activation_bits: int = option(8, range=(2, 8), also=(16,), per_module=True)
    calibration_samples: int = option(128, range=(1, 1 << 20))
    calibration_seqlen: int = option(2048, range=(1, 1 << 20))
    mode: str = option("static", choices=("static", "dynamic"))
    alpha: float = option(0.15, range=(0.0, 1.0))
    alpha_search: bool = option(False)
    token_scale: str = option("tight", choices=("tight", "paper"))
    percentile: float = option(100.0, range=(50.0, 100.0))
    fold: bool = option(True)
    solver: str = option("rtn", choices=("rtn", "gptq"))
    clip: str = option("none", choices=("none", "mse"))
    group_scale: str = option("float", choices=("float", "int"))
    percdamp: float = option(0.01, range=(0.0, 1.0))
    backend: Any = None

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        return self.mode == "static" or self.solver == "gptq"

    def check(self) -> None:
        own = {"solver": "rtn", "clip": "none", "group_scale": "float", "mode": "static", "token_scale": "tight"}
        for name, value in own.items() if self.backend is not None else ():
            if getattr(self, name) != value:
                raise ConfigError(f"{name}={getattr(self, name)!r} and backend={self.backend['method']!r}: the backend "
                                  f"rounds weights and inputs: {name}={value!r}, or no backend")
        if self.backend is not None:
            self.backend_config()  # what the backend refuses is found here
        if self.mode == "dynamic" and self.alpha_search:
            raise ConfigError("alpha_search=True needs mode='static': it weighs inputs against their weights")
        if self.mode == "dynamic" and (self.token_scale == "paper" or self.percentile < 100):
            raise ConfigError("token_scale and percentile are about ranges from calibration data: mode='static' has "
                              "them, mode='dynamic' takes both maxima from the call")
        if self.solver == "gptq" and self.group_scale == "int":
            raise ConfigError("group_scale='int' needs solver='rtn': it rounds the weights again on the new grid")

    def activation_for(self, name: str) -> int:
        """Bits of the input of the layer ``name``."""
        return self.value_for(name, "activation_bits")


def quantize(model: Any, data: Any, config: CrossQuantConfig, report: Report) -> None:
    """Static: ranges of channels, factors into weights, then weights, block by block. Dynamic: weights only."""
    from hfq.calibration.walk import walk
    from hfq.graph import pairs
    from hfq.reconstruction import divided
    from hfq.reconstruction.direct import pack_outside

    if config.mode == "dynamic":
        report.note(_LEAKS)
    if data is None:
        _without_data(model, config, report)
        return
    plan, call, walking = config.plan(model), config.one_call(model, data), config.walk_options()
    static = config.mode == "static"
    paper = config.token_scale == "paper"
    found = pairs.discover(plan, call, placement=walking["placement"], seed=config.seed)
    report.pairs = found.rows()
    if config.backend is not None:  # (which keeps the progress, on the divided model)
        walking["progress_dir"] = None
    moved = []
    for step in walk(plan, data, report=report, **walking):
        groups = divided.groups_of(step, config.activation_for, config.alpha)
        if static and groups:
            divided.measure(step, groups, percentile=config.percentile,
                            samples=divided.SAMPLES if config.alpha_search else 0)
            if config.alpha_search:
                divided.search(groups, config.spec_for, config.clip)
            divided.divide(step, groups, found, fold=config.fold and not paper)
            divided.count_rounding(step, groups, raw_tokens=paper)
        if config.backend is not None:
            moved += groups
            continue
        _pack(step, divided.swap_options(groups, lambda group, site: _inputs(group, site, config)), config)
    if config.backend is not None:
        config.run_backend(model, data, config.backend_config(), report)
        for row, extra in ((report.rows[site.name], group.extra) for group in moved for site in group.sites):
            row.extra |= extra
        return
    pack_outside(plan, config, report, clip=config.clip)


def _inputs(group: Any, site: Any, config: CrossQuantConfig) -> dict[str, Any]:
    """How the packed layer of a site treats its input."""
    from hfq.formats import ActivationSpec
    from hfq.layers.joint import JointRange

    bits, size = group.bits[site.name], site.in_features
    if config.mode == "dynamic":
        return {"online": JointRange(size, bits, group.exponent), "asked": {"activation_bits": bits}}
    if config.token_scale == "paper":
        part = JointRange(size, bits, group.exponent, group.division.vector)
        return {"online": part, "folded": True, "divides": True, "asked": {"activation_bits": bits}}
    return {"activation": ActivationSpec(bits, symmetric=True)}


def _pack(step: Any, options: dict[str, dict[str, Any]], config: CrossQuantConfig) -> None:
    """Packed layers in place of the floats; what is no linear has no column factor."""
    from hfq.formats import ActivationSpec
    from hfq.reconstruction.columns import Solver, solve_block
    from hfq.reconstruction.direct import nearest_site

    if config.solver == "gptq":
        solver = Solver(percdamp=config.percdamp, clip=config.clip)
        solve_block(step, config.spec_for, solver, options=options)
        return
    for site in list(step.block.sites):
        more = options.get(site.name, {})
        if site.kind == "experts" and config.activation_for(site.name) != 16:
            more = {"activation": ActivationSpec(config.activation_for(site.name), symmetric=True),
                    "reason": "experts: inputs quantized per token, without column factors"}  # fmt: skip
        nearest_site(step, site, config.spec_for(site.name), clip=config.clip,
                     whole_scales=config.group_scale == "int", options=more)


def _without_data(model: Any, config: CrossQuantConfig, report: Report) -> None:
    """Dynamic mode asks nothing of the data: every site of the plan by itself."""
    from hfq.reconstruction.direct import WholeModel, pack_outside
    from hfq.reconstruction.divided import Group

    plan = config.plan(model)
    for block in plan.blocks:
        options = {}
        for site in block.sites:
            bits = config.activation_for(site.name)
            if site.kind in ("linear", "transposed") and bits != 16:
                group = Group([site], {site.name: bits}, config.alpha)
                options[site.name] = {"extra": group.extra, **_inputs(group, site, config)}
        with config.placement(block.module):
            _pack(WholeModel(model, report, block), options, config)
    pack_outside(plan, config, report, clip=config.clip)
