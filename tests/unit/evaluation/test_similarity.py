"""Signal to noise and structural similarity: known values, signals, shapes that do not fit."""

from __future__ import annotations

import pytest
import torch

from hfq.errors import DataError
from hfq.evaluation.similarity import HIGHEST, signal_to_noise, structural_similarity


def test_known_ratios():
    wanted = [torch.ones(2, 3), 2 * torch.ones(4)]
    found = [wanted[0] + 0.1, wanted[1]]
    # 6 + 16 over 6 * 0.01
    assert signal_to_noise(found, wanted) == pytest.approx(10 * torch.log10(torch.tensor(22 / 0.06)).item(), abs=1e-4)
    assert signal_to_noise(wanted, wanted) == HIGHEST


def test_signals():
    wanted, offset = torch.randn(4, 2, 3), torch.randn(2, 2, 3)
    both = wanted + torch.cat([offset, offset])  # the same in both halves: the prompt changes as much as before
    assert signal_to_noise([both], [wanted], "guidance") > 120 > signal_to_noise([both], [wanted])
    video = torch.randn(1, 2, 5, 3, 3)
    still = video + torch.randn(1, 2, 1, 3, 3)
    assert signal_to_noise([still], [video], "frames") > 120 > signal_to_noise([still], [video])


@pytest.mark.parametrize(("found", "wanted", "signal"), [
    (torch.ones(3), torch.ones(4), "output"), (torch.ones(3), torch.zeros(3), "output"),
    (torch.full((3,), float("nan")), torch.ones(3), "output"), (torch.ones(3, 2), torch.ones(3, 2), "guidance"),
    (torch.ones(3, 2), torch.ones(3, 2), "frames"),
])  # fmt: skip
def test_nothing_to_compare(found, wanted, signal):
    with pytest.raises(DataError):
        signal_to_noise([found], [wanted], signal)


def test_structure():
    pictures = torch.rand(3, 3, 20, 20)
    assert torch.equal(structural_similarity(pictures, pictures), torch.ones(3))
    near = structural_similarity((pictures + 0.02 * torch.randn_like(pictures)).clamp(0, 1), pictures)
    far = structural_similarity(torch.rand(3, 3, 20, 20), pictures)
    assert (near > 0.95).all() and (far < 0.3).all() and (structural_similarity(1 - pictures, pictures) < 0).all()
    with pytest.raises(DataError):
        structural_similarity(pictures[:2], pictures)


def test_structure_is_what_others_compute():
    metrics = pytest.importorskip("skimage.metrics")
    one, other = torch.rand(1, 3, 17, 16), torch.rand(1, 3, 17, 16)
    for window, side in ((7, 7), (511, 15)):
        wanted = metrics.structural_similarity(one[0].numpy(), other[0].numpy(), win_size=side, channel_axis=0,
                                               data_range=1.0)
        assert float(structural_similarity(one, other, window)) == pytest.approx(float(wanted), abs=1e-5)
