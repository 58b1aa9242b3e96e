"""Modules that see their input on a stored grid: norms, and blocks with the stream that enters them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hfq.errors import CheckpointError, ConfigError, HfqError, QuantizationError
from hfq.formats import ActivationSpec, activation
from hfq.formats.activation import Parameters
from hfq.layers.attached import AttachedPart
from hfq.layers.hooks import unhook
from hfq.layers.manifest import fields, present

__all__ = ["CHILD", "RoundedInput", "attach_rounding", "describe", "empty_rounded", "remove"]

CHILD = "hfq_rounded"


class RoundedInput(AttachedPart):
    """``x`` on a symmetric static grid, one scale a tensor (float32, whatever the model is cast to)."""

    def __init__(self, spec: ActivationSpec, params: Parameters | None = None, *, device: Any = None) -> None:
        super().__init__()
        if spec.dynamic or spec.granularity != "tensor" or not spec.symmetric:
            raise QuantizationError(f"{spec}: a stored symmetric range a tensor is needed")
        self.spec = spec
        empty = torch.empty(1, dtype=torch.float32, device=device)
        self._put("scale", empty if params is None else params[0].detach().float().reshape(1).clone())
        if params is not None:
            self.check("the input", QuantizationError)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype; rounding passes gradients."""
        return activation.fake(x, self.spec, (self.scale.to(x.device), None))

    def check(self, where: str, error: type[HfqError] = CheckpointError) -> None:
        scale = self.scale
        if tuple(scale.shape) != (1,) or scale.dtype != torch.float32:
            raise error(f"{where}.scale: float32 (1,) is needed")
        if not scale.is_meta and not (torch.isfinite(scale).all() and (scale > 0).all()):
            raise error(f"{where}.scale {float(scale)}: a finite number above zero is needed")

    def describe(self) -> dict[str, Any]:
        return {"kind": "rounded", "activation": self.spec.to_dict()}

    def extra_repr(self) -> str:
        return f"{self.spec.bits} bits"


def _round(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (module.hfq_rounded(args[0]), *args[1:]), kwargs  # type: ignore[operator]
    first = next(iter(kwargs))
    return args, {**kwargs, first: module.hfq_rounded(kwargs[first])}  # type: ignore[operator]


def attach_rounding(module: nn.Module, part: RoundedInput) -> None:
    """Make ``module`` see its first input through ``part``.

    Raises:
        QuantizationError: it has such a part already.
    """
    if CHILD in module._modules:
        raise QuantizationError(f"{type(module).__name__} has a rounded input already")
    module.add_module(CHILD, part)
    module.register_forward_pre_hook(_round, with_kwargs=True)


def describe(model: nn.Module) -> list[dict[str, Any]]:
    """Manifest entries of all rounded inputs."""
    return [{"module": name, **module._modules[CHILD].describe()}  # type: ignore[operator,union-attr]
            for name, module in model.named_modules() if CHILD in module._modules]


def remove(model: nn.Module) -> list[str]:
    """Take all rounded inputs out; names of their modules."""
    found = [name for name, module in model.named_modules() if CHILD in module._modules]
    for module in (model.get_submodule(name) for name in found):
        del module._modules[CHILD]
        unhook(module, _round)
    return found


def empty_rounded(module: nn.Module, entry: Mapping[str, Any]) -> RoundedInput | None:
    """The empty part that a manifest entry describes; ``None`` if ``module`` has it already.

    Raises:
        CheckpointError: the entry makes no sense.
    """
    where = f"the rounded input of {entry.get('module')!r}"
    fields(where, entry, {"module", "kind", "activation"})
    if present(module._modules.get(CHILD), entry, where):
        return None
    device = next((p.device for p in module.parameters()), None)
    try:
        return RoundedInput(ActivationSpec.from_dict(dict(entry["activation"])), device=device)
    except (ConfigError, QuantizationError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where} in the manifest cannot be built: {error}") from error
