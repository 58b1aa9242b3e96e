"""What all packed layers have in common: canonical tensors, their runtime form, casts, copies and saving.

A layer holds one or several *slots*: packed matrices (or stacks of them), ``<prefix>qweight``, ``<prefix>scale`` and
``<prefix>zero_point``. :meth:`PackedModule.prepare` replaces the codes by the layout that a kernel computes from.
``state_dict``, copies and casts see the canonical tensors all the same, made when they are read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from hfq import kernels
from hfq.errors import CheckpointError, QuantizationError
from hfq.formats import ActivationSpec, Codes, affine, bitpack
from hfq.kernels import PackedWeight, Runtime
from hfq.layers.deferred import Deferred
from hfq.layers.inputs import QuantizedInput, input_shapes, input_size
from hfq.layers.online import OnlinePart
from hfq.layers.slot import Slot, columns_of
from hfq.memory import page_out

__all__ = ["Memory", "PackedModule", "check_slot"]

Memory = Literal["compact", "cached"]

_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class PackedModule(QuantizedInput, nn.Module):
    """Base of the packed layers.

    Attributes:
        slots: the packed matrices by the name of the float weight that they replace.
        activation: how inputs are quantized before the product, ``None`` for not at all; static ranges and factors are
            the parameters ``<prefix>input_scale``, ``<prefix>input_zero_point`` and ``<prefix>input_factor``.
        compute_dtype: dtype of the float weight; follows ``.to(dtype)``. Codes, scales and zero points do not.
        label: qualified name in the model, for messages only.
    """

    # transformers shards plain local tensors for tensor parallelism; without this the result is silently wrong.
    _hf_quantized_needs_local_tp = True
    # transformers must not look for weights to initialise in here.
    _is_hf_initialized = True
    # Whether a runtime layout is of use (an embedding reads rows of the canonical form).
    _has_runtime = True

    slots: dict[str, Slot]
    online: OnlinePart | None

    def __init__(
        self, slots: dict[str, Slot], *, compute_dtype: torch.dtype, device: Any = None,
        activation: ActivationSpec | None = None,
    ) -> None:
        super().__init__()
        self._start(slots, compute_dtype, device, activation)

    def _start(
        self, slots: dict[str, Slot], compute_dtype: torch.dtype, device: Any, activation: ActivationSpec | None
    ) -> None:
        self.slots, self.activation = slots, activation
        self.online = None
        self.compute_dtype = compute_dtype
        self.label = ""
        self._memory: Memory | None = None
        self._runtimes: dict[str, list[Runtime]] = {}
        self._held: dict[str, torch.Tensor] = {}
        for slot in slots.values():
            for name in slot.names:
                self.register_parameter(name, None)
            for name, (shape, dtype) in slot.shapes.items():
                self._put(name, torch.empty(shape, dtype=dtype, device=device))
            for name, dtype in input_shapes(activation, slot.input_prefix).items():
                self.register_parameter(name, None)
                self._put(name, torch.empty(input_size(activation, name), dtype=dtype, device=device))  # type: ignore

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        with torch.inference_mode(False):
            self._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    # Content

    def set_codes(self, key: str, codes: Codes | list[Codes], device: Any = None) -> None:
        """Fill slot ``key`` with ``codes`` (one per matrix of a stack).

        Raises:
            QuantizationError: the codes are of another shape or grid, or their scales are not finite.
        """
        slot = self.slots[key]
        several = codes if isinstance(codes, list) else [codes]
        if len(several) != (slot.count or 1):
            raise QuantizationError(f"{self.label or key}: {len(several)} sets of codes for {slot.count or 1} matrices")
        for one in several:
            if tuple(one.codes.shape) != (slot.rows, slot.columns) or one.spec != slot.spec:
                want, found = f"{slot.rows} x {slot.columns}, {slot.spec}", f"{tuple(one.codes.shape)}, {one.spec}"
                raise QuantizationError(f"{self.label or key}: codes of {found}; {want} is needed")
        device = device if device is not None else self.scale_of(key).device
        packed = [bitpack.pack(one.codes, slot.spec.bits) for one in several]
        parts = {slot.names[0]: packed, slot.names[1]: [one.scale for one in several]}
        if not slot.spec.symmetric:
            parts[slot.names[2]] = [one.zero_point for one in several]  # type: ignore[misc]
        self.restore()
        for name, (shape, dtype) in slot.shapes.items():
            tensors = [part.detach().to(device, dtype) for part in parts[name]]
            whole = tensors[0] if slot.count is None else torch.stack(tensors)
            # A view into a larger tensor would keep all of it alive, and shared memory cannot be saved.
            self._put(name, whole.reshape(shape).clone(memory_format=torch.contiguous_format))
        check_slot(self, key, QuantizationError)

    def scale_of(self, key: str) -> torch.Tensor:
        return self._parameters[self.slots[key].names[1]]  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.scale_of(next(iter(self.slots))).device

    def packed(self, key: str | None = None) -> list[PackedWeight]:
        """The canonical form of each matrix of slot ``key``: views, unless a runtime layout is converted back."""
        key = next(iter(self.slots)) if key is None else key
        return [self._one_packed(key, i) for i in range(self.slots[key].count or 1)]

    def operand(self, key: str, index: int = 0) -> Runtime | PackedWeight:
        """What a kernel computes from for matrix ``index`` of slot ``key``: the runtime form if there is one."""
        runtimes = self._runtimes.get(key)
        if runtimes is None:
            if self._memory is None or torch.compiler.is_compiling() or not self.prepare(self._memory):
                return self._one_packed(key, index)
            return self.operand(key, index)
        # Somebody (accelerate, a loader) put another tensor in the parameter's place: the runtime form is out of date.
        if not torch.compiler.is_compiling() and self._parameters[self.slots[key].names[0]] is not self._held[key]:
            self.restore()
            return self._one_packed(key, index)
        return runtimes[index]

    def _one_packed(self, key: str, index: int) -> PackedWeight:
        slot = self.slots[key]
        q, s, z = (None if (p := self._parameters[name]) is None else p.detach() for name in slot.names)
        i = () if slot.count is None else index
        codes = q[0][i]  # type: ignore[index]  # (a detached Deferred is the canonical tensor)
        columns = columns_of(codes.shape[-1], slot, self.label or key)
        return PackedWeight(codes, s[i], None if z is None else z[i], slot.spec, columns, codes.shape[0], self.label)  # type: ignore[index]

    def dequantize(
        self, key: str | None = None, dtype: torch.dtype | None = None, index: int | None = None
    ) -> torch.Tensor:
        """The float weight that slot ``key`` stands for, in the layout of the float module, online transform undone.

        Args:
            key: slot; default the first.
            dtype: default ``compute_dtype``.
            index: one matrix of a stack; default all of them.
        """
        key = next(iter(self.slots)) if key is None else key
        slot, dtype = self.slots[key], dtype or self.compute_dtype
        if slot.count is not None and index is None:
            return torch.stack([self.dequantize(key, dtype, i) for i in range(slot.count)])
        working, operand = dtype if self.online is None else torch.float32, self.operand(key, index or 0)
        if torch.compiler.is_compiling():  # the product is a traceable operator in every layout, unpacking is not
            columns = torch.eye(slot.columns, dtype=working, device=self.device)
            weight = kernels.linear(columns, operand).t()
        else:
            weight = kernels.dequantize(operand, working)
        if self.online is not None:  # as in (x H) Q^T = x (Q H^T)^T
            weight = self.online.unfold(weight).to(dtype)
        return slot.to_weight(weight)

    def weight_view(self, key: str) -> torch.Tensor:
        """The float weight of slot ``key``, dequantized when it is computed with."""
        if torch.compiler.is_compiling():  # a read of the dtype alone is dead code there
            return self.dequantize(key)
        return Deferred(lambda: self.dequantize(key), self.slots[key].weight_shape, self.compute_dtype, self.device)

    def assign_weight(self, key: str, value: torch.Tensor) -> None:
        """Take ``value`` as the float weight: nothing to do if it is the present one, else coded on the present grid.

        Libraries that merge adapters or move modules assign ``layer.weight``; a packed layer can only round it.
        """
        slot, where = self.slots[key], self.label or key
        if tuple(value.shape) != slot.weight_shape:
            raise QuantizationError(f"{where}: a weight of {tuple(value.shape)}; {slot.weight_shape} is needed")
        if slot.count is not None:
            raise QuantizationError(f"{where}: the weights of packed experts cannot be assigned")
        present = self.dequantize(key)
        new = (value.materialise() if isinstance(value, Deferred) else value.detach()).to(present.device)
        if torch.equal(new.to(present.dtype), present):
            return
        if not torch.isfinite(new).all():
            raise QuantizationError(f"{where}: the assigned weight has NaN or infinite elements")
        warnings.warn(f"{where}: the assigned weight is rounded to {slot.spec.bits} bits on its grid", stacklevel=3)
        matrix = slot.to_matrix(new.float())
        matrix = matrix if self.online is None else self.online.fold(matrix)
        old = self.packed(key)[0]
        codes = affine.encode(matrix, old.scale, old.zero_point, slot.spec)
        self.set_codes(key, Codes(codes, old.scale, old.zero_point, slot.spec))

    def explain(self, M: int = 1, dtype: torch.dtype | None = None) -> list[kernels.Choice]:
        """Which backend serves ``M`` rows of activations here, and why no other does; nothing without a product."""
        if not self._has_runtime:
            return []
        operand, dtype = self.operand(next(iter(self.slots))), dtype or self.compute_dtype
        return kernels.explain(operand, M, dtype, activation=self.activation)

    @property
    def prepared(self) -> bool:
        return bool(self._runtimes)

    def prepare(self, memory: Memory = "compact") -> bool:
        """Make the runtime form for the device where the layer is; it replaces the codes in memory.

        Returns:
            Whether there is one now. Layers on the meta device or under an accelerate hook stay canonical.
        """
        if self._runtimes and self._memory == memory:
            return True
        if not self._has_runtime or self.device.type == "meta" or hasattr(self, "_hf_hook"):
            return False
        self.restore()
        for key, slot in self.slots.items():
            name = slot.names[0]
            with torch.inference_mode(False), torch.no_grad():  # what is made here may serve a backward pass later
                runtimes = [self.runtime_of(one, key, memory) for one in self.packed(key)]
            parameter = self._parameters[name]
            assert parameter is not None
            start = parameter.untyped_storage().data_ptr()
            tensors = [t for runtime in runtimes for t in runtime.tensors.values()]
            if not any(t.untyped_storage().data_ptr() == start for t in tensors):
                page_out(parameter)
                self._parameters[name] = _canonical(runtimes, parameter, slot)  # type: ignore[assignment]
            self._runtimes[key], self._held[key] = runtimes, self._parameters[name]  # type: ignore[assignment]
        self._memory = memory
        return True

    def runtime_of(self, one: PackedWeight, key: str, memory: Memory) -> Runtime:
        """The form that the kernel of this layer computes from."""
        return kernels.prepare(one, dtype=self.compute_dtype, memory=memory, activation=self.activation)

    def restore(self) -> None:
        """Put the canonical tensors back in the place of the runtime form; the next forward makes that again.

        A tensor that somebody else put there meanwhile stays.
        """
        for key, held in self._held.items():
            name = self.slots[key].names[0]
            if isinstance(held, Deferred) and self._parameters[name] is held:
                self._put(name, held.materialise())
        self._runtimes, self._held = {}, {}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the layer holds at present, runtime layouts and biases included."""
        tensors: list[torch.Tensor] = [p for p in self.parameters() if not isinstance(p, Deferred)]
        tensors += [t for runtimes in self._runtimes.values() for r in runtimes for t in r.tensors.values()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values()) + sum(r.hidden for runtimes in self._runtimes.values() for r in runtimes)

    # nn.Module protocol

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedModule:
        """Move everything; cast what is a float weight's companion (bias) and never codes, scales or zero points."""
        self.restore()
        names = {name for slot in self.slots.values()
                 for name in (*slot.names, *input_shapes(self.activation, slot.input_prefix))}  # fmt: skip
        kept = {name: self._parameters.pop(name) for name in list(self._parameters) if name in names}
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters = {**self._parameters, **kept}  # a bias comes first, as it did
        for name, parameter in kept.items():
            if parameter is not None:
                # Casts of modules leave integers alone: seen as integers, scales keep their dtype and every bit.
                data = parameter.detach()
                moved = fn(data.view(_SAME_WIDTH[data.element_size()])).view(data.dtype)
                if moved.device != data.device or moved.data_ptr() != data.data_ptr():
                    self._put(name, moved)
        dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        self.compute_dtype = dtype if dtype.is_floating_point else self.compute_dtype
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for slot in self.slots.values():
            name = slot.names[0]
            value = destination.get(prefix + name)
            if isinstance(value, Deferred):
                destination[prefix + name] = value.materialise()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the canonical tensors; they make their own runtime form."""
        state = self.__dict__.copy()
        state["_runtimes"], state["_held"] = {}, {}
        state["_parameters"] = {
            name: nn.Parameter(p.materialise(), requires_grad=False) if isinstance(p, Deferred) else p
            for name, p in self._parameters.items()
        }
        return state

    def describe(self) -> dict[str, Any]:
        """The manifest entry: what :func:`hfq.layers.swap.build_empty` needs, JSON only."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        def text(slot: Slot) -> str:
            group = {-1: "per channel", 0: "per tensor"}.get(slot.spec.group_size, f"group {slot.spec.group_size}")
            end = ", symmetric" if slot.spec.symmetric else ""
            return f"{slot.rows}x{slot.columns}, {slot.spec.bits} bits, {group}{end}"

        several = len(self.slots) > 1
        parts = [f"{key}: {text(slot)}" if several or slot.count else text(slot) for key, slot in self.slots.items()]
        parts[-1] += "" if self.activation is None else f", {self.activation.bits}-bit inputs"
        return "; ".join(parts) + f", {str(self.compute_dtype).removeprefix('torch.')}"


