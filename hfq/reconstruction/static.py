"""Packed layers whose inputs have stored ranges, and attention products with theirs: one block, stage by stage.

Every stage sees what the stages before it leave: inputs are measured on the stream of finished packed layers. A recipe
says how a range is found and how weights are rounded; :func:`pack_block` is the plain form, which the baselines use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hfq.calibration import ranges, static
from hfq.calibration.static import AttentionSample, Stage
from hfq.calibration.step import Step
from hfq.errors import QuantizationError
from hfq.formats import ActivationSpec, QuantSpec
from hfq.formats.activation import Parameters
from hfq.formats.log import LogSpec
from hfq.formats.twin import TwinSpec
from hfq.layers import products
from hfq.layers.inputs import InputSpec
from hfq.layers.products import AttentionProducts
from hfq.reconstruction import columns, direct
from hfq.reconstruction.columns import Solver
from hfq.report import Report

__all__ = [
    "Products", "Round", "asks_inputs", "attention_asked", "input_grid", "input_options", "outside_inputs",
    "pack_block", "pack_outside", "pack_products", "pack_sites", "round_columns", "round_nearest",
]  # fmt: skip

# Packs sites that read one tensor: ``(step, sites, options of step.swap by site name)``.
Round = Callable[[Step, Sequence[Any], Mapping[str, Mapping[str, Any]]], None]
_PLAIN = ("linear", "transposed", "conv")


@dataclass(frozen=True)
class Products:
    """What the products of attentions are quantized to.

    Attributes:
        bits: of queries, keys, values and probabilities.
        probabilities: "uniform", "log2", "sqrt2" or "twin".
        symmetric: grids of queries, keys and values.
        zero: how a logarithmic grid has zero, see :class:`hfq.formats.log.LogSpec`.
        observer: of the uniform ranges.
        value_bits: of values and probabilities, if other than those of queries and keys.
        score_bits: of what the softmax reads; ``None`` for floats.
    """

    bits: int
    probabilities: str = "uniform"
    symmetric: bool = False
    zero: str = "reserve"
    observer: str = "percentile"
    value_bits: int | None = None
    score_bits: int | None = None

    def bits_of(self, side: str) -> int:
        return self.bits if side in ("query", "key") or self.value_bits is None else self.value_bits

    @property
    def form(self) -> ActivationSpec | LogSpec | TwinSpec:
        """The format of the probabilities."""
        bits = self.bits_of("probabilities")
        if self.probabilities in ("log2", "sqrt2"):
            return LogSpec(bits, "2" if self.probabilities == "log2" else "sqrt2", self.zero)  # type: ignore[arg-type]
        if self.probabilities == "twin":
            return TwinSpec(bits, 0, "magnitude")
        return input_grid(bits)


def input_grid(bits: int, symmetric: bool = False) -> ActivationSpec:
    """The static grid of a whole tensor."""
    return ActivationSpec(bits, symmetric, "tensor", dynamic=False)


def input_options(spec: InputSpec | None, params: Parameters | None, **more: Any) -> dict[str, Any]:
    """What ``step.swap`` is told of a packed layer's inputs."""
    if spec is None:
        return dict(more)
    return {"activation": spec, "activation_params": params, **more}


def round_nearest(spec_for: Callable[[str], QuantSpec], clip: Callable[[str], str] | str = "none") -> Round:
    """Every weight to the closest point of its grid."""
    def pack(step: Step, sites: Sequence[Any], options: Mapping[str, Mapping[str, Any]]) -> None:
        for site in sites:
            how = clip if isinstance(clip, str) else clip(site.name)
            direct.nearest_site(step, site, spec_for(site.name), clip=how, options=options.get(site.name))

    return pack


def round_columns(spec_for: Callable[[str], QuantSpec], solver: Solver) -> Round:
    """Column by column on the second moment of the inputs, as they come to the layer before they are quantized."""
    def pack(step: Step, sites: Sequence[Any], options: Mapping[str, Mapping[str, Any]]) -> None:
        columns.solve_sites(step, sites, spec_for, solver, options=options)

    return pack


def pack_sites(
    step: Step, sites: Sequence[Any], bits_for: Callable[[str], int], pack: Round, *, observer: str = "minmax",
    symmetric: bool = False, seed: int = 0,
) -> None:
    """Measure what enters ``sites``, and replace them by packed layers with that range stored.

    Args:
        bits_for: width of a site's inputs, 16 for floats.
        observer: see :func:`hfq.calibration.ranges.fit`.
    """
    wanted = [site for site in sites if bits_for(site.name) != 16]
    plain = [site for site in wanted if site.kind in _PLAIN]
    options: dict[str, dict[str, Any]] = {}
    if plain:
        rows, known = static.observe_inputs(step, plain, seed=seed), {}
        for site in plain:
            spec = input_grid(bits_for(site.name), symmetric)
            key = (id(rows[site.name]), spec)
            if key not in known:
                known[key] = ranges.fit(rows[site.name], spec, observer)
            options[site.name] = input_options(spec, known[key], extra={"observer": observer})
    for site in wanted:
        if site.kind == "experts":
            spec = ActivationSpec(bits_for(site.name), symmetric)
            options[site.name] = {"activation": spec, "reason": "experts: a range a token, none is stored"}
    pack(step, sites, options)


