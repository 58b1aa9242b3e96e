"""A model that computes with other parameters, made anew in every pass; with its own it is its own teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from hfq.calibration.capture import device_of, quiet, to_device
from hfq.errors import QuantizationError
from hfq.training.student import logits_of

__all__ = ["Substitutes"]

Make = Callable[[], torch.Tensor]


class Substitutes:
    """The student of ``model``, and its teacher: one set of float weights serves both.

    What a parameter is replaced by lives from the call of its module to the end of the backward pass; nothing of the
    model is copied.

    Args:
        model: all of its weights in memory. It is not changed; outside of :meth:`running` it computes as ever.
        made: qualified name of a parameter ("conv_in.weight") to a function that gives what the module computes with,
            in the shape of the parameter, differentiable. It is cast to the parameter's dtype.
        inputs: makes the context in which inputs of layers (and of attention) are quantized.
    """

    def __init__(
        self, model: nn.Module, made: Mapping[str, Make], *,
        inputs: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        offloaded = next((name for name, p in model.named_parameters() if p.is_meta), None)
        if offloaded is not None:
            raise QuantizationError(f"{offloaded} is offloaded: training needs all weights in memory (no device_map to "
                                    "CPU or disk)")
        self.model, self.inputs = model, inputs
        self._made: dict[str, dict[str, Make]] = {}
        for name, make in made.items():
            place, _, leaf = name.rpartition(".")
            if model.get_submodule(place)._parameters.get(leaf) is None:
                raise QuantizationError(f"{type(model).__name__} has no parameter {name!r}")
            self._made.setdefault(place, {})[leaf] = make

    def __call__(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """What the model predicts for a batch of forward keywords: the first floating tensor that it returns."""
        return logits_of(self.model(**to_device(dict(batch), device_of(self.model))))

    @torch.no_grad()
    def teacher(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """The same of the model itself; outside of :meth:`running`."""
        with quiet(self.model):
            return self(batch)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the model computes as the student, in evaluation mode."""
        with ExitStack() as stack:
            stack.enter_context(quiet(self.model))
            for place, made in self._made.items():
                self._replace(stack, self.model.get_submodule(place), made)
            stack.enter_context(self.inputs())
            yield

    def _replace(self, stack: ExitStack, module: nn.Module, made: Mapping[str, Make]) -> None:
        own = {leaf: module._parameters[leaf] for leaf in made}

        def before(_: nn.Module, args: Any) -> None:
            for leaf, make in made.items():
                parameter: torch.Tensor = own[leaf]  # type: ignore[assignment]
                module._parameters[leaf] = make().to(parameter.dtype).view(parameter.shape)  # type: ignore[assignment]

        def after(*_: Any) -> None:
            module._parameters.update(own)

        stack.callback(after)
        stack.callback(module.register_forward_pre_hook(before).remove)
        stack.callback(module.register_forward_hook(after, always_call=True).remove)
