"""One block of a walk: its inputs, its targets, and what a recipe may do with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hfq.calibration import ranks
from hfq.calibration.cache import ActivationCache, Store, TensorList, leaves
from hfq.calibration.capture import device_of, first_tensor, to_device
from hfq.calibration.settled import Settled
from hfq.errors import DataError, QuantizationError
from hfq.layers import swap as layer_swap
from hfq.layers.parts import DividedInput
from hfq.report import Report

__all__ = ["Step", "input_rows", "mask_for", "routing"]

Targets = TensorList | None


def mask_for(batch: Mapping[str, Any], shape: tuple[int, int], *, later_stack: bool = False) -> torch.Tensor | None:
    """The padding mask (bool ``[B, T]``, true where data is) that belongs to rows ``[B, T]``, ``None`` without padding.

    A decoder prefers its own mask where both have the same shape; beside an encoder it never takes the encoder's.
    """
    order = ["attention_mask", "decoder_attention_mask"]
    if later_stack:
        order.reverse()
    if "decoder_input_ids" in batch:
        del order[1]
    for key in order:
        mask = batch.get(key)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and tuple(mask.shape) == shape:
            return None if bool((mask != 0).all()) else mask != 0
    return None


def input_rows(x: torch.Tensor, hidden: torch.Tensor, values: torch.Tensor) -> torch.Tensor | None:
    """``values`` ``[B, T]`` of the block's rows for the rows of ``x``, flat; ``None`` if ``x`` has other rows.

    ``x`` may be ``[B, T, K]`` or flattened to ``[B * T, K]`` as routers and experts do.
    """
    if x.ndim >= 3 and x.shape[:2] == values.shape and x[..., 0].numel() == values.numel():
        return values.reshape(-1)
    if x.ndim == 2 and x.shape[0] == values.numel() and hidden.shape[:2] == values.shape:
        return values.reshape(-1)
    return None


def routing(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Indices ``[tokens, k]`` of the experts that a bank of experts was asked for, if they are visible."""
    for value in (*args[1:], kwargs.get("top_k_index"), kwargs.get("router_indices")):
        if (
            isinstance(value, torch.Tensor)
            and not value.is_floating_point()
            and value.dtype != torch.bool
            and value.ndim == 2
        ):
            return value
    return None


