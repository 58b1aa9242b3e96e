"""A whole model whose rounded weights train with helpers beside them, on inputs whose ranges learn too; and its end, as
packed layers without helpers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from hfq.formats import ActivationSpec, QuantSpec
from hfq.layers import levels as following
from hfq.layers import substitute, swap, times
from hfq.layers.fake import fake_inputs
from hfq.layers.times import NoiseLevels
from hfq.report import Report
from hfq.rounding.level_clips import LearnedClips
from hfq.training.decay import Decay
from hfq.training.helped import HelpedWeight
from hfq.training.substitutes import Substitutes

__all__ = ["HelpedModel"]


class HelpedModel:
    """The student of a denoiser: every parameter is a free copy; the model itself stays the teacher.

    Args:
        model: float.
        sites: its linear and transposed sites that are quantized.
        spec_for: grid of a site's weight, by name.
        inputs: grid of a site's input, dynamic with factors, by name; others stay floats.
        levels: of the factors.
        decay: of a helper, for the largest rank that its weight has; ``None`` for no helper.
        start: of the factors, see :class:`hfq.rounding.level_clips.LearnedClips`.

    Attributes:
        weights: by name of the site.
        others: free copies of all other parameters (biases, norms, embeddings, tables), by name.
        clips: factors of the inputs' ranges.
        student: see :class:`hfq.training.substitutes.Substitutes`.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[Any], spec_for: Callable[[str], QuantSpec],
        inputs: Mapping[str, ActivationSpec], levels: NoiseLevels, decay: Callable[[int], Decay | None],
        start: float = 0.95,
    ) -> None:
        self.model, self.sites, self.inputs, self.levels = model, list(sites), dict(inputs), levels
        self.weights = {}
        for site in self.sites:
            matrix = substitute.matrix(site.module)
            self.weights[site.name] = HelpedWeight(matrix, spec_for(site.name), decay(min(matrix.shape)))
        held = {f"{name}.weight" for name in self.weights}
        self.others = {name: nn.Parameter(p.detach().float().clone()) for name, p in model.named_parameters()
                       if name not in held and p.is_floating_point()}  # fmt: skip
        self.clips = LearnedClips(self.inputs, levels, start).to(next(model.parameters()).device)
        made = {name: partial(_itself, p) for name, p in self.others.items()}
        made |= {f"{site.name}.weight": partial(_turned, site.module, self.weights[site.name]) for site in self.sites}
        modules = {site.module: self.inputs[site.name] for site in self.sites if site.name in self.inputs}
        factors = {site.module: self.clips.of(site.name) for site in self.sites if site.name in self.inputs}
        self.student = Substitutes(model, made, inputs=lambda: fake_inputs(modules, factors))

    @property
    def latents(self) -> list[nn.Parameter]:
        """The weights that are rounded."""
        return [weight.latent for weight in self.weights.values()]

    @property
    def rank(self) -> int:
        """The largest of a helper."""
        return max(weight.rank for weight in self.weights.values())

    def groups(self, lr: float, lr_clips: float) -> list[dict[str, Any]]:
        """Of an optimiser: everything at ``lr``, but the factors of inputs' ranges at ``lr_clips``."""
        learned = [p for weight in self.weights.values() for p in weight.parameters() if p.requires_grad]
        found = [{"params": [*learned, *self.others.values()], "lr": lr}]
        return [*found, {"params": list(self.clips.raw), "lr": lr_clips}] if self.inputs else found

    def advance(self, step: int, frozen: int = 0) -> None:
        """Prepare optimiser step ``step``; before step ``frozen`` rounded weights and their grids stay as they are."""
        for weight in self.weights.values():
            weight.advance(step)
            weight.freeze(step < frozen)

    def fade(self, step: int) -> None:
        """Give the helpers the factors of a step that was done."""
        for weight in self.weights.values():
            weight.fade(step)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, the student computes as if there were no helpers."""
        for weight in self.weights.values():
            weight.alone = True
        try:
            yield
        finally:
            for weight in self.weights.values():
                weight.alone = False

    def pack(self, report: Report) -> None:
        """Put what was trained into the model, packed layers in the place of its sites.

        Raises:
            QuantizationError: a helper is not gone.
        """
        codes = {name: weight.codes() for name, weight in self.weights.items()}
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name in self.others:
                    p.copy_(self.others[name])
        if self.inputs:
            times.install(self.model, self.levels)
        for name, one in codes.items():
            spec = self.inputs.get(name)
            first = None if spec is None else torch.ones(2 if spec.factor == 2 else 1)
            layer = swap.swap(self.model, name, one, report, activation=spec, activation_factor=first)
            if spec is not None:
                following.follow(layer, self.levels, {}, report.rows[name],
                                 factors={"weight": self.clips.factors(name)})  # fmt: skip


def _itself(parameter: torch.Tensor) -> torch.Tensor:
    return parameter


def _turned(module: nn.Module, weight: HelpedWeight) -> torch.Tensor:
    return substitute.as_weight(module, weight())
