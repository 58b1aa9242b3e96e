"""Losses between the logits of two models, one number a token."""

from __future__ import annotations

import torch

from hfq.errors import ConfigError

__all__ = ["MODES", "top_divergence"]

MODES = ("partial", "renorm")


def top_divergence(student: torch.Tensor, teacher: torch.Tensor, k: int, mode: str = "partial") -> torch.Tensor:
    """Kullback-Leibler divergence over the ``k`` tokens that the teacher thinks most likely.

    "partial": ``sum_I p_i (log p_i - log q_i)`` with ``p`` and ``q`` normalised over the whole vocabulary; it may be
    negative. "renorm": both distributions restricted to those tokens and normalised there. With ``k`` at least the
    vocabulary both are the full divergence.

    Args:
        student, teacher: logits ``[..., V]``; computed in float32 (float64 if the student's are). No gradient reaches
            the teacher.
        k: at least 1; cut to ``V``.

    Returns:
        ``[...]``. Where both have the same logits it is exactly 0.

    Raises:
        ConfigError: ``k`` or ``mode`` is out of range.
    """
    if k < 1 or mode not in MODES:
        raise ConfigError(f"k={k}, mode={mode!r}: k at least 1 and one of {MODES} are needed")
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    whole = student, teacher
    if k < teacher.shape[-1]:
        teacher, index = teacher.topk(k, -1)
        student = student.gather(-1, index)
    total_q, total_p = (t.logsumexp(-1, keepdim=True) for t in (whole if mode == "partial" else (student, teacher)))
    log_p, log_q = teacher - total_p, student - total_q
    return (log_p.exp() * (log_p - log_q)).sum(-1)
