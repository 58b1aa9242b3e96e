"""Folding a scale or a rotation into a weight, in float64, written back in the weight's own dtype.

Conventions, for a matrix that computes ``y = x W^T + b``:

- ``scale_inputs(m, s)``: the matrix will receive ``x / s`` and computes the same ``y``.
- ``rotate_inputs(m, q)``: it will receive ``x @ q`` and computes the same ``y``.
- ``scale_outputs(m, s)``: it returns ``y * s``.
- ``rotate_outputs(m, q)``: it returns ``y @ q``, bias included.

``channels`` restricts each of them to some inputs or outputs: for scales a vector of channel numbers as long as ``s``,
for rotations ``[n, d]`` (one ``d x d`` rotation applied to ``n`` sets of ``d`` channels).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.graph.read import Site

__all__ = ["Matrix", "Norm", "Rotation", "add_bias", "check_fold", "fold_norm", "matrix_of", "rotate_inputs",
           "rotate_outputs", "scale_inputs", "scale_outputs"]


# A matrix ``q``, or a function that multiplies the last axis of a float64 tensor by it (fast transforms).
Rotation = torch.Tensor | Callable[[torch.Tensor], torch.Tensor]


@dataclass(eq=False)
class Matrix:
    """One weight tensor as a matrix: which axes are read and written, and what is added afterwards.

    A tensor with a further leading axis (experts) is a bank of matrices that are all treated alike.
    """

    name: str
    module: nn.Module
    tensor: str = "weight"
    input_axis: int = 1
    output_axis: int = 0
    bias: str | None = "bias"

    @property
    def weight(self) -> torch.Tensor:
        found = self.module._parameters.get(self.tensor)
        if found is None:
            raise QuantizationError(f"{self.name}.{self.tensor} is parametrized: remove the parametrization first")
        if found.is_meta:
            raise QuantizationError(f"{self.name}.{self.tensor} is on the meta device: load the weights (or pass "
                                    "`placement`) before transforming them")
        return found

    @property
    def bias_tensor(self) -> torch.Tensor | None:
        return self.module._parameters.get(self.bias) if self.bias else None

    @property
    def inputs(self) -> int:
        return self.weight.shape[self.input_axis]

    @property
    def outputs(self) -> int:
        return self.weight.shape[self.output_axis]


@dataclass(eq=False)
class Norm:
    """A normalisation with a gain: ``y = n(x) * (parameter + offset) + bias``, the convention found by probing.

    Attributes:
        name, module: the norm.
        gain: name of the parameter that holds the gain.
        offset: 0 for a plain gain, 1 for a ``1 + weight`` gain.
        bias: name of the bias parameter, if there is one.
        centred: the mean is removed before scaling (LayerNorm): only rotations that fix the ones vector commute.
    """

    name: str
    module: nn.Module
    gain: str = "weight"
    offset: float = 0.0
    bias: str | None = None
    centred: bool = False

    def get_gain(self) -> torch.Tensor:
        """The gain in float64 ``[d]``."""
        return self.module._parameters[self.gain].detach().double() + self.offset

    def get_bias(self) -> torch.Tensor | None:
        return self.module._parameters[self.bias].detach().double() if self.bias else None

    @torch.no_grad()
    def set_gain(self, gain: torch.Tensor) -> None:
        parameter = self.module._parameters[self.gain]
        parameter.copy_(gain.to(parameter.device) - self.offset)

    @torch.no_grad()
    def set_bias(self, bias: torch.Tensor) -> None:
        if self.bias is None:
            raise QuantizationError(f"{self.name} has no bias to set")
        self.module._parameters[self.bias].copy_(bias)

    @property
    def is_plain(self) -> bool:
        """Whether the gain is one everywhere and the bias zero."""
        bias = self.get_bias()
        return bool((self.get_gain() == 1).all()) and (bias is None or not bool(bias.any()))


def matrix_of(site: Site, tensor: str | None = None) -> Matrix:
    """The matrix of a site with one weight tensor: linear, transposed, or an embedding (outputs only)."""
    if site.kind == "linear":
        return Matrix(site.name, site.module)
    if site.kind == "transposed":
        return Matrix(site.name, site.module, input_axis=0, output_axis=1)
    if site.kind == "embedding":
        return Matrix(site.name, site.module, input_axis=0, output_axis=1, bias=None)
    raise QuantizationError(f"{site.name} ({site.kind}): a matrix cannot be named without a traced forward pass; "
                            "use the members of a pair")


@torch.no_grad()
def scale_inputs(target: Site | Matrix, scale: torch.Tensor, channels: torch.Tensor | None = None) -> None:
    """Multiply the input channels of the weight by ``scale`` ``[K]`` (or ``[len(channels)]``)."""
    matrix = _matrix(target)
    full = _spread(scale, channels, matrix.inputs, matrix)
    _write(matrix.weight, matrix.weight.double() * _along(full, matrix.input_axis, matrix.weight))


@torch.no_grad()
def scale_outputs(target: Site | Matrix, scale: torch.Tensor, channels: torch.Tensor | None = None) -> None:
    """Multiply the outputs, bias included, by ``scale`` ``[N]`` (or ``[len(channels)]``)."""
    matrix = _matrix(target)
    full = _spread(scale, channels, matrix.outputs, matrix)
    _write(matrix.weight, matrix.weight.double() * _along(full, matrix.output_axis, matrix.weight))
    if matrix.bias_tensor is not None:
        _write(matrix.bias_tensor, matrix.bias_tensor.double() * full)


@torch.no_grad()
def rotate_inputs(target: Site | Matrix, rotation: Rotation, channels: torch.Tensor | None = None) -> None:
    """Make the weight accept ``x @ rotation``; ``rotation``: ``[K, K]``, or ``[d, d]`` with ``channels`` ``[n, d]``."""
    matrix = _matrix(target)
    _write(matrix.weight, _turned(matrix.weight, rotation, matrix.input_axis, channels, matrix))


@torch.no_grad()
def rotate_outputs(target: Site | Matrix, rotation: Rotation, channels: torch.Tensor | None = None) -> None:
    """Make the outputs, bias included, ``y @ rotation``; shapes as in ``rotate_inputs``."""
    matrix = _matrix(target)
    _write(matrix.weight, _turned(matrix.weight, rotation, matrix.output_axis, channels, matrix))
    bias = matrix.bias_tensor
    if bias is not None:
        _write(bias, _turned(bias, rotation, bias.dim() - 1, channels, matrix))


@torch.no_grad()
def add_bias(matrix: Matrix, shift: torch.Tensor) -> None:
    """Add what a constant input ``shift`` ``[K]`` contributes (``W shift``) to the bias, which must exist."""
    bias = matrix.bias_tensor
    if bias is None:
        raise QuantizationError(f"{matrix.name} has no bias")
    product = torch.tensordot(matrix.weight.double(), shift.double().to(bias.device), dims=([matrix.input_axis], [0]))
    _write(bias, bias.double() + product)


def check_fold(norm: Norm, bias_moves: bool) -> None:
    """Raise a QuantizationError if a bias that stays would have to be divided by a gain of (almost) zero."""
    gain, bias = norm.get_gain(), norm.get_bias()
    if bias is None or bias_moves:
        return
    small = (gain.abs() <= 1e-6 * gain.abs().max()) & (bias != 0)
    if bool(small.any()):
        raise QuantizationError(f"{norm.name}: channel {int(small.nonzero()[0])} has a bias but no gain, and a "
                                "reader has no bias to take it")


@torch.no_grad()
def fold_norm(norm: Norm, readers: Sequence[tuple[Matrix, torch.Tensor]], bias_moves: bool) -> None:
    """Move the gain of a norm into its readers; its gain becomes one.

    Args:
        norm: the norm.
        readers: every matrix that reads it, with the norm's channel of each of its inputs (-1: none).
        bias_moves: the bias moves into the biases of the readers; else it stays in the norm, divided by the gain.

    Raises:
        QuantizationError: a bias would have to be divided by a gain of (almost) zero.
    """
    check_fold(norm, bias_moves)
    gain, bias = norm.get_gain(), norm.get_bias()
    if bias is not None and not bias_moves:
        norm.set_bias(torch.where(bias == 0, bias, bias / gain))
    for matrix, index in readers:
        index = index.to(gain.device)
        used = index >= 0
        if bias is not None and bias_moves:
            add_bias(matrix, torch.where(used, bias[index.clamp_min(0)], 0.0))
        scale_inputs(matrix, torch.where(used, gain[index.clamp_min(0)], 1.0))
    if bias is not None and bias_moves:
        norm.set_bias(torch.zeros_like(bias))
    norm.set_gain(torch.ones_like(gain))


def _matrix(target: Site | Matrix) -> Matrix:
    return target if isinstance(target, Matrix) else matrix_of(target)


def _write(parameter: torch.Tensor, value: torch.Tensor) -> None:
    parameter.copy_(value)


def _along(vector: torch.Tensor, axis: int, like: torch.Tensor) -> torch.Tensor:
    shape = [1] * like.dim()
    shape[axis] = -1
    return vector.reshape(shape)


def _spread(scale: torch.Tensor, channels: torch.Tensor | None, size: int, matrix: Matrix) -> torch.Tensor:
    """``scale`` on all ``size`` channels: one where ``channels`` does not reach."""
    device = matrix.weight.device
    if channels is None:
        if scale.numel() != size:
            raise QuantizationError(f"{matrix.name}: a scale of {scale.numel()} for {size} channels")
        return scale.double().to(device)
    full = torch.ones(size, dtype=torch.float64, device=device)
    full[channels.to(device)] = scale.double().to(device)
    return full


def _turned(
    tensor: torch.Tensor, rotation: Rotation, axis: int, channels: torch.Tensor | None, matrix: Matrix
) -> torch.Tensor:
    """``tensor`` with the vectors along ``axis`` multiplied from the right by ``rotation``."""
    moved = tensor.detach().double().movedim(axis, -1)
    if not isinstance(rotation, torch.Tensor):
        if channels is None:
            return rotation(moved.contiguous()).movedim(-1, axis)
        rotation = rotation(torch.eye(channels.shape[-1], dtype=torch.float64))
    rotation = rotation.double().to(tensor.device)
    if channels is None:
        if rotation.shape != (moved.shape[-1],) * 2:
            raise QuantizationError(f"{matrix.name}: rotation {tuple(rotation.shape)} for {moved.shape[-1]} channels")
        moved = moved @ rotation
    else:
        index = channels.to(tensor.device)
        moved = moved.clone()
        moved[..., index] = moved[..., index] @ rotation
    return moved.movedim(-1, axis)