class Step:
    """A block in the walk, materialised on its device.

    Attributes:
        block: the block; its module may be changed in any way.
        index, total: position in the walk, and number of blocks.
        batches: the calibration batches of this process.
        inputs: ``(args, kwargs)`` of every batch in the quantized stream.
        float_inputs: the same in the float stream, ``None`` if it was not asked for.
        tokens: rows that each site has seen (for experts: the rows of the expert that saw fewest).
        expert_tokens: rows a expert, by site.
        report: receives a row for every swap.
        kept: tensors that go into the progress file beside the block; an interrupted run gets them back.
    """

    def __init__(
        self,
        model: nn.Module,
        block: Any,
        index: int,
        total: int,
        batches: Sequence[Mapping[str, Any]],
        inputs: ActivationCache,
        float_inputs: ActivationCache | None,
        *,
        outputs: Targets = None,
        report: Report | None = None,
        min_tokens: int = 0,
        batch_index: Sequence[int] | None = None,
        store: Store | None = None,
    ) -> None:
        self.model, self.block, self.index, self.total = model, block, index, total
        self.batches, self.inputs, self.float_inputs = batches, inputs, float_inputs
        self.report, self.min_tokens = report, min_tokens
        self.tokens: dict[str, int] = {}
        self.kept: dict[str, torch.Tensor] = {}
        self.expert_tokens: dict[str, list[int]] = {}
        self.changed = False
        self._outputs = outputs
        self._before: str | None = None
        self._store = store or inputs.store
        self._batch_index = list(range(len(inputs))) if batch_index is None else list(batch_index)
        self._counted: set[tuple[str, int]] = set()
        self._local: dict[str, torch.Tensor] = {}
        self._seen: dict[tuple[str, int], torch.Tensor] = {}
        self._owned: list[Any] = []
        self._now: tuple[int, int] | None = None  # the running call of the block, and the number of the pass
        self._passes = 0
        self._swapped: set[str] = set()
        self._settled = Settled(block, self._store, lambda: self._now)

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, i: int) -> Mapping[str, Any]:
        """The model's inputs that call ``i`` of the block came from."""
        return self.batches[self._batch_index[i]]

    def batch_number(self, i: int) -> int:
        """Position in ``batches`` of ``batch(i)``."""
        return self._batch_index[i]

    def hidden(self, i: int) -> torch.Tensor:
        """The hidden state of the quantized stream that enters the block in call ``i``."""
        return self.inputs.hidden(i)

    def mask(self, i: int, shape: tuple[int, ...] | None = None) -> torch.Tensor | None:
        """Bool ``[B, T]``, true where call ``i`` holds data; ``None`` if nothing is padded."""
        rows = tuple((self.hidden(i).shape if shape is None else shape)[:2])
        return mask_for(self.batch(i), rows, later_stack=self.block.stack > 0) if len(rows) == 2 else None

    @property
    def outputs(self) -> TensorList:
        """The block's hidden outputs before any change: of the float stream if there is one, else of the quantized."""
        if self._outputs is None:
            if self.changed:
                raise QuantizationError(
                    f"{self.block.name}: read step.outputs before the block is changed, or ask for the float stream"
                )
            kept = [self._store.put(self.call(i)) for i in range(len(self))]
            self._owned += kept
            self._outputs = TensorList(self._store, kept)
        return self._outputs

    def call(self, i: int, inputs: ActivationCache | None = None) -> torch.Tensor:
        """Hidden output of call ``i`` without gradients; the stream is ``inputs`` (default: quantized)."""
        output = self.output_tree(i, inputs)
        path = first_tensor(output)
        return next(t for p, t in leaves(output) if p == path)

    def run(self, inputs: ActivationCache | None = None) -> list[torch.Tensor]:
        """Hidden outputs of all calls."""
        return [self.call(i, inputs) for i in range(len(self.inputs if inputs is None else inputs))]

    def output_tree(self, i: int, inputs: ActivationCache | None = None) -> Any:
        """Everything that the block returns for call ``i``; refuses what is not finite, naming the module."""
        cache = self.inputs if inputs is None else inputs
        args, kwargs = to_device(cache[i], device_of(self.block.module))
        with torch.no_grad(), self._counting(i if cache is self.inputs else None):
            output = self.block.module(*args, **kwargs)
        if not all(_finite(t) for _, t in leaves(output)):
            self._blame(args, kwargs)
        return output

    def blame(self, i: int) -> None:
        """Raise the error that names the module of the block from which on call ``i`` is not finite."""
        self._blame(*to_device(self.inputs[i], device_of(self.block.module)))

    def swap(self, site: Any, codes: Any, *, divides: bool = False, **options: Any) -> nn.Module:
        """Replace the module of ``site`` (or of the site of this name) by its packed layer; adds the report row.

        A division in front of the float module goes with it, unless ``online`` is what ``divides``.
        """
        site = self._site(site)
        part = DividedInput.of(site.module)
        if part is not None and not divides:
            if options.get("online") is not None:
                raise QuantizationError(f"{site.name}: its input is divided online already, and takes no other part")
            options |= {"online": part, "folded": True}
        options.setdefault("tokens", self.tokens.get(site.name))
        new = layer_swap.swap(self.model, site.name, codes, self.report, **options)
        return self._replaced(site, new)

    def swap_experts(self, site: Any, codes: Mapping[str, Any], **options: Any) -> nn.Module:
        """Replace a bank of experts; ``codes`` holds one list of codes a parameter."""
        site = self._site(site)
        new = layer_swap.swap_experts(self.model, site.name, codes, self.report, **options)
        return self._replaced(site, new)

    def _replaced(self, site: Any, new: nn.Module) -> nn.Module:
        self.changed = True
        self._swapped.add(site.name)
        site.module = new
        if getattr(self.block, "alone", False):
            self.block.module = new
        return new

    def settle(self) -> None:
        """Say that what was swapped, and all that comes before it in the block, stays as it is: outputs may be kept."""
        self._settled.update(self._swapped)

    def _site(self, site: Any) -> Any:
        if not isinstance(site, str):
            return site
        for candidate in (*self.block.sites, *getattr(self.block, "kept", ())):
            if candidate.name == site:
                return candidate
        raise QuantizationError(
            f"{self.block.name} has no site {site!r}; its sites: {[s.name for s in self.block.sites]}"
        )

    def _blame(self, args: Any, kwargs: Any) -> None:
        """Name the first module whose output is not finite although its inputs are."""
        if not all(_finite(t) for _, t in leaves((args, kwargs)) if t.dtype != torch.bool):
            raise DataError(
                f"the input of {self.block.name} has NaN or infinite elements: "
                "check the calibration data and the model's dtype"
            )
        guilty: list[str] = []
        handles = []
        for name, module in self.block.module.named_modules(prefix=self.block.name):

            def hook(_: nn.Module, given: Any, output: Any, name: str = name) -> None:
                if (
                    not guilty
                    and all(_finite(t) for _, t in leaves(given))
                    and not all(_finite(t) for _, t in leaves(output))
                ):
                    guilty.append(name)

            handles.append(module.register_forward_hook(hook))
        try:
            with torch.no_grad():
                self.block.module(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        kind = QuantizationError if self.changed else DataError
        raise kind(
            f"NaN or infinite elements appear first in the output of {guilty[0] if guilty else self.block.name} "
            f"({'after' if self.changed else 'before'} the block was changed); use a wider dtype "
            "or check the weights and the calibration data"
        )

    @contextmanager
    def _counting(self, i: int | None) -> Iterator[None]:
        """Count the rows that the sites see in call ``i``, each site once a call."""
        handles = []
        due = [] if i is None else [site for site in self.block.sites if (site.name, i) not in self._counted]
        fresh: set[str] = set()
        self._passes += 1
        self._now = None if i is None else (i, self._passes)
        try:
            for site in due:

                def hook(module: nn.Module, args: Any, kwargs: Any, site: Any = site) -> None:
                    self._count(site, args, kwargs, i or 0)
                    fresh.add(site.name)

                handles.append(site.module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
            yield
        finally:
            self._now = None
            for handle in handles:
                handle.remove()
            self._counted |= {(name, i or 0) for name in fresh}

    def _count(self, site: Any, args: Any, kwargs: Any, i: int) -> None:
        if site.kind == "experts":
            chosen = routing(site.module, args, kwargs)
            if chosen is None:
                return
            experts = (
                getattr(site.module, site.tensors[0]).shape[0]
                if site.tensors and hasattr(site.module, site.tensors[0])
                else 0
            )
            experts = experts or getattr(site.module, "num_experts", int(chosen.max()) + 1)
            values = chosen
            mask = self.mask(i)
            if mask is not None and mask.numel() == chosen.shape[0]:
                values = chosen[mask.reshape(-1).to(chosen.device)]
            seen = torch.bincount(values.reshape(-1).clamp(max=experts), minlength=experts)[:experts].cpu()
        else:
            x = args[0] if args else next(iter(kwargs.values()))
            mask = self.mask(i, tuple(x.shape)) if x.ndim >= 2 else None
            weights = None if mask is None else input_rows(x, x, mask)
            width = 1 if site.kind == "embedding" else x.shape[1] if site.kind == "conv" else x.shape[-1]
            seen = torch.tensor([x.numel() // max(width, 1) if weights is None else int(weights.sum())])
        self._local[site.name] = self._local.get(site.name, torch.zeros_like(seen)) + seen
        self._seen[site.name, i] = self._seen.get((site.name, i), torch.zeros_like(seen)) + seen

    def count_alike(self, name: str, like: str, i: int) -> None:
        """Site ``name`` was not reached in call ``i``; it reads the rows that site ``like`` has read."""
        if (name, i) not in self._counted and (seen := self._seen.get((like, i))) is not None:
            self._local[name] = self._local.get(name, torch.zeros_like(seen)) + seen
            self._counted.add((name, i))

    def reduce_tokens(self) -> None:
        """Sum the counts over all processes and refuse sites under the floor; every process has to call this."""
        sizes = ranks.broadcast(
            {site.name: self._local[site.name].numel() for site in self.block.sites if site.name in self._local}
        )
        if not sizes:
            return
        counts = torch.cat(
            [self._local.get(name, torch.zeros(size, dtype=torch.int64)) for name, size in sizes.items()]
        )
        low = []
        for name, total in zip(sizes, ranks.sum_(counts).split(list(sizes.values())), strict=True):
            self.tokens[name] = int(total.min())
            if total.numel() > 1:
                self.expert_tokens[name] = total.tolist()
            if int(total.min()) < self.min_tokens:
                which = f" (expert {int(total.argmin())})" if total.numel() > 1 else ""
                low.append(f"{name}{which} saw {int(total.min())}")
            if self.report is not None and name in self.report.rows:
                self.report.rows[name].tokens = int(total.min())
        if low:
            raise QuantizationError(
                f"too few calibration rows, at least {self.min_tokens} are needed: {'; '.join(low)}. "
                "Use more calibration samples, or leave these modules out with modules_to_not_convert"
            )

    def release(self) -> None:
        """Free what only this step used."""
        self._settled.release()
        for stored in self._owned:
            self._store.drop(stored)
        self._owned = []


def _finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
