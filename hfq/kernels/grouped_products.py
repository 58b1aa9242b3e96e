"""Products of attention whose operands are in groups, and probabilities that are powers of two below their own maximum.

Queries with keys: sums of products of codes are whole numbers. Groups of tokens are scaled where the sums are written;
groups of head dimensions have a sum each, for every pair of a group of queries and one of keys. Probabilities are
``s * 2**-c`` with ``s`` the largest one of the sample (or of the call), found when it runs; their products with whole
numbers are exact, and groups of values along the tokens are summed one by one. The first key, on which attention to
text rests, can be left out of all that: its scores are those of the float key, its probabilities are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hfq.formats import ActivationSpec, activation, groups, log
from hfq.formats.log import LogSpec
from hfq.kernels import dispatch, grouped
from hfq.kernels.dispatch import ANY_BITS, FLOATS, Case, Row
from hfq.kernels.grouped import Bank
from hfq.kernels.isa import isa
from hfq.kernels.products import _exact, _WholeProducts, repeated, scores_of

__all__ = ["Probabilities", "attend", "rounded"]


@dataclass(frozen=True)
class Probabilities:
    """How probabilities are coded.

    Attributes:
        spec: powers of two, or a uniform grid from zero to the maximum; ``None`` leaves them.
        whole: the maximum is one for the whole call, whichever samples are in it; else each sample has its own.
        start: the first column is left as it is, with the first key.
        renormalise: rows sum to one again afterwards.
        scale: stored step of a uniform grid ``[1]``, in the place of one that is found in the call.
    """

    spec: LogSpec | ActivationSpec | None
    whole: bool = False
    start: bool = False
    renormalise: bool = False
    scale: torch.Tensor | None = None


def top_of(p: torch.Tensor, how: Probabilities) -> torch.Tensor:
    """The largest probability, ``[B or 1, 1, 1, 1]``; never zero."""
    found = p.amax() if how.whole else p.amax((1, 2, 3))
    return found.reshape(-1, 1, 1, 1).clamp(min=torch.finfo(p.dtype).tiny)


def step_of(p: torch.Tensor, how: Probabilities) -> torch.Tensor:
    """The step of a uniform grid, ``[B or 1, 1, 1, 1]``: the stored one, or that of the largest probability."""
    return top_of(p, how) / how.spec.max_code if how.scale is None else how.scale.reshape(1, 1, 1, 1)  # type: ignore[union-attr]


def rounded(p: torch.Tensor, how: Probabilities) -> tuple[torch.Tensor, torch.Tensor]:
    """``p`` ``[B, H, Q, K]`` (without a first column that is kept) as ``(numbers, factor)``: powers of two, or whole
    numbers, and what they are multiplied with."""
    if how.spec is None:
        return p, p.new_ones(1)
    if isinstance(how.spec, LogSpec):
        top = top_of(p, how)
        codes = log.encode(p, top, how.spec, check=False)
        return log.table(how.spec, p.dtype).to(p.device)[codes.long()], top
    scale = step_of(p, how)
    return (p * (1 / scale)).round_().clamp_(0, how.spec.max_code), scale


@dataclass(frozen=True)
class _Coded:
    """Codes ``[B, H, T, D]`` as whole float32 numbers, and what broadcasts to them."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bank: Bank


def _coded(x: torch.Tensor, bank: Bank) -> _Coded:
    scale, zero = grouped.parameters(x, bank)
    return _Coded(groups.encode(x, scale, zero, bank.bits).float(), scale, zero, bank)


def _cells(q: _Coded, k: _Coded) -> Iterator[torch.Tensor | None]:
    """Head dimensions that have one grid in both operands; ``None`` for all of them."""
    labels = [one.bank.labels for one in (q, k) if one.bank.axis == "columns"]
    if not labels:
        yield None
        return
    joint = labels[0] if len(labels) == 1 else labels[0] * (int(labels[1].max()) + 1) + labels[1]
    for label in joint.unique():
        yield (joint == label).nonzero()[:, 0]


