"""Transforms of a whole model, from its proven pairs to merged weights, trained against the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from hfq.formats import ActivationSpec
from hfq.graph import gates as graph_gates
from hfq.graph import pairs as graph_pairs
from hfq.graph.ends import Ends, ends_of
from hfq.graph.pairs import PairReport
from hfq.graph.read import Plan
from hfq.graph.trace import order_groups
from hfq.layers import attention
from hfq.layers.fake import fake_inputs
from hfq.report import Report
from hfq.training.distill import Distillation
from hfq.training.loop import ProgressBar, fit
from hfq.training.losses import top_divergence
from hfq.training.progress import Saved
from hfq.training.start import smooth_scales
from hfq.training.student import Shape, Student
from hfq.transforms.learned import Sites, build
from hfq.transforms.manifold import ManifoldAdam, parameter_groups
from hfq.transforms.sites import TransformSet

__all__ = ["Prepared", "Training", "prepare", "quantized", "train"]

Placement = Callable[[nn.Module], AbstractContextManager[Any]]


@dataclass(eq=False)
class Prepared:
    """The transforms of a model, the pairs they came from, and what lies outside the blocks of rotated streams."""

    transforms: TransformSet
    pairs: PairReport
    ends: dict[str, Ends]


@dataclass(frozen=True)
class Training:
    """How transforms are trained.

    Attributes:
        steps, batch_size, micro_batch, schedule, seed: of :func:`hfq.training.loop.fit`.
        rotation_lr, scale_lr: learning rates.
        top_k, mode: of :func:`hfq.training.losses.top_divergence`.
        autocast: dtype of the products, or ``None``.
        recompute: gradient checkpointing.
        smooth: exponent of scales that start from activations; 0 starts from one. On ``smooth_rows`` rows.
    """

    steps: int = 150
    batch_size: int = 8
    micro_batch: int = 1
    rotation_lr: float = 0.0169
    scale_lr: float = 0.00179
    schedule: str = "cosine"
    seed: int = 0
    top_k: int = 1000
    mode: str = "partial"
    autocast: torch.dtype | None = None
    recompute: bool = True
    smooth: float = 0.0
    smooth_rows: int = 128


def prepare(
    model: nn.Module,
    plan: Plan,
    call: Callable[[], Any],
    sites: Sites,
    *,
    placement: Placement | None = None,
    seed: int = 0,
    report: Report | None = None,
) -> Prepared:
    """Find out what the model allows and make the transforms where they start; norms of the streams are folded.

    Args:
        plan: of ``graph.read``; gets its order and groups.
        call: runs one forward pass of the whole model on a small input.
        sites: what is wanted.
        placement: makes a block's weights available (offloaded models).
        seed: of the random choices.
        report: gets the pairs, and notes on what was left out.
    """
    trace = order_groups(plan, call)
    pairs = graph_pairs.discover(plan, trace, placement=placement, seed=seed)
    units = graph_gates.discover_gates(plan, trace, placement=placement, seed=seed) if sites.gates else []
    ends = {pair.place: ends_of(plan, trace, pair, placement) for pair in pairs.proven("rotation")}
    if report is not None:
        report.pairs = pairs.rows() + [pair.to_dict() for pair in units]
    generator = torch.Generator().manual_seed(seed)
    transforms = build(model, plan, pairs, sites, gates=units, generator=generator, placement=placement, report=report)
    return Prepared(transforms, pairs, ends)


@contextmanager
def quantized(
    model: nn.Module, inputs: Mapping[nn.Module, ActivationSpec | None],
    parts: Mapping[str, Callable[[], attention.AttentionQuant]],
) -> Iterator[None]:
    """Inside, layers see quantized inputs, and attention modules (by name) compute with the parts that are made."""
    for name, make in parts.items():
        attention.install(model, name, make())
    try:
        with fake_inputs(inputs):
            yield
    finally:
        if parts:
            attention.uninstall(model)


def train(
    model: nn.Module,
    plan: Plan,
    transforms: TransformSet,
    batches: Sequence[Mapping[str, Any]],
    training: Training,
    *,
    inputs: Callable[[], AbstractContextManager[Any]] = nullcontext,
    shape: Shape | None = None,
    saved: Saved | None = None,
    progress: ProgressBar | None = None,
    report: Report | None = None,
) -> list[float]:
    """Train the transforms; the loss of every step (also ``report.curves["transforms"]``).

    Args:
        model, plan, transforms: as :func:`prepare` left them. Only the transforms change.
        inputs: context in which the inputs of layers and of attention are quantized.
        shape: quantizes merged weights.
        saved: where the state is kept between steps.
        progress: makes a progress bar.
    """
    blocks = [(block.name, block.module) for block in plan.blocks]
    make = partial(Student, model, blocks, transforms, recompute=training.recompute, autocast=training.autocast)
    if not list(transforms.parameters()) or (training.steps == 0 and training.smooth == 0):
        if training.steps and report is not None:
            report.note("nothing was trained: the model has no rotation and no scale that was asked for")
        return []
    if training.smooth:
        smooth_scales(make(), batches, training.smooth, rows=training.smooth_rows)
    if training.steps == 0:
        return []
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    objective = Distillation(make(inputs=inputs, shape=shape),
                             partial(top_divergence, k=training.top_k, mode=training.mode))
    groups = parameter_groups(transforms, rotation_lr=training.rotation_lr, lr=training.scale_lr)
    try:
        curve = fit(
            objective, ManifoldAdam(groups), batches, steps=training.steps, batch_size=training.batch_size,
            micro_batch=training.micro_batch, schedule=training.schedule, seed=training.seed, saved=saved,
            progress=progress, after=transforms.keep_positive, where="training transforms",
        )  # fmt: skip
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    if report is not None:
        report.curves["transforms"] = [float(f"{value:.6g}") for value in curve]
    return curve
