"""The two products of an attention module on stored grids: queries with keys, probabilities with values.

The part sits where other quantized attention sits (child ``hfq_attention``) and takes the place of the attention
function of any module that goes through transformers' attention interface; nothing of the modules is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfq.errors import CheckpointError, ConfigError, HfqError, QuantizationError
from hfq.formats import ActivationSpec, activation, grids
from hfq.formats.activation import Parameters
from hfq.formats.grids import Grid
from hfq.formats.log import LogSpec
from hfq.formats.twin import TwinSpec
from hfq.kernels import products
from hfq.kernels.products import SIDES
from hfq.layers import attention, routing, times
from hfq.layers.attention import AttentionQuant
from hfq.layers.manifest import present
from hfq.layers.times import NoiseLevels
from hfq.report import Report, Row

__all__ = ["NOT_CAUSAL", "AttentionProducts", "causal", "empty_products", "install"]

# What reports say of causal ones.
NOT_CAUSAL = "attention that is causal keeps its products in floats: stored ranges are for attention without a cache"
# Options of attention functions that change the result and that these products do not know.
_CHANGING = {"softcap", "position_bias", "s_aux", "sinks", "attention_sinks", "alibi", "block_mask", "score_mod"}


class AttentionProducts(AttentionQuant):
    """Attention on codes: ``softmax(Q K^T * scaling + mask) V`` with exact sums of integers in both products.

    Relative positions and masks are added to the scores in floats; the softmax is computed in float32.

    Args:
        head_dim: width of a head.
        query, key, value: static uniform grids, one a tensor; ``None`` leaves a side as it is.
        probabilities: of what the softmax gives: uniform, logarithmic, or two grids of magnitudes.
        scores: a static uniform grid of what the softmax reads, before masks and positions are added.
        levels: every grid has a range for each of these noise levels; default one for all calls.
    """

    def __init__(
        self, head_dim: int, *, query: ActivationSpec | None = None, key: ActivationSpec | None = None,
        value: ActivationSpec | None = None, probabilities: Grid | None = None,
        scores: ActivationSpec | None = None, levels: NoiseLevels | None = None, device: Any = None,
    ) -> None:
        super().__init__(head_dim)
        self.levels = levels
        # While grids are learned: ``rounded(side, x)`` gives what a side becomes.
        self.rounded: Callable[[str, torch.Tensor], torch.Tensor] | None = None
        self.formats: dict[str, Grid | None] = dict(zip(SIDES, (query, key, value, probabilities), strict=True))
        if scores is not None:
            self.formats["scores"] = scores
        for name, spec in self.formats.items():
            if isinstance(spec, ActivationSpec) and (spec.dynamic or spec.granularity != "tensor"):
                raise QuantizationError(f"{name}={spec}: products take a stored range a tensor")
            if isinstance(spec, LogSpec) and not spec.storable:
                raise QuantizationError(f"{name}={spec}: one state more than {spec.bits} bits hold: simulation only")
            if (name != "probabilities" and not isinstance(spec, ActivationSpec | None)) or (
                    isinstance(spec, TwinSpec) and spec.regions != "magnitude"):
                raise QuantizationError(f"{name}={spec}: queries, keys and values take uniform grids, probabilities "
                                        "also logarithmic ones and two grids of magnitudes")
            for leaf, dtype in self._leaves(name).items():
                empty = torch.empty(self.count, dtype=dtype, device=device)
                self.register_parameter(leaf, nn.Parameter(empty, requires_grad=False))

    def _leaves(self, name: str) -> dict[str, torch.dtype]:
        spec = self.formats[name]
        found = {} if spec is None else {f"{name}_scale": torch.float32}
        if isinstance(spec, ActivationSpec) and not spec.symmetric:
            found[f"{name}_zero_point"] = torch.uint8
        return found

    def set_range(self, name: str, params: Parameters) -> None:
        """Store ``(scale, zero point or None)`` of a side, ``[1]`` or, of parts that have levels, ``[levels]``.

        Raises:
            QuantizationError: the side has no format, or they are no range of it.
        """
        leaves = self._leaves(name)
        given = {f"{name}_scale": params[0], f"{name}_zero_point": params[1]}
        if {leaf for leaf, tensor in given.items() if tensor is not None} != set(leaves):
            raise QuantizationError(f"{self.label or 'attention'}: {name} stores {sorted(leaves) or 'nothing'}")
        with torch.no_grad():
            for leaf in leaves:
                self._parameters[leaf].copy_(given[leaf].reshape(self.count))  # type: ignore[union-attr]
        self.check(self.label or "attention", QuantizationError, (name,))

    @property
    def count(self) -> int:
        """Ranges that each side has."""
        return 1 if self.levels is None else len(self.levels)

    def stored(self, name: str) -> Parameters | None:
        """Scale and zero point of a side as they are held, of every level."""
        if self.formats[name] is None:
            return None
        return self._parameters[f"{name}_scale"], self._parameters.get(f"{name}_zero_point")  # type: ignore[return-value]

    def range_of(self, name: str) -> Parameters | None:
        """Scale and zero point of a side ``[1]``, of the level of the running call."""
        found = self.stored(name)
        return found if found is None or self.levels is None else times.chosen(found, self.levels)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
        attend: Callable[..., Any], options: Mapping[str, Any] | None = None,
    ) -> Any:
        """``[batch, heads, tokens, head_dim]`` three times to ``([batch, tokens, heads, head_dim], None)``.

        Raises:
            QuantizationError: the call asks for what these products do not have: a cache, dropout, causal attention
                without a mask, or an option that changes the scores.
        """
        scaling = self._scaling(query, mask, options)
        params = {name: self.range_of(name) for name in self.formats}
        if self.rounded is not None:
            out = products.attention_float(query, key, value, mask, scaling, self.formats, params, self.rounded)
            return out.transpose(1, 2).contiguous(), None
        needs = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        whole = all(spec is not None for spec in self.formats.values())
        compute = products.attention_int if whole and not needs else products.attention_float
        out = compute(query, key, value, mask, scaling, self.formats, params)  # type: ignore[arg-type]
        return out.transpose(1, 2).contiguous(), None

    def _scaling(
        self, query: torch.Tensor, mask: torch.Tensor | None, options: Mapping[str, Any] | None
    ) -> float:
        """What the scores are multiplied with; refuses what these products do not have."""
        options = dict(options or {})
        unknown = sorted(name for name in _CHANGING & set(options) if options[name] is not None)
        if options.get("is_causal") and query.shape[2] > 1 and mask is None:
            unknown.append("causal mask")
        if self.training and options.get("dropout"):
            unknown.append("dropout")
        if attention._CALL.__dict__.pop("stored", None) is not None:
            unknown.append("cache")
        if unknown:
            raise QuantizationError(f"{self.label}: attention on stored grids has no {', '.join(unknown)}")
        scaling = options.get("scaling")
        return float(query.shape[-1] ** -0.5 if scaling is None else scaling)

    def check(self, where: str, error: type[HfqError] = CheckpointError, sides: Sequence[str] | None = None) -> None:
        """Raise ``error`` unless every stored range (of ``sides`` alone, if given) makes sense."""
        for name in self.formats if sides is None else sides:
            spec = self.formats[name]
            params = self.stored(name)
            if params is None or params[0].is_meta:
                continue
            for leaf, dtype in self._leaves(name).items():
                tensor = self._parameters[leaf]
                if tensor is None or tuple(tensor.shape) != (self.count,) or tensor.dtype != dtype:
                    raise error(f"{where}.{leaf}: {dtype} ({self.count},) is needed")
            try:
                if isinstance(spec, ActivationSpec):
                    activation.check_parameters(params, spec, f"{where}.{name}_scale", self.count)
                elif not (torch.isfinite(params[0]).all() and (params[0] > 0).all()):
                    raise QuantizationError(f"{where}.{name}_scale {params[0].tolist()}: finite numbers above zero")
            except QuantizationError as wrong:
                raise error(str(wrong)) from None

    def describe(self) -> dict[str, Any]:
        """The manifest entry, JSON only, without the module's name."""
        sides = {name: _described(spec) for name, spec in self.formats.items()}
        levels = {} if self.levels is None else {"levels": self.count}
        return {"form": "products", "head_dim": self.head_dim, **sides, **levels}

    def _apply(self, fn: Any, recurse: bool = True) -> AttentionProducts:
        for name, parameter in self._parameters.items():
            if parameter is not None:  # casts leave integers alone
                data = parameter.detach()
                same = torch.int32 if data.dtype == torch.float32 else torch.uint8
                moved = fn(data.view(same)).view(data.dtype)
                self._parameters[name] = nn.Parameter(moved, requires_grad=False)
        return self

    def extra_repr(self) -> str:
        parts = [f"{name} {spec.bits} bits" for name, spec in self.formats.items() if spec is not None]
        return ", ".join([str(self.head_dim), *parts])