def pack_products(
    step: Step, name: str, plan: Products, report: Report | None, *, seed: int = 0,
    fit: Callable[[AttentionSample, dict[str, Any]], dict[str, Any]] | None = None,
) -> bool:
    """Quantize the two products of an attention of the block; ``False`` (with a note) where that cannot be.

    Args:
        fit: may change the found ``{side: (format, parameters)}``.
    """
    module = step.model.get_submodule(name)
    if products.causal(module):
        if report is not None:
            report.note(products.NOT_CAUSAL)
        return False
    sample = static.observe_attention(step, name, seed=seed)
    grids = {side: input_grid(plan.bits_of(side), plan.symmetric) for side in ("query", "key", "value")}
    if plan.score_bits is not None:
        grids["scores"] = input_grid(plan.score_bits, plan.symmetric)
    found: dict[str, Any] = {side: (grid, ranges.fit(getattr(sample, side), grid, plan.observer))
                             for side, grid in grids.items()}
    found["probabilities"] = _probabilities(sample.probabilities, plan)
    found = found if fit is None else fit(sample, found)
    part = AttentionProducts(sample.query.shape[1], **{side: spec for side, (spec, _) in found.items()})
    part.label = name
    for side, (spec, params) in found.items():
        if spec is not None:
            part.set_range(side, params)
    products.install(step.model, name, part, report)
    return True


def _probabilities(x: torch.Tensor, plan: Products) -> tuple[Any, Parameters]:
    spec = plan.form
    if isinstance(spec, LogSpec):
        return spec, (ranges.fit_log(x, spec), None)
    if isinstance(spec, TwinSpec):
        spec, scale = ranges.fit_twin(x, spec, top=1.0)
        return spec, (scale, None)
    return spec, ranges.fit(x, spec, plan.observer)


def attention_asked(stage: Stage, step: Step, bits_for: Callable[[str], int]) -> bool:
    """Whether a stage is an attention some of whose own linears have quantized inputs: then its products do too."""
    inside = [site for site in step.block.sites if site.name.startswith(f"{stage.attention}.")]
    return bool(stage.attention) and any(bits_for(site.name) != 16 for site in inside)


def pack_block(
    step: Step, bits_for: Callable[[str], int], pack: Round, *, plan: Products | None = None,
    observer: str = "minmax", symmetric: bool = False, seed: int = 0,
) -> None:
    """All of a block: sites in execution order, each behind what is packed before it, and its attentions."""
    for stage in static.stages(step):
        if stage.sites:
            pack_sites(step, stage.sites, bits_for, pack, observer=observer, symmetric=symmetric, seed=seed)
        elif plan is not None and attention_asked(stage, step, bits_for):
            pack_products(step, stage.attention, plan, step.report, seed=seed)
        step.settle()


def outside_inputs(
    plan: Any, batches: Sequence[Mapping[str, Any]], bits_for: Callable[[str], int], *, observer: str = "minmax",
    symmetric: bool = False, seed: int = 0, only: Sequence[Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Options of ``swap`` with stored ranges for the sites outside the blocks, measured in the model as it is now."""
    sites = [site for site in (plan.outside if only is None else only)
             if bits_for(site.name) != 16 and site.kind in _PLAIN]
    if not sites:
        return {}
    rows = static.observe_outside(plan.model, batches, sites, seed=seed)
    missing = [site.name for site in sites if site.name not in rows]
    if missing:
        raise QuantizationError(f"the calibration data never reaches {', '.join(missing)}: leave it out with "
                                "modules_to_not_convert")
    options = {}
    for site in sites:
        spec = input_grid(bits_for(site.name), symmetric)
        params = ranges.fit(rows[site.name], spec, observer)
        options[site.name] = input_options(spec, params, extra={"observer": observer}, tokens=rows[site.name].shape[0])
    return options


def asks_inputs(config: Any) -> bool:
    """Whether a config asks for quantized inputs anywhere."""
    given = [config.activation_bits, *(values.get("activation_bits", 16) for values in config.overrides.values())]
    return any(bits != 16 for bits in given)


def pack_outside(
    plan: Any, config: Any, batches: Sequence[Mapping[str, Any]], report: Report, *, observer: str = "minmax",
    symmetric: bool = False, clip: str = "none", options: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """The sites outside the blocks, rounded to nearest, with stored ranges of their inputs behind the packed blocks.

    Args:
        config: gives ``spec_for(name)``, ``value_for(name, field)``, ``placement(module)`` and ``seed``.
        options: of sites that were calibrated otherwise; the others are measured here.
    """
    def bits_for(name: str) -> int:
        return config.value_for(name, "activation_bits")

    known = dict(options or {})
    left = [site for site in plan.outside if site.name not in known]
    known.update(outside_inputs(plan, batches, bits_for, observer=observer, symmetric=symmetric, seed=config.seed,
                                only=left))
    reason = "outside the blocks: rounded to nearest"
    measured = f"{reason}, inputs measured behind the packed blocks"
    direct.pack_outside(plan, config, report, clip=clip, options={
        site.name: {"reason": measured if site.name in known else reason, **known.get(site.name, {})}
        for site in plan.outside
    })
