"""OSTQuant (arXiv 2501.13987): rotations and scales learned through the whole model, merged into it, then GPTQ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hfq.config import HfqConfig, option
from hfq.errors import ConfigError
from hfq.report import Report, Row

__all__ = ["OSTQuantConfig", "quantize"]


@dataclass(kw_only=True, eq=False, repr=False)
class OSTQuantConfig(HfqConfig):
    """Orthogonal and scaling transforms, trained against the float model's most likely tokens.

    Args:
        rotate, rotate_heads: rotation of the residual stream, and of the values of every key-value head.
        scale_norms, scale_values, scale_hidden: scales after the norms, between value and output, between up and down.
        scale_queries: scales between query and key; "free" has one a channel as the released code, which under rotary
            embeddings is not the same function; "tied" shares one between the members of a rotary pair; or "none".
        scale_gates: scales between gate and up (the activation keeps one number a channel).
        online: Hadamard transforms while the model runs, in front of "down" projections, of "all" that write the
            stream, or "none". With ``kv_bits`` queries and keys get one too, unless "none".
        start: rotations start from eigenvectors of the weights' covariance times a Hadamard matrix ("womi"), alone
            ("klt"), from "hadamard", "random" or "identity".
        smooth: start the scales from activations, with this exponent; 0 starts from one.
        fold_rotation: fold the stream's rotation into embedding and head, which are then untied; ``False`` keeps them
            and turns the stream at both ends by a stored matrix. Where folding is impossible the matrix is used.
        steps: of training; 0 keeps the transforms where they start.
        batch_size, micro_batch: rows a step, and in one pass.
        rotate_lr, scale_lr, schedule: learning rates, falling to 0 on a "cosine", "linear", or "constant".
        top_k: most likely tokens that are compared; ``renormalise`` compares their distributions by themselves.
        train_weights: quantize weights in training; ``None`` does so where nothing else is quantized.
        mixed_precision: bfloat16 products in training.
        recompute: gradient checkpointing.
        rounding: "gptq" on the first ``rounding_samples`` rows with float activations, or "nearest".
        percdamp, clip, clip_norm, clip_grid, weigh_clip, act_order, static_groups, refine: of the rounding.
    """

    method = "ostquant"
    supports_activation_bits = True
    supports_kv_bits = True

    symmetric: bool = option(True, per_module=True)
    activation_symmetric: bool = option(False, per_module=True)
    calibration_samples: int = option(1000, range=(1, 1 << 20))
    calibration_seqlen: int = option(2048, range=(1, 1 << 20))
    rotate: bool = option(True)
    rotate_heads: bool = option(True)
    scale_norms: bool = option(True)
    scale_values: bool = option(True)
    scale_hidden: bool = option(True)
    scale_gates: bool = option(False)
    scale_queries: str = option("tied", choices=("tied", "free", "none"))
    online: str = option("down", choices=("down", "all", "none"))
    start: str = option("womi", choices=("womi", "klt", "hadamard", "random", "identity"))
    smooth: float = option(0.0, range=(0.0, 1.0))
    fold_rotation: bool = option(True)
    steps: int = option(150, range=(0, 1 << 20))
    batch_size: int = option(8, range=(1, 1 << 16))
    micro_batch: int = option(1, range=(1, 1 << 16))
    rotate_lr: float = option(0.0169, range=(0.0, 10.0))
    scale_lr: float = option(0.00179, range=(0.0, 10.0))
    schedule: str = option("cosine", choices=("cosine", "linear", "constant"))
    top_k: int = option(1000, range=(1, 1 << 24))
    renormalise: bool = option(False)
    train_weights: bool | None = option(None)
    mixed_precision: bool = option(False)
    recompute: bool = option(True)
    rounding: str = option("gptq", choices=("gptq", "nearest"))
    rounding_samples: int = option(128, range=(1, 1 << 20))
    percdamp: float = option(0.01, range=(0.0, 1.0))
    clip: str = option("mse", choices=("none", "mse"))
    clip_norm: float = option(2.4, range=(0.5, 8.0))
    clip_grid: int = option(100, range=(1, 1000))
    weigh_clip: bool = option(False)
    act_order: bool = option(False)
    static_groups: bool = option(False)
    refine: int = option(0, range=(0, 100))

    def check(self) -> None:
        if self.kv_bits == 1:
            raise ConfigError("kv_bits=1: ostquant quantizes keys and values to 2 bits at least")
        if self.act_order and self.group_size > 0 and not self.static_groups:
            raise ConfigError("act_order=True with groups needs static_groups=True: columns are taken out of order")

    def activation_for(self, name: str, group_size: int = -1) -> Any:
        """Grid of the input of the layer ``name``, ``None`` if it stays float."""
        from hfq.formats import ActivationSpec

        bits, symmetric = self.value_for(name, "activation_bits"), self.value_for(name, "activation_symmetric")
        return None if bits == 16 else ActivationSpec(bits, symmetric=symmetric, group_size=group_size)


def quantize(model: Any, data: Any, config: OSTQuantConfig, report: Report) -> None:
    """Steps 0 to 6 of the specification."""
    from hfq.layers import attention
    from hfq.training import learn
    from hfq.transforms.learned import Sites, head_groups
    from hfq.transforms.settle import settle

    plan, call = config.plan(model), config.one_call(model, data)
    parts = _attention(model, config, call) if config.kv_bits != 16 else {}
    if plan.sites:
        sites = Sites(
            config.rotate, config.rotate_heads, config.scale_norms, config.scale_values, config.scale_hidden,
            config.scale_gates, config.scale_queries, config.online, config.start,
        )
        made = learn.prepare(model, plan, call, sites, placement=config.placement, seed=config.seed, report=report)
        groups = head_groups(made.pairs) if config.online != "all" else {}
        inputs = {site.name: config.activation_for(site.name, groups.get(site.name, -1)) for site in plan.sites}
        _train(model, plan, data, made.transforms, inputs, parts, config, report)
        online = settle(
            model, plan, made.transforms, call=None if config.scale_queries == "free" else call,
            ends=made.ends if config.fold_rotation else None, untie=getattr(config._environment, "untie", None),
            placement=config.placement, report=report,
        )
        _round(plan, data, online, inputs, config, report)
    for name, make in parts.items():
        part = attention.install(model, name, make())
        asked = {"bits": config.kv_bits, "hadamard": part.hadamard}
        bits = part.cache.form.bits_per_element(1, part.head_dim)
        report.add(Row(f"{name}.{attention.CHILD}", kind="cache", asked=asked, bits=bits))


def _attention(model: Any, config: OSTQuantConfig, call: Any) -> dict[str, Any]:
    """What makes the quantizer of keys and values, by attention module."""
    from hfq.formats import ActivationSpec
    from hfq.kernels import hadamard
    from hfq.layers import attention, kv_install

    spec, turned = ActivationSpec(config.kv_bits), config.online != "none"
    return {place.name: partial(attention.AttentionQuant, place.head_dim, key=spec, value=spec,
                                hadamard=turned and hadamard.is_order(place.head_dim))
            for place in kv_install.places(model, call)}  # fmt: skip


def _train(
    model: Any, plan: Any, data: Any, transforms: Any, inputs: Mapping[str, Any], parts: Mapping[str, Any],
    config: OSTQuantConfig, report: Report,
) -> None:
    """Step 1 to 5: quantized inputs, keys and values; weights only where nothing else is quantized."""
    import torch

    from hfq.calibration.progress import state_digest
    from hfq.training import learn
    from hfq.training.progress import Saved
    from hfq.training.weights import FakeWeights

    weights_only = not parts and all(spec is None for spec in inputs.values())
    options, shape, saved = config.walk_options(), None, None
    if weights_only if config.train_weights is None else config.train_weights:
        matrices = [site for site in plan.sites if site.kind in ("linear", "transposed")]
        shape = FakeWeights({site: config.spec_for(site.name) for site in matrices}, clip=config.clip)
    if options["progress_dir"] is not None and config.steps:
        run = {**options["fingerprint"], "data": data.sha256, "model": state_digest(model)}
        saved = Saved(Path(options["progress_dir"]) / "transforms.safetensors", run)
    training = learn.Training(
        config.steps, config.batch_size, config.micro_batch, config.rotate_lr, config.scale_lr, config.schedule,
        config.seed, config.top_k, "renorm" if config.renormalise else "partial",
        torch.bfloat16 if config.mixed_precision else None, config.recompute, config.smooth, config.rounding_samples,
    )
    modules = {plan.site(name).module: spec for name, spec in inputs.items()}
    learn.train(
        model, plan, transforms, data, training, inputs=partial(learn.quantized, model, modules, parts), shape=shape,
        saved=saved, progress=options["progress"], report=report,
    )


def _round(plan: Any, data: Any, online: Any, inputs: Any, config: OSTQuantConfig, report: Report) -> None:
    """Step 6, on float activations; layers quantize their inputs from then on."""
    from hfq.calibration.data import first_rows
    from hfq.calibration.walk import walk
    from hfq.layers.rebuild import packed_modules
    from hfq.reconstruction.columns import Solver, solve_block
    from hfq.reconstruction.direct import nearest_block, pack_outside

    grid = {"clip": config.clip, "norm": config.clip_norm, "grid": config.clip_grid}
    names = ("percdamp", "weigh_clip", "act_order", "static_groups", "refine")
    solver = Solver(**{name: getattr(config, name) for name in names}, **grid)
    nearest = config.rounding == "nearest"
    rows = first_rows(data, 1 if nearest else config.rounding_samples)
    for step in walk(plan, rows, report=report, **config.walk_options()):
        if nearest:
            nearest_block(step, config.spec_for, online=online, **grid)
        else:
            solve_block(step, config.spec_for, solver, online=online)
    pack_outside(plan, config, report, clip=config.clip)
    for name, layer in packed_modules(plan.model).items():
        if inputs.get(name) is not None:
            layer.restore()
            layer.activation = inputs[name]
            report.rows[name].asked["activation"] = inputs[name].to_dict()