def _described(spec: Grid | None) -> dict[str, Any] | None:
    return None if spec is None else {"form": "uniform", **spec.to_dict()}


def causal(module: nn.Module) -> bool:
    """Whether an attention module lets tokens see the ones before them alone, which needs a mask at every call.

    Some say so at each call instead: that is known once one was observed.
    """
    return bool(getattr(module, "is_causal", False)) or routing.asked_causal(module)


def install(
    model: nn.Module, name: str, part: AttentionProducts, report: Report | None = None,
    extra: Mapping[str, Any] | None = None,
) -> AttentionProducts:
    """Make the attention module ``name`` compute with ``part``, and add a report row.

    Raises:
        QuantizationError: it is causal, has a part already, or does not go through the attention interface.
    """
    if causal(model.get_submodule(name)):
        raise QuantizationError(f"{name} is causal: products on stored grids are for attention without a cache")
    attention.install(model, name, part)
    if report is not None:
        numel = sum(p.numel() for p in part.parameters())
        bits = 8 * sum(p.nbytes for p in part.parameters()) / numel if numel else None
        formats = {side: _described(spec) for side, spec in part.formats.items()}
        report.add(Row(f"{name}.{attention.CHILD}", kind="attention", status="attached", bits=bits, numel=numel,
                       asked={side: spec.bits for side, spec in part.formats.items() if spec is not None},
                       extra={**formats, **(extra or {})}))  # fmt: skip
    return part


def empty_products(
    module: nn.Module, entry: Mapping[str, Any], name: str, levels: NoiseLevels | None = None
) -> AttentionProducts | None:
    """The empty part that a manifest entry describes; ``None`` if ``module`` has it already. ``levels`` are those of
    the manifest.

    Raises:
        CheckpointError: the entry makes no sense.
    """
    known = {"module", "form", "head_dim", *SIDES}
    if set(entry) - {"scores", "levels"} != known or not attention._is_size(entry["head_dim"]):
        raise CheckpointError(f"the attention of {name!r} in the manifest is damaged: {dict(entry)}")
    if present(attention.installed(module), entry, f"the quantized attention of {name!r}"):
        return None
    device = next((p.device for p in module.parameters()), None)
    try:
        sides: Any = {side: None if entry[side] is None else grids.from_dict(entry[side])
                      for side in (*SIDES, "scores") if side in entry}
        own = times.counted(entry["levels"], levels, f"the attention of {name!r}") if "levels" in entry else None
        return AttentionProducts(entry["head_dim"], levels=own, device=device, **sides)
    except (ConfigError, QuantizationError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the attention of {name!r} in the manifest cannot be built: {error}") from error