def _canonical(runtimes: list[Runtime], parameter: torch.Tensor, slot: Slot) -> Deferred:
    def make() -> torch.Tensor:
        codes = [runtime.canonical() for runtime in runtimes]
        return (codes[0] if slot.count is None else torch.stack(codes)).unsqueeze(0)

    return Deferred(make, tuple(parameter.shape), parameter.dtype, parameter.device, parameter=True)


def check_slot(module: PackedModule, key: str, error: type[Exception] = CheckpointError) -> None:
    """Raise ``error`` unless the tensors of a slot have the right form and can be decoded."""
    slot = module.slots[key]
    where = module.label or type(module).__name__
    sharded = hasattr(module, "_hf_device_mesh")  # tensor parallelism: the shapes are those of a shard
    for name, (shape, dtype) in slot.shapes.items():
        tensor = module._parameters[name]
        if tensor is None or (tuple(tensor.shape) != shape and not sharded):
            raise error(f"{where}.{name} is {None if tensor is None else tuple(tensor.shape)}; {shape} is needed")
        if dtype == torch.uint8 and tensor.dtype != dtype:
            raise error(f"{where}.{name} is {tensor.dtype}; {dtype} is needed")
    if module.device.type == "meta":
        return
    scale, zero = (module._parameters[name] for name in slot.names[1:])
    if scale is None or not torch.isfinite(scale).all() or not (scale > 0).all():
        raise error(f"{where}.{slot.names[1]} has scales that are not finite or not positive")
    if zero is not None and zero.dtype == torch.uint8 and zero.numel() and int(zero.max()) > slot.spec.max_code:
        found = f"{where}.{slot.names[2]} has a zero point of {int(zero.max())}"
        raise error(f"{found}; {slot.spec.bits} bits allow {slot.spec.max_code}")
    if zero is not None and not torch.isfinite(zero).all():
        raise error(f"{where}.{slot.names[2]} has zero points that are not finite")
