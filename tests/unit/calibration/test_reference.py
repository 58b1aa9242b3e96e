"""The float copy beside a model that changes."""

from __future__ import annotations

import torch
from torch import nn

from hfq.calibration.reference import copy_of


def test_a_float_copy_takes_what_the_model_takes() -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).to(dtype)
        made, x = copy_of(model), torch.randn(2, 3, 8, 8).to(dtype)
        assert made(x).dtype == torch.float32 and torch.equal(made(x), made(x.float()))
        assert model(x).dtype == dtype and not any(p.requires_grad for p in made.parameters())
