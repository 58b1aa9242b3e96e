"""What the tuners that train through a weight quantizer have in common: configs, layers around layers, merging.

A tuner layer computes with a weight of its own making in the place of the base layer's. Whatever it trains belongs to
an adapter (a learned grid and a trained copy of the weight too), so the base stays as it was for the next adapter.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn

from hfq.errors import CheckpointError, ConfigError, QuantizationError
from hfq.formats import Codes, QuantSpec
from hfq.integrations.peft import owner, targets
from hfq.layers import merge, substitute
from hfq.layers.one_weight import OneWeight

__all__ = ["WeightTuner", "WeightTunerConfig", "WeightTunerLayer"]

_FLOAT = 16  # bits of a weight that is not quantized


@dataclass
class WeightTunerConfig(PeftConfig):
    """Common fields.

    Args:
        r: rank, of every targeted layer; ``rank_pattern`` as of ``LoraConfig``.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save, bias: as of
            ``LoraConfig``; every name of a list must be in the model.
        bits, group_size, symmetric: grid of float layers; 16 bits mean none. Packed layers keep theirs.
        base_hash: of the layers that the adapter was made for; filled in, and compared when it is loaded.
    """

    r: int = 32
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    bits: int | None = None
    group_size: int = -1
    symmetric: bool = False
    base_hash: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple, set)) else value)
        ranks = {"r": self.r, **{f"rank_pattern[{key!r}]": value for key, value in self.rank_pattern.items()}}
        for name, value in ranks.items():
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name}={value!r}: a rank is an integer of at least 1")
        if self.bits not in (None, _FLOAT):
            self.spec(self.bits)
        if self.bias not in ("none", "all"):
            raise ConfigError(f"bias={self.bias!r}: 'none' or 'all'")

    def spec(self, bits: int) -> QuantSpec:
        """The grid of a float layer."""
        return QuantSpec(bits, self.group_size, self.symmetric, scale_dtype="float32")

    def spec_for(self, layer: nn.Module, where: str) -> QuantSpec | None:
        """The grid of ``layer``; ``None`` for no rounding.

        Raises:
            ConfigError: a float layer and no bits, or a packed one of other bits.
        """
        own = substitute.spec_of(layer)
        if own is None:
            if self.bits is None:
                raise ConfigError(f"{where} is a float layer: say with bits= to what its weight is rounded")
            return None if self.bits == _FLOAT else self.spec(self.bits)
        if self.bits not in (None, own.bits):
            raise ConfigError(f"bits={self.bits}: {where} is packed in {own.bits} bits already; leave bits out")
        return own


class WeightTunerLayer(nn.Module, BaseTunerLayer):
    """Around one layer. A subclass adds its parameters to ``ParameterDict`` objects by adapter.

    Attributes:
        grids: grid by adapter.
        base_digest: SHA-256 of the base layer's weight as it was when it was wrapped.
    """

    other_param_names: tuple[str, ...] = ("grids",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, where: str) -> None:
        super().__init__()
        self.base_layer, self.where = base_layer, where
        self.merged_adapters: list[str] = []
        self._disable_adapters, self._active_adapter = False, [adapter_name]
        self.grids: dict[str, QuantSpec | None] = {}
        self.base_digest = substitute.digest(base_layer)
        self._before: Any = None

    # For a subclass

    def update_layer(self, adapter_name: str, r: int, config: Any) -> None:
        """Make the parameters of a new adapter."""
        raise NotImplementedError

    def effective(self, names: list[str]) -> torch.Tensor:
        """The weight ``[rows, columns]`` that the active adapters ``names`` compute with, differentiable."""
        raise NotImplementedError

    def codes(self, names: list[str]) -> Codes | torch.Tensor:
        """What is stored of it: codes, or without a grid the matrix. Raises QuantizationError if it cannot be."""
        raise NotImplementedError

    # Shared

    def known(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.grids]

    def _put(self, holder: str, name: str, tensor: torch.Tensor) -> None:
        """Store a parameter of adapter ``name``, in its own dtype: small steps vanish in half precision."""
        getattr(self, holder)[name] = nn.Parameter(tensor.detach().clone())

    def _limit(self, r: int) -> int:
        rows, columns = substitute.matrix(self.get_base_layer()).shape
        if r > min(rows, columns):
            raise ConfigError(f"r={r} is above the layer {self.where}, whose weight has rank {min(rows, columns)} at "
                              "most")
        return r

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.pop("adapter_names", None) is not None:
            raise ConfigError("adapter_names: one weight serves the whole batch with this type of adapter")
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self.known(self.active_adapters)
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        return substitute.product(self.get_base_layer(), x, self.effective(names))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make the base layer a packed one that computes what the adapters do.

        Raises:
            QuantizationError: it cannot be, with the reason; the layer is as it was.
        """
        names = self.known(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        if self.merged_adapters:
            raise QuantizationError(f"{self.where}: {self.merged_adapters} are merged already, and codes take no "
                                    "further adapter in: unmerge, then merge all of them at once")
        base, found = self.get_base_layer(), self.codes(names)
        numbers = found.scale if isinstance(found, Codes) else found
        if not torch.isfinite(numbers).all():
            raise QuantizationError(f"{self.where}: the adapters {names} have NaN or infinite elements")
        if isinstance(found, torch.Tensor):
            self._before = base.weight.detach().clone()  # type: ignore[union-attr, operator]
            with torch.no_grad():
                base.weight.copy_(substitute.as_weight(base, found))  # type: ignore[union-attr]
        elif isinstance(base, OneWeight):
            self._before = merge.Snapshot.of(base)
            merge.recode(base, found)
        else:
            self._before = base
            packed = substitute.pack(base, found)
            packed.label = self.where
            self.base_layer = packed
        self.merged_adapters = list(names)

    def unmerge(self) -> None:
        """Put the base layer back as it was, bit for bit."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if isinstance(self._before, nn.Module):
            self.base_layer = self._before
        elif isinstance(self._before, merge.Snapshot):
            self._before.put_back(self.get_base_layer())  # type: ignore[arg-type]
        else:
            self.get_base_layer().weight.data.copy_(self._before)  # type: ignore[union-attr]
        self._before, self.merged_adapters = None, []


class WeightTuner(BaseTuner):
    """Injects tuner layers, and checks that an adapter meets the base that it was made for."""

    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **kwargs: Any,
    ) -> None:
        pattern = get_pattern_key(peft_config.rank_pattern.keys(), current_key)
        r = peft_config.rank_pattern.get(pattern, peft_config.r)
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, r, peft_config)
            return
        try:
            if isinstance(target, BaseTunerLayer):
                raise QuantizationError("an adapter of another type is there already")
            substitute.check(target)
        except QuantizationError as error:
            raise ConfigError(f"{current_key} takes no {peft_config.peft_type.value} adapter: {error}") from error
        new = self.tuner_layer_cls(target, adapter_name, current_key)
        new.update_layer(adapter_name, r, peft_config)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        targets.check_names(config, model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        found = owner.combined({name: layer.base_digest for name, layer in self.layers(adapter_name).items()})
        if config.base_hash not in (None, found):
            self.take_out(adapter_name)
            raise CheckpointError(
                f"adapter {adapter_name!r} was trained on another base: its layers have the hash {found[:12]}, the "
                f"adapter was made for {config.base_hash[:12]}. Load the checkpoint that it was trained on")
        config.base_hash = found

    def layers(self, adapter_name: str) -> dict[str, Any]:
        """The tuner layers with this adapter by the names of the layers that they stand for."""
        return {name: layer for name, layer in self.model.named_modules()
                if isinstance(layer, self.tuner_layer_cls) and adapter_name in layer.grids}  # fmt: skip

    def take_out(self, adapter_name: str) -> None:
        """Remove an adapter, and the tuner layers that hold no other."""
        for name, layer in self.layers(adapter_name).items():
            if set(layer.grids) == {adapter_name}:
                self.model.set_submodule(name, layer.get_base_layer())
            else:
                layer.delete_adapter(adapter_name)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        configs = dict(self.peft_config)
        model = super()._unload_and_optionally_merge(merge=merge, **kwargs)
        if merge:
            owner.record(model, next(iter(configs.values())))
        return model
