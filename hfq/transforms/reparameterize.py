"""Scales and shifts of single channels moved out of a norm's output: from a grid a channel to one for the tensor.

A norm gives ``X``; its readers compute ``X W^T + c``. After :func:`fold` it gives ``X / scale + shift``, and the
readers, with ``W * scale`` and ``c - W (scale * shift)``, compute what they did. If ``scale`` and ``shift`` come from
grids of the channels (:func:`common_grid`), one grid for the whole tensor has the same codes, element by element.

A shift is undone by a constant: it holds only where every token that reaches the readers went through the norm. Padding
that a model inserts in between (windows that do not divide an image) is zero afterwards as before, and no longer means
zero. :func:`prove_shifts` runs the block in float64 and says where a shift may not go; a scale alone may go everywhere
that the graph has proven. The proof holds for inputs of the size that it saw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.graph.absorb import Matrix, Norm, add_bias, scale_inputs
from hfq.graph.links import Link, Pair
from hfq.graph.proof import TOLERANCE, BlockCopy, floats, relative_error
from hfq.graph.prove import RERUN_ERRORS
from hfq.graph.read import is_norm
from hfq.layers.packed import PackedModule

__all__ = ["Grid", "common_grid", "fold", "is_folded", "outside_pair", "prove_shifts"]

# Channels whose step is under this share of the mean step get it: their gain would grow without bound.
FLOOR = 1e-2
_FLAG = "hfq_folded"
Own = Callable[[str], nn.Module]


@dataclass(frozen=True)
class Grid:
    """One grid for a tensor, and what turns the grids of its channels into it.

    Attributes:
        scale, zero_point: of the tensor; the zero point is a whole number in ``0 .. 2**bits - 1``.
        channels, zeros: float64 ``[K]``, the grids of the channels as they are used (steps floored).
        ratio: ``channels / scale``, float64 ``[K]``, mean one.
        shift: ``scale * (zeros - zero_point)``, float64 ``[K]``: whole multiples of the step.
    """

    scale: float
    zero_point: int
    channels: torch.Tensor
    zeros: torch.Tensor

    @property
    def ratio(self) -> torch.Tensor:
        return self.channels / self.scale

    @property
    def shift(self) -> torch.Tensor:
        return self.scale * (self.zeros - self.zero_point)

    @property
    def params(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As layers store it: ``(scale [1], zero_point [1])`` in float32."""
        return torch.tensor([self.scale]), torch.tensor([float(self.zero_point)])


def common_grid(scale: torch.Tensor, zero_point: torch.Tensor, bits: int, *, floor: float = FLOOR) -> Grid:
    """The mean of the channels' grids: arithmetic mean of the steps, rounded mean of the zero points.

    Args:
        scale: steps ``[K]``, above zero; those under ``floor`` times their mean are raised to it, and the lower end of
            their range stays where it was.
        zero_point: whole numbers ``[K]``, on the grid or not.

    Raises:
        QuantizationError: a step or a zero point is no such number.
    """
    s, z = scale.detach().double(), zero_point.detach().double()
    if not bool((torch.isfinite(s) & (s > 0)).all()) or not bool((z == z.round()).all()):
        raise QuantizationError("grids of channels need finite steps above zero and whole zero points")
    least = floor * s.mean()
    z = torch.where(s < least, (z * s / least).round(), z)
    s = s.clamp(min=float(least))
    middle = int(z.mean().round().clamp(0, (1 << bits) - 1))
    return Grid(float(s.mean()), middle, s, z)


def is_folded(module: nn.Module) -> bool:
    """Whether scales or shifts were folded into this norm before."""
    return bool(getattr(module, _FLAG, False))


@torch.no_grad()
def fold(
    pair: Pair, scale: torch.Tensor, shift: torch.Tensor | None = None, *, own: Own | None = None, again: bool = False
) -> None:
    """Make the norm of ``pair`` give ``X / scale + shift`` and its readers compute as before, in float64, in place.

    Readers without a bias get one if there is a shift.

    Args:
        pair: of kind "norm", proven.
        scale: ``[classes]``, finite and above zero.
        shift: ``[classes]``, finite; ``None`` for none. Where it may go is for :func:`prove_shifts` to say.
        own: maps names to the modules of a copy, which gets no mark.
        again: allow a norm that has been folded before.

    Raises:
        QuantizationError: the pair is not proven, was folded before, has packed readers, or a norm without a bias would
            have to shift.
    """
    if pair.kind != "norm" or not (pair.proven or own is not None):
        raise QuantizationError(f"{pair}: channels of its norm cannot be scaled")
    s, t = scale.detach().double().cpu(), None if shift is None else shift.detach().double().cpu()
    if s.shape != (pair.classes,) or not bool((torch.isfinite(s) & (s > 0)).all()):
        raise QuantizationError(f"{pair.place}: {tuple(s.shape)} scales for {pair.classes} channels, above zero")
    if t is not None and (t.shape != s.shape or not bool(torch.isfinite(t).all())):
        raise QuantizationError(f"{pair.place}: {tuple(t.shape)} shifts for {pair.classes} channels")
    t = None if t is None or not bool(t.any()) else t
    source = pair.sources[0].on(own)
    norm, index = source.part, source.index
    assert isinstance(norm, Norm)
    if own is None and is_folded(norm.module) and not again:
        raise QuantizationError(f"{norm.name} was folded before: a second fold would scale its readers twice")
    packed = [link.name for link in pair.readers if isinstance(link.on(own).part.module, PackedModule)]
    if packed:
        raise QuantizationError(f"{norm.name}: {', '.join(packed)} is packed already, its norm cannot change any more")
    if t is not None and norm.bias is None:
        raise QuantizationError(f"{norm.name} has no bias: its output cannot be shifted")
    bias = norm.get_bias()
    own_s = _spread(s, index, 1.0)
    norm.set_gain(norm.get_gain() / own_s.to(norm.get_gain().device))
    if bias is not None:
        norm.set_bias(bias / own_s.to(bias.device) + (0 if t is None else _spread(t, index, 0.0).to(bias.device)))
    for link in pair.readers:
        matrix = link.on(own).part
        assert isinstance(matrix, Matrix)
        scale_inputs(matrix, _spread(s, link.index, 1.0))
        if t is not None:
            _with_bias(matrix)
            add_bias(matrix, -_spread(t, link.index, 0.0))
    if own is None:
        setattr(norm.module, _FLAG, True)


