"""Learned maps: the mask opens as the paper says, what is masked does not move, the map is the masked one."""

import pytest
import torch

from hfq.errors import ConfigError
from hfq.transforms.affine import Diagonal, MaskedMatrix, RotaryBlocks, bandwidth, gradual_mask, truncate_


@pytest.mark.parametrize("epochs", [2, 7, 20])
@pytest.mark.parametrize("size", [2, 5, 64])
def test_the_band_opens_from_the_diagonal_outwards(size, epochs):
    counts = []
    for epoch in range(epochs):
        width = bandwidth(size, epoch, epochs)
        assert width == (size - 1) * epoch // (epochs - 1) + 1
        mask = gradual_mask(size, width, 0.1)
        assert torch.equal(mask, mask.t()) and torch.equal(mask.diagonal(), torch.ones(size))
        away = (torch.arange(size)[:, None] - torch.arange(size)).abs()
        assert (mask[(away > 0) & (away < width)] == 0.1).all() and (mask[away >= width] == 0).all()
        counts.append(int((mask != 0).sum()))
    assert torch.equal(gradual_mask(size, bandwidth(size, 0, epochs), 0.1), torch.eye(size))
    assert counts[-1] == size * size and counts == sorted(counts)


def test_one_epoch_opens_everything_and_wrong_epochs_are_refused():
    assert bandwidth(9, 0, 1) == 9
    with pytest.raises(ConfigError):
        bandwidth(9, 3, 3)


def test_truncation_lifts_small_entries_and_leaves_zeros():
    entries = torch.tensor([0.0, 1e-5, -1e-3, 0.02, -3.0])
    assert truncate_(entries).tolist() == pytest.approx([0.0, 0.01, -0.01, 0.02, -3.0])


def test_masked_entries_get_no_gradient_and_open_ones_the_damped_one():
    matrix = MaskedMatrix(torch.ones(1, 6), 0.1)
    target = torch.randn(1, 6, 6)
    matrix.open(2, 6)
    (matrix.effective() * target).sum().backward()
    away = (torch.arange(6)[:, None] - torch.arange(6)).abs()
    grad = matrix.raw.grad[0]
    assert (grad[away >= 3] == 0).all()
    assert torch.allclose(grad[(away > 0) & (away < 3)], 0.1 * target[0][(away > 0) & (away < 3)])
    assert torch.allclose(grad.diagonal(), target[0].diagonal())


def test_inverse_is_of_the_masked_matrix():
    matrix = MaskedMatrix(torch.rand(3, 8) + 0.5, 0.2)
    with torch.no_grad():
        matrix.raw.add_(torch.randn(3, 8, 8) * 0.3)
    for epoch in range(4):
        matrix.open(epoch, 4)
        forward, back = matrix.pair(torch.float64)
        assert torch.allclose(forward @ back, torch.eye(8).double().expand(3, 8, 8), atol=1e-9)
        assert torch.allclose(forward, matrix.raw.double() * matrix.mask(torch.float64))
        values = torch.linalg.cond(forward)
        assert matrix.condition() == pytest.approx(float(values.max()))
    assert not torch.allclose(torch.linalg.inv(matrix.raw.double()), back)


def test_rotary_blocks_commute_with_rotations():
    blocks = RotaryBlocks(torch.rand(5) + 0.5, 1.0)
    with torch.no_grad():
        blocks.b.add_(torch.randn(5))
    assert torch.equal(blocks.effective()[:, 0, 1], torch.zeros(5))  # closed until it is opened
    blocks.open(1, 2)
    angle = torch.tensor(0.7)
    turn = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    forward, back = blocks.pair()
    assert torch.allclose(forward @ turn, turn @ forward, atol=1e-6)
    assert torch.allclose(forward @ back, torch.eye(2).expand(5, 2, 2), atol=1e-6)
    assert blocks.condition() == pytest.approx(float(torch.linalg.svdvals(forward).max()
                                                     / torch.linalg.svdvals(forward).min()), rel=1e-5)


def test_diagonal():
    scale = Diagonal(torch.tensor([2.0, 1e-4, 0.5]))
    scale.truncate_()
    forward, back = scale.pair(torch.float64)
    assert torch.allclose(forward * back, torch.ones(3).double()) and scale.condition() == pytest.approx(200)
