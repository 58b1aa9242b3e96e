"""Channels of a norm scaled and shifted: exact where it is proven, refused where it is not, marked once done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vision_toys import untrained

from hfq import graph
from hfq.calibration.walk import walk
from hfq.errors import QuantizationError
from hfq.graph import pairs
from hfq.transforms import reparameterize

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def swin(window: int) -> Any:
    return untrained("swin", window=window, initializer_range=0.2, qkv_bias=False)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES).logits


def reasons(model: Any) -> dict[str, str]:
    plan = graph.read(model)
    found = pairs.discover(plan, lambda: model(IMAGES))
    result: dict[str, str] = {}
    for step in walk(plan, [{"pixel_values": IMAGES}]):
        args, kwargs = step.inputs[0]
        result |= reparameterize.prove_shifts(step.block, args, kwargs, found.proven("norm", step.block.name))
    return result


def test_shifts_are_proven_and_padding_is_noticed() -> None:
    model = swin(2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = reasons(model)
    assert len(found) == 4 and not any(found.values())
    assert before.keys() == dict(model.named_parameters()).keys()  # a try leaves no trace
    padded = reasons(swin(3))  # 8 x 8 tokens in windows of 3 x 3
    assert "padding" in padded["swin.encoder.layers.0.blocks.0.layernorm_before"]
    assert padded["swin.encoder.layers.0.blocks.0.layernorm_after"] == ""


def test_a_site_between_the_stacks_is_proven_by_the_model() -> None:
    model = swin(2)
    plan, wanted = graph.read(model), logits(model)
    site = plan.outside[0]
    pair, reason = reparameterize.outside_pair(model, site, lambda: logits(model))
    assert pair is not None and not reason and pair.sources[0].name.endswith("downsample.norm")
    assert torch.equal(logits(model), wanted) and site.module.bias is None
    assert not reparameterize.is_folded(pair.sources[0].part.module)
    reparameterize.fold(pair, torch.rand(pair.classes) + 0.5, torch.randn(pair.classes))
    assert site.module.bias is not None and (logits(model) - wanted).norm() <= 1e-5 * wanted.norm()
    assert reparameterize.is_folded(pair.sources[0].part.module)
    linear = graph.read(model).blocks[0].sites[0]
    pair, reason = reparameterize.outside_pair(model, linear, lambda: logits(model))
    assert pair is None and reason


def test_what_is_refused() -> None:
    model = swin(2)
    pair = next(iter(pairs.discover(graph.read(model), lambda: model(IMAGES)).proven("norm")))
    ones = torch.ones(pair.classes)
    for scale, shift in ((ones[:-1], None), (0 * ones, None), (ones, ones[:-1]), (ones, ones * float("nan"))):
        with pytest.raises(QuantizationError):
            reparameterize.fold(pair, scale, shift)
    reparameterize.fold(pair, 2 * ones)
    with pytest.raises(QuantizationError, match="folded before"):
        reparameterize.fold(pair, ones)
    reparameterize.fold(pair, ones, again=True)
    with pytest.raises(QuantizationError, match="whole zero points"):
        reparameterize.common_grid(ones, 0.5 * ones, 4)
    pair.refuse("somebody else reads it")
    with pytest.raises(QuantizationError, match="cannot be scaled"):
        reparameterize.fold(pair, ones, again=True)
