"""How much each calibration token counts: scores of tokens, their normalisation to weights, dataset expansion.

A score is ``[B, T]`` a call; padded positions score 0 and are left out of every minimum, maximum and mean. ``weights``
goes from a step to what ``hessian.collect`` takes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hfq.calibration import ranks
from hfq.calibration.cache import rebuild
from hfq.calibration.capture import Stop, device_of, to_device
from hfq.calibration.data import Batches
from hfq.calibration.step import Step
from hfq.errors import ConfigError, DataError, QuantizationError

__all__ = [
    "STRATEGIES",
    "act_diff",
    "act_norm",
    "attention",
    "expand",
    "first_last_n",
    "first_n",
    "normalise",
    "token_freq",
    "token_sim",
    "weights",
]

Scores = list[torch.Tensor]


class _Attention(TorchFunctionMode):
    """Sums the attention that each position receives, over heads and queries, in every self-attention that runs."""

    def __init__(
        self, rows: int, tokens: int, mask: torch.Tensor | None, only_first: bool, last: int | None = None
    ) -> None:
        super().__init__()
        self.shape, self.mask, self.only_first = (rows, tokens), mask, only_first
        self.received: torch.Tensor | None = None
        self.seen, self.last = 0, last  # attentions so far; after the last one the rest of the block is not needed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            self._fused(*args, **kwargs)
            self._count()
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in (nn.functional.softmax, torch.softmax, torch.Tensor.softmax) and out.ndim == 4:
            rows, tokens = self.shape
            # Learned attention sinks add one column.
            if out.shape[0] == rows and out.shape[2] == tokens and out.shape[3] in (tokens, tokens + 1):
                self._add(out[..., :tokens])
                self._count()
        return out

    def _count(self) -> None:
        self.seen += 1
        if self.seen == self.last:
            raise Stop

    def _fused(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> None:  # fmt: skip
        rows, tokens = self.shape
        if query.ndim != 4 or query.shape[0] != rows or query.shape[2] != tokens or key.shape[2] != tokens:
            return
        if self.only_first and self.received is not None:
            return
        repeat = query.shape[1] // key.shape[1]
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril() if is_causal else None
        for row in range(rows):  # one sequence at a time: the probabilities are heads x T x T
            k = key[row].float().repeat_interleave(repeat, 0)
            logits = (query[row].float() @ k.transpose(-1, -2)) * factor
            if causal is not None:
                logits = logits.masked_fill(~causal, -math.inf)
            if attn_mask is not None:
                one = attn_mask.expand(rows, *attn_mask.shape[1:])[row] if attn_mask.ndim == 4 else attn_mask
                logits = logits.masked_fill(~one, -math.inf) if one.dtype == torch.bool else logits + one.float()
            self._add(logits.softmax(-1)[None], row)

    def _add(self, probabilities: torch.Tensor, row: int | None = None) -> None:
        """``probabilities`` ``[b, heads, T, T]`` of all rows, or of one."""
        if self.only_first and row is None and self.received is not None:
            return
        if self.received is None:
            self.received = torch.zeros(self.shape)
        weights = probabilities.float()
        if self.mask is not None:
            queries = (self.mask if row is None else self.mask[row : row + 1]).to(weights.device)
            # A padded query may see nothing at all, which gives NaN.
            weights = weights.nan_to_num(0.0) * queries[:, None, :, None] * queries[:, None, None, :]
        total = weights.sum((1, 2)).cpu()
        if row is None:
            self.received += total
        else:
            self.received[row] += total[0]


@contextmanager
def _visible_attention(block: nn.Module) -> Iterator[bool]:
    """Switch fused kernels that cannot be watched to scaled_dot_product_attention; yields whether anything changed."""
    saved: dict[int, tuple[Any, Any]] = {}
    for module in block.modules():
        config = getattr(module, "config", None)
        chosen = getattr(config, "_attn_implementation", None)
        if chosen not in (None, "sdpa", "eager") and id(config) not in saved:
            saved[id(config)] = (config, chosen)
    try:
        for config, _ in saved.values():
            config._attn_implementation = "sdpa"
        yield bool(saved)
    finally:
        for config, chosen in saved.values():
            config._attn_implementation = chosen


def attention(step: Step) -> Scores:
    """Attention concentration: attention received, summed over heads and queries of the step's self-attention.

    Works for ``scaled_dot_product_attention`` and plain softmax attention; other kernels are switched for this pass.
    A cross-attention in the same block is not counted.

    Raises:
        QuantizationError: no self-attention over the block's rows was seen.
    """
    scores, last = [], None
    for i in range(len(step)):
        hidden = step.hidden(i)
        if hidden.ndim != 3:
            raise QuantizationError(
                f"{step.block.name}: rows of shape {list(hidden.shape)} have no attention over tokens"
            )
        mask = step.mask(i)
        args, kwargs = to_device(step.inputs[i], device_of(step.block.module))
        with torch.no_grad(), _visible_attention(step.block.module) as switched:
            if switched:
                args, kwargs = rebuild((args, kwargs), functools.partial(_four_axes, hidden))
            mode = _Attention(hidden.shape[0], hidden.shape[1], mask, _has_cross_attention(kwargs, args), last)
            with mode, suppress(Stop):
                step.block.module(*args, **kwargs)
            last = mode.seen
        if mode.received is None:
            raise QuantizationError(
                f"{step.block.name}: no self-attention over its {hidden.shape[1]} rows was seen; "
                "choose another token importance (actnorm) for this model"
            )
        scores.append(mode.received)
    return scores


def _has_cross_attention(kwargs: dict[str, Any], args: Sequence[Any]) -> bool:
    named = isinstance(kwargs.get("encoder_hidden_states"), torch.Tensor)
    return named or sum(isinstance(a, torch.Tensor) and a.ndim == 3 and a.is_floating_point() for a in args) > 1


def _four_axes(hidden: torch.Tensor, path: Any, tensor: torch.Tensor) -> torch.Tensor:
    """A padding mask ``[B, T]``, as some kernels take it, as the causal mask that sdpa needs."""
    if tensor.ndim != 2 or tensor.is_floating_point() or tensor.shape != hidden.shape[:2] or int(tensor.max()) > 1:
        return tensor
    tokens = tensor.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=tensor.device).tril()
    return causal & (tensor != 0)[:, None, None, :]


def act_norm(step: Step) -> Scores:
    """Norm of the block's input rows."""
    return [_blank(step, i, step.hidden(i).float().norm(dim=-1).cpu()) for i in range(len(step))]


