"""What a norm-like module does with its vectors, found by running it: gain or ``1 + weight``, bias, centring."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hfq.graph.absorb import Norm
from hfq.graph.proof import double_copy, double_precision, floats, relative_error, to_double
from hfq.graph.trace import Node

__all__ = ["probe"]

_EXACT = 1e-9


class _Probe:
    """A float64 copy of the module with its recorded arguments; the first floating argument scaled up from eps."""

    def __init__(self, module: nn.Module, recorded: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        self.module = double_copy(module)
        self.args, self.kwargs = to_double(recorded[0]), to_double(recorded[1])
        inputs = [t for t in floats((self.args, self.kwargs)) if t.dim() > 0]
        self.input = inputs[0] if inputs else None
        if self.input is not None:
            self.input.mul_(10 / self.input.pow(2).mean().sqrt().clamp_min(1e-12))

    def run(self, **parameters: torch.Tensor) -> torch.Tensor:
        saved = {key: self.module._parameters[key].detach().clone() for key in parameters}
        with double_precision():
            try:
                for key, value in parameters.items():
                    self.module._parameters[key].copy_(value)
                return floats(self.module(*to_double(self.args), **to_double(self.kwargs)))[0]
            finally:
                for key, value in saved.items():
                    self.module._parameters[key].copy_(value)


def probe(name: str, module: nn.Module, node: Node) -> Norm | str:
    """The norm ``module`` is, or the reason why it is none that can be folded.

    Args:
        name: qualified name.
        module: the module, its weights materialised.
        node: one recorded call of it.
    """
    assert node.recorded is not None
    trial = _Probe(module, node.recorded)
    if trial.input is None:
        return "it takes no floating tensor"
    base = trial.run()
    keys = {key: p for key, p in trial.module._parameters.items() if p is not None and p.shape == base.shape[-1:]}
    generator = torch.Generator().manual_seed(0)
    gain = bias = None
    for key, parameter in keys.items():
        role = _role(trial, key, parameter, base, generator)
        if role == "gain" and gain is None:
            gain = key
        elif role == "bias" and bias is None:
            bias = key
        else:
            return f"its parameter {key!r} is neither a gain nor a bias"
    if gain is None:
        return "it has no gain over the last axis"
    cleared = {} if bias is None else {bias: torch.zeros_like(keys[bias])}
    for offset in (0.0, 1.0):
        silent = trial.run(**{gain: torch.full_like(keys[gain], -offset)}, **cleared)
        if float(silent.abs().max()) <= _EXACT * float(base.abs().max()):
            return Norm(name, module, gain, offset, bias, _is_centred(trial, cleared))
    return f"its output is not proportional to {gain!r} nor to 1 + {gain!r}"


def _role(
    trial: _Probe, key: str, parameter: torch.Tensor, base: torch.Tensor, generator: torch.Generator
) -> str | None:
    """"gain": the output is affine in it, channel by channel; "bias": it is added; else ``None``."""
    step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.device)
    step[1::2] = 0
    change = trial.run(**{key: parameter + step}) - base
    if relative_error(change, step.expand(change.shape)) < _EXACT:
        return "bias"
    twice = trial.run(**{key: parameter + 2 * step}) - base
    apart = float(change[..., 1::2].abs().max()) if change.shape[-1] > 1 else 0.0
    affine = relative_error(twice, 2 * change) < _EXACT and apart <= _EXACT * float(change.abs().max())
    return "gain" if affine else None


def _is_centred(trial: _Probe, cleared: dict[str, torch.Tensor]) -> bool:
    """Whether adding the same number to every channel changes nothing."""
    before = trial.run(**cleared)
    assert trial.input is not None
    trial.input.add_(3.0)
    after = trial.run(**cleared)
    trial.input.sub_(3.0)
    return relative_error(after, before) < 1e-6
