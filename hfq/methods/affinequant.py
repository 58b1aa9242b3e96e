"""AffineQuant (arXiv 2403.12544): affine transforms of what flows between layers, learned block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from hfq.config import HfqConfig, option
from hfq.errors import ConfigError
from hfq.report import Report, Row

__all__ = ["AffineQuantConfig", "quantize"]


@dataclass(kw_only=True, eq=False, repr=False)
class AffineQuantConfig(HfqConfig):
    """Matrices between norms, values, queries and the linears that read them; a gradual mask opens them.

    Args:
        epochs: passes over the data a block; ``None`` is 40 at two bits, else 20.
        let_lr, lwc_lr: learning rates of transforms and shifts, and of the learned ranges of the weights.
        alpha: exponent of the starting scales.
        sf: stability factor, damps what lies off the diagonals; ``None`` is 0.1 with quantized activations, else 0.01.
        ln_matrix: a full matrix after the norms, which runs online; ``None``: only with float activations.
        qk_matrix: matrices of queries and keys; ``None``: only with quantized activations; else scales.
        qk_mode: "rope_safe" keeps the model's function under rotary embeddings, "free" is the published code, which
            does not, "off" leaves queries and keys alone.
        aug_loss: also compare with the float block on the quantized stream; ``None``: at two bits.
        maps: "affine"; "diagonal" learns scales instead of every matrix (the baseline of this method); "none" only the
            ranges (with ``clipping=False`` and no epochs: round to nearest).
        shift: also learn shifts; norms without a bias then add one online.
        clipping: learn the range of the weights.
        loss: "mse" as published; "token_relative" weighs every token alike where some have massive activations.
        attention_bits: width of queries, keys and values; ``None`` is ``activation_bits``. ``kv_bits`` or a carried
            ``kv_cache`` decide about keys and values where they are given.
        batch_size: samples a step.
        max_condition: a run whose matrices get worse conditioned starts again with a tenth of ``sf``.
        mixed_precision: run the block in bfloat16; what is learned, inverses and the loss stay in float32.
    """

    method = "affinequant"
    supports_activation_bits: ClassVar[bool] = True
    supports_kv_bits: ClassVar[bool] = True

    calibration_samples: int = option(128, range=(1, 1 << 20))
    calibration_seqlen: int = option(2048, range=(1, 1 << 20))
    seed: int = option(2, range=(0, 2**63 - 1))
    epochs: int | None = option(None, range=(0, 10_000))
    let_lr: float = option(5e-3, range=(0.0, 1.0))
    lwc_lr: float = option(1e-2, range=(0.0, 1.0))
    alpha: float = option(0.5, range=(0.0, 1.0))
    sf: float | None = option(None, range=(0.0, 1.0))
    ln_matrix: bool | None = None
    qk_matrix: bool | None = None
    qk_mode: str = option("rope_safe", choices=("rope_safe", "free", "off"))
    aug_loss: bool | None = None
    maps: str = option("affine", choices=("affine", "diagonal", "none"))
    shift: bool = True
    clipping: bool = True
    loss: str = option("mse", choices=("mse", "relative", "token_relative"))
    attention_bits: int | None = option(None, range=(2, 8), also=(16,))
    batch_size: int = option(1, range=(1, 4096))
    max_condition: float = option(1e6, range=(1.0, 1e12))
    mixed_precision: bool = False

    def check(self) -> None:
        wanted = [name for name in ("ln_matrix", "qk_matrix") if getattr(self, name)]
        if wanted and self.maps != "affine":
            raise ConfigError(f"{wanted[0]}=True: maps={self.maps!r} learns no matrices, maps='affine' does")
        if self.qk_matrix and self.qk_mode == "off":
            raise ConfigError("qk_matrix=True: qk_mode='off' leaves queries and keys alone")
        if self.kv_bits == 1 and self.attention != 16:
            raise ConfigError("kv_bits=1: keys and values are learned with 2 bits at least")

    @property
    def attention(self) -> int:
        """Width of queries, keys and values after the default."""
        return self.activation_bits if self.attention_bits is None else self.attention_bits

    @property
    def passes(self) -> int:
        """Epochs after the default."""
        return (40 if self.bits == 2 else 20) if self.epochs is None else self.epochs

    @property
    def options(self) -> Any:
        """What the blocks learn, after the defaults."""
        from hfq.reconstruction.transformed import Options

        quantized = self.activation_bits != 16
        if self.maps == "none":
            return Options(norm="off", value="off", clip=self.clipping)
        affine = self.maps == "affine"
        matrix = affine and (not quantized if self.ln_matrix is None else self.ln_matrix)
        query = affine and (quantized if self.qk_matrix is None else self.qk_matrix)
        return Options(
            norm="matrix" if matrix else "vector", value="matrix" if affine else "vector",
            query="off" if self.qk_mode == "off" else "matrix" if query else "vector",
            rotary="free" if self.qk_mode == "free" else "safe", shift=self.shift, alpha=self.alpha,
            factor=(0.1 if quantized else 0.01) if self.sf is None else self.sf, clip=self.clipping,
        )


def quantize(model: Any, data: Any, config: AffineQuantConfig, report: Report) -> None:
    """Walk the blocks with both streams; learn each block's transforms and ranges, merge them, pack."""
    import torch

    from hfq.calibration.walk import generator, walk
    from hfq.graph import pairs
    from hfq.reconstruction.direct import pack_outside
    from hfq.reconstruction.transformed import BlockTransform, fit_transformed, targets_of_stream

    plan, walking = config.plan(model), config.walk_options()
    call = config.one_call(model, data)
    found = pairs.discover(plan, call, placement=walking["placement"], seed=config.seed)
    report.pairs = found.rows()
    attend = _attentions(model, call, config, report)
    second = config.bits == 2 if config.aug_loss is None else config.aug_loss
    for step in walk(plan, data, streams=("quantized", "float"), report=report, **walking):
        sites = [site for site in step.block.sites if site.kind in ("linear", "transposed")]
        if not sites:
            _pack(step, {}, None, config)
            continue
        random = generator(config.seed, step.index)
        targets = targets_of_stream(step) if second else None
        transform = BlockTransform(step, list(found), config.spec_for, config.options, random)
        attend(step.block.name)
        fit = fit_transformed(
            step, transform, epochs=config.passes, lr=config.let_lr, clip_lr=config.lwc_lr, second=targets,
            batch_size=config.batch_size, activations={site.module: _activation(site, config) for site in sites},
            most_condition=config.max_condition, generator=random, loss=config.loss,
            autocast=torch.bfloat16 if config.mixed_precision else None,
        )  # fmt: skip
        report.curves[step.block.name] = [fit.initial, *fit.curve]
        for key, reason in transform.reasons.items():
            report.note(f"{key}: {reason}")
        _pack(step, transform.freeze(), fit, config)
        for name, part in transform.added().items():
            numel = sum(p.numel() for p in part)
            bits = 8 * sum(p.nbytes for p in part) / numel
            report.add(Row(name, kind="part", status="attached", bits=bits, numel=numel,
                           reason="added by the transform, stored in the checkpoint"))
    pack_outside(plan, config, report)


