"""How the relevance of an operation's output is handed to its inputs.

Every rule takes ``r``, the relevance of the output, and gives one of the shape of each input; what goes in comes out
again (up to what lies on outputs that are exactly zero). Quotients are guarded: ``a / (b + tiny sign(b))``, zero where
``b`` is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hfq.errors import QuantizationError

__all__ = ["Rule", "bilinear", "divide", "half", "linear_map", "positive", "residual", "ruled", "through"]

# Added to denominators; in float64 far below what sums should keep.
_TINY = {torch.float64: 1e-18}
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# ``rule(relevance of the output, *inputs)`` gives the relevance of each input.
Rule = Callable[..., tuple["torch.Tensor | None", ...]]


def divide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a / b`` where ``b`` is not zero, and zero elsewhere."""
    tiny = _TINY.get(b.dtype, 1e-9)
    return torch.where(b == 0, torch.zeros_like(a), a / (b + tiny * b.sign() + (b == 0).to(b.dtype)))


def positive(r: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, product: Product) -> torch.Tensor:
    """A product with a constant (linear, convolution), its bias left out: by the contributions above zero alone.

    ``Z = x+ W+ + x- W-``, ``S = r / Z``, ``x+ (W+ S) + x- (W- S)``.
    """
    with torch.enable_grad():
        above, below = x.detach().clamp(min=0).requires_grad_(), x.detach().clamp(max=0).requires_grad_()
        z = product(above, weight.detach().clamp(min=0)) + product(below, weight.detach().clamp(max=0))
    to_above, to_below = torch.autograd.grad(z, (above, below), divide(r, z.detach()))
    return (above * to_above + below * to_below).detach()


def bilinear(
    r: torch.Tensor, a: torch.Tensor, b: torch.Tensor, product: Product
) -> tuple[torch.Tensor, torch.Tensor]:
    """A product of two that both depend on the input: half to each, by contribution. ``Z = A B``, ``S = r / Z``,
    ``A (S B^T) / 2`` and ``B (A^T S) / 2``."""
    with torch.enable_grad():
        left, right = a.detach().requires_grad_(), b.detach().requires_grad_()
        z = product(left, right)
    to_left, to_right = torch.autograd.grad(z, (left, right), divide(r, z.detach()))
    return (left * to_left / 2).detach(), (right * to_right / 2).detach()


def linear_map(r: torch.Tensor, x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Averages and sums: ``Z = f(x)``, ``x f^T(r / Z)``."""
    with torch.enable_grad():
        inner = x.detach().requires_grad_()
        z = function(inner)
    (back,) = torch.autograd.grad(z, inner, divide(r, z.detach()))
    return (inner * back).detach()


def residual(r: torch.Tensor, a: torch.Tensor, c: torch.Tensor, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A sum of two branches: ``A r / Z`` and ``C r / Z``, each rescaled, image by image, so that the branches get
    shares in proportion to the magnitudes of these sums.

    Args:
        images: in the batch; they are the outermost parts of the first axis.

    Raises:
        QuantizationError: the first axis holds no whole number of rows an image.
    """
    s = divide(r, a + c)
    parts = [(t * s).expand_as(r) for t in (a, c)]
    if r.shape[0] % images:
        raise QuantizationError(f"a sum of shape {tuple(r.shape)} cannot be told apart into {images} images: score one "
                                "image a batch (calibration_batch_size=1)")
    sums = [part.reshape(images, -1).sum(1) for part in parts]
    whole = r.reshape(images, -1).sum(1)
    magnitude = sums[0].abs() + sums[1].abs()
    found = []
    for part, total, t in zip(parts, sums, (a, c), strict=True):
        factor = divide(whole * divide(total.abs(), magnitude), total).repeat_interleave(r.shape[0] // images)
        found.append((part * factor.reshape(-1, *[1] * (r.dim() - 1))).sum_to_size(t.shape))
    return found[0], found[1]


def through(r: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Functions of single elements, norms, softmax: unchanged."""
    return r.sum_to_size(x.shape) if r.shape != x.shape else r


def half(r: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An elementwise product (a gate): half to each."""
    return (r / 2).sum_to_size(a.shape), (r / 2).sum_to_size(b.shape)


class _Ruled(torch.autograd.Function):
    """A tensor whose backward pass is a rule."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, rule: Rule, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.rule = rule
        ctx.save_for_backward(*inputs)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, r: torch.Tensor) -> Any:  # type: ignore[override]
        with torch.no_grad():
            found = ctx.rule(r, *ctx.saved_tensors)
        return (None, None, *(t if t is None else t.to(x.dtype)
                              for t, x in zip(found, ctx.saved_tensors, strict=True)))  # fmt: skip


def ruled(native: Callable[[], torch.Tensor], rule: Rule, *inputs: torch.Tensor) -> torch.Tensor:
    """What ``native`` gives, with the rule in place of its gradient."""
    with torch.no_grad():
        out = native()
    return _Ruled.apply(out, rule, *inputs)  # type: ignore[no-any-return]
