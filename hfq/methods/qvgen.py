"""QVGen (arXiv 2505.11497): quantization-aware training of video diffusion transformers by distillation, with a
low-rank module beside every rounded weight whose rank decays to nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hfq.config import HfqConfig, option
from hfq.errors import ConfigError
from hfq.report import Report

__all__ = ["QVGenConfig", "quantize"]


@dataclass(kw_only=True, eq=False, repr=False)
class QVGenConfig(HfqConfig):
    """Weights, biases, norms, grids and ranges train together; calibrate it on ``hfq.record_calls``.

    Weights have float zero points a channel; every token's range is clipped by learned factors of its lower and upper
    end, which belong to one of ``clip_groups`` equal parts of the noise schedule.

    Args:
        rank: of the module beside a weight; 0 is plain LSQ training. Smaller layers have the largest rank they can.
        shrink: share of the module's components that fades in a phase; 1 fades all of them together.
        decay: how they fade, "cosine" or "linear".
        removal: "phases"; "at_once" keeps the module whole to the last step and takes it away then (an ablation).
        module_warmup: first steps, in which the module and the rest learn, and rounded weights do not.
        steps: in all; phases are equally long.
        batch_size: rows in one pass, at most.
        calls_per_step: recorded calls that a step takes, of one timestep each.
        lr, lr_clips: of everything, and of the clipping; a cosine after a rise over ``lr_warmup`` of the steps.
        weight_decay, beta1, beta2, clip_norm: of AdamW; longer gradients are scaled down to ``clip_norm``.
        clip_groups, clip_start: parts of the schedule; where the sigmoids of the factors start.
        check_calls: recorded calls on which the loss is measured, with and without the module, where a phase ends.
    """

    method = "qvgen"
    supports_activation_bits = True
    zero_point: ClassVar[str] = "float"

    activation_bits: int = option(4, range=(2, 8), also=(16,), per_module=True)
    rank: int = option(32, range=(0, 4096))
    shrink: float = option(0.5, range=(0.01, 1.0))
    decay: str = option("cosine", choices=("cosine", "linear"))
    removal: str = option("phases", choices=("phases", "at_once"))
    module_warmup: int = option(0, range=(0, 1_000_000))
    steps: int = option(2000, range=(1, 10_000_000))
    batch_size: int = option(8, range=(1, 4096))
    calls_per_step: int = option(8, range=(1, 4096))
    lr: float = option(3e-5, range=(0.0, 1.0))
    lr_clips: float = option(1e-2, range=(0.0, 1.0))
    lr_warmup: float = option(0.1, range=(0.0, 1.0))
    weight_decay: float = option(1e-4, range=(0.0, 1.0))
    beta1: float = option(0.9, range=(0.0, 0.9999))
    beta2: float = option(0.95, range=(0.0, 0.9999))
    clip_norm: float = option(1.0, range=(1e-6, 1e6))
    clip_groups: int = option(50, range=(1, 1000))
    clip_start: float = option(0.95, range=(0.01, 0.999))
    check_calls: int = option(8, range=(0, 4096))

    def check(self) -> None:
        if self.group_size != -1:
            raise ConfigError(f"group_size={self.group_size}: qvgen has one grid an output channel (-1)")
        if self.rank:
            self.schedule(self.rank)

    def schedule(self, rank: int) -> Any:
        """The decay of a module of ``rank``; ``None`` without one.

        Raises:
            ConfigError: there are fewer steps than phases.
        """
        from hfq.training.decay import Decay

        rank = min(rank, self.rank)
        if not rank:
            return None
        if self.removal == "at_once":
            return Decay(rank, 1, 1.0, self.decay, self.steps - 1)
        phases, steps = len(Decay(self.rank, 1, self.shrink).ranks) - 1, self.steps - self.module_warmup
        if steps < phases:
            raise ConfigError(f"steps={self.steps}: rank {self.rank} takes {phases} phases to decay, one step each at "
                              f"least, after module_warmup={self.module_warmup}")
        return Decay(rank, steps // phases, self.shrink, self.decay, self.module_warmup)

    def plan(self, model: Any, ask: Sequence[str] = ()) -> Any:
        """Every linear, the first and the last ones too; convolutions stay floats."""
        from hfq import graph
        from hfq.graph import select
        from hfq.graph.leave import leave

        kinds = ("linear", "transposed")
        every = [site.name for site in graph.read(model).every_site if site.kind in kinds]
        plan = super().plan(model, [*ask, *select.exactly(every)])
        leave(plan, lambda site: None if site.kind in kinds else f"{site.kind}: this method quantizes linears")
        return plan


def quantize(model: Any, data: Any, config: QVGenConfig, report: Report) -> None:
    """Steps 1 to 9 of the specification."""
    import torch

    from hfq.training.denoise import Denoising, Trajectories
    from hfq.training.loop import Gradients, fit

    plan = config.plan(model)
    if not plan.sites:
        return
    calls = data.cut(config.batch_size) if hasattr(data, "cut") else data
    helped = _student(model, plan, data, config)  # 1 to 4
    objective = Denoising(helped.student, reduction="mean")  # 7
    checks: list[dict[str, float]] = []
    gradients = Gradients(config.clip_norm, helped.latents)

    def before(step: int) -> None:
        """5 and 6: the module's factors follow from the number of the step."""
        helped.fade(max(step - 1, 0))
        if config.check_calls and step and _phase(config, step) != _phase(config, step - 1):
            checks.append(_check(helped, objective, calls, step, config.check_calls))
        helped.advance(step, config.module_warmup)

    optimizer = torch.optim.AdamW(helped.groups(config.lr, config.lr_clips), betas=(config.beta1, config.beta2),
                                  weight_decay=config.weight_decay)  # 8  # fmt: skip
    report.curves["loss"] = fit(
        objective, optimizer, Trajectories(calls, together=config.calls_per_step, seed=config.seed), steps=config.steps,
        micro_batch=config.batch_size, schedule="cosine", warmup=config.lr_warmup, before=before, gradients=gradients,
        saved=_saved(model, data, config, {"norms": gradients.norms, "checks": checks}),
        progress=config.walk_options()["progress"], where="qvgen",
    )  # fmt: skip
    if config.check_calls:
        checks.append(_check(helped, objective, calls, config.steps, config.check_calls))
    helped.advance(config.steps)
    report.curves["gradient norm"] = list(gradients.norms)
    report.totals["module"] = checks
    helped.pack(report)  # 9


