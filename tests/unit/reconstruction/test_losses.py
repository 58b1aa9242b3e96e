"""Losses: their formulas, padding, and that parts of a batch add up."""

from __future__ import annotations

import pytest
import torch

from hfq.errors import ConfigError
from hfq.reconstruction import losses

PRED = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
TARGET = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 1, 0, 0]] * 3 + [[1, 1, 1, 1, 1]] * 3, dtype=torch.bool)


def test_formulas() -> None:
    square = (PRED - TARGET) ** 2
    torch.testing.assert_close(losses.mse(PRED, TARGET), square.mean())
    torch.testing.assert_close(losses.sum_of_squares(PRED, TARGET), square.sum(1).mean())
    torch.testing.assert_close(losses.relative(PRED, TARGET), (square.sum((1, 2)) / (TARGET**2).sum((1, 2))).mean())
    torch.testing.assert_close(losses.token_relative(PRED, TARGET), (square.sum(-1) / (TARGET**2).sum(-1)).mean())
    kl = torch.nn.functional.kl_div(PRED.log_softmax(-1), TARGET.softmax(-1), reduction="none").sum(-1).mean()
    torch.testing.assert_close(losses.divergence(PRED, TARGET), kl)
    torch.testing.assert_close(losses.mse(PRED[:, 0, 0], TARGET[:, 0, 0]), square[:, 0, 0].mean())


@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_padding_has_no_influence(name: str) -> None:
    loss = losses.get(name)
    changed = torch.where(MASK[..., None], PRED, 99 * torch.arange(1.0, 5.0))
    torch.testing.assert_close(loss(PRED, TARGET, MASK), loss(changed, TARGET, MASK))
    assert loss(changed, TARGET) > loss(PRED, TARGET)
    torch.testing.assert_close(loss(PRED[:3], TARGET[:3], MASK[:3]), loss(PRED[:3, :3], TARGET[:3, :3]))


@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_parts_add_up(name: str) -> None:
    loss = losses.get(name)
    parts = loss(PRED[:2], TARGET[:2], MASK[:2]) * 2 / 6 + loss(PRED[2:], TARGET[2:], MASK[2:]) * 4 / 6
    torch.testing.assert_close(parts, loss(PRED, TARGET, MASK))


def test_names() -> None:
    assert losses.get(losses.mse) is losses.mse
    with pytest.raises(ConfigError, match="token_relative"):
        losses.get("l3")


def test_weights_of_elements() -> None:
    shared = torch.rand(1, 5, 4, generator=torch.Generator().manual_seed(2))
    own = torch.rand(6, 5, 4, generator=torch.Generator().manual_seed(3))
    square = (PRED - TARGET) ** 2
    torch.testing.assert_close(losses.weighted(shared)(PRED, TARGET), (square * shared).mean())
    torch.testing.assert_close(losses.weighted()(PRED, torch.cat([TARGET, own], -1)), (square * own).mean())
    torch.testing.assert_close(losses.weighted(shared, over_tokens=True)(PRED, TARGET), (square * shared).sum(1).mean())
    torch.testing.assert_close(losses.weighted(torch.ones(1, 5, 4))(PRED, TARGET, MASK), losses.mse(PRED, TARGET, MASK))
    assert float(losses.unit_rms(7 * shared).square().mean()) == pytest.approx(1, abs=1e-5)
    assert float(losses.unit_mean(7 * shared).mean()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(losses.unit_rms(torch.zeros(1, 3)), torch.ones(1, 3))
