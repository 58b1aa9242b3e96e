from __future__ import annotations

import math

import pytest
import torch

from hfq.errors import DataError
from hfq.evaluation.agreement import agreement

WINDOWS = torch.arange(12).view(3, 4) % 2


def constant(*probabilities):
    return lambda ids: torch.tensor(probabilities).log().expand(*ids.shape, -1)


def test_a_model_agrees_with_itself():
    model = constant(0.2, 0.8)
    result = agreement(model, model, WINDOWS, batch_size=2)
    assert (result.kl, result.top1, result.max_abs, result.tokens) == (0, 1, 0, 12)


def test_by_hand():
    result = agreement(constant(0.75, 0.25), constant(0.25, 0.75), WINDOWS)
    assert result.kl == pytest.approx(0.75 * math.log(3) + 0.25 * math.log(1 / 3), rel=1e-5)
    assert result.top1 == 0 and result.max_abs == pytest.approx(math.log(3), rel=1e-5)


def test_the_reference_is_the_first():
    skewed, flat = constant(0.99, 0.01), constant(0.5, 0.5)
    assert agreement(skewed, flat, WINDOWS).kl != pytest.approx(agreement(flat, skewed, WINDOWS).kl, rel=0.1)


def test_other_vocabulary_raises():
    with pytest.raises(DataError, match="cannot be compared"):
        agreement(constant(0.5, 0.5), constant(0.2, 0.3, 0.5), WINDOWS)
