"""What the inputs of sites, and the queries, keys, values and probabilities of attention, are in the quantized stream.

Rows are kept as a sample of bounded size, the same for the same data and seed; several processes join theirs. Ranges
come from the samples by :mod:`hfq.calibration.ranges`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfq.calibration import ranks
from hfq.calibration.cache import ActivationCache
from hfq.calibration.capture import forward, quiet
from hfq.calibration.step import Step, input_rows
from hfq.errors import DataError, QuantizationError
from hfq.kernels import products
from hfq.layers import routing

__all__ = [
    "AttentionSample", "RowSample", "Stage", "attention_sample", "observe_attention", "observe_inputs",
    "observe_outside", "probabilities", "scores", "stages", "watching", "watching_attentions",
]  # fmt: skip

# Elements of a sample: 16 MiB of float32.
LIMIT = 1 << 22
_SAMPLED = ("query", "key", "value", "probabilities", "scores")


class RowSample:
    """At most ``limit`` elements of the rows that were seen, every row as likely as any other.

    Every row draws a number, and those with the least numbers are kept: the result depends on the data, its order and
    the seed alone.
    """

    def __init__(self, limit: int = LIMIT, seed: int = 0) -> None:
        self.limit = limit
        self.generator = torch.Generator().manual_seed(seed)
        self.kept: torch.Tensor | None = None
        self.numbers = torch.empty(0, dtype=torch.float64)
        self.seen = 0

    def update(self, rows: torch.Tensor) -> None:
        """Add ``rows`` ``[N, K]``."""
        rows = rows.detach().float()
        if not bool(torch.isfinite(rows).all()):
            raise DataError("an observed activation has NaN or infinite elements")
        self.seen += rows.shape[0]
        numbers = torch.rand(rows.shape[0], generator=self.generator, dtype=torch.float64)
        most = max(1, self.limit // max(rows.shape[1], 1))
        if rows.shape[0] > most:  # never more than a sample in memory
            own = numbers.topk(most, largest=False).indices.sort().values
            rows, numbers = rows[own.to(rows.device)], numbers[own]
        self.kept = rows.cpu().clone() if self.kept is None else torch.cat([self.kept, rows.cpu()])
        self.numbers = torch.cat([self.numbers, numbers])
        self._thin(most)

    def _thin(self, most: int) -> None:
        if self.kept is not None and self.kept.shape[0] > most:
            own = self.numbers.topk(most, largest=False).indices.sort().values
            self.kept, self.numbers = self.kept[own], self.numbers[own]

    def rows(self) -> torch.Tensor:
        """The sample ``[N, K]`` of all processes, on the CPU; every process has to call this."""
        parts = [part for part in ranks.gather(None if self.kept is None else (self.kept, self.numbers)) if part]
        if not parts:
            raise DataError("no calibration rows were seen: no range can be found")
        self.kept, self.numbers = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        self._thin(max(1, self.limit // max(self.kept.shape[1], 1)))
        return self.kept


@dataclass(frozen=True)
class Stage:
    """A part of a block that is calibrated at once: sites that read one tensor, or the products of an attention."""

    sites: tuple[Any, ...] = ()
    attention: str = ""


def stages(step: Step) -> list[Stage]:
    """The groups of sites of a block and its attentions, in the order in which they run.

    The groups are those of the plan (``Config.traced_plan``). Attention that does not go through the attention
    interface has no stage.
    """
    order: dict[Any, None] = {}
    names = {module: name for name, module in step.block.module.named_modules(prefix=step.block.name)}
    place = {site.name: group for group in map(tuple, step.block.groups) for site in group}
    handles = []
    for site in step.block.sites:
        def hook(_: nn.Module, __: Any, name: str = site.name) -> None:
            order.setdefault(Stage(place[name]))

        handles.append(site.module.register_forward_pre_hook(hook))

    def seen(module: nn.Module, *_: Any) -> None:
        if module in names:
            order.setdefault(Stage(attention=names[module]))

    try:
        with routing.observing(step.model, seen):
            for i in range(min(1, len(step))):
                step.call(i)
    finally:
        for handle in handles:
            handle.remove()
    found = list(ranks.broadcast([(tuple(s.name for s in stage.sites), stage.attention) for stage in order]))
    known = {site.name: site for site in step.block.sites}
    made = [Stage(tuple(known[name] for name in sites), called) for sites, called in found]
    reached = {site for stage in made for site in stage.sites}
    missed = [group for group in map(tuple, step.block.groups) if not reached & set(group)]
    return made + [Stage(group) for group in missed]


def observe_inputs(
    step: Step, sites: Sequence[Any], *, limit: int = LIMIT, seed: int = 0, inputs: ActivationCache | None = None
) -> dict[str, torch.Tensor]:
    """Rows of what enters each of ``sites`` while the block runs, padded ones left out.

    Args:
        inputs: the stream; default the quantized one.

    Sites of one call that are given the same tensor share one sample.

    Returns:
        site name to ``[N, K]``; for a convolution one row a position of its input.

    Raises:
        QuantizationError: a site was never reached.
    """
    samples: dict[str, RowSample] = {}
    shared: dict[str, str] = {}
    last: list[Any] = [None, ""]
    now = [0]

    def hook(site: Any, x: torch.Tensor) -> None:
        if x is last[0] and site.name != last[1]:
            shared[site.name] = last[1]
            return
        last[:] = [x, site.name]
        if site.name not in samples:
            samples[site.name] = RowSample(limit, seed)
        rows = x.movedim(1, -1) if site.kind == "conv" else x
        mask = step.mask(now[0], tuple(x.shape)) if x.ndim >= 3 and site.kind != "conv" else None
        keep = None if mask is None else input_rows(x, step.hidden(now[0]), mask)
        rows = rows.reshape(-1, rows.shape[-1])
        samples[site.name].update(rows if keep is None else rows[keep.to(rows.device)])

    with watching(sites, hook):
        for i in range(len(step)):
            now[0] = i
            step.call(i, inputs)
            last[:] = [None, ""]
    leaders = ranks.broadcast({site.name: shared.get(site.name, site.name) for site in sites})
    return _joined(sites, samples, leaders, limit, seed)


def _joined(
    sites: Sequence[Any], samples: Mapping[str, RowSample], leaders: Mapping[str, str], limit: int, seed: int
) -> dict[str, torch.Tensor]:
    rows: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys(leaders[site.name] for site in sites):
        try:
            rows[name] = samples.get(name, RowSample(limit, seed)).rows()
        except DataError as error:
            raise QuantizationError(
                f"{name}: {error}; the data does not reach it: leave it out with modules_to_not_convert"
            ) from error
    return {site.name: rows[leaders[site.name]] for site in sites}


@contextmanager
def watching(sites: Sequence[Any], hook: Callable[[Any, torch.Tensor], None]) -> Iterator[None]:
    """Inside, ``hook(site, x)`` sees the first input of each site."""
    handles = []
    try:
        for site in sites:
            def before(_: nn.Module, args: tuple, kwargs: dict[str, Any], site: Any = site) -> None:
                hook(site, args[0] if args else next(iter(kwargs.values())))

            handles.append(site.module.register_forward_pre_hook(before, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def observe_outside(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], sites: Sequence[Any], *, limit: int = LIMIT, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Rows of what enters ``sites`` in whole forward passes of ``model`` as it is now; sites never reached are missing.

    For the sites outside the blocks, once the blocks are packed.
    """
    samples: dict[str, RowSample] = {}

    def hook(site: Any, x: torch.Tensor) -> None:
        rows = x.movedim(1, -1) if site.kind == "conv" else x
        samples.setdefault(site.name, RowSample(limit, seed)).update(rows.reshape(-1, rows.shape[-1]))

    with quiet(model), watching(sites, hook):
        for i in ranks.share(len(batches)):
            forward(model, batches[i])
    reached = {name for names in ranks.gather(sorted(samples)) for name in names}
    return {site.name: samples.get(site.name, RowSample(limit, seed)).rows() for site in sites if site.name in reached}