def act_diff(step: Step) -> Scores:
    """Distance of the block's input from its output, negated: tokens that the block changes little count most."""
    return [
        _blank(
            step, i, -(step.hidden(i).float() - step.outputs[i].float().to(step.hidden(i).device)).norm(dim=-1).cpu()
        )
        for i in range(len(step))
    ]


def token_sim(step: Step) -> Scores:
    """Mean squared distance of a row from all rows of its sequence."""
    result: Scores = []
    for i in range(len(step)):
        x, mask = step.hidden(i).float(), step.mask(i)
        keep = torch.ones(x.shape[:2], device=x.device) if mask is None else mask.to(x.device).float()
        count = keep.sum(1, keepdim=True).clamp(min=1)
        mean = (x * keep[..., None]).sum(1, keepdim=True) / count[..., None]
        square = x.square().sum(-1)
        score = square + (square * keep).sum(1, keepdim=True) / count - 2 * (x * mean).sum(-1)
        result.append(_blank(step, i, score.cpu()))
    return result


def token_freq(step: Step) -> Scores:
    """How often a token occurs in the whole calibration set, negated."""
    found = [step.batch(i).get("input_ids") for i in range(len(step))]
    ids = [one for one in found if isinstance(one, torch.Tensor)]
    if len(ids) != len(found):
        raise DataError("token frequency needs data with input_ids")
    size = 1 + max([int(one.max()) for one in ids], default=0)
    size = max(ranks.gather(size))
    counts = torch.zeros(size, dtype=torch.int64)
    # A block that runs several times in one pass has several calls of the same batch.
    for i in {step.batch_number(i): i for i in range(len(step))}.values():
        mask = step.mask(i, tuple(ids[i].shape))
        counts += torch.bincount((ids[i] if mask is None else ids[i][mask]).reshape(-1), minlength=size)
    ranks.sum_(counts)
    return [_blank(step, i, -counts[one].float()) for i, one in enumerate(ids)]


def _blank(step: Step, i: int, score: torch.Tensor) -> torch.Tensor:
    if score.ndim != 2:
        raise QuantizationError(f"{step.block.name}: rows of shape {list(step.hidden(i).shape)} are not tokens")
    mask = step.mask(i)
    return score if mask is None else score.masked_fill(~mask, 0)


def _chunks(step: Step, count: int, chosen: Callable[[int], bool]) -> Scores:
    result = []
    for i in range(len(step)):
        hidden = step.hidden(i)
        tokens = hidden.shape[1]
        chunk = (torch.arange(tokens) * count).div(max(tokens, 1), rounding_mode="floor")
        keep = torch.tensor([chosen(int(c)) for c in chunk], dtype=torch.float32)
        result.append(_blank(step, i, keep.expand(hidden.shape[0], tokens).clone()))
    return result


