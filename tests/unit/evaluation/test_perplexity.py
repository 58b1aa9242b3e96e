from __future__ import annotations

import math

import pytest
import torch

from hfq.errors import DataError
from hfq.evaluation.perplexity import perplexity

WINDOWS = [[0, 1, 2, 3], [3, 2, 1, 0]]


def successor(ids: torch.Tensor) -> torch.Tensor:
    """Puts probability 1/2 on (token + 1) mod 4 and 1/6 on each other."""
    logits = torch.full((*ids.shape, 4), math.log(1 / 6))
    return logits.scatter(-1, ((ids + 1) % 4)[..., None], math.log(1 / 2))


def test_by_hand():
    # The first window is predicted with 1/2 three times, the second with 1/6 three times.
    expected = math.exp(-(3 * math.log(1 / 2) + 3 * math.log(1 / 6)) / 6)
    for batch_size in (1, 2):
        assert perplexity(successor, WINDOWS, batch_size=batch_size) == pytest.approx(expected, rel=1e-6)


def test_uniform_model_has_the_vocabulary_size():
    assert perplexity(lambda ids: torch.zeros(*ids.shape, 49), WINDOWS) == pytest.approx(49, rel=1e-6)


def test_nothing_is_predicted_across_a_window_border():
    one = perplexity(successor, [[0, 1, 2, 3, 0, 1]])
    two = perplexity(successor, [[0, 1, 2], [1, 2, 3]])  # 2 -> 1 would be a bad guess
    assert one == pytest.approx(2, rel=1e-6) and two == pytest.approx(2, rel=1e-6)


def test_half_precision_logits_are_scored_in_float32():
    exact, half = perplexity(successor, WINDOWS), perplexity(lambda ids: successor(ids).half(), WINDOWS)
    assert half == pytest.approx(exact, rel=2e-3)


def test_progress_sees_every_batch():
    seen = []

    class Bar:
        def __init__(self, total, description):
            seen.append((total, description))

        def update(self):
            seen.append("update")

        def close(self):
            seen.append("close")

    perplexity(successor, WINDOWS, progress=Bar)
    assert seen == [(2, "perplexity"), "update", "update", "close"]


@pytest.mark.parametrize("windows", [[], [[1]], [[1, 2], [1, 2, 3]]])
def test_bad_windows(windows):
    with pytest.raises(DataError, match="window"):
        perplexity(successor, windows)


def test_logits_that_are_not_finite_raise():
    with pytest.raises(DataError, match="not finite"):
        perplexity(lambda ids: successor(ids) * float("nan"), WINDOWS)


def test_a_module_is_evaluated_in_eval_mode_and_restored():
    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))
            self.modes = []

        def forward(self, input_ids, use_cache=True):
            self.modes.append((self.training, use_cache, torch.is_grad_enabled()))
            return successor(input_ids) * self.scale

    toy = Toy().train()
    perplexity(toy, WINDOWS)
    assert toy.training and set(toy.modes) == {(False, False, False)}