def _spread(values: torch.Tensor, index: torch.Tensor, rest: float) -> torch.Tensor:
    return torch.where(index >= 0, values[index.clamp(min=0)], rest)


def _with_bias(matrix: Matrix) -> None:
    if matrix.bias_tensor is None:
        weight = matrix.weight
        zeros = torch.zeros(matrix.outputs, dtype=weight.dtype, device=weight.device)
        matrix.module.register_parameter("bias", nn.Parameter(zeros, requires_grad=weight.requires_grad))
        matrix.bias = "bias"


def prove_shifts(
    block: Any, args: tuple, kwargs: Mapping[str, Any], pairs: Sequence[Pair], *, seed: int = 0
) -> dict[str, str]:
    """Why the norms of ``pairs`` may not shift: name to reason, empty for those that may.

    Args:
        block: of the plan, all of it floats still.
        args, kwargs: of one call of the block.
        pairs: proven, of kind "norm".
    """
    reasons: dict[str, str] = {}
    generator = torch.Generator().manual_seed(seed)
    try:
        copy = BlockCopy(SimpleNamespace(block=block, args=args, kwargs=kwargs))  # type: ignore[arg-type]
        for pair in pairs:
            name = pair.sources[0].name
            if pair.sources[0].part.bias is None:  # type: ignore[union-attr]
                reasons[name] = "it has no bias"
                continue
            with copy.undone(pair.modules):
                had = {link.name: copy.own(link.name)._parameters.get("bias") is not None for link in pair.readers}
                scale, shift = _random(pair.classes, generator)
                fold(pair, scale, shift, own=copy.own)
                error = relative_error(copy.run(), copy.reference)
                for reader, present in had.items():
                    if not present:
                        copy.own(reader)._parameters["bias"] = None
            reasons[name] = "" if error <= TOLERANCE else (
                f"a shift changes the block's output by {error:.1e}: not all that reaches its readers comes from it "
                "(padding in between?)")
    except RERUN_ERRORS as error:
        for pair in pairs:
            reasons.setdefault(pair.sources[0].name, f"the block cannot be run again by itself: {error}")
    return reasons


def _random(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.empty(count, dtype=torch.float64).uniform_(-0.7, 0.7, generator=generator).exp()
    return scale, torch.randn(count, dtype=torch.float64, generator=generator)


@torch.no_grad()
def outside_pair(
    model: nn.Module, site: Any, call: Callable[[], Any], *, tolerance: float = 1e-4, seed: int = 0
) -> tuple[Pair | None, str]:
    """The norm that feeds a site outside the blocks, proven by the model's output: ``(pair, "")`` or a reason.

    Args:
        site: a linear.
        call: runs one forward pass of the model on a small input.
        tolerance: of the output of the whole model, in the dtype of the model.
    """
    seen: dict[str, Any] = {}
    handles = [module.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
               for name, module in model.named_modules() if is_norm(module)]  # fmt: skip
    given: list[Any] = []
    handles.append(site.module.register_forward_pre_hook(lambda _, args: given.append(args[0])))
    outputs: list[Any] = []
    handles.append(model.register_forward_hook(lambda _, __, out: outputs.append(out)))
    try:
        call()
        reference = [t.clone() for t in floats(outputs.pop())]
    finally:
        for handle in handles:
            handle.remove()
    sources = [name for name, out in seen.items() if any(out is x for x in given)]
    module = model.get_submodule(sources[0]) if len(sources) == 1 else None
    if not isinstance(module, nn.LayerNorm) or module.weight is None or site.kind != "linear" or len(given) != 1:
        return None, "it does not read a LayerNorm directly"
    norm = Norm(sources[0], module, bias=None if module.bias is None else "bias", centred=True)
    whole = torch.arange(site.in_features)
    pair = Pair("norm", sources[0], [Link(norm, whole)], [Link(Matrix(site.name, site.module), whole)],
                classes=site.in_features, proven=True)  # fmt: skip
    had = site.module._parameters.get("bias") is not None
    kept = [(p, p.detach().clone()) for m in (module, site.module) for p in m._parameters.values() if p is not None]
    scale, shift = _random(pair.classes, torch.Generator().manual_seed(seed))
    handle = model.register_forward_hook(lambda _, __, out: outputs.append(out))
    try:
        fold(pair, scale, None if norm.bias is None else shift, again=True)
        call()
        error = relative_error(floats(outputs.pop()), reference)
    finally:
        handle.remove()
        for parameter, before in kept:
            parameter.copy_(before)
        if not had:
            site.module._parameters["bias"] = None
        module.__dict__.pop(_FLAG, None)
    if error > tolerance:
        return None, f"a fold changes the model's output by {error:.1e}: somebody else reads the norm"
    pair.error = error
    return pair, ""
