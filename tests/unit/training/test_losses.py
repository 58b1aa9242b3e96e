"""Divergence over the teacher's most likely tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hfq.errors import ConfigError
from hfq.training.losses import top_divergence

MODES = ("partial", "renorm")


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    return 2 * torch.randn(5, 40, dtype=torch.float64), 2 * torch.randn(5, 40, dtype=torch.float64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k", [40, 1000])
def test_all_tokens_give_the_full_divergence(mode: str, k: int) -> None:
    student, teacher = logits()
    full = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    found = top_divergence(student, teacher, k, mode)
    torch.testing.assert_close(found, full)
    assert (found >= 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_equal_logits_give_zero(mode: str) -> None:
    student, _ = logits()
    assert torch.equal(top_divergence(student.float(), student.float(), 7, mode), torch.zeros(5))


def test_the_partial_sum_is_over_the_teachers_tokens_and_may_be_negative() -> None:
    student, teacher = logits()
    p, q = teacher.softmax(-1), student.softmax(-1)
    index = teacher.topk(6).indices
    expected = (p.gather(-1, index) * (p.gather(-1, index) / q.gather(-1, index)).log()).sum(-1)
    torch.testing.assert_close(top_divergence(student, teacher, 6), expected)
    sure = teacher.clone().scatter_add_(-1, index, torch.full((5, 6), 3.0, dtype=torch.float64))
    assert (top_divergence(sure, teacher, 6) < 0).all()


@pytest.mark.parametrize("k", [6, 40])
def test_gradient_of_the_partial_sum(k: int) -> None:
    student, teacher = logits()
    student.requires_grad_()
    top_divergence(student, teacher, k).sum().backward()
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    kept = torch.zeros_like(p).scatter_(-1, teacher.topk(k).indices, 1.0) * p
    torch.testing.assert_close(student.grad, kept.sum(-1, keepdim=True) * q - kept)


def test_renormalised_distributions_see_only_those_tokens() -> None:
    student, teacher = logits()
    index = teacher.topk(6).indices
    p, q = (t.gather(-1, index).softmax(-1) for t in (teacher, student))
    torch.testing.assert_close(top_divergence(student, teacher, 6, "renorm"), (p * (p / q).log()).sum(-1))


def test_sixteen_bit_logits_are_compared_in_float32_and_options_checked() -> None:
    student, teacher = (t.bfloat16() for t in logits())
    assert top_divergence(student, teacher, 5).dtype == torch.float32
    for wrong in ({"k": 0}, {"k": 5, "mode": "full"}):
        with pytest.raises(ConfigError, match="partial"):
            top_divergence(student, teacher, **wrong)