def _of(one: _Coded, cell: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale and zero point of some head dimensions; the latter two ``[..., T or 1, 1]``."""
    if cell is None:
        return one.codes, one.scale, one.zero
    codes = one.codes.index_select(-1, cell)
    if one.bank.axis == "columns":
        return codes, one.scale[cell[:1]], one.zero[cell[:1]]
    return codes, one.scale, one.zero


def _scores(q: _Coded, k: _Coded) -> torch.Tensor:
    """``Q K^T`` of the grids: ``s_q s_k (sum qk - z_q sum k - z_k sum q + n z_q z_k)``, cell by cell."""
    total = None
    largest = ((1 << q.bank.bits) - 1) * ((1 << k.bank.bits) - 1)
    for cell in _cells(q, k):
        (a, sa, za), (b, sb, zb) = _of(q, cell), _of(k, cell)
        sb, zb = (t.transpose(-1, -2) if t.dim() > 1 else t for t in (sb, zb))
        acc = _exact(a, b.transpose(-1, -2), largest)
        sums_a, sums_b = a.sum(-1, keepdim=True), b.sum(-1, keepdim=True).transpose(-1, -2)
        part = (acc - za * sums_b - zb * sums_a + za * zb * a.shape[-1]) * (sa * sb)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _values(p: torch.Tensor, v: _Coded, skip: int) -> torch.Tensor:
    """``p`` times the values after the first ``skip``: groups of tokens are summed one by one, those of head dimensions
    scaled afterwards."""
    codes = v.codes[..., skip:, :]
    if v.scale.dim() > 2:  # ranges that were found in the values: no groups
        return p @ ((codes - v.zero[..., skip:, :]) * v.scale[..., skip:, :])
    if v.bank.axis != "rows":
        return (p @ (codes - v.zero)) * v.scale
    total, labels = None, v.bank.labels[skip:]
    for label in labels.unique().tolist():
        own = (labels == label).nonzero()[:, 0]
        part = p.index_select(-1, own) @ (codes.index_select(-2, own) - v.bank.zero[label])
        part = part.mul_(v.bank.scale[label])
        total = part if total is None else total.add_(part)
    return codes.new_zeros(*p.shape[:-1], codes.shape[-1]) if total is None else total


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float,
    banks: tuple[Bank, Bank, Bank], how: Probabilities,
) -> torch.Tensor:
    """Attention ``[B, heads, queries, head_dim]``, dtype of ``query``; without gradients.

    Args:
        query, key, value: floats ``[B, heads, tokens, head_dim]``; fewer heads of keys and values are shared.
        mask: see :func:`hfq.kernels.products.scores_of`.
        banks: of queries, keys (with ``how.start`` those after the first) and values.
    """
    bits = max(bank.bits for bank in banks)
    case = Case("attention_groups", query.device.type, query.dtype, bits, query.shape[2], key.shape[2],
                query.shape[3], query.shape[3], isa=isa())  # fmt: skip
    name = dispatch.choose(case, "attention").backend
    return dispatch.BACKENDS["attention_groups", name](query, key, value, mask, scaling, banks, how)


@dispatch.backend("attention_groups", "reference")
def _reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float,
    banks: tuple[Bank, Bank, Bank], how: Probabilities,
) -> torch.Tensor:
    """Every operand decoded, products in float64; only the softmax is one of float32."""
    q = grouped.decoded(query, banks[0], torch.float64)
    rest = key[:, :, 1:] if how.start else key
    k = grouped.decoded(rest, banks[1], torch.float64)
    k = torch.cat([key[:, :, :1].double(), k], 2) if how.start else k
    v = grouped.decoded(value, banks[2], torch.float64)
    k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
    p = scores_of((q @ k.transpose(-1, -2) * scaling).float(), mask)
    first, others = (p[..., :1], p[..., 1:]) if how.start else (p[..., :0], p)
    numbers, factor = rounded(others, how)
    p = torch.cat([first.double(), numbers.double() * factor.double()], -1)
    p = p / p.sum(-1, keepdim=True) if how.renormalise else p
    return (p @ v).to(query.dtype)


@dispatch.backend("attention_groups", "float_codes")
def _float_codes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float,
    banks: tuple[Bank, Bank, Bank], how: Probabilities,
) -> torch.Tensor:
    """Whole numbers and powers of two in batched float32 products."""
    with torch.no_grad(), _WholeProducts():
        q, v = _coded(query, banks[0]), _coded(value, banks[2])
        k = _coded(key[:, :, 1:] if how.start else key, banks[1])
        heads = query.shape[1]
        k, v = (_Coded(repeated(one.codes, heads), *_shared(one, heads), one.bank) for one in (k, v))
        raw = _scores(q, k)
        if how.start:
            exact = ((q.codes - q.zero) * q.scale) @ repeated(key[:, :, :1], heads).float().transpose(-1, -2)
            raw = torch.cat([exact, raw], -1)
        p = scores_of(raw.mul_(scaling), mask)
        skip = int(how.start)
        numbers, factor = rounded(p[..., skip:], how)
        out, total = _values(numbers, v, skip).mul_(factor), None
        if how.renormalise:
            total = numbers.sum(-1, keepdim=True).mul_(factor)
        if how.start:
            every = v.codes.shape
            scale, zero = (t.expand(every)[..., :1, :] for t in (v.scale, v.zero))
            out.add_(p[..., :1] @ ((v.codes[..., :1, :] - zero) * scale))
            total = None if total is None else total.add_(p[..., :1])
        return (out if total is None else out.div_(total)).to(query.dtype)


def _shared(one: _Coded, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Grids of single rows for all heads that share them."""
    return tuple(repeated(t, heads) if t.dim() == 4 else t for t in (one.scale, one.zero))  # type: ignore[return-value]


def fake(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float,
    banks: tuple[Bank, Bank, Bank], how: Probabilities,
) -> torch.Tensor:
    """The same in floats, with gradients that pass the roundings straight through."""
    q, v = grouped.fake(query, banks[0]), grouped.fake(value, banks[2])
    k = grouped.fake(key[:, :, 1:] if how.start else key, banks[1])
    k = torch.cat([key[:, :, :1], k], 2) if how.start else k
    k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
    p = scores_of(q @ k.transpose(-1, -2) * scaling, mask)
    first, others = (p[..., :1], p[..., 1:]) if how.start else (p[..., :0], p)
    if isinstance(how.spec, LogSpec):
        others = log.fake(others, top_of(others.detach(), how), how.spec)
    elif how.spec is not None:
        step = step_of(others.detach(), how)
        others = activation.fake(others, how.spec, (step, torch.zeros_like(step)))
    p = torch.cat([first, others], -1)
    p = p / p.sum(-1, keepdim=True) if how.renormalise else p
    return p.to(v.dtype) @ v


def _serves(case: Any) -> bool:
    return True


dispatch.add_rows([
    Row("attention_groups", "*", FLOATS, ANY_BITS, "*", _serves, "float_codes", "serves every shape"),
    Row("attention_groups", "*", (), ANY_BITS, "*", _serves, "reference", "serves everything"),
])
