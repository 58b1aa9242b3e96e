"""Pictures as calibration data, and images that do not fit."""

from __future__ import annotations

from types import SimpleNamespace

import numpy
import pytest
import torch

from hfq.calibration.data import normalise
from hfq.calibration.images import check
from hfq.errors import DataError

PIL = pytest.importorskip("PIL.Image")
MODEL = SimpleNamespace(config=SimpleNamespace(num_channels=3, image_size=8))


def picture(value: int, mode: str = "RGB"):
    return PIL.fromarray(numpy.full((8, 8, 3), value, numpy.uint8)).convert(mode)


def prepare(images, return_tensors):
    return {"pixel_values": torch.tensor(numpy.asarray(images)).permute(2, 0, 1)[None].float() / 255}


@pytest.mark.parametrize("form", [
    lambda n: picture(10 * n), lambda n: {"image": picture(10 * n, "L"), "label": n % 2},
    lambda n: (picture(10 * n), n % 2), lambda n: {"img": picture(10 * n), "caption": f"number {n}"},
])
def test_pictures_become_pixel_values(form):
    batches = normalise([form(n) for n in range(5)], processor=prepare, samples=4, batch_size=3)
    assert [tuple(batch["pixel_values"].shape) for batch in batches] == [(3, 3, 8, 8), (1, 3, 8, 8)]
    assert batches[0]["pixel_values"][2].mean() == pytest.approx(20 / 255) and batches.descriptor["count"] == 4


def test_pictures_that_cannot_be_used():
    with pytest.raises(DataError, match="processor"):
        normalise([picture(1), picture(2)])
    with pytest.raises(DataError, match="one class"):
        normalise([(picture(n), 3) for n in range(4)], processor=prepare)
    with pytest.raises(DataError, match="sample 1 has no picture"):
        normalise([picture(1), {"label": 2}], processor=prepare)


@pytest.mark.parametrize(("pixels", "match"), [
    (torch.zeros(2, 3, 16, 16), "16 x 16 pixels and the model reads 8 x 8"), (torch.zeros(2, 1, 8, 8), "3 channels"),
    (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "uint8"), (torch.zeros(1, 3, 8, 8), "one calibration image"),
])
def test_images_that_do_not_fit(pixels, match):
    with pytest.raises(DataError, match=match):
        check([{"pixel_values": pixels}], MODEL)
    check([{"pixel_values": torch.zeros(1, 3, 8, 8)}] * 2, MODEL)


def test_pictures_that_no_processor_has_seen():
    raw = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    with pytest.raises(DataError, match="uint8"):
        check(normalise(raw), MODEL)
    with pytest.warns(UserWarning, match="scale pictures to a few units"):
        check(normalise(raw.float()), MODEL)
