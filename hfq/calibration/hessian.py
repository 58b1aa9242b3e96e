"""Second moments of the inputs of sites: ``H = (2 / N) X^T diag(w) X`` over the rows of the calibration data.

Products are fp32, one a batch; their sum is kept in float64, reduced over all processes once, and handed out in
float32: so the order of the batches, and how they were split over processes, does not show in the result.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hfq.calibration import ranks
from hfq.calibration.cache import leaves
from hfq.calibration.capture import Stop, device_of, to_device
from hfq.calibration.experts import Bank
from hfq.calibration.step import Step, input_rows, mask_for
from hfq.errors import QuantizationError

__all__ = ["Hessian", "Hessians", "collect", "no_moment"]


@dataclass(eq=False)
class Hessian:
    """Second moment of a site's input.

    Attributes:
        matrix: float32 ``[K, K]``, ``(2 / N) sum w x x^T``; for an embedding twice the identity.
        tokens: rows ``N`` that it was summed over, padding not counted.
        counts: for an embedding, how often each row was read (int64 ``[num_embeddings]``).
    """

    matrix: torch.Tensor
    tokens: int
    counts: torch.Tensor | None = None


class _NotFiniteError(QuantizationError):
    """A product overflowed, or an input was not finite."""


Hessians = dict[str, Any]  # site name -> Hessian; for experts: parameter name -> list of Hessian, one an expert


@dataclass
class _Sum:
    """A running sum; ``key`` is ``(site, parameter, expert)``."""

    matrix: torch.Tensor | None = None
    tokens: int = 0
    followers: list[str] = field(default_factory=list)

    def add(self, x: torch.Tensor, weights: torch.Tensor | None, keep: torch.Tensor | None) -> None:
        if keep is not None:
            keep = keep.to(x.device)
            x, weights = x[keep], None if weights is None else weights.to(x.device)[keep]
        x = x.float()
        left = x if weights is None else x * weights.to(x.device, torch.float32)[:, None]
        with _exact():
            product = left.t() @ x
        if not bool(torch.isfinite(product).all()):
            raise _NotFiniteError("the input of a site is not finite, or too large for a second moment in fp32")
        if self.matrix is None:
            self.matrix = torch.zeros_like(product, dtype=torch.float64)
        self.matrix += product
        self.tokens += x.shape[0]


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Products of fp32 in fp32: the shortened formats of some GPUs lose the small directions."""
    old = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = old


def collect(step: Step, sites: Sequence[Any] | None = None, weights: Sequence[torch.Tensor] | None = None) -> Hessians:
    """Second moments of the inputs of ``sites`` over the quantized stream of ``step``.

    Args:
        step: the block.
        sites: sites of the block (or their names); default all. Sites that read the same tensor get the same object.
        weights: importance of the tokens, one ``[B, T]`` a call; padded positions are left out whatever their weight.
            Tokens of another sequence, which a block attends to (an encoder's output), count the same.

    Returns:
        site name to ``Hessian``; for a bank of experts parameter name to a list of ``Hessian``.

    Raises:
        QuantizationError: a site is never reached, its kind has no second moment, or it saw fewer rows than the floor.
    """
    found = [step._site(site) for site in (step.block.sites if sites is None else sites)]
    if weights is not None and len(weights) != len(step):
        raise QuantizationError(f"{len(weights)} token weights for {len(step)} batches")
    sums = _Collector(step, found, weights).run()
    result = _finish(step, found, sums)
    step.reduce_tokens()
    return result


