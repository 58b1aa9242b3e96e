"""Put packed layers into a model, take them out again, and rebuild them before a checkpoint is loaded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfq.errors import CheckpointError, QuantizationError
from hfq.formats import ActivationSpec, Codes, affine
from hfq.formats.activation import Parameters
from hfq.layers import folded, rounded, switched, times
from hfq.layers.attached import AttachedPart, Rectifier
from hfq.layers.conv import SecondHalf
from hfq.layers.deferred import Deferred
from hfq.layers.embedding import QEmbedding
from hfq.layers.experts import is_transposed, pack_experts
from hfq.layers.inputs import InputSpec, check_input, input_shapes, input_size, join
from hfq.layers.integer import IntegerModule
from hfq.layers.integer_build import check as check_integer
from hfq.layers.kinds import empty, kind_of, matrix_of, to_float
from hfq.layers.kv_cache import CacheQuant
from hfq.layers.one_weight import OneWeight
from hfq.layers.online import ChannelScale, OnlinePart, StreamRotation
from hfq.layers.packed import Memory, PackedModule, check_slot
from hfq.layers.products import AttentionProducts
from hfq.layers.rebuild import build_empty, describe, packed_modules
from hfq.layers.slot import Slot
from hfq.memory import give_back
from hfq.report import Report, Row

__all__ = [
    "build_empty", "check", "check_codes", "dequantize_modules", "describe", "freeze", "keep_dtype", "kernel_of",
    "kind_of", "packed_modules", "prepare", "swap", "swap_experts",
]  # fmt: skip

_OWN_TENSORS = (PackedModule, StreamRotation, OnlinePart, AttachedPart, CacheQuant, IntegerModule, AttentionProducts)
_TRIM_EVERY = 1 << 20  # bytes of prepared layers; preparing leaves six times as much free, to go back now


def swap(
    model: nn.Module, name: str, codes: Codes, report: Report | None = None, *,
    online: OnlinePart | Sequence[OnlinePart] | None = None, activation: InputSpec | None = None,
    activation_params: Parameters | None = None, activation_factor: torch.Tensor | None = None,
    asked: Mapping[str, Any] | None = None, tokens: int | None = None, reason: str = "",
    extra: Mapping[str, Any] | None = None, folded: bool = False, coarse: tuple[tuple[int, int], Codes] | None = None,
    second: SecondHalf | None = None,
) -> PackedModule:
    """Replace module ``name`` by its packed layer and add a report row.

    Args:
        codes: of the weight as ``[out, in]``; with ``online``, of ``online.fold(weight)``.
        online: transform of the layer's input, or several, the first one first.
        activation: how the input is quantized before the product.
        activation_params, activation_factor: ``(scale, zero_point)`` of a static format; the factor of one that has it.
        asked: what the config asked for; default the grid.
        tokens, reason, extra: for the row.
        folded: the weight of the float module has ``online`` folded in already.
        coarse: of a convolution: taps and codes of a second part of the weight, over the centre of the kernel.
        second: of a convolution: what it does with the second part of its input channels; ``codes`` are those of the
            first part then.

    Returns:
        The packed layer, on the device of the float one.

    Raises:
        QuantizationError: no packed layer fits the module, or the codes do not fit it.
    """
    module = _find(model, name)
    try:
        kind = kind_of(module)
    except QuantizationError as error:
        raise QuantizationError(f"{name}: {error}") from error
    weight = matrix_of(module, kind)
    held = tuple(codes.shape) if second is None else (len(codes.codes), codes.shape[1] + second.codes.shape[1])
    if held != tuple(weight.shape):
        raise QuantizationError(f"{name}: codes of {held} for a weight of {tuple(weight.shape)}")
    online = join(online)
    if activation is not None and kind == "embedding":
        raise QuantizationError(f"{name}: an embedding has no inputs to quantize")
    if (coarse is not None or second is not None) and kind != "conv2d":
        raise QuantizationError(f"{name}: {kind} has no second part of its weight")
    if online is not None and (kind == "embedding" or online.n != weight.shape[1]):
        raise QuantizationError(f"{name}: a transform of {online.n} features does not fit {kind} {tuple(weight.shape)}")
    device = codes.codes.device if weight.is_meta else weight.device
    bias = getattr(module, "bias", None) is not None
    parts = {"coarse": None if coarse is None else (coarse[0], coarse[1].spec),
             "cut": None if second is None else (second.at, second.codes.spec)}  # fmt: skip
    try:
        new = empty(module, kind, codes.spec, online, bias, "meta", activation, **parts)
    except QuantizationError as error:
        raise QuantizationError(f"{name}: {error}") from error
    new.label = name
    new.set_codes("weight", codes, device)
    if coarse is not None:
        new.set_codes("coarse", coarse[1], device)
    new.set_input("weight", activation_params, activation_factor)
    others = [] if coarse is None else [coarse[1]]
    if second is not None:
        others = [second.codes]
        new.set_codes("second", second.codes, device)
        new.set_input("second", second.params)
    if online is not None:
        online.to(device)
    distance = None
    if others and not weight.is_meta:
        distance = float((new.dequantize(dtype=torch.float32).flatten(1) - weight).norm() / weight.norm())
    elif not weight.is_meta:
        distance = _relative_error([(weight, codes)], None if folded else online)
    if distance is not None and not distance < float("inf"):
        raise QuantizationError(f"{name}: the codes decode to values that are not finite")
    model.set_submodule(name, new)
    if report is not None:
        report.add(Row(
            name, kind=kind, reason=reason, asked=_asked(asked or codes.spec.to_dict(), activation),
            bits=_bits(codes, others, weight.numel(), online, activation, 1 if second is None else 2),
            numel=weight.numel(), error=distance, tokens=tokens, kernel=kernel_of(new),
            extra=_extra(extra, activation),
        ))  # fmt: skip
    return new


def keep_dtype(model: nn.Module) -> None:
    """Give the first packed layer a bias of zeros, if its scales would be the first floating tensor of ``model``.

    Libraries take the dtype of that tensor for the model's: a checkpoint would say so, and its float layers would be
    loaded in the dtype of scales.
    """
    first = next(((name, p) for name, p in model.named_parameters() if p.is_floating_point()), None)
    if first is not None:
        layer = model.get_submodule(first[0].rpartition(".")[0])
        if isinstance(layer, OneWeight) and not isinstance(layer, QEmbedding) and first[1].dtype != layer.compute_dtype:
            layer.add_bias()


def swap_experts(
    model: nn.Module, name: str, codes: Mapping[str, Sequence[Codes]], report: Report | None = None, *,
    transposed: bool | None = None, asked: Mapping[str, Any] | None = None, tokens: int | None = None, reason: str = "",
    extra: Mapping[str, Any] | None = None, activation: ActivationSpec | None = None,
    activation_params: Mapping[str, Parameters] | None = None,
    activation_factors: Mapping[str, torch.Tensor] | None = None,
) -> PackedModule:
    """Replace a bank of experts by its packed form and add a report row.

    Args:
        codes: for each 3-D parameter one set of codes an expert, of its weight as ``[out, in]``.
        transposed: the float weights are ``[E, in, out]``; default: from the shapes, or what the module says.
        asked, tokens, reason, extra, activation: as in :func:`swap`.
        activation_params, activation_factors: those of :func:`swap`, for each parameter.
    """
    module = _find(model, name)
    if isinstance(module, PackedModule):
        raise QuantizationError(f"{name}: {type(module).__name__} is packed already")
    if not codes or not all(codes.values()):
        raise QuantizationError(f"{name}: no codes for the experts")
    try:
        shapes = {parameter: (c[0].shape[0], c[0].shape[1]) for parameter, c in codes.items()}
        turned = is_transposed(module, shapes) if transposed is None else transposed
    except QuantizationError as error:
        raise QuantizationError(f"{name}: {error}") from error
    slots, pairs = {}, []
    for parameter, several in codes.items():
        weight = module._parameters.get(parameter)
        rows, columns = several[0].shape
        if weight is None or tuple(weight.shape) != (len(several), *((columns, rows) if turned else (rows, columns))):
            found = None if weight is None else tuple(weight.shape)
            raise QuantizationError(f"{name}: {len(several)} codes of {rows} x {columns} for {parameter} {found}")
        slots[parameter] = Slot(several[0].spec, rows, columns, len(several), f"{parameter}_", turned)
        if not weight.is_meta:
            float_weights = weight.detach().transpose(1, 2) if turned else weight.detach()
            pairs += list(zip(float_weights, several, strict=True))
    device = next(iter(codes.values()))[0].codes.device if not pairs else pairs[0][0].device
    new = pack_experts(module, slots, "meta", activation)
    new.label = name
    for parameter, several in codes.items():
        new.set_codes(parameter, list(several), device)
        new.set_input(parameter, (activation_params or {}).get(parameter), (activation_factors or {}).get(parameter))
    model.set_submodule(name, new)
    if report is not None:
        numel = sum(c.codes.numel() for several in codes.values() for c in several)
        stored = sum(c.bits_per_weight() * c.codes.numel() for several in codes.values() for c in several)
        report.add(Row(
            name, kind="experts", reason=reason,
            asked=_asked(asked or next(iter(slots.values())).spec.to_dict(), activation),
            bits=stored / numel, numel=numel, error=_relative_error(pairs) if pairs else None, tokens=tokens,
            kernel=kernel_of(new), extra=_extra(extra, activation),
        ))  # fmt: skip
    return new


def _bits(
    codes: Codes, others: Sequence[Codes], numel: int, online: OnlinePart | None, activation: InputSpec | None,
    halves: int = 1,
) -> float:
    """Stored bits for each of ``numel`` weights, with all that comes along; ``halves`` of the input have ranges."""
    stored = sum(one.bits_per_weight() * one.codes.numel() for one in (codes, *others))
    stored += 0 if online is None else 8 * sum(p.nbytes for p in online.parameters())
    inputs = sum(math.prod(input_size(activation, name)) * t.itemsize for name, t in input_shapes(activation).items())
    return (stored + 8 * halves * inputs) / numel


def _asked(asked: Mapping[str, Any], activation: InputSpec | None) -> dict[str, Any]:
    return dict(asked) if activation is None else {"activation_bits": activation.bits, **asked}


def _extra(extra: Mapping[str, Any] | None, activation: InputSpec | None) -> dict[str, Any]:
    found = dict(extra or {})
    return found if activation is None else {"activation": activation.to_dict(), **found}


def _find(model: nn.Module, name: str) -> nn.Module:
    try:
        found = model.get_submodule(name)
    except AttributeError as error:
        raise QuantizationError(f"{type(model).__name__} has no module {name!r}") from error
    if found is model:
        raise QuantizationError("the model itself cannot be replaced: give the name of a module in it")
    return found


def _relative_error(
    pairs: Sequence[tuple[torch.Tensor, Codes]], online: OnlinePart | None = None, rows: int = 1024
) -> float:
    """``||W - Q|| / ||W||`` over all matrices, some rows at a time, of the weights as the codes hold them."""
    wrong = total = 0.0
    for weight, codes in pairs:
        for i in range(0, weight.shape[0], rows):
            part = slice(i, i + rows)
            grid = [t if t is None or t.shape[0] == 1 else t[part] for t in (codes.scale, codes.zero_point)]
            decoded = affine.decode(codes.codes[part], grid[0], grid[1], codes.spec)  # type: ignore[arg-type]
            w = weight[part].to(decoded.device, torch.float32)
            w = w if online is None else online.fold(w)
            wrong += float((w - decoded).double().square().sum())
            total += float(w.double().square().sum())
    return (wrong / total) ** 0.5 if total else wrong**0.5


def kernel_of(module: PackedModule) -> str | None:
    """Name of the backend that serves one row of input, where the module is now."""
    return next((choice.backend for choice in module.explain() if choice.chosen), None)


def prepare(model: nn.Module, memory: Memory = "compact") -> list[str]:
    """Make the runtime form of every packed layer that is in memory and not under an offloading hook; their names."""
    done, converted = [], 0
    for name, module in packed_modules(model).items():
        if module.prepare(memory):
            done.append(name)
            converted += module.nbytes
        # Conversion needs several times the layer for a moment; what stays is laid into the holes that this leaves.
        if converted > _TRIM_EVERY:
            give_back()
            converted = 0
    give_back()
    return done


def freeze(model: nn.Module) -> None:
    """No tensor of a packed layer or of a rotation needs a gradient (loaders make floating tensors trainable)."""
    for module in model.modules():
        if isinstance(module, _OWN_TENSORS):
            for parameter in module.parameters(recurse=False):
                if not isinstance(parameter, Deferred):
                    parameter.requires_grad_(False)


def check_codes(module: PackedModule) -> None:
    """Raise :class:`CheckpointError`, naming the tensor, if what was loaded cannot be decoded.

    Codes in packed form are in range by construction; scales must be finite and positive, zero points in range.
    """
    for key in module.slots:
        check_slot(module, key)
    bias = module._parameters.get("bias")
    if bias is not None and not bias.is_meta and not torch.isfinite(bias).all():
        raise CheckpointError(f"{module.label}.bias has elements that are not finite")
    if module.activation is not None:
        for slot in module.slots.values():
            check_input(module, module.activation, slot.input_prefix, module.label, CheckpointError)
    if module.online is not None:
        for name, part in module.online.named_modules():
            where = f"{module.label}.online" + (f".{name}" if name else "")
            _check_signs(part, where)
            vector = getattr(part, "vector" if isinstance(part, ChannelScale) else "columns", None)
            if vector is not None and not vector.is_meta and not (torch.isfinite(vector) & (vector > 0)).all():
                raise CheckpointError(f"{where} has scales that are not finite or not above zero")
            shift = getattr(part, "shift", None)
            if shift is not None and not shift.is_meta and not torch.isfinite(shift).all():
                raise CheckpointError(f"{where}.shift has elements that are not finite")


def _check_signs(module: nn.Module, where: str) -> None:
    signs = module._parameters.get("signs")
    if signs is not None and not signs.is_meta and not (signs.abs() == 1).all():
        raise CheckpointError(f"{where}.signs has elements other than +1 and -1")


def check(model: nn.Module) -> None:
    """:func:`check_codes` for every packed layer, and the same for the rotations and for integer modules."""
    check_integer(model)
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            module.label = module.label or name
            check_codes(module)
        elif isinstance(module, AttachedPart):
            module.check(name)
        elif isinstance(module, CacheQuant):
            module.check()
        elif isinstance(module, AttentionProducts):
            module.check(name)
        elif isinstance(module, StreamRotation):
            _check_signs(module, name)
            if module.kind == "dense" and not module.matrix.is_meta:
                q = module.matrix_of()
                wrong = (q @ q.t() - torch.eye(module.size, dtype=q.dtype, device=q.device)).abs().max()
                if not wrong < 1e-3:
                    raise CheckpointError(f"{name}.matrix is not orthogonal (off by {float(wrong):.2g})")


def dequantize_modules(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Replace every packed layer by its float module, online transforms folded back into the weight.

    Rounded inputs of norms and blocks go as well; of a layer with several widths the widest is left. Stream rotations
    stay: the weights in between are rotated, and the model's function needs both.

    Args:
        dtype: of the float weights; default the layers' ``compute_dtype``.

    Returns:
        Names of the replaced modules.
    """
    if getattr(model, "hfq_integer", None) is not None:
        raise QuantizationError(f"{type(model).__name__} is an integer-only decoder: it computes with integers from "
                                "the ids to the logits and has no float form; load the float model instead")
    switched.collapse(model)
    found = packed_modules(model)
    for name, module in found.items():
        model.set_submodule(name, to_float(module, dtype).train(module.training))
    folded.restore(model)
    other = [name for name, module in model.named_modules() if isinstance(module, Rectifier)]
    if other:  # only the manifest of a packed model names them
        warnings.warn(f"{other[0]} (and {len(other) - 1} more) is a ReLU now, for which its linears were fitted: a "
                      "float checkpoint is right only if its config says so (hidden_act)", stacklevel=2)
    rounded.remove(model)
    times.remove(model)
    return list(found)