@dataclass
class AttentionSample:
    """Elements of what an attention computes with: ``query``, ``key``, ``value`` and ``probabilities``, rows of heads.

    ``query``, ``key`` and ``value`` are ``[N, head_dim]``; ``probabilities`` ``[N, tokens]`` (of the longest call), and
    so are ``scores``, what the softmax reads before masks and positions are added.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    probabilities: torch.Tensor
    scores: torch.Tensor


def scores(module: nn.Module, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Scaled products of queries and keys in float32, ``[batch, heads, queries, keys]``."""
    scaling = getattr(module, "scaling", None)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return query.float() @ products.repeated(key, query.shape[1]).float().transpose(-1, -2) * scaling


def probabilities(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """The softmax of an attention in float32, ``[batch, heads, queries, keys]``."""
    return products.scores_of(scores(module, query, key), mask)


def observe_attention(step: Step, name: str, *, limit: int = LIMIT, seed: int = 0) -> AttentionSample:
    """Samples of one attention of the block on the quantized stream, before anything of it is quantized.

    Raises:
        QuantizationError: the attention was never reached through the attention interface.
    """
    target = step.model.get_submodule(name)
    with watching_attentions(step.model, limit=limit, seed=seed, only=target) as seen:
        for i in range(len(step)):
            step.call(i)
    return attention_sample(name, seen.get(target, {}), limit, seed)


@contextmanager
def watching_attentions(
    model: nn.Module, *, limit: int = LIMIT, seed: int = 0, only: nn.Module | None = None
) -> Iterator[dict[nn.Module, dict[str, RowSample]]]:
    """Inside, what every attention of ``model`` (or ``only`` one) computes with is sampled: by module and side."""
    found: dict[nn.Module, dict[str, RowSample]] = {}

    def seen(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> None:
        if only is not None and module is not only:
            return
        samples = found.setdefault(module, {side: RowSample(limit, seed) for side in _SAMPLED})
        with torch.no_grad():
            raw = scores(module, query, key)
            now = {"query": query, "key": key, "value": value, "scores": raw,
                   "probabilities": products.scores_of(raw, mask)}
        for side, tensor in now.items():
            rows, sample = tensor.reshape(-1, tensor.shape[-1]), samples[side]
            if sample.kept is not None:  # rows of another length cannot be put beside each other
                more = rows.shape[-1] - sample.kept.shape[-1]
                sample.kept = nn.functional.pad(sample.kept, (0, max(more, 0)))
                rows = nn.functional.pad(rows, (0, max(-more, 0)))
            sample.update(rows)

    with routing.observing(model, seen):
        yield found


def attention_sample(
    name: str, samples: Mapping[str, RowSample], limit: int = LIMIT, seed: int = 0
) -> AttentionSample:
    """What was sampled of the attention ``name``, in all processes.

    Raises:
        QuantizationError: it was never reached.
    """
    try:
        return AttentionSample(**{key: samples.get(key, RowSample(limit, seed)).rows() for key in _SAMPLED})
    except DataError as error:
        raise QuantizationError(f"{name}: the data does not reach this attention ({error})") from error