class _Collector:
    """Runs the block over all batches with hooks on the sites."""

    def __init__(self, step: Step, sites: list[Any], weights: Sequence[torch.Tensor] | None) -> None:
        self.step, self.sites, self.weights = step, sites, weights
        self.sums: dict[tuple[str, str, int], _Sum] = {}
        self.leader: dict[str, str] = {}
        self.pending: list[tuple[Any, torch.Tensor]] = []
        self.calls: Counter[str] = Counter()
        self.usual: Counter[str] | None = None
        self.now = 0
        self.others: list[torch.Tensor] = []
        self.off = False

    def run(self) -> dict[tuple[str, str, int], _Sum]:
        plain = [site for site in self.sites if site.kind != "experts"]
        banks = [site for site in self.sites if site.kind == "experts"]
        handles = [site.module.register_forward_pre_hook(self._hook(site), with_kwargs=True) for site in plain]
        try:
            with contextlib.ExitStack() as stack:
                for bank in banks:
                    stack.enter_context(Bank(bank, self))
                for i in range(len(self.step)):
                    self._one(i, early=not banks)
        finally:
            for handle in handles:
                handle.remove()
        return self.sums

    def _one(self, i: int, early: bool) -> None:
        try:
            self._pass(i, early)
        except _NotFiniteError:
            self.off = True
            self.step.blame(i)
            raise

    def _pass(self, i: int, early: bool) -> None:
        self.now, self.calls = i, Counter()
        args, kwargs = to_device(self.step.inputs[i], device_of(self.step.block.module))
        # What a decoder block attends to besides its own rows: tokens of another sequence.
        given = dict(leaves((args, kwargs)))
        own = None if self.step.inputs.main is None else given.get(self.step.inputs.main)
        self.others = [t for t in given.values() if t is not own and t.ndim == 3]
        try:
            with torch.no_grad(), self.step._counting(i):
                self.step.block.module(*args, **kwargs)
        except Stop:
            for name, leader in self.leader.items():
                self.step.count_alike(name, leader, i)
        if self.pending:
            self._lead()
        if i == 0 and early and len(self.calls) == len(self.sites):
            # A later pass ends as soon as every sum has what it had now. Not if a site was not called at all: where
            # tokens choose their experts, each pass calls others.
            self.usual = Counter({name: n for name, n in self.calls.items() if self.leader[name] == name})

    def _hook(self, site: Any) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if self.off:
                return
            x = args[0] if args else next(iter(kwargs.values()))
            self.calls[site.name] += 1
            if site.name not in self.leader:
                self.pending.append((site, x))
            elif self.leader[site.name] == site.name:
                self.add(site, x)
            if self.usual is not None and self.calls >= self.usual:
                raise Stop

        return hook

    def _lead(self) -> None:
        """After the first pass that calls them: sites whose inputs are the same objects share one sum."""
        inputs: dict[str, list[int]] = {}
        for site, x in self.pending:
            inputs.setdefault(site.name, []).append(id(x))
        first: dict[tuple[str, tuple[int, ...]], str] = {}
        kinds = {site.name: site.kind for site, _ in self.pending}
        for name, ids in inputs.items():
            shared = ("matrix" if kinds[name] in ("linear", "transposed") else name, tuple(ids))
            self.leader[name] = first.setdefault(shared, name)
        for site, x in self.pending:
            if self.leader[site.name] == site.name:
                self.add(site, x)
        for name in inputs:
            self.sums[self.leader[name], "", 0].followers.append(name)
        self.pending = []

    def sum_of(self, name: str, parameter: str = "", expert: int = 0) -> _Sum:
        return self.sums.setdefault((name, parameter, expert), _Sum())

    def add(self, site: Any, x: torch.Tensor) -> None:
        total = self.sum_of(site.name)
        if site.kind == "embedding":
            seen = torch.bincount(x.reshape(-1), minlength=site.in_features)
            total.matrix = seen if total.matrix is None else total.matrix + seen
            total.tokens += x.numel()
            return
        if site.kind == "conv":
            total.add(_patches(site, x), None, None)
            return
        if any(x is other for other in self.others):
            # The weights are those of the block's rows; here every token counts the same.
            mask = mask_for(self.step.batch(self.now), tuple(x.shape[:2]))  # type: ignore[arg-type]
            total.add(x.reshape(-1, x.shape[-1]), None, None if mask is None else mask.reshape(-1))
            return
        weights, keep = self.rows(x)
        if self.weights is not None and weights is None:
            raise QuantizationError(
                f"{site.name}: its input {list(x.shape)} has other rows than the block, so tokens cannot be weighted"
            )
        total.add(x.reshape(-1, x.shape[-1]), weights, keep)

    def rows(self, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Weights and padding mask for the rows of ``x``, flat."""
        hidden = self.step.hidden(self.now)
        mask = self.step.mask(self.now, tuple(x.shape)) if x.ndim >= 3 else self.step.mask(self.now)
        keep = None if mask is None else input_rows(x, hidden, mask)
        weights = None if self.weights is None else input_rows(x, hidden, self.weights[self.now])
        return weights, keep


def no_moment(site: Any) -> str:
    """Why the rows that a site multiplies with have no second moment here; empty if they have one."""
    conv = site.module
    if site.kind != "conv" or (conv.groups == 1 and not isinstance(conv, nn.Conv3d)
                               and not isinstance(conv.padding, str) and conv.padding_mode == "zeros"):  # fmt: skip
        return ""
    return "no second moment for a convolution with groups, three axes or special padding"


def _patches(site: Any, x: torch.Tensor) -> torch.Tensor:
    """The rows that a convolution multiplies with its flattened kernel, ``[positions, in_channels * kernel]``."""
    conv = site.module
    if reason := no_moment(site):
        raise QuantizationError(f"{site.name}: {reason}")
    kernel, stride, pad, dilation = (tuple(v) for v in (conv.kernel_size, conv.stride, conv.padding, conv.dilation))
    if isinstance(conv, nn.Conv1d):
        x = x.unsqueeze(-2)
        kernel, stride, pad, dilation = (1, *kernel), (1, *stride), (0, *pad), (1, *dilation)
    columns = nn.functional.unfold(x.float(), kernel, dilation=dilation, padding=pad, stride=stride)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def _finish(step: Step, sites: list[Any], sums: dict[tuple[str, str, int], _Sum]) -> Hessians:
    """Reduce over processes, divide, and hand the shared sums to all their sites."""
    shapes = {
        key: (tuple(s.matrix.shape), s.matrix.dtype, s.followers) for key, s in sums.items() if s.matrix is not None
    }
    for other in ranks.gather(shapes):
        shapes.update(other)
    device = device_of(step.block.module)
    result: Hessians = {}
    by_name = {site.name: site for site in sites}
    for key in sorted(shapes):
        name, parameter, expert = key
        shape, dtype, followers = shapes[key]
        total = sums.get(key) or _Sum()
        matrix = torch.zeros(shape, dtype=dtype, device=device) if total.matrix is None else total.matrix
        ranks.sum_(matrix)
        tokens = int(ranks.sum_(torch.tensor(total.tokens, device=device)))
        if parameter:
            entry = Hessian(_mean(matrix, tokens), tokens)
            result.setdefault(name, {}).setdefault(parameter, {})[expert] = entry
            continue
        if by_name[name].kind == "embedding":
            shared = Hessian(2 * torch.eye(by_name[name].out_features, device=device), tokens, matrix)
        else:
            shared = Hessian(_mean(matrix, tokens), tokens)
        result.update(dict.fromkeys(followers or [name], shared))
    for site in sites:
        _complete(site, result, device)
    return {site.name: result[site.name] for site in sites}


def _mean(total: torch.Tensor, tokens: int) -> torch.Tensor:
    """``2 / N`` times the sum, exactly symmetric: the fp32 products are so only up to rounding."""
    return ((total + total.t()) / max(tokens, 1)).float()


def _complete(site: Any, result: Hessians, device: torch.device) -> None:
    if site.kind == "experts" and site.name in result:
        for name in site.tensors:
            per, parameter = result[site.name].get(name, {}), getattr(site.module, name)
            if not per:
                raise QuantizationError(f"{site.name}.{name}: no product with its matrices was seen")
            width = next(iter(per.values())).matrix.shape[0]
            empty = Hessian(torch.zeros(width, width, device=device), 0)
            result[site.name][name] = [per.get(e, empty) for e in range(parameter.shape[0])]
    if site.name not in result:
        raise QuantizationError(
            f"{site.name}: its module is never called in this block (the data does not reach it, or its weight is read "
            "directly); leave it out with modules_to_not_convert or use other data"
        )
