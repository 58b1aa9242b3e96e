"""What a packed layer does to its input before the product: online parts in a row, then quantization."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hfq.errors import CheckpointError, ConfigError, HfqError, QuantizationError
from hfq.formats import ActivationSpec, activation, grids
from hfq.formats.activation import Parameters
from hfq.formats.twin import TwinSpec
from hfq.layers import manifest as record
from hfq.layers import times
from hfq.layers.joint import JointRange
from hfq.layers.parts import ChannelScale, Hadamard, OnlinePart
from hfq.layers.shift import ChannelShift
from hfq.layers.slot import Slot
from hfq.layers.times import NoiseLevels

__all__ = [
    "Chain", "InputSpec", "QuantizedInput", "activation_of", "check_input", "describe_input", "input_shapes",
    "input_size", "join", "online_of",
]  # fmt: skip


InputSpec = ActivationSpec | TwinSpec


class Chain(OnlinePart):
    """Several parts, the first one first: children "0", "1", ..."""

    def __init__(self, parts: Sequence[OnlinePart]) -> None:
        super().__init__()
        if len(parts) < 2 or len({part.n for part in parts}) != 1:
            raise QuantizationError("a chain of online parts has two or more of one width")
        self.n = parts[0].n
        for i, part in enumerate(parts):
            self.add_module(str(i), part)

    @property
    def parts(self) -> list[OnlinePart]:
        return list(self._modules.values())  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
        return x

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        for part in reversed(self.parts):
            y = part.inverse(y)
        return y

    def fold(self, weight: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            weight = part.fold(weight)
        return weight

    def unfold(self, weight: torch.Tensor) -> torch.Tensor:
        for part in reversed(self.parts):
            weight = part.unfold(weight)
        return weight

    def describe(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [part.describe() for part in self.parts]


def join(online: OnlinePart | Sequence[OnlinePart] | None) -> OnlinePart | None:
    """One part for a list of them; ``None`` for none."""
    if online is None or isinstance(online, OnlinePart):
        return online
    parts = [inner for part in online for inner in (part.parts if isinstance(part, Chain) else [part])]
    return None if not parts else parts[0] if len(parts) == 1 else Chain(parts)


def input_shapes(spec: InputSpec | None, prefix: str = "") -> dict[str, torch.dtype]:
    """Names and dtypes of the stored input parameters; see :func:`input_size` for their shapes."""
    if spec is None:
        return {}
    found = {prefix + "input_factor": torch.float32} if spec.factor else {}
    if not spec.dynamic:
        found[prefix + "input_scale"] = torch.float32
        if not spec.symmetric:
            found[prefix + "input_zero_point"] = torch.uint8
    return found


def input_size(spec: InputSpec | None, name: str, levels: NoiseLevels | None = None) -> tuple[int, ...]:
    """Shape of a stored input parameter: one element (of ranges and ends that follow noise levels one a level), of the
    factors of both ends two."""
    ends = (2,) if spec is not None and spec.factor == 2 and name.endswith("factor") else ()
    return (1 if levels is None else len(levels), *ends)


class QuantizedInput:
    """What a packed layer knows of its inputs: a format, and for static ones and factors parameters in the module.

    Attributes:
        levels: the noise levels that static ranges, or the factors of both ends of dynamic ones, belong to, one each;
            ``None``: one serves all calls.
    """

    activation: InputSpec | None = None
    levels: NoiseLevels | None = None
    slots: dict[str, Slot]
    label: str
    _parameters: dict[str, Any]
    _put: Callable[[str, torch.Tensor], None]

    def set_input(self, key: str, params: Parameters | None, factor: torch.Tensor | None = None) -> None:
        """Store the static range (of a layer that follows noise levels ``[levels]`` of them), or the factor, of the
        inputs of slot ``key``.

        Raises:
            QuantizationError: they are missing, not asked for, or no range.
        """
        prefix, device = self.slots[key].prefix, self._parameters[self.slots[key].names[1]].device
        scale, zero = (None, None) if params is None else params
        given = {"input_scale": scale, "input_zero_point": zero, "input_factor": factor}
        wanted = input_shapes(self.activation, prefix)
        for leaf, tensor in given.items():
            if (tensor is None) == (prefix + leaf in wanted):
                state = "missing" if tensor is None else "not part of the activation format"
                raise QuantizationError(f"{self.label or key}: {leaf} is {state}")
            if tensor is not None:
                size = input_size(self.activation, leaf, self.levels)
                value = tensor.detach().reshape(-1, *size[1:]).to(device, wanted[prefix + leaf], copy=True)
                self._put(prefix + leaf, value)
        if self.activation is not None:
            check_input(self, self.activation, prefix, self.label or key, QuantizationError)

    def input_of(self, key: str) -> tuple[Parameters | None, torch.Tensor | None]:
        """``(params, factor)`` of the inputs of slot ``key``, as :func:`hfq.kernels.linear_int` takes them: where there
        is a range for each noise level, that of the running call."""
        spec, prefix = self.activation, self.slots[key].prefix
        if spec is None or (spec.dynamic and not spec.factor):
            return None, None
        if spec.factor:
            factor: torch.Tensor = self._parameters[prefix + "input_factor"]
            factor = factor if self.levels is None else times.chosen((factor, None), self.levels)[0]
            return None, factor[0] if spec.factor == 2 else factor
        stored = self._parameters
        params = stored[prefix + "input_scale"], stored.get(prefix + "input_zero_point")
        return (params if self.levels is None else times.chosen(params, self.levels)), None


def check_input(module: Any, spec: InputSpec, prefix: str, where: str, error: type[HfqError]) -> None:
    """Raise ``error`` unless the stored input parameters of ``module`` make sense."""
    count = 1 if module.levels is None else len(module.levels)
    for name, dtype in input_shapes(spec, prefix).items():
        tensor = module._parameters[name]
        size = input_size(spec, name, module.levels)
        if tensor is None or tuple(tensor.shape) != size or tensor.dtype != dtype:
            found = None if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise error(f"{where}.{name} is {found}; {dtype} {size} is needed")
    if not spec.dynamic:
        scale, zero = module._parameters[prefix + "input_scale"], module._parameters.get(prefix + "input_zero_point")
        try:
            activation.check_parameters((scale, zero), spec, f"{where}.{prefix}input_scale", count)  # type: ignore[arg-type]
        except QuantizationError as wrong:
            raise error(str(wrong)) from None
    factor = module._parameters.get(prefix + "input_factor")
    if factor is not None and not factor.is_meta and not (torch.isfinite(factor).all() and (factor > 0).all()):
        raise error(f"{where}.{prefix}input_factor is {factor.tolist()}: finite numbers above zero are needed")


def describe_input(spec: InputSpec | None) -> dict[str, Any] | None:
    """The part of a manifest entry that :func:`activation_of` reads."""
    return None if spec is None else spec.to_dict()


def activation_of(name: str, entry: Mapping[str, Any]) -> InputSpec | None:
    """The activation format of a manifest entry: "form" says which kind, "uniform" if nothing does. Entries from before
    there was one have none.

    Raises:
        CheckpointError: it is damaged.
    """
    given = entry.get("activation")
    if given is None:
        return None
    try:
        form = given.get("form", "uniform")
        if form not in ("uniform", "twin"):
            raise CheckpointError(f"{name}: inputs of form {form!r}: the checkpoint needs a newer hfq")
        return grids.from_dict(given)  # type: ignore[return-value]
    except (TypeError, ValueError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{name}: its activation format in the manifest is not valid: {error}") from error


def online_of(name: str, entry: Any, columns: int, device: Any) -> OnlinePart | None:
    """The empty online part that a manifest entry (``None``, a part, or a list of parts) describes.

    Raises:
        CheckpointError: it is damaged, or does not fit ``columns`` features.
    """
    if entry is None:
        return None
    if isinstance(entry, list):
        if len(entry) < 2:
            raise CheckpointError(f"{name}.online: a list of {len(entry)} parts in the manifest")
        return Chain([_part(name, f"online[{i}]", part, columns, device) for i, part in enumerate(entry)])
    return _part(name, "online", entry, columns, device)


def _part(layer: str, leaf: str, entry: Any, columns: int, device: Any) -> OnlinePart:
    name = f"{layer}.{leaf}"
    if isinstance(entry, Mapping) and entry.get("kind") == "channel_scale":
        record.fields(name, entry, {"kind", "size"})
        record.size(name, entry, "size", columns)
        return ChannelScale(columns, device=device)
    if isinstance(entry, Mapping) and entry.get("kind") == "channel_shift":
        record.fields(name, entry, {"kind", "size"})
        record.size(name, entry, "size", columns)
        return ChannelShift(columns, device=device)
    if isinstance(entry, Mapping) and entry.get("kind") == "joint_range":
        return _joint(layer, name, entry, columns, device)
    record.fields(name, entry, {"kind", "size", "block", "signs"})
    record.size(name, entry, "size", columns)
    block, signs = entry["block"], entry["signs"]
    whole = block is None or (isinstance(block, int) and not isinstance(block, bool))
    if entry["kind"] != "hadamard" or not isinstance(signs, bool) or not whole:
        raise CheckpointError(f"{layer}: unknown online transform {dict(entry)} in the manifest")
    try:
        return Hadamard(columns, block, signs=signs, device=device)
    except QuantizationError as error:
        raise CheckpointError(f"{layer}: {error}") from error


def _joint(layer: str, name: str, entry: Mapping[str, Any], columns: int, device: Any) -> JointRange:
    record.fields(name, entry, {"kind", "size", "bits", "exponent", "stored"})
    record.size(name, entry, "size", columns)
    bits, exponent, stored = entry["bits"], entry["exponent"], entry["stored"]
    if type(bits) is not int or type(exponent) not in (int, float) or not isinstance(stored, bool):
        raise CheckpointError(f"{layer}: unknown online transform {dict(entry)} in the manifest")
    try:
        return JointRange(columns, bits, exponent, stored, device=device)
    except QuantizationError as error:
        raise CheckpointError(f"{layer}: {error}") from error
