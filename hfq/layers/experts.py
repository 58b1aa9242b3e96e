"""Packed banks of experts: the 3-D weights of a mixture-of-experts module, without a copy of its code.

The packed module is an instance of a subclass of the original class. Its float weights are gone; reading
``self.gate_up_proj`` gives a stand-in whose ``[expert]`` multiplies from packed codes, so that the class's own forward
runs unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hfq import kernels
from hfq.errors import QuantizationError
from hfq.formats import ActivationSpec
from hfq.layers.deferred import Deferred
from hfq.layers.inputs import describe_input, input_shapes
from hfq.layers.packed import PackedModule
from hfq.layers.slot import Slot

__all__ = ["ExpertWeight", "QExperts", "is_transposed", "pack_experts", "unpack_experts"]


class ExpertWeight(Deferred):
    """The weights of a bank ``[E, ...]``, or of one expert of it, as model code sees them.

    ``linear``, ``matmul`` and ``bmm`` run on packed codes; everything else dequantizes.
    """

    _bank: QExperts
    _key: str
    _index: int | None
    _flipped: bool

    __torch_function__ = classmethod(  # type: ignore[assignment]
        lambda cls, func, types, args=(), kwargs=None: _function(func, args, kwargs or {})
    )

    @classmethod
    def of(cls, bank: QExperts, key: str, index: int | None = None, flipped: bool = False) -> ExpertWeight:
        def make() -> torch.Tensor:
            weight = bank.dequantize(key, index=index)
            return weight.transpose(-1, -2) if flipped else weight

        shape = bank.slots[key].weight_shape
        shape = shape if index is None else shape[1:]
        shape = (*shape[:-2], shape[-1], shape[-2]) if flipped else shape
        self = cls(make, shape, bank.compute_dtype, bank.device)
        self._bank, self._key, self._index, self._flipped = bank, key, index, flipped
        return self

    def __getitem__(self, index: Any) -> torch.Tensor:
        single = isinstance(index, int) or (
            isinstance(index, torch.Tensor) and index.dim() == 0 and index.dtype != torch.bool
        )
        if self._index is not None or not single:
            return self.materialise()[index]
        expert, count = int(index), self._bank.slots[self._key].count or 0
        if not -count <= expert < count:
            raise IndexError(f"expert {expert} of {count}")
        return ExpertWeight.of(self._bank, self._key, expert % count, self._flipped)

    @property
    def by_rows(self) -> bool:
        """Whether the last axis is the input features, as the codes lie (``x @ self.T``)."""
        return self._bank.slots[self._key].transposed == self._flipped

    def product(self, x: torch.Tensor, index: int, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` times the matrix of one expert."""
        bank, key = self._bank, self._key
        if bank.activation is not None:
            return kernels.linear_int(x, bank.operand(key, index), bias, bank.activation, *bank.input_of(key))
        return kernels.linear(x, bank.operand(key, index), bias)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, ExpertWeight) or isinstance(x, Deferred) or weight._index is None or not weight.by_rows:
        return NotImplemented
    return weight.product(x, weight._index, bias)


def _matmul(x: Any, weight: Any) -> Any:
    if not isinstance(weight, ExpertWeight) or weight.by_rows or isinstance(x, Deferred):
        return NotImplemented
    if weight._index is not None:
        return weight.product(x, weight._index)
    if x.dim() != 3 or x.shape[0] != weight.shape[0]:
        return NotImplemented
    return torch.stack([weight.product(rows, i) for i, rows in enumerate(x)])


def _transpose(weight: Any, a: int, b: int) -> Any:
    last = weight.dim() - 1
    if not isinstance(weight, ExpertWeight) or {a % weight.dim(), b % weight.dim()} != {last, last - 1}:
        return NotImplemented
    return ExpertWeight.of(weight._bank, weight._key, weight._index, not weight._flipped)


def _turn(weight: Any) -> Any:
    return _transpose(weight, -1, -2) if weight.dim() == 2 else NotImplemented


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.nn.functional.linear: _linear,
    torch.matmul: _matmul, torch.Tensor.matmul: _matmul, torch.Tensor.__matmul__: _matmul,
    torch.bmm: _matmul, torch.Tensor.bmm: _matmul, torch.mm: _matmul, torch.Tensor.mm: _matmul,
    torch.transpose: _transpose, torch.Tensor.transpose: _transpose,
    torch.t: _turn, torch.Tensor.t: _turn, torch.Tensor.T.__get__: _turn,  # type: ignore[attr-defined]
    torch.Tensor.mT.__get__: lambda weight: _transpose(weight, -1, -2),  # type: ignore[attr-defined]
}  # fmt: skip


