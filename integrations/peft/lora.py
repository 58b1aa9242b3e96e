"""LoRA on packed layers: every ``LoraConfig`` knows them, so adapters are loaded and saved as on float models.

What is saved is an ordinary adapter. Merging rounds the sum of the weight and the adapter to codes again and says how
far that is off; an adapter in groups (``use_qalora``) goes into the zero points, exactly.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from torch.nn import functional as F

from hfq.errors import ConfigError, QuantizationError
from hfq.integrations.peft import grouped
from hfq.layers import merge
from hfq.layers.conv import QConv2d
from hfq.layers.embedding import QEmbedding
from hfq.layers.experts import QExperts
from hfq.layers.integer import IntegerModule
from hfq.layers.kinds import to_float
from hfq.layers.linear import PackedMatrix
from hfq.layers.one_weight import OneWeight

__all__ = ["PackedConv2dLora", "PackedEmbeddingLora", "PackedLinearLora", "register"]

# Starting points that read the weight at most. The others subtract their product from it, which codes cannot follow.
_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")


class _Packed:
    """What adapters of packed layers of all kinds have in common.

    Attributes:
        merge_error: ``||W - Q|| / ||W||`` of the last merge, with ``W`` the sum that was rounded.
    """

    merge_error: float | None = None
    _before: merge.Snapshot | None = None
    merged_adapters: list[str]
    lora_variant: dict[str, Any]
    get_base_layer: Any
    get_delta_weight: Any

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        base: OneWeight = self.get_base_layer()
        start = config.init_lora_weights
        if start not in _STARTS:
            raise ConfigError(
                f"init_lora_weights={start!r} takes its product out of the weight that it starts from, and codes "
                f"cannot follow: one of {_STARTS} is allowed, or initialise on the float model and quantize that")
        slot = base.slots["weight"]
        # An adapter that is loaded may be wider than a small layer; one that is made here has no use for it.
        loading = config.inference_mode or _on_meta()
        if not loading and r > min(slot.rows, slot.columns):
            raise ConfigError(f"r={r} is above the layer {base.label or type(base).__name__}, whose weight has rank "
                              f"{min(slot.rows, slot.columns)} at most")
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)  # type: ignore[misc]

    def _names(self, adapter_names: list[str] | None) -> list[str]:
        known = self._get_available_adapters()  # type: ignore[attr-defined]
        return [name for name in check_adapters_to_merge(self, adapter_names) if name in known]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Change the codes (or, of adapters in groups, the zero points) so that the layer alone computes the sum.

        Raises:
            QuantizationError: the adapters cannot be merged, with the reason; the layer is as it was.
        """
        names = self._names(adapter_names)
        if not names:
            return
        base, every = self.get_base_layer(), [*self.merged_adapters, *names]
        where = base.label or type(base).__name__
        kinds = {isinstance(self.lora_variant.get(name), grouped.GroupedVariant) for name in every}
        if len(kinds) > 1:
            raise QuantizationError(f"{where}: an adapter in groups and another one cannot be merged together")
        before = self._before or merge.Snapshot.of(base)
        bias = self._merged_bias(before.bias, every, where)
        if kinds == {True}:
            merge.shift_groups(base, grouped.offsets(self, names, every))
        else:
            self.merge_error = self._round(before, every, where)
            # One text for all layers, so that it is shown once.
            warnings.warn(
                f"merging rounds weights to {base.spec.bits}-bit codes again: the result differs from the adapter "
                "beside them. Every adapted layer has its relative error in merge_error", stacklevel=2)  # fmt: skip
        if bias is not None:
            base.bias.data.copy_(bias)
        self._before = before
        self.merged_adapters.extend(names)

    def _round(self, before: merge.Snapshot, names: list[str], where: str) -> float:
        """Rounded once, from the codes before: what was merged already comes along unrounded."""
        base, now = self.get_base_layer(), merge.Snapshot.of(self.get_base_layer())
        before.put_back(base)
        try:
            return merge.requantize(base, self._sum(base.dequantize(dtype=torch.float32), names, where))
        except BaseException:
            now.put_back(base)
            raise

    def _sum(self, weight: torch.Tensor, names: list[str], where: str) -> torch.Tensor:
        if getattr(self.get_base_layer(), "groups", 1) != 1:
            raise QuantizationError(f"{where}: an adapter of a convolution in groups cannot be merged")
        special = [name for name in names if name in self.lora_variant]
        if special and len(names) > 1:
            raise QuantizationError(f"{where}: adapter {special[0]!r} depends on the weight that it is merged into, "
                                    "and cannot be merged together with another one")
        with torch.no_grad():
            if special:
                return self.lora_variant[special[0]].merge_safe(self, special[0], weight).float()
            return weight + sum(self.get_delta_weight(name).float() for name in names)

    def _merged_bias(self, bias: torch.Tensor | None, names: list[str], where: str) -> torch.Tensor | None:
        extra = [name for name in names if getattr(self, "lora_bias", {}).get(name)]
        if not extra:
            return None
        if bias is None:
            raise QuantizationError(f"{where}: lora_bias=True cannot be merged into a layer without a bias")
        added = [self.lora_B[name].bias.detach() * self.scaling[name] for name in extra]  # type: ignore[attr-defined]
        return bias + sum(added).to(bias.dtype)

    def unmerge(self) -> None:
        """Put the codes back as they were before the first merge, bit for bit."""
        if self._before is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._before.put_back(self.get_base_layer())
        self._before = None
        self.merged_adapters.clear()