def first_n(step: Step, chunks: int = 8) -> Scores:
    """1 on the first of ``chunks`` parts of the sequence, 0 elsewhere."""
    return _chunks(step, chunks, lambda c: c == 0)


def first_last_n(step: Step, chunks: int = 32) -> Scores:
    """1 on the first and the last of ``chunks`` parts of the sequence, 0 elsewhere."""
    return _chunks(step, chunks, lambda c: c in (0, chunks - 1))


STRATEGIES: dict[str, Callable[[Step], Scores]] = {
    "attncon": attention,
    "actnorm": act_norm,
    "actdiff": act_diff,
    "tokensim": token_sim,
    "tokenfreq": token_freq,
    "firstn": first_n,
    "firstlastn": first_last_n,
}
_PLAIN = ("firstn", "firstlastn")  # already weights: not stretched to [r_min, r_max]


def normalise(scores: torch.Tensor, r_min: float, r_max: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Weights ``[B, T]`` with mean 1 over the tokens of each sequence; 0 on padding.

    ``r = r_min + (r_max - r_min) (s - min s) / (max s - min s)``, 1 where all scores are equal; ``w = r T / sum r``.
    """
    if not 0 <= r_min <= r_max or r_max == 0:
        raise ConfigError(f"r_min={r_min}, r_max={r_max}: 0 <= r_min <= r_max and r_max > 0 are needed")
    keep = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.to(scores.device)
    s = scores.double()
    low = s.masked_fill(~keep, math.inf).amin(1, keepdim=True)
    high = s.masked_fill(~keep, -math.inf).amax(1, keepdim=True)
    span = high - low
    stretched = r_min + (r_max - r_min) * (s - low) / torch.where(span > 0, span, torch.ones_like(span))
    r = torch.where(span > 0, stretched.clamp(r_min, r_max), torch.ones_like(s))
    if r_min == r_max:
        r = torch.ones_like(s)
    return unit_mean(r, keep)


def unit_mean(r: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Scale ``r`` ``[B, T]`` to mean 1 over the tokens of each sequence; 0 on padding, 1 where all are 0."""
    keep = torch.ones_like(r, dtype=torch.bool) if mask is None else mask.to(r.device)
    r = r.double().masked_fill(~keep, 0)
    total, tokens = r.sum(1, keepdim=True), keep.sum(1, keepdim=True)
    w = torch.where(total > 0, r * tokens / torch.where(total > 0, total, torch.ones_like(total)), keep.double())
    return w.float()


def weights(step: Step, strategy: str = "attncon", r_min: float = 0.005, r_max: float = 1.0) -> Scores:
    """Token weights of a step, ready for ``hessian.collect``; computed before the block is changed."""
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy={strategy!r}: one of {sorted(STRATEGIES)}")
    scores = STRATEGIES[strategy](step)
    if strategy in _PLAIN:
        return [unit_mean(score, step.mask(i)) for i, score in enumerate(scores)]
    return [normalise(score, r_min, r_max, step.mask(i)) for i, score in enumerate(scores)]


def expand(batches: Batches, factor: int) -> Batches:
    """Dataset expansion: every sequence also shifted in a circle by ``m floor(T / factor)``, ``m = 1 .. factor - 1``.

    Only the tokens themselves turn; padding stays at the end. ``factor=1`` returns the batches as they are.
    """
    if factor < 1:
        raise ConfigError(f"expansion={factor}: at least 1")
    if factor == 1:
        return batches
    items = [
        {**batch, "input_ids": _turned(batch, m, factor)}
        for m in range(factor)
        for batch in batches
        if _has_tokens(batch)
    ]
    result = Batches(items, {**batches.descriptor, "expansion": factor})
    result.descriptor.update(sha256=result.sha256, count=result.samples, tokens=result.tokens)
    return result


def _has_tokens(batch: Any) -> bool:
    if not isinstance(batch.get("input_ids"), torch.Tensor):
        raise DataError("dataset expansion needs data with input_ids")
    return True


def _turned(batch: Any, m: int, factor: int) -> torch.Tensor:
    ids, mask = batch["input_ids"].clone(), batch.get("attention_mask")
    for row in range(ids.shape[0]):
        kept = torch.arange(ids.shape[1]) if mask is None else (mask[row] != 0).nonzero()[:, 0]
        ids[row, kept] = ids[row, kept.roll(m * (len(kept) // factor))]
    return ids
