"""Banks of input groups, a part of packed layers and of attention: one for each noise level of a denoiser.

Tensors of a part: ``scale`` ``[banks, groups]`` float32, ``zero_point`` ``[banks, groups]`` int16, and the ``labels``
of all banks that group an axis, one after the other, packed as a row of codes (:mod:`hfq.formats.bitpack`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hfq.errors import CheckpointError, ConfigError, HfqError, QuantizationError
from hfq.formats import bitpack, groups
from hfq.formats.groups import Axis, GroupSpec
from hfq.kernels import grouped
from hfq.kernels.grouped import Bank
from hfq.layers.attached import AttachedPart
from hfq.layers.times import NoiseLevels

__all__ = ["InputBanks", "empty_banks"]

# A bank: axis, labels int64, scale and zero point of the groups.
Given = tuple[Axis, torch.Tensor, torch.Tensor, torch.Tensor]


class InputBanks(AttachedPart):
    """Groups of an input, one bank a noise level; which one is in use follows from the running call.

    Args:
        spec: form of the banks.
        levels: what they belong to, in their order.
        device: of the empty tensors.

    Raises:
        QuantizationError: another number of banks than of levels.
    """

    def __init__(self, spec: GroupSpec, levels: NoiseLevels, *, device: Any = None) -> None:
        super().__init__()
        if len(spec.axes) != len(levels):
            raise QuantizationError(f"{len(spec.axes)} banks for {len(levels)} noise levels")
        self.spec, self.levels, self.label = spec, levels, ""
        shape = (len(spec.axes), spec.groups)
        self._put("scale", torch.empty(shape, dtype=torch.float32, device=device))
        self._put("zero_point", torch.empty(shape, dtype=torch.int16, device=device))
        self._put("labels", torch.empty(spec.label_bytes, dtype=torch.uint8, device=device))
        self._kept: tuple[Any, int, Bank] | None = None

    @classmethod
    def of(cls, given: Sequence[Given], bits: int, levels: NoiseLevels, *, device: Any = None) -> InputBanks:
        """The part that holds these banks.

        Raises:
            QuantizationError: banks of different sizes along one axis, or zero points that are out of range.
        """
        sizes: dict[str, int] = {"rows": 0, "columns": 0}
        for axis, labels, *_ in given:
            if axis != "tensor" and sizes[axis] not in (0, len(labels)):
                raise QuantizationError(f"banks of {sizes[axis]} and of {len(labels)} {axis}")
            sizes |= {} if axis == "tensor" else {axis: len(labels)}
        axes = tuple(axis for axis, *_ in given)
        part = cls(GroupSpec(bits, len(given[0][2]), axes, **sizes), levels, device=device)
        labels = torch.cat([own for axis, own, *_ in given if axis != "tensor"] or [torch.zeros(0, dtype=torch.int64)])
        packed = bitpack.pack(labels.to(torch.uint8)[None], part.spec.label_bits)[0]
        scale, zero = (torch.stack([one[i] for one in given]) for i in (2, 3))
        if float(zero.abs().max()) > groups.LARGEST_ZERO:
            raise QuantizationError(f"zero points up to {float(zero.abs().max()):g}: at most {groups.LARGEST_ZERO}")
        with torch.no_grad():
            for name, tensor in (("scale", scale), ("zero_point", zero.round()), ("labels", packed)):
                part._parameters[name].copy_(tensor)  # type: ignore[union-attr]
        part.check("the banks", QuantizationError)
        return part

    def bank(self) -> Bank:
        """The bank of the running call."""
        return self.at(self.levels.index())

    def at(self, index: int) -> Bank:
        """Bank ``index``, with the order of its columns; the last one is kept."""
        scale = self._parameters["scale"]
        if self._kept is not None and self._kept[0] is scale and self._kept[1] == index:
            return self._kept[2]
        spec = self.spec
        axis, start = spec.axes[index], spec.start(index)
        labels = self.every_label()[start : start + spec.length(axis)]
        largest = groups.largest_zero(spec.columns, spec.bits)
        made = Bank.of(axis, self.scale[index].detach(), self.zero_point[index].detach(), labels, spec.bits, largest)
        self._kept = (scale, index, made)
        return made

    def every_label(self) -> torch.Tensor:
        """Labels of all banks, one after the other, int64."""
        count = sum(map(self.spec.length, self.spec.axes))
        return bitpack.unpack(self.labels.detach()[None], self.spec.label_bits, count)[0].long()

    def seen(self, rows: int) -> None:
        """Say, once for a model, that the groups of rows do not fit ``rows`` rows, where that is so."""
        if self.levels.told or not self.spec.rows or rows == self.spec.rows:
            return
        self.levels.told = True
        warnings.warn(f"{self.label} (and maybe others): its groups are those of {self.spec.rows} rows, and there are "
                      f"{rows}: each row has a range of its own where rows are in groups", RuntimeWarning, stacklevel=3)

    def check(self, where: str, error: type[HfqError] = CheckpointError) -> None:
        """Raise ``error`` unless the tensors can be decoded."""
        spec = self.spec
        shape = (len(spec.axes), spec.groups)
        wanted = {"scale": (shape, torch.float32), "zero_point": (shape, torch.int16),
                  "labels": ((spec.label_bytes,), torch.uint8)}  # fmt: skip
        for name, (size, dtype) in wanted.items():
            tensor = self._parameters[name]
            if tensor is None or tuple(tensor.shape) != size or tensor.dtype != dtype:
                raise error(f"{where}.{name}: {dtype} {size} is needed")
        if self.scale.is_meta:
            return
        if not (torch.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise error(f"{where}.scale: finite numbers above zero are needed")
        if self.labels.numel() and int(self.every_label().max()) >= spec.groups:
            raise error(f"{where}.labels: a label of {int(self.every_label().max())} for {spec.groups} groups")
        most = groups.largest_zero(spec.columns, spec.bits)
        if int(self.zero_point.int().abs().max()) > most:
            raise error(f"{where}.zero_point: at most {most} in size for {spec.columns} columns")

    def describe(self) -> dict[str, Any]:
        """The manifest entry, JSON only."""
        return self.spec.to_dict()

    def _apply(self, fn: Any, recurse: bool = True) -> InputBanks:
        self._kept = None
        return super()._apply(fn, recurse)  # type: ignore[return-value]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def fake(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[..., rows, columns]`` on the grids of the running call, in floats."""
        return grouped.fake(x, self.bank())

    def extra_repr(self) -> str:
        axes = {axis: self.spec.axes.count(axis) for axis in dict.fromkeys(self.spec.axes)}
        along = ", ".join(f"{count} along {axis}" for axis, count in axes.items())
        return f"{self.spec.bits} bits, {self.spec.groups} groups, banks: {along}"


def empty_banks(
    entry: Any, levels: NoiseLevels | None, where: str, device: Any, columns: int | None = None
) -> InputBanks:
    """The empty part that a manifest entry describes.

    Args:
        columns: of the layer; ``None`` for operands of attention.

    Raises:
        CheckpointError: the entry makes no sense, or the manifest has no noise levels.
    """
    if levels is None:
        raise CheckpointError(f"{where}: inputs in groups, and no noise levels in the manifest")
    try:
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{entry!r} is no format of inputs in groups")
        spec = GroupSpec.from_dict(dict(entry))
        if columns is not None and spec.columns not in (0, columns):
            raise ConfigError(f"groups of {spec.columns} columns for {columns}")
        return InputBanks(spec, levels, device=device)
    except (ConfigError, QuantizationError, TypeError) as error:
        raise CheckpointError(f"{where} in the manifest is not valid: {error}") from error
