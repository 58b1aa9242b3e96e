"""A model that computes with changed weights and quantized inputs, block by block with gradient checkpointing.

The changed weights are made once a step. Blocks compute with copies of them that collect the gradients of all parts of
a mini-batch; at the end one pass, block by block, takes those gradients to the parameters that the weights were made
from. Activations of a block are recomputed in the backward pass, so memory is that of one block beside the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from hfq.calibration.capture import device_of, quiet, to_device
from hfq.errors import QuantizationError
from hfq.graph.proof import floats
from hfq.layers.online import turn_input, turn_output

__all__ = ["Student", "logits_of"]

# (name of the parameter, weight, whether the step begins) -> what the module computes with.
Shape = Callable[[str, torch.Tensor, bool], torch.Tensor]


def logits_of(output: Any) -> torch.Tensor:
    """The logits in what a model returned: ``.logits``, or its first floating tensor."""
    found = getattr(output, "logits", None)
    if isinstance(found, torch.Tensor):
        return found
    tensors = floats(output)
    if not tensors:
        raise QuantizationError("the model returned no floating tensor to compare")
    return tensors[0]


class _Body(nn.Module):
    """A block's own forward, so that the block's hooks run once and outside of the recomputed part."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.block = block
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


class Student:
    """The student of ``model``.

    Args:
        model: all of its weights in memory. It is not changed; outside of :meth:`running` it computes as ever.
        blocks: ``(name, module)`` of the blocks, in execution order.
        transform: a :class:`hfq.transforms.sites.TransformSet`.
        inputs: makes the context in which the inputs of layers are quantized.
        shape: further change of a merged weight (fake quantization), called with (name, weight, whether a step begins).
        recompute: gradient checkpointing of the blocks.
        autocast: dtype of the products, ``None`` for that of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[tuple[str, nn.Module]],
        transform: Any,
        *,
        inputs: Callable[[], AbstractContextManager[Any]] = nullcontext,
        shape: Shape | None = None,
        recompute: bool = True,
        autocast: torch.dtype | None = None,
    ) -> None:
        offloaded = next((name for name, p in model.named_parameters() if p.is_meta), None)
        if offloaded is not None:
            raise QuantizationError(f"{offloaded} is offloaded: training needs all weights in memory (no device_map to "
                                    "CPU or disk), or steps=0")
        self.model, self.blocks, self.transform = model, list(blocks), transform
        self.inputs, self.shape, self.recompute, self.autocast = inputs, shape, recompute, autocast
        self._weights: dict[str, dict[str, torch.Tensor]] = {}
        self._turns: dict[str, torch.Tensor] = {}
        self._gates: dict[str, torch.Tensor] = {}

    # -- weights -----------------------------------------------------------------------------------------------------
    def _merged(self, block: str, begin: bool) -> dict[str, torch.Tensor]:
        found = self.transform(self.transform.names(block))
        if self.shape is not None:
            found = {name: self.shape(name, weight, begin) for name, weight in found.items()}
        # What products read is cast here, once, instead of in every pass.
        own = {name: self.transform.parameter(name).dtype for name in found}
        product = {name: self.autocast for name, t in found.items() if self.autocast is not None and t.dim() > 1}
        return {name: weight.to({**own, **product}[name]) for name, weight in found.items()}

    def _shared(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Rotations of the streams and scales of activations: used beside the weights."""
        turns = {stream.site: self.transform.rotation(stream) for stream in self.transform.streams}
        gates = {name: self.transform.transforms[site]() for name, site in self.transform.activations.items()}
        return turns, gates

    def start(self) -> None:
        """Make the weights of the next passes; without gradients if they are off."""
        grad = torch.is_grad_enabled()

        def leaf(found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: t.detach().requires_grad_(grad) for name, t in found.items()}

        with torch.no_grad():
            self._weights = {name: leaf(self._merged(name, True)) for name, _ in self.blocks}
            turns, gates = self._shared()
        self._turns, self._gates = leaf(turns), leaf(gates)

    def finish(self) -> None:
        """Take the gradients that the passes left at the weights to the transforms' parameters; drop the weights."""
        for name, _ in self.blocks:
            kept = {key: leaf.grad for key, leaf in self._weights.pop(name).items() if leaf.grad is not None}
            made = self._merged(name, False) if kept else {}
            due = [(made[key], grad) for key, grad in kept.items() if made[key].requires_grad]
            if due:
                torch.autograd.backward([weight for weight, _ in due], [grad for _, grad in due])
        for leaves, made in zip((self._turns, self._gates), self._shared(), strict=True):
            for key, leaf in leaves.items():
                if leaf.grad is not None:
                    made[key].backward(leaf.grad)
        self._turns, self._gates = {}, {}

    def drop(self) -> None:
        """Forget the weights of :meth:`start`."""
        self._weights, self._turns, self._gates = {}, {}, {}

    # -- passes ------------------------------------------------------------------------------------------------------
    def __call__(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Logits of a batch of forward keywords; inside :meth:`running` and after :meth:`start`."""
        given = to_device(dict(batch), device_of(self.model))
        with torch.autocast(device_of(self.model).type, dtype=self.autocast, enabled=self.autocast is not None):
            return logits_of(self.model(**given, **self._no_cache()))

    @torch.no_grad()
    def teacher(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Logits of the model itself; outside of :meth:`running`."""
        with quiet(self.model):
            return self(batch)

    def _no_cache(self) -> dict[str, Any]:
        config = getattr(self.model, "config", None)
        return {"use_cache": False} if isinstance(getattr(config, "use_cache", None), bool) else {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the model computes as the student. Backward passes belong inside as well: they recompute blocks."""
        with ExitStack() as stack:
            stack.enter_context(quiet(self.model))
            for stream in self.transform.streams:
                self._turn(stack, stream)
            for name, transform in self.transform.online.items():
                handle = self.model.get_submodule(name).register_forward_pre_hook(_through(transform))
                stack.callback(handle.remove)
            for name in self.transform.activations:
                handle = self.model.get_submodule(name).register_forward_hook(self._gated(name))
                stack.callback(handle.remove)
            for name, module in self.blocks:
                self._patch(stack, name, module)
            stack.enter_context(self.inputs())
            yield

    def _turn(self, stack: ExitStack, stream: Any) -> None:
        def turn(x: torch.Tensor, back: bool) -> torch.Tensor:
            q = self._turns[stream.site].to(x.device)
            with torch.autocast(x.device.type, enabled=False):
                return (x.to(q.dtype) @ (q.t() if back else q)).to(x.dtype)

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return turn_input(lambda x: turn(x, False), module, args, kwargs)

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            return turn_output(lambda x: turn(x, True), module, output)

        first, last = self.model.get_submodule(stream.first), self.model.get_submodule(stream.last)
        stack.callback(first.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(last.register_forward_hook(leave, prepend=True).remove)

    def _gated(self, name: str) -> Callable[..., torch.Tensor]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            x = args[0].to(torch.promote_types(args[0].dtype, torch.float32))
            return (x * torch.sigmoid(x / self._gates[name].to(x.device))).to(output.dtype)

        return hook

    def _patch(self, stack: ExitStack, name: str, module: nn.Module) -> None:
        original, missing = module.forward, object()
        before = module.__dict__.get("forward", missing)
        body = _Body(module, original)
        cut = len(name) + 1

        def forward(*args: Any, **kwargs: Any) -> Any:
            weights = {f"block.{key[cut:]}": weight for key, weight in self._weights[name].items()}

            def run(*args: Any, **kwargs: Any) -> Any:
                return functional_call(body, weights, args, kwargs, tie_weights=False)

            if self.recompute and torch.is_grad_enabled():
                return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
            return run(*args, **kwargs)

        def restore() -> None:
            if before is missing:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before

        module.__dict__["forward"] = forward
        stack.callback(restore)


def _through(transform: Any) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (transform(args[0]), *args[1:])

    return hook
