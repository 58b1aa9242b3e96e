"""NoisyQuant (arXiv 2211.16056): a fixed vector added to the inputs of a linear before they are coded, so that numbers
that pile up inside a bin are spread over it; the bias takes it out again. Weights and products stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfq.config import HfqConfig, option
from hfq.report import Report

if TYPE_CHECKING:
    import torch

__all__ = ["NoisyQuantConfig", "quantize"]


@dataclass(kw_only=True, eq=False, repr=False)
class NoisyQuantConfig(HfqConfig):
    """Noisy bias on top of a searched activation quantizer.

    Args:
        base: grids of the inputs: "linear" (symmetric), or "twin" (two grids where inputs are those of a GELU, and for
            the softmax).
        noise: add the vector; without it, the base quantizer alone.
        search_mean: also search a mean for the vector.
        clip_search_steps, mean_steps, noise_steps: candidates of the range, of the mean and of the size a step.
        coarse: candidates of a first pass of every search, refined around the best; 0 tries all of them.
        objective: what a search counts: the error of the "output", or of the "input" (for the vector only).
        noise_dist: "uniform", or "repo" as the public script draws it.
        search_rows: rows of calibration inputs that a search sees.
        fold: put the vector into the bias of a norm where nothing else reads the norm, and save the addition.
        attention: quantize both products of attentions (those that are not causal), without noise.
    """

    method = "noisyquant"
    supports_activation_bits = True

    bits: int = option(6, range=(1, 8), also=(16,), per_module=True)
    activation_bits: int = option(6, range=(2, 8), also=(16,), per_module=True)
    symmetric: bool = option(True, per_module=True)
    calibration_samples: int = option(1024, range=(1, 1 << 20))
    seed: int = option(42, range=(0, 2**63 - 1))
    base: str = option("linear", choices=("linear", "twin"))
    noise: bool = True
    search_mean: bool = True
    clip_search_steps: int = option(1000, range=(1, 1 << 16))
    mean_steps: int = option(200, range=(0, 1 << 16))
    noise_steps: int = option(1000, range=(1, 1 << 16))
    coarse: int = option(50, range=(0, 1 << 16))
    objective: str = option("output", choices=("output", "input"))
    noise_dist: str = option("uniform", choices=("uniform", "repo"))
    search_rows: int = option(4096, range=(1, 1 << 24))
    fold: bool = True
    attention: bool = True

    def inputs_for(self, name: str) -> int:
        return self.value_for(name, "activation_bits")


def quantize(model: Any, data: Any, config: NoisyQuantConfig, report: Report) -> None:
    """Walk the blocks; every layer sees the quantized outputs of those before it."""
    from hfq.calibration import static, walk
    from hfq.graph import pairs
    from hfq.reconstruction.static import Products, attention_asked, pack_products

    plan = config.plan(model)
    found = pairs.discover(plan, config.one_call(model, data), placement=config.placement, seed=config.seed)
    report.pairs += found.rows()
    products = None
    if config.attention and config.activation_bits != 16:
        form = "twin" if config.base == "twin" else "uniform"
        products = Products(config.activation_bits, form, symmetric=True, observer="mse")
    for step in walk.walk(plan, data, report=report, **config.walk_options()):
        folds = _folds(step, found.proven("norm", step.block.name), config)
        for number, stage in enumerate(static.stages(step)):
            if stage.attention:
                if products is not None and attention_asked(stage, step, config.inputs_for):
                    pack_products(step, stage.attention, products, report, seed=config.seed)
            else:
                _sites(step, stage.sites, folds, config, walk.generator(config.seed, 1000 * step.index + number))
            step.settle()
    _outside(plan, data, config, report)


def _folds(step: Any, proven: Sequence[Any], config: NoisyQuantConfig) -> dict[str, Any]:
    """The norm that may take the vector of a reader, by name of the reader."""
    from hfq.transforms.reparameterize import prove_shifts

    if not config.fold or not proven or not len(step):
        return {}
    args, kwargs = step.inputs[0]
    reasons = prove_shifts(step.block, args, kwargs, proven, seed=config.seed)
    return {reader.name: pair for pair in proven if not reasons[pair.sources[0].name] for reader in pair.readers}


def _sites(step: Any, sites: Sequence[Any], folds: Any, config: NoisyQuantConfig, random: Any) -> None:
    """Sites that read one tensor: those of one width share the grid and the vector."""
    from hfq.calibration.static import observe_inputs
    from hfq.formats import ActivationSpec
    from hfq.reconstruction.direct import nearest_site

    plain = [s for s in sites if s.kind in ("linear", "transposed") and config.inputs_for(s.name) != 16]
    for bits in sorted({config.inputs_for(site.name) for site in plain}):
        group = [site for site in plain if config.inputs_for(site.name) == bits]
        limit = config.search_rows * group[0].in_features
        rows = observe_inputs(step, group, limit=limit, seed=config.seed)[group[0].name]
        pair = folds.get(group[0].name)
        alone = pair is not None and {reader.name for reader in pair.readers} == {site.name for site in group}
        norm = pair.sources[0].part if alone else None
        for site, (codes, options) in zip(group, _noisy(group, rows, bits, norm, config, random), strict=True):
            step.swap(site, codes, **options)
    for site in (site for site in sites if site not in plain):
        options = {}
        if site.kind == "experts" and config.inputs_for(site.name) != 16:
            options = {"activation": ActivationSpec(config.inputs_for(site.name), True),
                       "reason": "experts: a range a token and no vector, whose size is tied to a stored step"}
        nearest_site(step, site, config.spec_for(site.name), options=options)


def _noisy(
    sites: Sequence[Any], rows: torch.Tensor, bits: int, norm: Any, config: NoisyQuantConfig, random: Any
) -> list[tuple[Any, dict[str, Any]]]:
    """Steps 1 to 6: codes of each weight, and what its packed layer is told; biases (and the norm) change in place."""
    from hfq.calibration import dither
    from hfq.formats import affine
    from hfq.layers.shift import ChannelShift
    from hfq.reconstruction.direct import site_matrix
    from hfq.rounding import nearest

    codes = [nearest.solve(site_matrix(site), config.spec_for(site.name)) for site in sites]  # 1
    weights = [affine.dequantize(one) for one in codes]
    spec, params = _base(dither.Product(rows, weights), bits, config)  # 2
    extra: dict[str, Any] = {"base": config.base}
    part = None
    if config.noise:
        u = dither.draw(rows.shape[1], random, config.noise_dist)  # 3
        found = dither.search_noise(  # 4 and 5
            dither.Product(rows, weights, config.objective), spec, params, u, noise_steps=config.noise_steps,
            mean_steps=config.mean_steps, search_mean=config.search_mean, coarse=config.coarse,
        )  # fmt: skip
        extra |= {key: float(f"{getattr(found, key):.6g}") for key in
                  ("size", "mean", "before", "after", "clipped_before", "clipped")}
        if bool(found.noise.any()):
            for site, weight in zip(sites, weights, strict=True):
                _take_out(site.module, weight, found.noise)  # 6
            if norm is not None:
                norm.set_bias(norm.get_bias() + found.noise.double().to(norm.get_bias().device))
                extra["folded"] = norm.name
            else:
                part = found.noise
    told = {"activation": spec, "activation_params": params, "extra": extra}
    return [(one, told if part is None else {**told, "online": ChannelShift(part)}) for one in codes]


def _base(product: Any, bits: int, config: NoisyQuantConfig) -> tuple[Any, Any]:
    """The grid of the inputs without noise."""
    from hfq.calibration import dither
    from hfq.formats.twin import TwinSpec
    from hfq.reconstruction.static import input_grid

    low = float(product.rows.min())
    if config.base == "twin" and -0.2 < low < 0:  # what a GELU gives: never below -0.17
        return dither.search_twin(product, TwinSpec(bits, 0), steps=min(config.clip_search_steps, 100))
    spec = input_grid(bits, symmetric=True)
    return spec, dither.search_scale(product, spec, steps=config.clip_search_steps, coarse=config.coarse)


def _take_out(module: Any, weight: torch.Tensor, noise: torch.Tensor) -> None:
    """``bias - W_q N``, with the weight as it is multiplied; a layer without a bias gets one."""
    import torch

    own = module.weight
    start = torch.zeros(weight.shape[0]) if module.bias is None else module.bias.detach().cpu()
    bias = start.double() - weight.double().cpu() @ noise.double()
    module.register_parameter("bias", torch.nn.Parameter(bias.to(own.device, own.dtype), requires_grad=False))


def _outside(plan: Any, data: Any, config: NoisyQuantConfig, report: Report) -> None:
    """Sites between the stacks, in the finished model; the vector is added there, not folded."""
    from hfq.calibration import static, walk
    from hfq.layers import swap
    from hfq.reconstruction.static import pack_outside

    for number, site in enumerate(list(plan.outside)):
        bits = config.inputs_for(site.name)
        if bits == 16 or site.kind not in ("linear", "transposed"):
            continue
        limit = config.search_rows * site.in_features
        rows = static.observe_outside(plan.model, data, [site], limit=limit, seed=config.seed)[site.name]
        random = walk.generator(config.seed, 1000 * (len(plan.blocks) + number))
        [(codes, options)] = _noisy([site], rows, bits, None, config, random)
        swap.swap(plan.model, site.name, codes, report, tokens=rows.shape[0],
                  reason="outside the blocks: measured behind the packed blocks", **options)
        plan.outside.remove(site)
    pack_outside(plan, config, data, report)