def _function(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        handler = _FUNCTIONS.get(func)
        result = NotImplemented if handler is None else handler(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result


class _EagerConfig:
    """The module's config, except that experts run one by one: other implementations read the float bank as a whole."""

    def __init__(self, config: Any) -> None:
        object.__setattr__(self, "_config", config)

    _experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":
            raise AttributeError(name)
        return getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "_experts_implementation":
            setattr(self._config, name, value)

    def __reduce__(self) -> Any:
        return _EagerConfig, (self._config,)


class QExperts(PackedModule):
    """Mixed into a subclass of the original class by :func:`pack_experts`; parameters ``<param>_qweight`` and so on."""

    _kind = "experts"
    _float_class: type[nn.Module]

    def __init__(self, *_: Any, **__: Any) -> None:
        raise QuantizationError("packed experts are made from a float module, by pack_experts")

    def __getattr__(self, name: str) -> Any:
        slots = self.__dict__.get("slots")
        if slots is not None and name in slots:
            if torch.compiler.is_compiling():
                if self.activation is not None:
                    raise QuantizationError("packed experts with quantized inputs cannot be compiled: run them eagerly")
                return self.dequantize(name)
            return ExpertWeight.of(self, name)
        return super().__getattr__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:  # the class itself is made on demand and cannot be imported
        return _blank, (self._float_class,), self.__getstate__()

    def describe(self) -> dict[str, Any]:
        return {"kind": self._kind, "params": {
            key: {
                "experts": slot.count, "out_features": slot.rows, "in_features": slot.columns,
                "transposed": slot.transposed, "spec": slot.spec.to_dict(),
            } for key, slot in self.slots.items()
        }, "activation": describe_input(self.activation)}  # fmt: skip


@functools.cache
def _class_for(base: Any) -> type[QExperts]:
    return type(f"Q{base.__name__}", (QExperts, base), {"_float_class": base, "__doc__": QExperts.__doc__})


def _blank(base: type[nn.Module]) -> QExperts:
    packed = _class_for(base)  # type: ignore[arg-type]
    return packed.__new__(packed)


# What belongs to one module object and not to its replacement.
_OWN = {"_parameters", "_modules", "_buffers", "_hf_hook", "_old_forward", "forward", "_is_hf_initialized"}


def _copy_plain(source: nn.Module, target: nn.Module, without: set[str]) -> None:
    nn.Module.__init__(target)
    hooks = {name for name in source.__dict__ if name.endswith("_hooks") or "_hooks_" in name}
    for name, value in source.__dict__.items():
        if name not in _OWN | hooks | without:
            target.__dict__[name] = value
    target._buffers.update(source._buffers)
    target._modules.update(source._modules)


def is_transposed(module: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> bool:
    """Whether the bank's float weights are ``[E, in, out]``.

    Args:
        module: the float bank.
        shapes: ``(out, in)`` of the codes of each packed parameter.

    Raises:
        QuantizationError: the shapes fit neither way, or both and the module does not say.
    """
    votes = set()
    for name, (rows, columns) in shapes.items():
        parameter = module._parameters.get(name)
        if parameter is None or parameter.dim() != 3:
            raise QuantizationError(f"{type(module).__name__} has no 3-D parameter {name!r}")
        found = tuple(parameter.shape[1:])
        if found not in ((rows, columns), (columns, rows)):
            raise QuantizationError(f"codes of {rows} x {columns} do not fit {name} {tuple(parameter.shape)}")
        if rows != columns:
            votes.add(found == (columns, rows))
    if not votes:
        said = getattr(module, "is_transposed", None)
        if not isinstance(said, bool):
            raise QuantizationError(f"{type(module).__name__} has square weights: say whether they are transposed")
        return said
    if len(votes) > 1:
        raise QuantizationError(f"the codes of {type(module).__name__} are not all [out, in], or not all [in, out]")
    return votes.pop()


def pack_experts(
    module: nn.Module, slots: dict[str, Slot], device: Any = None, activation: ActivationSpec | None = None
) -> QExperts:
    """An empty packed module in the place of ``module``, which keeps its other tensors, sub-modules and attributes."""
    first = next(iter(slots))
    parameter = module._parameters[first]
    assert parameter is not None
    new = _blank(type(module))
    _copy_plain(module, new, set())
    new._parameters.update({name: p for name, p in module._parameters.items() if name not in slots})
    new._start(slots, parameter.dtype, parameter.device if device is None else device, activation)
    config = new.__dict__.get("config")
    if config is not None and hasattr(config, "_experts_implementation"):
        new.__dict__["config"] = _EagerConfig(config)
    return new


def unpack_experts(module: QExperts, dtype: torch.dtype | None = None) -> nn.Module:
    """The float module again, with the dequantized weights."""
    new = module._float_class.__new__(module._float_class)
    packed = {"slots", "activation", "compute_dtype", "label", "online", "_memory", "_runtimes", "_held"}
    _copy_plain(module, new, packed)
    names = {name for slot in module.slots.values()
             for name in (*slot.names, *input_shapes(module.activation, slot.prefix))}  # fmt: skip
    for key in module.slots:
        new._parameters[key] = nn.Parameter(module.dequantize(key, dtype).contiguous(), requires_grad=False)
    new._parameters.update({name: p for name, p in module._parameters.items() if name not in names})
    if isinstance(new.__dict__.get("config"), _EagerConfig):
        new.__dict__["config"] = new.__dict__["config"]._config
    return new
