"""EfficientDM (arXiv 2310.03270): a denoiser learns in low bits, without data, from what its float self predicts on the
way from noise to picture; low-rank updates are added to weights before they are rounded, and every input has a learned
grid at every noise level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hfq.config import HfqConfig, option
from hfq.errors import ConfigError
from hfq.graph import select
from hfq.report import Report

__all__ = ["EfficientDMConfig", "quantize"]

# Of UNets, and of transformers: what embeds timestep and text, the first and the last layer.
_ENDS = (
    "time_embedding", "timestep_embedder", "text_embedder", "caption_projection", "condition_embedder",
    "re:conv_in", "re:conv_out", "pos_embed.proj", "patch_embed.proj", "re:patch_embedding", "re:proj_out(_[12])?",
)  # fmt: skip
# Shortcuts over residual blocks, and what halves the picture between them.
_SHORTCUTS = ("conv_shortcut", "downsamplers")


@dataclass(kw_only=True, eq=False, repr=False)
class EfficientDMConfig(HfqConfig):
    """Distillation through QALoRA and TALSQ; record the calls of whole loops for it, ``hfq.record_calls``.

    Args:
        end_bits: of weights and inputs of the first and the last layer and of what embeds timestep and text, which do
            not learn; 16 for floats.
        keep_shortcuts: leave shortcuts and down-sampling convolutions in floats.
        rank: of the updates, cut to that of a layer's weight.
        learn: "updates" of that rank, or "weights", all of them (full quantization-aware training, to compare with).
        base: the update is added to the "float" weight, or to what its "codes" stand for.
        steps: one a denoising step: one call of the data, in their order, and then again.
        micro_batch: samples in one pass at most.
        update_lr: of updates, as a share of the mean step of the layer's grid.
        scale_lr, table_lr: of the steps of weights; of the steps and zero points of inputs.
        weight_decay: of the updates.
        schedule: of all rates: "linear" or "cosine" to 0, or "constant".
        guidance_scale: with which both halves are combined before they are compared, where the calls have both.
        condition_first: the half with the condition is the first one (class-conditional transformers).
        reduction: the loss of a step is the "sum" over all elements or their "mean".
        start: of the grids of inputs: one range for all noise levels ("shared"), or one for each ("levels").
        range_samples: rows that a range is searched on.
    """

    method = "efficientdm"
    supports_activation_bits = True

    activation_bits: int = option(4, range=(2, 8), also=(16,), per_module=True)
    calibration_samples: int = option(320, range=(1, 1 << 20))
    end_bits: int = option(8, range=(2, 8), also=(16,))
    keep_shortcuts: bool = True
    rank: int = option(32, range=(1, 1 << 16))
    learn: str = option("updates", choices=("updates", "weights"))
    base: str = option("float", choices=("float", "codes"))
    steps: int = option(16_000, range=(0, 1 << 24))
    micro_batch: int = option(1 << 16, range=(1, 1 << 16))
    update_lr: float = option(1 / 2500, range=(0.0, 1e3))
    scale_lr: float = option(1e-6, range=(0.0, 1.0))
    table_lr: float = option(5e-4, range=(0.0, 1.0))
    weight_decay: float = option(0.01, range=(0.0, 1e3))
    schedule: str = option("linear", choices=("linear", "cosine", "constant"))
    guidance_scale: float = option(1.5, range=(0.0, 100.0))
    condition_first: bool = False
    reduction: str = option("sum", choices=("sum", "mean"))
    start: str = option("shared", choices=("shared", "levels"))
    range_samples: int = option(32, range=(1, 1 << 20))

    def check(self) -> None:
        if self.group_size != -1:
            raise ConfigError(f"group_size={self.group_size}: efficientdm has one grid an output channel (-1)")

    @classmethod
    def fast(cls, **fields: Any) -> EfficientDMConfig:
        """A tenth of the steps, with rates ten times as large."""
        quick = {"steps": 1_600, "update_lr": 1 / 250, "scale_lr": 1e-5, "table_lr": 5e-3, "start": "levels"}
        return cls(**{**quick, **fields})

    def is_end(self, name: str) -> bool:
        return select.first_match(name, _ENDS) is not None

    def inputs_for(self, name: str) -> int:
        """Width of the input of a layer."""
        asked = self.value_for(name, "activation_bits")
        if self.is_end(name) and asked != 16 and "activation_bits" not in self.override_for(name):
            return self.end_bits
        return asked

    def spec_for(self, name: str) -> Any:
        if "bits" not in self.override_for(name):
            if self.keep_shortcuts and select.first_match(name, _SHORTCUTS) is not None:
                return None
            if self.is_end(name) and self.bits != 16:
                return self._spec({**self.override_for(name), "bits": self.end_bits})
        return super().spec_for(name)

    def plan(self, model: Any, ask: Any = ()) -> Any:
        """Every convolution and linear, the first and the last ones too."""
        from hfq import graph

        every = [site.name for site in graph.read(model).every_site if site.kind in ("conv", "linear", "transposed")]
        plan = super().plan(model, [*ask, *select.exactly(every)])
        plan.skipped.update({name: "shortcuts and down-sampling convolutions stay float" for name in plan.skipped
                             if select.first_match(name, _SHORTCUTS) is not None and self.bits != 16})
        return plan


def quantize(model: Any, data: Any, config: EfficientDMConfig, report: Report) -> None:
    """Steps 2 to 11; step 1 and the trajectories of step 9 are the calls."""
    from hfq.calibration import trajectories
    from hfq.layers import times
    from hfq.reconstruction.direct import unpackable
    from hfq.training import lowbit

    times.position_of(model)  # or an error: it is no denoiser
    plan, steps = config.plan(model), trajectories.timesteps_of(data)
    sites = [site for site in plan.sites if not unpackable(site)]
    for site in plan.sites:
        if why := unpackable(site):
            report.refuse(site.name, why, kind=site.kind, asked=config.spec_for(site.name).to_dict(), numel=site.numel)
    if not sites:
        return
    levels = times.NoiseLevels(sorted(set(steps), reverse=True))
    learned = [site.name for site in sites if not config.is_end(site.name)]
    starts = _starts(model, data, sites, [name for name in learned if config.start == "levels"], levels, config)  # 3
    rank = config.rank if config.learn == "updates" else None
    layers = lowbit.Layers(model, sites, config.spec_for, starts, levels, learned=learned, rank=rank,
                           codes=config.base == "codes", seed=config.seed)  # 4 to 6
    if learned:
        _distill(model, data, layers, config, report)
    if layers.inputs.specs:
        times.install(model, levels)
    layers.pack(report)  # 11


def _starts(
    model: Any, data: Any, sites: Any, apart: Any, levels: Any, config: EfficientDMConfig
) -> dict[str, Any]:
    """Ranges of the inputs; of the layers ``apart`` one for each level."""
    from hfq.reconstruction.static import input_grid
    from hfq.training import lowbit

    def grid(name: str) -> Any:
        bits = config.inputs_for(name)
        return None if bits == 16 else input_grid(bits)

    found, options = {}, {"rows": config.range_samples, "seed": config.seed}
    for which in (None, levels):
        own = [site for site in sites if (site.name in apart) == (which is not None)]
        found |= lowbit.starts(model, data, own, grid, levels=which, **options) if own else {}
    return found


def _distill(model: Any, data: Any, layers: Any, config: EfficientDMConfig, report: Report) -> None:
    """Steps 7 to 9."""
    from pathlib import Path

    import torch

    from hfq.calibration.progress import state_digest
    from hfq.reconstruction.loop import thinned
    from hfq.training.denoise import Denoising, Trajectories
    from hfq.training.loop import fit
    from hfq.training.progress import Saved

    options, saved, guided = config.walk_options(), None, bool(getattr(data, "guidance", False))
    if options["progress_dir"] is not None and config.steps:
        run = {**options["fingerprint"], "data": data.sha256, "model": state_digest(model)}
        saved = Saved(Path(options["progress_dir"]) / "distillation.safetensors", run, every=50)
    objective = Denoising(layers.student, guidance=config.guidance_scale if guided else None,
                          condition_first=config.condition_first, reduction=config.reduction)  # fmt: skip
    groups = layers.groups(config.update_lr, config.scale_lr, config.table_lr, config.weight_decay)
    curve = fit(
        objective, torch.optim.AdamW(groups), Trajectories(data, guided), steps=config.steps,
        micro_batch=config.micro_batch, schedule=config.schedule, saved=saved, progress=options["progress"],
        where="distillation",
    )  # fmt: skip
    report.curves["distillation"] = thinned(curve)
    if config.steps < len(data):
        report.note(f"{config.steps} steps for {len(data)} calls: the last ones were not used")
