"""QuEST (arXiv 2402.03666): behind learned rounding, the weights of two small groups of layers and the steps of all
activations are tuned through the whole model: first what embeds the timestep, then what attention hangs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfq.config import HfqConfig, option
from hfq.errors import ConfigError
from hfq.graph import select
from hfq.report import Report

__all__ = ["QuESTConfig", "quantize"]

# The inputs of the first and of the last layer of a denoiser have 8 bits.
_ENDS = ("conv_in", "conv_out", "pos_embed.proj", "proj_out", "proj_out_2")
_TIME = ("time_emb_proj", "norm1.linear", "adaln_single.linear", "timestep_embedder")
# What is critical: UNets that read a text, those without a condition, transformers.
_CRITICAL = {"text": ("ff.net.0.proj", "ff.net.2"), "plain": ("to_q", "to_k", "to_v"),
             "transformer": ("ff.net.2", "attn1.to_q", "attn1.to_k", "attn1.to_v")}  # fmt: skip


@dataclass(kw_only=True, eq=False, repr=False)
class QuESTConfig(HfqConfig):
    """Selective finetuning in two stages; calibrate it on ``hfq.record_calls``.

    Args:
        activation_range: where the grids of activations begin: "percentile" (the best of three), or "minmax".
        channels: a range for each input channel: "auto" for inputs of 4 bits and less, as published, "always", "never".
        channel_groups: most ranges of an input with one for each channel; of more channels, like ones share theirs.
        timewise: ranges of their own for every timestep of the calibration, each valid until the next one is reached,
            as in the released code; else one set for all, as in the paper.
        attention: quantize both products of attentions.
        softmax_bits: of the probabilities; 16 for floats.
        time_layers, critical_layers: patterns of the layers that are tuned in the first and in the second stage.
            ``None``: projections of the time embedding; feed-forward layers of UNets that read a text, projections to
            queries, keys and values of those that do not, the second layer of the feed-forward part and those of
            self-attention in transformers.
        time_embedding: tune the layers that embed the timestep too.
        time_steps, critical_steps: updates for every timestep of the calibration, in each stage.
        batch_size: rows of an update, all at one timestep.
        lr, lr_scales: of weights and of the steps of activations; the latter in the first stage is ``lr_time_scales``.
        local_loss: compare the outputs of the tuned layers in the second stage too, as in the paper.
        tune_weights: ``False`` trains the steps of activations alone.
        start: where tuned weights begin: "weight" with the directions of rounding that were learned, or "grid" at the
            rounded weight, rounded to nearest from there on.
        weight_range: "mse" searches the shrunken range with the least error ``|w - q(w)| ** 2.4``, "max" covers all.
        split_shortcut: grids of their own for both halves of a layer's input that joins a skip; not with ``channels``.
        rounding_steps, rounding_lr, rounding_batch_size: of learning the rounding of a unit.
        penalty, penalty_start, penalty_end, warmup: of its gates between 0 and 1.
    """

    method = "quest"
    supports_activation_bits = True

    activation_bits: int = option(4, range=(2, 8), also=(16,), per_module=True)
    calibration_samples: int = option(5120, range=(1, 1 << 20))
    activation_range: str = option("percentile", choices=("percentile", "minmax"))
    channels: str = option("auto", choices=("auto", "always", "never"))
    channel_groups: int = option(256, range=(1, 256))
    timewise: bool = False
    attention: bool = True
    softmax_bits: int = option(8, range=(2, 8), also=(16,))
    time_layers: Sequence[str] | None = None
    critical_layers: Sequence[str] | None = None
    time_embedding: bool = False
    time_steps: int = option(20, range=(0, 1_000_000))
    critical_steps: int = option(90, range=(0, 1_000_000))
    batch_size: int = option(8, range=(1, 4096))
    lr: float = option(1e-5, range=(0.0, 1.0))
    lr_scales: float = option(1e-4, range=(0.0, 1.0))
    lr_time_scales: float = option(1e-5, range=(0.0, 1.0))
    local_loss: bool = True
    tune_weights: bool = True
    start: str = option("weight", choices=("weight", "grid"))
    weight_range: str = option("mse", choices=("mse", "max"))
    split_shortcut: bool = False
    rounding_steps: int = option(20_000, range=(0, 1_000_000))
    rounding_lr: float = option(1e-3, range=(0.0, 1.0))
    rounding_batch_size: int = option(32, range=(1, 4096))
    penalty: float = option(0.01, range=(0.0, 1e3))
    penalty_start: float = option(20.0, range=(0.1, 100.0))
    penalty_end: float = option(2.0, range=(0.1, 100.0))
    warmup: float = option(0.2, range=(0.0, 0.99))

    def check(self) -> None:
        if self.group_size != -1:
            raise ConfigError(f"group_size={self.group_size}: quest has one grid an output channel (-1)")
        widths = [self.activation_bits, *(one.get("activation_bits", 16) for one in self.overrides.values())]
        if self.split_shortcut and any(map(self.grouped, widths)):
            raise ConfigError("split_shortcut=True: a range for each input channel has no halves: use channels='never'")

    def grouped(self, bits: int) -> bool:
        """Whether inputs of this width have a range for each channel."""
        return bits != 16 and (self.channels == "always" or (self.channels == "auto" and bits <= 4))

    def inputs_for(self, name: str) -> int:
        asked = self.override_for(name).get("activation_bits")
        ends = self.activation_bits != 16 and name in _ENDS
        return asked if asked is not None else max(8, self.activation_bits) if ends else self.activation_bits

    def plan(self, model: Any, ask: Any = ()) -> Any:
        """Every convolution and linear, the first and the last ones too."""
        from hfq import graph

        every = [site.name for site in graph.read(model).every_site if site.kind in ("conv", "linear", "transposed")]
        return super().plan(model, [*ask, *select.exactly(every)])

    def tuned(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """The layers of both stages among ``names``.

        Raises:
            ConfigError: there are none, or a pattern names none.
        """
        plain = not any(select.matches(name, "ff.net.2") for name in names)
        unet = any(select.matches(name, "time_emb_proj") for name in names)
        kind = "plain" if plain else "text" if unet else "transformer"
        time = self.time_layers or [*_TIME, *(["time_embedding"] if self.time_embedding else ())]
        found = [[name for name in names if select.first_match(name, patterns)]
                 for patterns in (time, self.critical_layers or _CRITICAL[kind])]  # fmt: skip
        for field, chosen in zip(("time_layers", "critical_layers"), found, strict=True):
            given = getattr(self, field)
            wrong = select.unused(given or (), names)
            if wrong or not chosen:
                raise ConfigError(f"{field}={given}: {wrong or 'the default'} names no layer that is quantized")
        return found[0], [name for name in found[1] if name not in found[0]]


def quantize(model: Any, data: Any, config: QuESTConfig, report: Report) -> None:
    """Round, find the grids of activations, tune in two stages, pack."""
    from hfq.calibration import extremes, level_grids
    from hfq.reconstruction import level_pack
    from hfq.training.level_inputs import LevelInputs
    from hfq.training.substitutes import Substitutes
    from hfq.training.tuned_weights import TunedWeights

    plan = config.traced_plan(model, data, units=True)
    if not plan.sites:
        return
    time, critical = config.tuned([site.name for site in plan.sites])
    levels = extremes.levels_of(model, data, each=config.timewise, rule="above")
    how = level_grids.How(config.inputs_for, config.grouped, config.channel_groups, config.activation_range,
                          config.attention, config.softmax_bits, seed=config.seed)
    rounded, cuts, grids = _round(model, plan, data, levels, how, config, report)  # 2, 3
    sites = [site for site in plan.sites if site.name in rounded]
    weights = TunedWeights(sites, {name: one.codes for name, one in rounded.items()}, {*time, *critical}, config.start)
    inputs = LevelInputs(model, grids, levels, apart=time)
    student = Substitutes(model, weights.made(), inputs=inputs.simulated)
    _tune(student, weights, inputs, (time, critical), data, config, report)  # 4 to 7
    weights.store_biases()
    level_pack.pack(model, sites, {name: weights.codes(name) for name in rounded}, inputs.learned(), levels, report,
                    cuts=cuts, told={name: one.told for name, one in rounded.items()})  # 8


def _round(model: Any, plan: Any, data: Any, levels: Any, how: Any, config: QuESTConfig, report: Report) -> Any:
    """Codes of all weights, cuts of shortcuts, grids of activations behind these codes; the model is float again."""
    from hfq.calibration import level_grids
    from hfq.calibration.reference import copy_of
    from hfq.graph import joins, trace
    from hfq.reconstruction import learned_units, phases

    cuts = joins.find(plan, trace.record(plan, config.one_call(model, data))) if config.split_shortcut else {}
    ranges = phases.Ranges(config.spec_for, config.inputs_for, config.weight_range, cuts=cuts, seed=config.seed)
    sharp = (config.penalty_start, config.penalty_end)
    course = phases.Course(config.rounding_steps, config.rounding_lr, batch_size=config.rounding_batch_size,
                           penalty=config.penalty, sharp=sharp, warmup=config.warmup)
    full = copy_of(model)
    rounded = learned_units.learn(plan, config.traced_plan(full, data, units=True), data, ranges, course, report,
                                  seed=config.seed, **config.walk_options("rounding"))
    sites = [site for site in plan.sites if site.name in rounded]
    grids = level_grids.measure(model, data, sites, levels, how, report)
    for site in sites:
        site.module.weight.data.copy_(full.get_submodule(site.name).weight)
    return rounded, cuts, grids


def _tune(student: Any, weights: Any, inputs: Any, layers: Any, data: Any, config: QuESTConfig, report: Report) -> None:
    from hfq.calibration import trajectories
    from hfq.calibration.progress import state_digest
    from hfq.training.progress import Saved
    from hfq.training.selective import Stage, tune

    (time, critical), options = layers, config.walk_options()
    tuned = [weights.parameters(names) if config.tune_weights else [] for names in layers]
    stages = [
        Stage("time", tuned[0], list(inputs.apart.scale), config.lr, config.lr_time_scales, time, config.time_steps),
        Stage("critical", tuned[1], list(inputs.others.scale), config.lr, config.lr_scales,
              critical if config.local_loss else (), config.critical_steps),
    ]  # fmt: skip
    whole = sum(p.numel() for p in student.model.parameters())
    report.totals["tuned_share"] = round(sum(p.numel() for part in tuned for p in part) / whole, 6)
    folder = options["progress_dir"]
    run = {**options["fingerprint"], "data": data.sha256, "model": state_digest(student.model)} if folder else {}
    saved = {stage.name: Saved(Path(folder) / f"{stage.name}.safetensors", run) for stage in stages if folder}
    tune(student, stages, data, report, batch_size=config.batch_size, seed=config.seed, saved=saved,
         progress=options["progress"], looked=trajectories.one_each(data))
