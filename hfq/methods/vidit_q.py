"""ViDiT-Q (arXiv 2406.02540): tokens of diffusion transformers on grids of their own while they run, channels balanced
by a scale and a rotation in front of weights that are rounded once, and widths by layer and part of the schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfq.config import HfqConfig, option
from hfq.errors import ConfigError
from hfq.graph import select
from hfq.report import Report
from hfq.widths import check_known

__all__ = ["ViDiTQConfig", "quantize"]

# Embeddings, modulation by the timestep, the last projection, and what reads the text.
_FREEZE = ["re:.*embed.*", "re:.*norm.*", "re:proj_out.*", "re:.*ada_?ln.*", "caption_projection", "final_layer",
           "t_block", "attn2.to_k", "attn2.to_v"]  # fmt: skip
_METRICS = {"attn2": "guidance", "re:.*temp.*": "frames", "*": "output"}


@dataclass(kw_only=True, eq=False, repr=False)
class ViDiTQConfig(HfqConfig):
    """Dynamic inputs, balanced channels, and with ``target_bits`` widths by layer and interval of the schedule.

    Args:
        freeze: patterns of layers that stay floats; convolutions do in any case.
        scale, rotate: the two halves of the balance, for all layers or by ``overrides``.
        alpha: exponent of the weight in the scale: 1 leaves the sizes of channels in the inputs.
        target_bits: mean width of the weights over layers and intervals; ``None`` has ``bits`` everywhere.
        widths: to choose from.
        intervals: into which the schedule is divided, from noise to image, with equally many recorded timesteps.
        metrics: pattern → what of the model's output shows the damage of the layers that it names (the first one
            counts): "output", "guidance" (the difference of the two halves: what the prompt changes) or "frames" (what
            moves in a video). Layers of one metric share a budget.
        score_calls: recorded calls of each interval that scores are measured on, at most.
        schedule: layer → width in each interval. Filled in by the run; when given (with ``edges``), used as it is.
        edges: falling timesteps between the intervals. Filled in by the run.
        average_bits: filled in by the run.
    """

    method = "vidit_q"
    supports_activation_bits = True

    activation_bits: int = option(8, range=(2, 8), also=(16,), per_module=True)
    freeze: Sequence[str] = option(_FREEZE)
    scale: bool = option(True, per_module=True)
    rotate: bool = option(True, per_module=True)
    alpha: float = option(0.5, range=(0.0, 1.0), per_module=True)
    target_bits: float | None = option(None, range=(1.0, 8.0))
    widths: Sequence[int] = option([4, 6, 8])
    intervals: int = option(4, range=(1, 64))
    metrics: Mapping[str, str] = option(_METRICS)
    score_calls: int = option(8, range=(1, 1 << 20))
    schedule: Mapping[str, Any] | None = None
    edges: Sequence[float] | None = None
    average_bits: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        self._chosen = False  # whether a run, not the user, filled in the schedule
        super().__post_init__()

    def check(self) -> None:
        if not self.widths or not all(1 <= bits <= 8 for bits in self.widths):
            raise ConfigError(f"widths={list(self.widths)}: widths from 1 to 8 are needed")
        if self.target_bits is not None and not min(self.widths) <= self.target_bits <= max(self.widths):
            raise ConfigError(f"target_bits={self.target_bits}: widths={list(self.widths)} have no such mean")
        for pattern, metric in self.metrics.items():
            if metric not in ("output", "guidance", "frames"):
                raise ConfigError(f"metrics[{pattern!r}]={metric!r}: 'output', 'guidance' or 'frames'")
        if (self.schedule is None) != (self.edges is None):
            raise ConfigError("schedule and edges belong together: give both or none")
        for name, row in (self.schedule or {}).items():
            whole = isinstance(row, Sequence) and all(type(bits) is int and 1 <= bits <= 8 for bits in row)
            if not whole or len(row) != len(self.edges or ()) + 1:
                raise ConfigError(f"schedule[{name!r}]={row!r}: {len(self.edges or ()) + 1} widths from 1 to 8 are "
                                  "needed, one more than there are edges")

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        return self.scale or self.target_bits is not None

    def widths_for(self, name: str) -> list[int]:
        """Width of a layer in each interval; one number where it is always the same."""
        row = [] if "bits" in self.override_for(name) else (self.schedule or {}).get(name, [])
        return list(row) if len(set(row)) > 1 else [row[0] if row else self.value_for(name, "bits")]

    def choose(self, schedule: Mapping[str, Any] | None, edges: Sequence[float] | None) -> None:
        """Set what a run chose; ``None`` before it chooses again."""
        self.schedule, self.edges, self._chosen = schedule, edges, schedule is not None

    def plan(self, model: Any, ask: Sequence[str] = ()) -> Any:
        """The linears that nothing freezes, unless an override gives one of those bits."""
        from hfq.graph.leave import leave

        def reason(site: Any) -> str | None:
            if site.kind not in ("linear", "transposed"):
                return f"{site.kind}: this method quantizes linears"
            pattern = select.first_match(site.name, self.freeze)
            asked = "bits" in self.override_for(site.name)
            return None if pattern is None or asked else f"frozen by pattern {pattern!r}"

        plan = super().plan(model, ask)
        leave(plan, reason)
        return plan


def quantize(model: Any, data: Any, config: ViDiTQConfig, report: Report) -> None:
    """Sizes of channels over the whole trajectory, widths, and then every layer by itself: balance, round, pack."""
    from hfq.calibration import columns
    from hfq.reconstruction.dynamic import DynamicLayers

    plan = config.plan(model) if data is None else config.traced_plan(model, data)
    check_known("schedule", config.schedule or {}, [site.name for site in plan.sites])
    seen = {} if data is None else columns.channel_maxima(model, data, plan.sites)
    for site in [site for site in plan.sites if data is not None and site.name not in seen]:
        report.refuse(site.name, "the calibration data never reaches this module", kind=site.kind, numel=site.numel)
    whole = [list(group) for block in plan.blocks for group in block.groups] + [[site] for site in plan.outside]
    groups = [[site for site in group if site.name not in report.rows] for group in whole]
    sites = [site for group in groups for site in group]
    if not sites:
        return
    parts = {name: found for group in groups for name, found in _balance(group, seen, config).items()}
    layers = DynamicLayers(config.spec_for, lambda name: config.value_for(name, "activation_bits"), parts,
                           tokens={name: rows for name, (_, rows) in seen.items()})
    if config.target_bits is not None and (config.schedule is None or config._chosen):
        config.choose(None, None)
        config.choose(*_allocate(model, data, plan, sites, layers, config, report))
    for site in sites:
        with config.placement(site.module):
            layers.pack(model, site, config.widths_for(site.name), config.edges or (), report)
    total = sum(site.numel for site in sites)
    mean = sum(site.numel * sum(row) / len(row) for site in sites if (row := config.widths_for(site.name))) / total
    config.average_bits = {"nominal": mean, "stored": report.stored_bits() / total}
    report.totals |= {name: getattr(config, name) for name in ("schedule", "edges", "average_bits")}


def _balance(group: Sequence[Any], seen: Mapping[str, Any], config: ViDiTQConfig) -> dict[str, list[Any]]:
    """Steps 5 and 6 for linears that read one tensor: those with the same options share scale and rotation."""
    import torch

    from hfq.reconstruction.direct import site_matrix
    from hfq.transforms.balance import balanced

    kinds: dict[tuple[Any, ...], list[Any]] = {}
    for site in group:
        if config.value_for(site.name, "activation_bits") != 16:
            key = tuple(config.value_for(site.name, field) for field in ("alpha", "scale", "rotate"))
            kinds.setdefault(key, []).append(site)
    found = {}
    for (alpha, scale, rotate), sites in kinds.items():
        size = seen[sites[0].name][0] if sites[0].name in seen else torch.ones(sites[0].in_features)
        # One seed: inputs of one width have the same signs, so that they can be shared without data too.
        parts = balanced([site_matrix(site) for site in sites], size, alpha=alpha, scale=scale, rotate=rotate,
                         generator=torch.Generator().manual_seed(config.seed))
        found |= {site.name: own for site, own in zip(sites, parts, strict=True)}
    return found


def _allocate(
    model: Any, data: Any, plan: Any, sites: Sequence[Any], layers: Any, config: ViDiTQConfig, report: Report
) -> tuple[dict[str, list[int]], list[float]]:
    """Step 9: damage of every part of a block in every interval at every width; an integer program a metric."""
    from hfq.allocation.measured import ScoreBook
    from hfq.allocation.scheduled import schedule_widths
    from hfq.calibration import trajectories
    from hfq.evaluation.similarity import signal_to_noise

    edges = trajectories.edges_of(trajectories.timesteps_of(data), config.intervals)
    families: dict[str, dict[str, list[Any]]] = {}
    for site in sites:
        metric = config.metrics.get(select.first_match(site.name, config.metrics) or "", "output")
        if metric == "guidance" and not getattr(data, "guidance", False):
            report.note("the calls have one half of guidance: what the prompt changes is scored by the whole output")
            metric = "output"
        families.setdefault(metric, {}).setdefault(plan.part_of(site), []).append(site)
    known = {"data": data.sha256, "sites": [site.name for site in sites], "edges": edges}
    known |= {name: getattr(config, name) for name in ("activation_bits", "alpha", "scale", "rotate", "overrides",
                                                       "metrics", "score_calls", "group_size", "symmetric", "seed")}
    book = ScoreBook(None if config.work_dir is None else f"{config.work_dir}/scores.json", known)
    chosen = schedule_widths(model, data, families, layers.layer, signal_to_noise, edges=edges, widths=config.widths,
                             target=config.target_bits or 0.0, calls=config.score_calls, book=book,
                             progress=config.walk_options()["progress"])
    return chosen, edges