def _on_meta() -> bool:
    """Whether parameters that are made now stay empty (the loader fills them later)."""
    return nn.Linear(1, 1, bias=False).weight.is_meta


class PackedLinearLora(_Packed, lora.Linear):
    """An adapter beside a packed linear layer (or transformers' ``Conv1D``)."""

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the float weight is ``[in, out]``: the base layer knows, whatever the config says."""
        return self.get_base_layer().slots["weight"].transposed

    @fan_in_fan_out.setter
    def fan_in_fan_out(self, value: bool) -> None:
        pass

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> Any:
        if getattr(config, "use_qalora", False):
            return grouped.GroupedVariant.of(config)
        return super().resolve_lora_variant(config=config, **kwargs)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        if isinstance(self.lora_variant.get(adapter), grouped.GroupedVariant):
            return grouped.delta(self, adapter)
        return super().get_delta_weight(adapter)


class _FloatConv2d(lora.Conv2d):
    """PEFT makes the matrices of an adapter of the class of the base layer, and reads its weight: for that moment the
    base layer is a float convolution with the dequantized weight."""

    _stand_in: tuple[nn.Module, ...] = ()

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        self._stand_in = (to_float(super().get_base_layer(), None),)  # type: ignore[arg-type]
        try:
            super().update_layer(*args, **kwargs)
        finally:
            self._stand_in = ()

    def get_base_layer(self) -> nn.Module:
        return self._stand_in[0] if self._stand_in else super().get_base_layer()


class PackedConv2dLora(_Packed, _FloatConv2d):
    """An adapter beside a packed convolution."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_channels, module.out_channels

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> Any:
        _no_groups(config, "a convolution")
        return super().resolve_lora_variant(config=config, **kwargs)


class PackedEmbeddingLora(_Packed, lora.Embedding):
    """An adapter beside a packed table."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.num_embeddings, module.embedding_dim

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> Any:
        _no_groups(config, "a table")
        return super().resolve_lora_variant(config=config, **kwargs)

    def _embed(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return F.embedding(input, weight, padding_idx=self.get_base_layer().padding_idx)


def _no_groups(config: LoraConfig, what: str) -> None:
    if getattr(config, "use_qalora", False):
        raise ConfigError(f"use_qalora=True: the inputs of {what} have no groups to pool; leave it out of "
                          "target_modules")


def _refuse(reason: str) -> Any:
    def refuse(target: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise ConfigError(f"{getattr(target, 'label', '') or type(target).__name__} takes no adapter: {reason}")

    return refuse


_LAYERS: dict[type[nn.Module], Any] = {
    PackedMatrix: PackedLinearLora, QConv2d: PackedConv2dLora, QEmbedding: PackedEmbeddingLora,
    QExperts: _refuse("its experts are one module; adapt the layers around it"),
    IntegerModule: _refuse("it computes in integers throughout, an adapter in floats has no place in it"),
}


def register() -> None:
    """Make every ``LoraConfig``, also one that is read from disk, know the packed layers. Idempotent."""
    before = LoraConfig.__post_init__
    if hasattr(before, "_hfq"):
        return

    @functools.wraps(before)
    def after(self: LoraConfig) -> None:
        before(self)
        self._register_custom_module(dict(_LAYERS))

    after._hfq = True  # type: ignore[attr-defined]
    LoraConfig.__post_init__ = after  # type: ignore[method-assign]
