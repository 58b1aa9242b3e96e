"""A forward pass whose backward pass hands relevance back, for any model made of operations with a rule.

Every torch function of the pass is seen (``TorchFunctionMode``): products, sums, averages and functions of elements get
their rule in place of their gradient; what only moves numbers keeps its gradient, which moves relevance likewise; a
tensor that is used twice gets the sum. Anything else that depends on the input is refused by name. Nothing of the
modules is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from hfq.allocation import rules
from hfq.allocation.rules import ruled
from hfq.errors import QuantizationError
from hfq.graph.read import is_norm

__all__ = ["Pass", "floating"]

# Numbers are moved, repeated, padded or cast: the gradient moves relevance as it has to be moved.
_MOVES = frozenset((
    "view", "reshape", "view_as", "reshape_as", "permute", "transpose", "t", "swapaxes", "swapdims", "movedim",
    "moveaxis", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "expand", "expand_as", "repeat",
    "repeat_interleave", "tile", "roll", "flip", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "split",
    "split_with_sizes", "chunk", "unbind", "tensor_split", "getitem", "select", "narrow", "index_select", "gather",
    "take_along_dim", "pad", "to", "float", "double", "type", "type_as", "unfold", "fold", "pixel_shuffle",
    "pixel_unshuffle", "requires_grad_", "broadcast_to",
))  # fmt: skip
_ELEMENTWISE = frozenset((
    "softmax", "gelu", "relu", "relu6", "silu", "mish", "elu", "selu", "leaky_relu", "hardswish", "hardsigmoid",
    "hardtanh", "tanh", "sigmoid", "softplus", "dropout", "layer_norm", "rms_norm", "group_norm", "batch_norm",
    "instance_norm", "masked_fill", "clamp", "clip", "neg", "sub", "rsub", "div", "true_divide", "truediv",
))  # fmt: skip
_SUMS = frozenset(("add", "radd", "iadd"))
_PRODUCTS = frozenset(("matmul", "rmatmul", "bmm", "mm", "einsum"))
_GATES = frozenset(("mul", "multiply", "rmul"))
_AVERAGES = frozenset(("mean", "sum", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
                       "interpolate"))  # fmt: skip
_CONVOLUTIONS = frozenset(("conv1d", "conv2d", "conv3d"))
_BATCH = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


def floating(tree: Any) -> list[torch.Tensor]:
    """All floating-point tensors of a tree."""
    return [t for t in tree_flatten(tree)[0] if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _live(tree: Any) -> list[torch.Tensor]:
    return [t for t in floating(tree) if t.requires_grad]


class Pass(TorchFunctionMode):
    """One forward pass under the rules.

    Args:
        model: all of it floats, its parameters without gradients.
        images: in the batch.
        point: ``point(name, output, macs)`` is called for the output of each product: of a layer by its name, of the
            products of an attention by its module's name and "scores" or "values"; ``macs`` is for one image.
        gradients: leave all gradients as they are; the points are called all the same.
        watch: ``(names of modules, function)``: the function gets name, "input" or "output", and the tensor.
    """

    def __init__(
        self, model: nn.Module, images: int, point: Callable[[str, torch.Tensor, float], None], *,
        gradients: bool = False, watch: tuple[Sequence[str], Callable[[str, str, torch.Tensor], None]] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.images, self.point, self.gradients, self.watch = model, images, point, gradients, watch
        self.owners = {id(p): name for name, module in model.named_modules()
                       for p in module._parameters.values() if p is not None}  # fmt: skip
        self.stack: list[list[Any]] = []  # name of the running module, products that it has computed
        self.opaque = 0

    # -- modules -----------------------------------------------------------------------------------------------------
    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Inside, modules are followed by name, and norms are one step each."""
        handles = []
        watched = set(self.watch[0]) if self.watch is not None else set()
        try:
            for name, module in self.model.named_modules():
                handles.append(module.register_forward_pre_hook(self._enter(name, name in watched), with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave(name, name in watched), with_kwargs=True,
                                                            always_call=False))  # fmt: skip
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, watched: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.stack.append([name, 0])
            self._show(watched, name, "input", (args, kwargs))
            if self._norm(module):
                self.opaque += 1

        return hook

    def _leave(self, name: str, watched: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            self.stack.pop()
            if self._norm(module):
                found = _live((args, kwargs))
                if found and self.opaque == 1 and not self.gradients:  # still opaque: what is done here is not seen
                    value = output.detach()
                    output = ruled(lambda: value, lambda r, x: (rules.through(r, x),), found[0])
                self.opaque -= 1
            self._show(watched, name, "output", output)
            return output

        return hook

    def _show(self, watched: bool, name: str, side: str, tree: Any) -> None:
        if watched and (found := _live(tree)):
            self.opaque += 1
            self.watch[1](name, side, found[0])  # type: ignore[index]
            self.opaque -= 1

    def _norm(self, module: nn.Module) -> bool:
        return is_norm(module) or isinstance(module, _BATCH)

    # -- functions ---------------------------------------------------------------------------------------------------
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        name = name.strip("_") if name.startswith("__") else name
        live = _live((args, kwargs))
        if not live or self.opaque or name == "get":
            out = func(*args, **kwargs)
            # What an embedding gives is where the input begins: numbers of tokens have no relevance of their own.
            return out.detach().requires_grad_() if name == "embedding" and not self.opaque else out
        rule = next((rule for names, rule in self._TABLE if name in names), None)
        if rule is not None:
            return rule(self, name, func, args, kwargs, live)
        out = func(*args, **kwargs)
        if name == "detach" or (name not in _MOVES and _live(out)):
            where = self.stack[-1][0] if self.stack else ""
            raise QuantizationError(
                f"{where or type(self.model).__name__}: relevance has no rule for {name!r}; a model whose attention is "
                "not made of plain products can be loaded with attn_implementation='eager'")
        return out

    def _given(self, native: Callable[[], torch.Tensor], rule: rules.Rule, *inputs: torch.Tensor) -> torch.Tensor:
        return native() if self.gradients else ruled(native, rule, *inputs)

    def _name(self, weight: torch.Tensor) -> str:
        base = weight if id(weight) in self.owners else getattr(weight, "_base", None)
        return self.owners.get(id(base), self.stack[-1][0] if self.stack else "")

    def _linear(self, name: str, func: Any, args: Any, kwargs: Any, live: Any) -> torch.Tensor:
        x, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
        out = self._constant(lambda: func(*args, **kwargs), x, weight, F.linear)
        self.point(self._name(weight), out, out.numel() // self.images * x.shape[-1])
        return out

    def _addmm(self, name: str, func: Any, args: Any, kwargs: Any, live: Any) -> torch.Tensor:
        x, weight = args[1], args[2]
        if weight.requires_grad or args[0].requires_grad or kwargs:
            raise QuantizationError("addmm of something else than an input and a weight has no rule for relevance")
        out = self._constant(lambda: func(*args), x, weight, torch.matmul)
        self.point(self._name(weight), out, out.numel() // self.images * x.shape[-1])
        return out

    def _convolution(self, name: str, func: Any, args: Any, kwargs: Any, live: Any) -> torch.Tensor:
        x, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
        rest = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        rest = {key: _argument(args, kwargs, 3 + i, key, default) for i, (key, default) in enumerate(rest.items())}

        def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return func(x, w, None, **rest)

        if x.is_leaf and not self.gradients:  # nobody asks which pixel it was
            out = ruled(lambda: func(*args, **kwargs), lambda r, x: (None,), x)
        else:
            out = self._constant(lambda: func(*args, **kwargs), x, weight, product)
        self.point(self._name(weight), out, out.numel() // self.images * weight[0].numel())
        return out

    def _constant(self, native: Any, x: torch.Tensor, weight: torch.Tensor, product: Any) -> torch.Tensor:
        return self._given(native, lambda r, x: (rules.positive(r, x, weight, product),), x)

    def _product(self, name: str, func: Any, args: Any, kwargs: Any, live: Any) -> torch.Tensor:
        if name == "einsum":
            equation, *operands = args
            operands = list(operands[0]) if operands and isinstance(operands[0], (list, tuple)) else operands

            def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
                return torch.einsum(equation, a, b)
        else:
            operands, product = [_argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "other")], torch.matmul
            operands = operands[::-1] if name == "rmatmul" else operands
        if len(operands) != 2:
            raise QuantizationError(f"a product of {len(operands)} tensors has no rule for relevance")
        return self._two(product, *operands)

    def _two(self, product: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``product(a, b)``; with both alive it is a product of an attention."""
        if a.requires_grad and b.requires_grad:
            out = self._given(lambda: product(a, b), lambda r, a, b: rules.bilinear(r, a, b, product), a, b)
            top = self.stack[-1] if self.stack else ["", 0]
            what = ("scores", "values")[top[1]] if top[1] < 2 else f"product_{top[1]}"
            top[1] += 1
            self.point(f"{top[0]}.{what}", out, out.numel() // self.images * a.shape[-1])
            return out
        if a.requires_grad:
            out = self._constant(lambda: product(a, b), a, b, product)
        else:
            out = self._constant(lambda: product(a, b), b, a, lambda x, w: product(w, x))
        weight, x = (b, a) if a.requires_grad else (a, b)
        if id(weight) in self.owners or id(getattr(weight, "_base", None)) in self.owners:
            self.point(self._name(weight), out, out.numel() // self.images * x.shape[-1])
        return out

    def _attention(self, name: str, func: Any, args: Any, kwargs: Any, live: Any) -> torch.Tensor:
        """The scaled dot product, step by step."""
        q, k, v = (_argument(args, kwargs, i, key) for i, key in enumerate(("query", "key", "value")))
        mask = _argument(args, kwargs, 3, "attn_mask", None)
        causal, scale = _argument(args, kwargs, 5, "is_causal", False), kwargs.get("scale")
        if k.shape[1] != q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        raw = self._two(torch.matmul, q, k.transpose(-1, -2))
        scale = q.shape[-1] ** -0.5 if scale is None else scale

        def probabilities() -> torch.Tensor:
            scores = raw * scale
            if causal:
                above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
                scores = scores.masked_fill(above, float("-inf"))
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
            return scores.softmax(-1)

        p = self._given(probabilities, lambda r, x: (rules.through(r, x),), raw)
        return self._two(torch.matmul, p, v)

    def _sum(self, name: str, func: Any, args: Any, kwargs: Any, live: Any) -> torch.Tensor:
        a, c = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "other")
        alpha = kwargs.get("alpha", 1)
        plain = torch.add if name == "iadd" else func
        # A learned vector of every token is a branch of its own; masks and biases of scores are not.
        tensors = [t if isinstance(t, torch.Tensor) else None for t in (a, c)]
        branches = all(t is not None and (t.requires_grad or self._learned(t)) for t in tensors)
        if not branches:
            return self._given(lambda: plain(a, c, **({"alpha": alpha} if alpha != 1 else {})),
                               lambda r, x: (rules.through(r, x),), live[0])  # fmt: skip
        scaled = c if alpha == 1 else c * alpha

        def rule(r: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            found = rules.residual(r, a.detach(), scaled.detach(), self.images)
            return tuple(part for part, t in zip(found, (a, c), strict=True) if t.requires_grad)

        return self._given(lambda: a + scaled, rule, *(t for t in (a, c) if t.requires_grad))

    def _learned(self, t: torch.Tensor) -> bool:
        return id(t) in self.owners or id(getattr(t, "_base", None)) in self.owners

    def _gate(self, name: str, func: Any, args: Any, kwargs: Any, live: Any) -> torch.Tensor:
        if len(live) == 2:
            return self._given(lambda: func(*args, **kwargs), rules.half, *live)
        return self._element(name, func, args, kwargs, live)

    def _element(self, name: str, func: Any, args: Any, kwargs: Any, live: Any) -> torch.Tensor:
        if len(live) != 1 or (name in ("div", "true_divide", "truediv") and live[0] is not args[0]):
            where = self.stack[-1][0] if self.stack else ""
            raise QuantizationError(f"{where}: relevance has no rule for {name!r} of two tensors that depend on the "
                                    "input")
        if kwargs.get("inplace") or any(arg is True for arg in args):  # rules need the number as it was
            args = tuple(t.clone() if t is live[0] else t for t in args)
        return self._given(lambda: func(*args, **kwargs), lambda r, x: (rules.through(r, x),), live[0])

    def _average(self, name: str, func: Any, args: Any, kwargs: Any, live: Any) -> torch.Tensor:
        key = next((key for key, value in kwargs.items() if value is live[0]), None)

        def function(x: torch.Tensor) -> torch.Tensor:
            return func(x, *args[1:], **kwargs) if key is None else func(**{**kwargs, key: x})

        return self._given(lambda: func(*args, **kwargs), lambda r, x: (rules.linear_map(r, x, function),), live[0])

    _TABLE = (
        (frozenset(("linear",)), _linear), (frozenset(("addmm",)), _addmm), (_CONVOLUTIONS, _convolution),
        (_PRODUCTS, _product), (frozenset(("scaled_dot_product_attention",)), _attention), (_SUMS, _sum),
        (_GATES, _gate), (_ELEMENTWISE, _element), (_AVERAGES, _average),
    )  # fmt: skip


_MISSING = object()


def _argument(args: Any, kwargs: Any, place: int, name: str, default: Any = _MISSING) -> Any:
    if len(args) > place:
        return args[place]
    if name not in kwargs and default is _MISSING:
        raise QuantizationError(f"an operation without its argument {name!r} has no rule for relevance")
    return kwargs.get(name, default)
