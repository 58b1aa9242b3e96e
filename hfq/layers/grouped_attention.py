"""Attention whose queries, keys and values are in groups by noise level, and whose probabilities have a grid that
follows the prompt, or a stored one a noise level."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hfq.errors import CheckpointError, ConfigError, HfqError, QuantizationError
from hfq.formats import ActivationSpec, grids
from hfq.formats.log import LogSpec
from hfq.kernels import grouped_products
from hfq.kernels.grouped_products import Probabilities
from hfq.layers import attention
from hfq.layers.banks import InputBanks, empty_banks
from hfq.layers.manifest import present
from hfq.layers.products import AttentionProducts
from hfq.layers.times import NoiseLevels

__all__ = ["OPERANDS", "GroupedAttention", "empty_grouped"]

OPERANDS = ("query", "key", "value")
_FLAGS = ("whole", "start", "renormalise")


class GroupedAttention(AttentionProducts):
    """``softmax(Q K^T * scaling + mask) V`` on codes in groups; the softmax is computed in float32.

    Args:
        head_dim: width of a head.
        banks: of "query", "key" and "value"; rows are tokens (with ``how.start``, keys are counted from the second on),
            columns head dimensions. Also of "probabilities", if they have stored steps: one grid a tensor, from zero.
        how: of the probabilities; with stored steps its form alone counts.

    Raises:
        QuantizationError: stored steps of probabilities that are in groups, or not from zero.
    """

    def __init__(self, head_dim: int, banks: Mapping[str, InputBanks], how: Probabilities) -> None:
        super().__init__(head_dim)
        steps = banks.get("probabilities")
        if steps is not None:
            if set(steps.spec.axes) != {"tensor"} or isinstance(how.spec, LogSpec):
                raise QuantizationError(f"{steps.spec} for probabilities: one uniform grid a tensor is needed")
            how = replace(how, spec=ActivationSpec(steps.spec.bits, granularity="tensor", dynamic=False))
        self.how = how
        for name in (*OPERANDS, *(("probabilities",) if steps is not None else ())):
            setattr(self, name, banks[name])
        self.formats = {name: banks[name].spec for name in OPERANDS} | {"probabilities": how.spec}  # type: ignore[assignment]

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
        attend: Callable[..., Any], options: Mapping[str, Any] | None = None,
    ) -> Any:
        scaling = self._scaling(query, mask, options)
        parts: list[InputBanks] = [self._modules[name] for name in OPERANDS]  # type: ignore[misc]
        banks = (parts[0].bank(), parts[1].bank(), parts[2].bank())
        for part, x in zip(parts, (query, key[:, :, 1:] if self.how.start else key, value), strict=True):
            part.label = self.label
            part.seen(x.shape[2])
        how = self.how if self.steps is None else replace(self.how, scale=self.steps.bank().scale[:1])
        needs = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        compute = grouped_products.fake if needs else grouped_products.attend
        out = compute(query, key, value, mask, scaling, banks, how)
        return out.transpose(1, 2).contiguous(), None

    @property
    def steps(self) -> InputBanks | None:
        """Stored steps of the probabilities."""
        return self._modules.get("probabilities")  # type: ignore[return-value]

    def check(self, where: str, error: type[HfqError] = CheckpointError, sides: Any = None) -> None:
        for name, part in self._modules.items():
            part.check(f"{where}.{name}", error)  # type: ignore[union-attr, operator]
        if self.steps is not None and not self.steps.zero_point.is_meta and bool(self.steps.zero_point.any()):
            raise error(f"{where}.probabilities: steps from zero on are needed")

    def describe(self) -> dict[str, Any]:
        sides = {name: self._modules[name].describe() for name in OPERANDS}  # type: ignore[union-attr, operator]
        spec = self.how.spec
        coded = None if spec is None else {"form": "uniform", **spec.to_dict()}
        coded = coded if self.steps is None else self.steps.describe()
        return {"form": "grouped", "head_dim": self.head_dim, **sides, "probabilities": coded,
                **{flag: getattr(self.how, flag) for flag in _FLAGS}}  # fmt: skip

    def _apply(self, fn: Any, recurse: bool = True) -> GroupedAttention:
        return nn.Module._apply(self, fn, recurse)  # type: ignore[return-value]


def empty_grouped(
    module: nn.Module, entry: Mapping[str, Any], name: str, levels: NoiseLevels | None
) -> GroupedAttention | None:
    """The empty part that a manifest entry describes; ``None`` if ``module`` has it already.

    Raises:
        CheckpointError: the entry makes no sense.
    """
    known = {"module", "form", "head_dim", "probabilities", *OPERANDS, *_FLAGS}
    flags = {flag: entry.get(flag) for flag in _FLAGS}
    plain = all(type(flag) is bool for flag in flags.values())
    if set(entry) != known or not attention._is_size(entry["head_dim"]) or not plain:
        raise CheckpointError(f"the attention of {name!r} in the manifest is damaged: {dict(entry)}")
    if present(attention.installed(module), entry, f"the quantized attention of {name!r}"):
        return None
    device, given = next((p.device for p in module.parameters()), None), entry["probabilities"]
    stored = isinstance(given, Mapping) and given.get("form") == "groups"
    try:
        spec = None if given is None or stored else grids.from_dict(given)
    except (ConfigError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the attention of {name!r} in the manifest cannot be built: {error}") from error
    if not isinstance(spec, ActivationSpec | LogSpec | None):
        raise CheckpointError(f"the attention of {name!r} in the manifest: probabilities as {given!r}")
    sides = (*OPERANDS, "probabilities") if stored else OPERANDS
    banks = {side: empty_banks(entry[side], levels, f"{name}.{side}", device) for side in sides}
    if any(banks[side].spec.columns not in (0, entry["head_dim"]) for side in OPERANDS):
        raise CheckpointError(f"the attention of {name!r} in the manifest: groups of other columns than head_dim")
    try:
        return GroupedAttention(entry["head_dim"], banks, Probabilities(spec, **flags))  # type: ignore[arg-type]
    except QuantizationError as error:
        raise CheckpointError(f"the attention of {name!r} in the manifest: {error}") from error
