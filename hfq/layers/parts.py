"""Linear maps of the last axis in front of a product: Hadamard transforms and scales of the channels."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.kernels import hadamard

__all__ = ["ChannelScale", "DividedInput", "Hadamard", "OnlinePart", "mix", "order", "sign_vector", "unmix"]


class OnlinePart(nn.Module):
    """A linear map of the last axis (``n`` features) in front of a product; the weight holds its counterpart.

    ``fold(weight)`` is the weight ``[out, n]`` whose product with ``forward(x)`` is ``x @ weight.T``; ``unfold`` undoes
    it.
    """

    n: int
    _signed: tuple[list[torch.Tensor], list[int], bytes] | None = None

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        """The ``x`` with ``forward(x) == y``."""
        raise NotImplementedError

    def signature(self) -> bytes | None:
        """A digest of what the part computes: two parts of one digest give the same result for the same tensor, so
        that layers which read one tensor quantize it once. ``None`` where changes of the tensors cannot be noticed."""
        tensors = list(self.parameters())
        if any(t.is_inference() or t.is_meta for t in tensors):
            return None
        versions, known = [t._version for t in tensors], self._signed
        if known is not None and known[1] == versions and all(a is b for a, b in zip(known[0], tensors, strict=True)):
            return known[2]
        digest = hashlib.sha256(repr((type(self).__name__, self.describe())).encode())
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self._signed = (tensors, versions, digest.digest())
        return self._signed[2]

    def fold(self, weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def unfold(self, weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def describe(self) -> Any:
        """The manifest entry: JSON only."""
        raise NotImplementedError


class ChannelScale(OnlinePart):
    """``y = x * vector`` on the last axis; float32 whatever the model is cast to.

    Args:
        vector: ``[n]``, finite and above zero; or ``n`` itself for a parameter that is filled later.
        device: of an empty vector.
    """

    def __init__(self, vector: torch.Tensor | int, *, device: Any = None) -> None:
        super().__init__()
        if isinstance(vector, int):
            vector = torch.empty(vector, dtype=torch.float32, device=device)
        elif vector.dim() != 1 or (not vector.is_meta and not (torch.isfinite(vector) & (vector > 0)).all()):
            raise QuantizationError(f"channel scales of shape {tuple(vector.shape)}: finite numbers above zero needed")
        self.n = vector.shape[0]
        self.vector = nn.Parameter(vector.detach().to(torch.float32, copy=True), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., n]`` to the same shape and dtype."""
        return (x * self.vector.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        return (y / self.vector.to(torch.promote_types(y.dtype, torch.float32))).to(y.dtype)

    def fold(self, weight: torch.Tensor) -> torch.Tensor:
        return self.inverse(weight)

    def unfold(self, weight: torch.Tensor) -> torch.Tensor:
        return self(weight)

    def describe(self) -> dict[str, Any]:
        return {"kind": "channel_scale", "size": self.n}

    def _apply(self, fn: Any, recurse: bool = True) -> ChannelScale:
        data = self.vector.detach()
        self.vector = nn.Parameter(fn(data.view(torch.int32)).view(torch.float32), requires_grad=False)
        return self

    def extra_repr(self) -> str:
        return str(self.n)


class DividedInput:
    """Hook of a float module whose input goes through a part, and whose weight holds the counterpart already."""

    def __init__(self, part: ChannelScale) -> None:
        self.part = part

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (self.part(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self.part(kwargs[name])}

    @staticmethod
    def of(module: nn.Module) -> ChannelScale | None:
        """The part in front of a float module, if it has one."""
        return next((hook.part for hook in module._forward_pre_hooks.values() if isinstance(hook, DividedInput)), None)


class Hadamard(OnlinePart):
    """``y = (x * signs) H / sqrt(n)`` on the last axis; orthogonal.

    Args:
        n: size of the last axis.
        block: transform runs of this many elements each; default one transform over all ``n``.
        signs: int8 ``[n]`` of +1 and -1, or ``True`` for a parameter that is filled later; default none.
        device: of an empty sign vector.

    Raises:
        QuantizationError: ``block`` does not divide ``n``, or no Hadamard matrix of the order is known.
    """

    def __init__(
        self, n: int, block: int | None = None, *, signs: torch.Tensor | bool | None = None, device: Any = None
    ) -> None:
        super().__init__()
        self.n, self.block, self.order = n, block, order(n, block)
        if signs is None or signs is False:
            self.register_parameter("signs", None)
        else:
            self.signs = sign_vector(n, signs, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., n]`` to the same shape and dtype."""
        return mix(x, self.signs, self.order)

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        """The ``x`` with ``forward(x) == y``."""
        return unmix(y, self.signs, self.order)

    def fold(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight ``[out, n]`` whose product with ``forward(x)`` is ``x @ weight.T``."""
        return self(weight.double()).to(weight.dtype)

    def unfold(self, weight: torch.Tensor) -> torch.Tensor:
        return self.inverse(weight)

    def describe(self) -> dict[str, Any]:
        return {"kind": "hadamard", "size": self.n, "block": self.block, "signs": self.signs is not None}

    def extra_repr(self) -> str:
        block, signs = f", block={self.block}" if self.block else "", ", signs" if self.signs is not None else ""
        return f"{self.n}{block}{signs}"


def order(n: int, block: int | None) -> int:
    """Order of the Hadamard matrix for ``n`` features in runs of ``block``; raises if there is none."""
    if block is not None and (block < 1 or n % block):
        raise QuantizationError(f"a Hadamard block of {block} does not divide {n} features")
    hadamard.decompose(block or n)
    return block or n


def mix(x: torch.Tensor, signs: torch.Tensor | None, order: int) -> torch.Tensor:
    """``(x * signs) H`` in runs of ``order`` elements."""
    return hadamard.transform(x if signs is None else x * signs.to(x.dtype), order)


def unmix(y: torch.Tensor, signs: torch.Tensor | None, order: int) -> torch.Tensor:
    """Inverse of :func:`mix`."""
    x = hadamard.transform(y, order, inverse=True)
    return x if signs is None else x * signs.to(x.dtype)


def sign_vector(n: int, signs: torch.Tensor | bool, device: Any) -> nn.Parameter:
    """int8 ``[n]``: ``signs`` checked, or an empty vector."""
    if isinstance(signs, bool):
        return nn.Parameter(torch.empty(n, dtype=torch.int8, device=device), requires_grad=False)
    if tuple(signs.shape) != (n,) or (not signs.is_meta and not (signs.abs() == 1).all()):
        raise QuantizationError(f"signs of shape {tuple(signs.shape)}: {n} elements, each +1 or -1, are needed")
    return nn.Parameter(signs.detach().to(torch.int8).clone(), requires_grad=False)
