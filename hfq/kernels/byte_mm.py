"""Products of bytes by torch's ``_int_mm``: what of them is exact on this CPU, and one that always is.

On CPUs without VNNI that product saturates sums of two products in 16 bits, which is a wrong number without a sign of
it. What is exact is found out once, with the largest codes there are.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["exact_in_steps", "exact_signed", "exact_unsigned", "integer_mm"]

# Weights of this size never saturate: 255 * 64 * 2 < 2**15.
NARROW = 64


def _exact(activation: torch.dtype, low: int, high: int, weights: tuple[int, ...] = (-128, 127)) -> bool:
    """Whether products of extreme codes are exact, in all kernels that sizes choose from."""
    for m in (1, 3, 40, 130):
        for k in (64, 200):
            for a in (low, high):
                for w in weights:
                    x, weight = torch.full((m, k), a, dtype=activation), torch.full((48, k), w, dtype=torch.int8)
                    if not bool((torch._int_mm(x, weight.t()) == a * w * k).all()):
                        return False
    return True


@functools.cache
def exact_unsigned() -> bool:
    """Whether this process multiplies uint8 with int8 exactly."""
    return _exact(torch.uint8, 0, 255)


@functools.cache
def exact_signed() -> bool:
    """Whether this process multiplies int8 with int8 exactly."""
    return _exact(torch.int8, -128, 127)


@functools.cache
def exact_in_steps() -> bool:
    """Whether it does so for seven-bit activations, and for weights within ``NARROW``."""
    return _exact(torch.uint8, 0, 127) and _exact(torch.uint8, 0, 255, (-NARROW, NARROW))


def integer_mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` exactly: uint8 or int8 ``[M, K]`` times int8 ``[K, N]`` (any strides), int32 ``[M, N]``."""
    if not a.shape[0] or not b.shape[1] or not a.shape[1]:
        return torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32, device=a.device)
    if a.device.type != "cpu":
        return _device_mm(a, b)
    if a.shape[1] == 1:  # `_int_mm` mistakes a matrix of one column for its transpose
        return a.to(torch.int32) * b.to(torch.int32)
    if exact_signed() if a.dtype == torch.int8 else exact_unsigned():
        return torch._int_mm(a.contiguous(), b)
    if a.dtype == torch.int8:  # as unsigned, so that halves fit seven bits
        moved = (a.to(torch.int16) + 128).to(torch.uint8)
        return integer_mm(moved, b) - 128 * b.sum(0, dtype=torch.int32)
    return 2 * torch._int_mm((a >> 1).contiguous(), b) + torch._int_mm((a & 1).contiguous(), b)


def _device_mm(a: Tensor, b: Tensor) -> Tensor:
    """The product of the CUDA libraries: signed, more than 16 rows, sizes in multiples of 8."""
    correction = None
    if a.dtype == torch.uint8:
        a, correction = (a.to(torch.int16) - 128).to(torch.int8), 128 * b.sum(0, dtype=torch.int32)
    (rows, inner), outer = a.shape, b.shape[1]
    pad = (-inner % 8, max(24 - rows, -rows % 8), -outer % 8)
    a = torch.nn.functional.pad(a, (0, pad[0], 0, pad[1]))
    b = torch.nn.functional.pad(b.t(), (0, pad[0], 0, pad[2])).contiguous().t()
    y = torch._int_mm(a, b)[:rows, :outer]
    return y if correction is None else y + correction


_LIBRARY = torch.library.Library("hfq", "FRAGMENT")
_LIBRARY.define("integer_mm(Tensor a, Tensor b) -> Tensor")
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("integer_mm", integer_mm, _key)


def _integer_mm_fake(a: Tensor, b: Tensor) -> Tensor:
    torch._check(a.shape[1] == b.shape[0], lambda: f"{tuple(a.shape)} times {tuple(b.shape)}")
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.int32)


torch.library.register_fake("hfq::integer_mm", _integer_mm_fake, lib=_LIBRARY)
