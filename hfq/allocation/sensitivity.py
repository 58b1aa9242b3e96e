"""How much a block or a layer matters: from its input and output, from its weights, or from its rounding error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from hfq.calibration import ranks
from hfq.errors import ConfigError, DataError
from hfq.formats import QuantSpec, affine
from hfq.rounding import nearest

__all__ = ["InputModification", "input_modifications", "rounding_losses", "zscore_share", "zscore_shares"]


class InputModification:
    """How much a block turns its input: minus the mean cosine of the hidden states that enter and leave it.

    In [-1, 1], higher is more important. Running sums only, in float32 per vector and float64 over vectors.

    Args:
        reduce: ``"token"`` averages the cosines of the vectors; ``"flatten"`` takes one cosine a sample over all of its
            vectors.
        axis: of the vectors: the last one for tokens, 1 for images ``[B, C, H, W]``.
    """

    def __init__(self, reduce: str = "token", axis: int = -1) -> None:
        if reduce not in ("token", "flatten"):
            raise ConfigError(f"reduce={reduce!r}: 'token' or 'flatten'")
        self.reduce, self.axis = reduce, axis
        self.sum, self.count = 0.0, 0

    @torch.no_grad()
    def update(self, entering: torch.Tensor, leaving: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add hidden states ``[B, ..., D]``; ``mask`` bool (``[B, T]``) is true where data is. A vector without length
        counts as 0.

        Raises:
            DataError: the two shapes differ: the score is not defined for such a block.
        """
        if entering.shape != leaving.shape:
            raise DataError(
                f"the block turns {tuple(entering.shape)} into {tuple(leaving.shape)}: without equal shapes its input "
                "modification is not defined"
            )
        a, b = entering.float().movedim(self.axis, -1), leaving.float().movedim(self.axis, -1)
        if mask is not None:
            wide = mask.reshape(*mask.shape, *(1,) * (a.ndim - mask.ndim)).to(a.device)
            a, b = a * wide, b * wide
        if self.reduce == "flatten":
            a, b = a.flatten(1), b.flatten(1)
        # Unit vectors first: products of outliers would lose the small differences that make the ranking.
        a, b = a / a.norm(dim=-1, keepdim=True).clamp(min=1e-30), b / b.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        cosine = (a * b).sum(-1).clamp(-1, 1)
        self.sum += float(cosine.double().sum())
        self.count += cosine.numel() if mask is None or self.reduce == "flatten" else int(mask.sum())

    def reduce_ranks(self) -> None:
        """Add up over all processes; to be called once, by every process."""
        total = ranks.sum_(torch.tensor([self.sum, float(self.count)], dtype=torch.float64))
        self.sum, self.count = float(total[0]), int(total[1])

    @property
    def value(self) -> float:
        """The score.

        Raises:
            DataError: nothing was added.
        """
        if self.count == 0:
            raise DataError("no hidden states were seen: the input modification is not known")
        return -self.sum / self.count


def input_modifications(
    plan: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    reduce: str = "token",
    samples: int | None = None,
    **walking: Any,
) -> dict[str, float]:
    """:class:`InputModification` of every block of a float model, from one walk over the first ``samples`` samples.

    Blocks whose output has another shape than their input are left out. ``walking`` goes to the walk.
    """
    from hfq.calibration.walk import walk

    used: list[Mapping[str, Any]] = []
    seen = 0
    for batch in batches:
        if samples is not None and seen >= samples:
            break
        used.append(batch)
        seen += next(v.shape[0] for v in batch.values() if isinstance(v, torch.Tensor))
    found = {}
    for step in walk(plan, used, **walking):
        measure = InputModification(reduce)
        if all(step.hidden(i).shape == step.outputs[i].shape for i in range(len(step))):
            for i in range(len(step)):
                measure.update(step.hidden(i), step.outputs[i], step.mask(i))
        measure.reduce_ranks()
        if measure.count:
            found[step.block.name] = measure.value
    return found


def zscore_shares(
    blocks: Iterable[Any], placement: Callable[[Any], AbstractContextManager[Any]], **options: Any
) -> dict[str, float]:
    """:func:`zscore_share` of every block of the graph, one block in memory at a time."""
    found = {}
    for block in blocks:
        with placement(block.module):
            weights = [getattr(site.module, name) for site in block.sites for name in site.tensors]
            found[block.name] = zscore_share(weights, **options)
    return found


def zscore_share(
    weights: Iterable[torch.Tensor] | Callable[[], Iterable[torch.Tensor]],
    *,
    threshold: float = 1.0,
    two_sided: bool = False,
    per_matrix: bool = False,
) -> float:
    """Share of the weights that lie more than ``threshold`` standard deviations above their mean.

    Args:
        weights: the matrices of one block, or a function that gives them (called twice, so that they can be read from
            disk one at a time). Mean and deviation are taken over all of them together.
        two_sided: count both tails.
        per_matrix: standardise every matrix by itself and average their shares.

    Returns:
        A share in [0, 1]; 0 where the weights have no spread. For Gaussian weights about 0.1587 (two-sided 0.3173).
    """
    if not callable(weights):
        kept = list(weights)
        return zscore_share(lambda: kept, threshold=threshold, two_sided=two_sided, per_matrix=per_matrix)
    if per_matrix:
        shares = [zscore_share([w], threshold=threshold, two_sided=two_sided) for w in weights()]
        return sum(shares) / len(shares) if shares else 0.0
    count, total = 0, 0.0
    for w in weights():
        count += w.numel()
        total += float(w.detach().double().sum())
    if count == 0:
        return 0.0
    mean = total / count
    square = sum(float((w.detach().double() - mean).square().sum()) for w in weights())
    deviation = (square / count) ** 0.5
    if not deviation > 1e-12 * abs(mean):
        return 0.0
    above = 0
    for w in weights():
        z = (w.detach().double() - mean) / deviation
        above += int(((z.abs() if two_sided else z) > threshold).sum())
    return above / count


def rounding_losses(
    weight: torch.Tensor,
    spec: QuantSpec,
    widths: Sequence[int],
    *,
    hessian: torch.Tensor | None = None,
    clip: str = "none",
) -> dict[int, float]:
    """Loss of round-to-nearest at each width: ``tr((W - Q) H (W - Q)^T)``, without ``hessian`` ``||W - Q||^2``.

    ``weight`` is ``[rows, K]``, ``hessian`` ``[K, K]``.
    """
    w = weight.detach().float()
    losses = {}
    for bits in widths:
        difference = affine.dequantize(nearest.solve(w, spec.with_bits(bits), clip=clip)) - w
        product = difference if hessian is None else difference @ hessian.float()
        losses[bits] = float((product * difference).sum(dtype=torch.float64))
    return losses