def _student(model: Any, plan: Any, data: Any, config: QVGenConfig) -> Any:
    from hfq.formats import ActivationSpec
    from hfq.layers.times import NoiseLevels
    from hfq.training.helped_model import HelpedModel

    inputs = {}
    for site in plan.sites:
        bits = config.value_for(site.name, "activation_bits")
        if bits != 16:
            symmetric = config.value_for(site.name, "symmetric")
            inputs[site.name] = ActivationSpec(bits, symmetric, factor=True if symmetric else 2)
    last = getattr(getattr(data, "record", None), "train_steps", None) or 1000
    levels = NoiseLevels.even(config.clip_groups, last)
    return HelpedModel(model, plan.sites, config.spec_for, inputs, levels, config.schedule, config.clip_start)


def _phase(config: QVGenConfig, step: int) -> int:
    schedule = config.schedule(config.rank)
    return 0 if schedule is None else schedule.phase(step)


def _check(helped: Any, objective: Any, calls: Any, step: int, count: int) -> dict[str, float]:
    """The loss before step ``step`` with and without the module, on calls from all over the data."""
    some = [calls[i * len(calls) // min(count, len(calls))] for i in range(min(count, len(calls)))]
    found = {"step": step, "rank": helped.rank, "with": objective.mean(some)}
    with helped.alone():
        return {**found, "without": objective.mean(some)}


def _saved(model: Any, data: Any, config: QVGenConfig, kept: dict[str, list[Any]]) -> Any:
    from pathlib import Path

    from hfq.calibration.progress import state_digest
    from hfq.training.progress import Saved

    options = config.walk_options()
    if options["progress_dir"] is None:
        return None
    run = {**options["fingerprint"], "data": data.sha256, "model": state_digest(model)}
    return Saved(Path(options["progress_dir"]) / "training.safetensors", run, kept=kept)
