"""Layer-wise quantization (arXiv 2406.17415): which block gets which width; any other method then does the rounding."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hfq.compose import ComposedConfig
from hfq.config import option
from hfq.errors import ConfigError
from hfq.report import Report

__all__ = ["LayerwiseQuantConfig", "quantize"]

_TARGETS = ("target_bits", "num_low_layers", "fraction_low")


@dataclass(kw_only=True, eq=False, repr=False)
class LayerwiseQuantConfig(ComposedConfig):
    """Blocks in order of importance: the first get ``high_bits``, the others ``low_bits``.

    Exactly one of ``target_bits``, ``num_low_layers`` and ``fraction_low`` says how many. ``bits`` holds for sites
    outside the blocks; ``overrides`` with bits hold before the map.

    Args:
        backend: the method that rounds; see :class:`hfq.compose.ComposedConfig`.
        score: "lim" (how much a block turns its input; one pass over the data) or "zd" (share of large weights).
        high_bits, low_bits: the two widths. ``mid_bits`` between them is used where the target lies nearer.
        target_bits: mean bits a weight that is not exceeded; with ``count_metadata`` scales and zero points count.
        num_low_layers, fraction_low: how many blocks, or which share of them, get ``low_bits``.
        lim_reduce: one cosine a token, or one a flattened sample.
        score_samples: calibration samples that the score looks at; ``None`` for all.
        z_threshold, two_sided, per_matrix: variants of "zd".
        separate_stacks: rank and budget encoder and decoder each for itself.
        importance: your own scores, block name → importance (higher keeps more bits); ``score`` is then not computed.
        bit_map: block name → bits. Filled in by the run and saved; when given, it is used as it is.
        scores, average_bits: filled in by the run: raw scores, and the mean bits reached ("nominal", "stored").
    """

    method = "layerwise_quant"

    score: str = option("lim", choices=("lim", "zd"))
    high_bits: int = option(4, range=(1, 8))
    low_bits: int = option(2, range=(1, 8))
    mid_bits: int | None = option(None, range=(1, 8))
    target_bits: float | None = option(None, range=(1.0, 16.0))
    num_low_layers: int | None = option(None, range=(0, 1 << 16))
    fraction_low: float | None = option(None, range=(0.0, 1.0))
    count_metadata: bool = False
    lim_reduce: str = option("token", choices=("token", "flatten"))
    score_samples: int | None = option(50, range=(1, 1 << 20))
    z_threshold: float = option(1.0, range=(0.0, 100.0))
    two_sided: bool = False
    per_matrix: bool = False
    separate_stacks: bool = False
    importance: Mapping[str, float] | None = None
    bit_map: Mapping[str, int] | None = None
    scores: Mapping[str, Any] | None = None
    average_bits: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        self._chosen = False  # whether a run, not the user, filled in bit_map
        super().__post_init__()

    @property
    def fixed(self) -> bool:
        """Whether the widths were given: nothing is scored then."""
        return self.bit_map is not None and not self._chosen

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        """The score may need data, and so may the backend."""
        scored = not self.fixed and self.importance is None and self.score == "lim"
        return scored or super().needs_calibration

    def check(self) -> None:
        given = [name for name in _TARGETS if getattr(self, name) is not None]
        if len(given) > 1 or not given and self.bit_map is None:
            raise ConfigError(f"exactly one of {', '.join(_TARGETS)} is needed, got {given or 'none'}")
        widths = [bits for bits in (self.high_bits, self.mid_bits, self.low_bits) if bits is not None]
        if any(high <= low for high, low in zip(widths, widths[1:], strict=False)):
            raise ConfigError(f"high_bits, mid_bits, low_bits = {widths}: each has to be below the one before")
        if self.mid_bits is not None and self.target_bits is None and self.bit_map is None:
            raise ConfigError("mid_bits needs target_bits")
        if self.target_bits is not None and not self.count_metadata and not self.low_bits <= self.target_bits:
            raise ConfigError(f"target_bits={self.target_bits}: at least low_bits={self.low_bits} is needed")
        # A width that the backend refuses is found here, before anything is computed.
        for bits in sorted({*widths, *(self.bit_map or {}).values(), self.bits} - {16}):
            self.backend_config({}, bits=bits)


def quantize(model: Any, data: Any, config: LayerwiseQuantConfig, report: Report) -> None:
    """Score the float blocks, choose their widths, and run the backend once with the widths as overrides."""
    from hfq.allocation import cost

    plan = config.plan(model)
    blocks = [block for block in plan.blocks if block.sites]
    if not blocks:  # nothing to choose: everything is skipped, or outside the blocks
        config.run_backend(model, data, config.backend_config(), report)
        return
    if not config.fixed:
        importance = _importance(plan, blocks, data, config)
        config.bit_map, config._chosen = _allocate(blocks, importance, config, report), True
    assert config.bit_map is not None
    unknown = set(config.bit_map) ^ {block.name for block in blocks}
    if unknown:
        raise ConfigError(f"bit_map and model differ in the blocks {sorted(unknown)[:5]}")
    overrides = {
        f"re:{re.escape(site.name)}": {"bits": config.bit_map[block.name]} for block in blocks for site in block.sites
    }
    backend = config.backend_config(overrides)
    config.average_bits = cost.averages((site for block in blocks for site in block.sites), backend.spec_for)
    if config.average_bits["nominal"] < 2.5:
        report.note(
            f"{config.average_bits['nominal']:.2f} bits on average: the ranking ignores how blocks act together, which "
            "matters below about 2.5 bits"
        )
    config.run_backend(model, data, backend, report)
    report.totals |= {name: getattr(config, name) for name in ("bit_map", "scores", "average_bits")}


def _importance(plan: Any, blocks: list[Any], data: Any, config: LayerwiseQuantConfig) -> dict[str, float]:
    """Importance of the blocks for which it is defined; raw scores are kept in ``config.scores``."""
    from hfq.allocation import sensitivity

    if config.importance is not None:
        missing = {block.name for block in blocks} - set(config.importance)
        if missing:
            raise ConfigError(f"importance has no value for {sorted(missing)[:5]}")
        config.scores = {"score": "given", "values": dict(config.importance)}
        return {block.name: float(config.importance[block.name]) for block in blocks}
    if config.score == "lim":
        options = {key: value for key, value in config.walk_options().items() if key in ("placement", "progress")}
        raw = sensitivity.input_modifications(
            plan, data, reduce=config.lim_reduce, samples=config.score_samples, **options
        )
    else:
        raw = sensitivity.zscore_shares(
            blocks, config.placement, threshold=config.z_threshold, two_sided=config.two_sided,
            per_matrix=config.per_matrix,
        )  # fmt: skip
    config.scores = {"score": config.score, "values": raw}
    sign = 1 if config.score == "lim" else -1  # a large share of large weights means: less important
    return {name: sign * value for name, value in raw.items()}


def _allocate(
    blocks: list[Any], importance: dict[str, float], config: LayerwiseQuantConfig, report: Report
) -> dict[str, int]:
    """Widths of all blocks; those without a score keep ``high_bits`` and count in the budget."""
    stacks = {block.stack for block in blocks}
    if config.separate_stacks and len(stacks) > 1:
        chosen: dict[str, int] = {}
        for stack in sorted(stacks):
            chosen |= _ranked([block for block in blocks if block.stack == stack], importance, config, report)
        return {block.name: chosen[block.name] for block in blocks}
    return _ranked(blocks, importance, config, report)


def _ranked(
    blocks: list[Any], importance: dict[str, float], config: LayerwiseQuantConfig, report: Report
) -> dict[str, int]:
    from hfq.allocation import greedy

    high, low = config.high_bits, config.low_bits
    scored = {block.name: importance[block.name] for block in blocks if block.name in importance}
    unscored = [block.name for block in blocks if block.name not in importance]
    for name in unscored:
        report.note(f"{name} has no score and keeps {high} bits")
    if config.target_bits is None:
        count = config.num_low_layers
        if count is None:
            assert config.fraction_low is not None
            count = int(config.fraction_low * len(blocks) + 1e-9)
        if count > len(scored):
            raise ConfigError(f"num_low_layers={count}: the model has {len(scored)} blocks with a score")
        chosen = greedy.lowest(scored, count, high, low)
    else:
        widths = [bits for bits in (high, config.mid_bits, low) if bits is not None]
        costs = {block.name: {bits: _cost(block, bits, config) for bits in widths} for block in blocks}
        size = sum(site.numel for block in blocks for site in block.sites)
        budget = config.target_bits * size - sum(costs[name][high] for name in unscored)
        chosen = greedy.walk(scored, costs, widths, budget)
    chosen |= dict.fromkeys(unscored, high)
    return {block.name: chosen[block.name] for block in blocks}


def _cost(block: Any, bits: int, config: LayerwiseQuantConfig) -> float:
    """Bits of a block; sites whose width is set by ``overrides`` cost what that says."""
    from hfq.allocation import cost

    total = 0.0
    for site in block.sites:
        spec = config.spec_for(site.name)
        if "bits" not in config.override_for(site.name):
            spec = spec.with_bits(bits)
        total += cost.site_bits(site, spec) if config.count_metadata else site.numel * spec.bits
    return total