def _activation(site: Any, config: AffineQuantConfig) -> Any:
    """Grid of a site's input: asymmetric, its range from each token."""
    from hfq.formats import ActivationSpec

    bits = config.value_for(site.name, "activation_bits")
    return None if bits == 16 else ActivationSpec(bits=bits)


def _attentions(
    model: Any, call: Callable[[], Any], config: AffineQuantConfig, report: Report
) -> Callable[[str], None]:
    """A function that quantizes queries, keys and values of a block's attention modules."""
    from hfq.formats import ActivationSpec
    from hfq.layers import attention

    widths: dict[str, int] = {}
    if config.attention != 16:
        names = {module: name for name, module in model.named_modules()}
        with attention.observing(model, lambda module, query, *_: widths.update({names[module]: query.shape[-1]})):
            call()
        if not widths:
            report.refuse("attention", "no attention goes through transformers' interface: its queries, keys and "
                          "values cannot be quantized (attention_bits=16 leaves them)", kind="attention")

    def attend(block: str) -> None:
        for name, width in widths.items():
            if name.startswith(f"{block}."):
                query = ActivationSpec(bits=config.attention)
                stored = query if config.kv_bits == 16 else ActivationSpec(bits=config.kv_bits)
                stored = None if config.kv_cache is not None else stored  # the carried method stores them
                attention.install(model, name, attention.AttentionQuant(width, query=query, key=stored, value=stored))

    return attend


def _pack(step: Any, codes: dict[str, Any], fit: Any, config: AffineQuantConfig) -> None:
    """Packed layers in place of the transformed floats; experts, which have no transform, round to nearest."""
    from hfq.reconstruction.direct import expert_matrices
    from hfq.rounding import nearest

    for site in list(step.block.sites):
        asked, spec = config.spec_for(site.name).to_dict(), config.spec_for(site.name)
        if site.name in codes:
            grid = _activation(site, config)
            more = {} if grid is None else {"activation": grid}
            step.swap(site, codes[site.name], asked=asked, extra=fit.to_dict(), **more)
        elif site.kind == "experts":
            solved = {name: [nearest.solve(w, spec) for w in expert_matrices(site, name)] for name in site.tensors}
            step.swap_experts(site, solved, asked=asked, reason="experts: rounded to nearest, without a learned range")
        else:
            step.report.refuse(site.name, f"no transform and no packed layer for sites of kind {site.kind!r}",
                               kind=site.kind, asked=asked, numel=site.numel)
