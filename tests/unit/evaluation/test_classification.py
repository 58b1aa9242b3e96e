"""Top-1, agreement and KL of image classifiers against numbers worked out by hand, and wrong input."""

from __future__ import annotations

import math

import pytest
import torch

from hfq.errors import DataError
from hfq.evaluation.classification import classify, image_logits
from hfq.formats import QuantSpec, affine
from hfq.layers import swap

PIXELS = torch.arange(4 * 3 * 2 * 2, dtype=torch.float32).reshape(4, 3, 2, 2) / 48


def fixed(rows: list[list[float]]):
    """A classifier that answers the rows one after another, whatever the batch size."""
    table = {float(image.sum()): torch.tensor(row) for image, row in zip(PIXELS, rows, strict=True)}
    return lambda pixels: torch.stack([table[float(image.sum())] for image in pixels])


ANSWERS = [[2.0, 0.0], [0.0, 1.0], [0.5, 0.0], [0.0, 3.0]]


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_the_numbers(batch):
    other = [[2.0, 0.0], [1.0, 0.0], [0.5, 0.0], [0.0, 3.0]]
    found = classify(fixed(other), PIXELS, torch.tensor([0, 1, 1, 1]), reference=fixed(ANSWERS), batch_size=batch)
    assert found.images == 4 and found.top1 == 0.5 and found.agreement == 0.75 and found.max_abs == 1.0
    p = 1 / (1 + math.e)  # KL of (p, 1 - p) to (1 - p, p), for one image of four
    assert found.kl == pytest.approx((p * math.log(p / (1 - p)) + (1 - p) * math.log((1 - p) / p)) / 4, rel=1e-5)


def test_a_model_against_itself():
    found = classify(fixed(ANSWERS), PIXELS, reference=image_logits(fixed(ANSWERS), PIXELS))
    assert found.agreement == 1 and found.kl == 0 and found.top1 is None


def test_the_mode_of_a_module_comes_back():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(12, 3)).train()
    assert torch.equal(image_logits(model, PIXELS), image_logits(model, PIXELS)) and model.training


@pytest.mark.parametrize(("pixels", "labels", "match"), [
    (PIXELS[0], None, "height, width"), (PIXELS[:0], None, "height, width"),
    ((48 * PIXELS).to(torch.uint8), None, "image processor"), (PIXELS * math.nan, None, "NaN"),
    (PIXELS, torch.tensor([0, 1]), "for 4 images"), (PIXELS, torch.tensor([0, 1, 2, 1]), "0 to 1 are allowed"),
    (PIXELS, torch.zeros(4), "whole number"),
])
def test_wrong_input(pixels, labels, match):
    with pytest.raises(DataError, match=match):
        classify(fixed(ANSWERS), pixels, labels)


def test_wrong_answers():
    with pytest.raises(DataError, match="cannot be compared"):
        classify(fixed(ANSWERS), PIXELS, reference=torch.zeros(4, 3))
    with pytest.raises(DataError, match="not finite"):
        classify(fixed([[math.inf, 0.0], *ANSWERS[1:]]), PIXELS)


def test_a_model_that_starts_with_scales_gets_images_in_its_own_precision():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 4))
    codes = affine.quantize(model[0].weight.detach().flatten(1), QuantSpec(8))
    swap.swap(model, "0", codes)
    assert next(p for p in model.parameters() if p.is_floating_point()).dtype == torch.float16
    pixels = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(image_logits(model, pixels), model(pixels))
