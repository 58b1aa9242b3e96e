"""A first token with a stored output: what is multiplied, what is refused, the manifest, the finder."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hfq.calibration import leading as finder
from hfq.errors import CheckpointError, QuantizationError
from hfq.formats import ActivationSpec, QuantSpec, activation, affine
from hfq.graph.read import read
from hfq.layers import swap
from hfq.layers.leading import LeadingToken, lead
from hfq.report import Report


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.key = nn.Linear(16, 8)
        self.own = nn.Linear(16, 8)

    def forward(self, sample, text):
        return self.own(sample), self.key(text)


def packed(report=None):
    model, token = Reader(), 20 * torch.randn(16)
    wanted = F.linear(token, model.key.weight, model.key.bias)
    spec = ActivationSpec(8, False, "tensor", dynamic=False)
    params = activation.range_parameters(torch.tensor([-3.0]), torch.tensor([3.0]), spec)
    layer = swap.swap(model, "key", affine.quantize(model.key.weight.detach(), QuantSpec(8, symmetric=True)), report,
                      activation=spec, activation_params=params)
    plain = copy.deepcopy(layer)
    lead(layer, LeadingToken(token, wanted), None if report is None else report.rows["key"])
    return model, token, wanted.detach(), plain


def text_of(token, rows=3, others=5):
    return torch.cat([token.expand(rows, 1, -1), torch.randn(rows, others, 16)], 1)


def test_the_first_is_stored_and_the_rest_multiplied():
    report = Report()
    model, token, wanted, plain = packed(report)
    x = text_of(token)
    y = model.key(x)
    assert torch.equal(y[:, 0], wanted.expand(3, -1)) and torch.equal(y[:, 1:], plain(x[:, 1:]))
    assert model.key(x[:, :1]).shape == (3, 1, 8)
    stored = sum(t.nbytes for name, t in model.key.state_dict().items() if name != "bias")
    assert report.rows["key"].bits == pytest.approx(8 * stored / 128)


def test_another_token_is_refused():
    model, token, _, _ = packed()
    x = text_of(token)
    model.key(x)
    with pytest.raises(QuantizationError, match="first token of the text is another one"):
        model.key(text_of(token * 1.01))
    x[1, 0] += 1  # the same tensor, with other numbers in it
    with pytest.raises(QuantizationError, match="another one"):
        model.key(x)
    model.key(text_of(token).bfloat16())  # rounding is no other encoder
    with torch.inference_mode():
        model.key(text_of(token))
        with pytest.raises(QuantizationError, match="another one"):
            model.key(text_of(-token))
    with pytest.raises(QuantizationError, match="first token of 4"):
        lead(model.key, LeadingToken(torch.ones(4), torch.ones(8)))


def test_rebuilt_from_the_manifest_and_kept_under_casts():
    model, token, wanted, _ = packed()
    manifest = swap.describe(model)
    assert manifest["layers"]["key"]["leading"] == {"dtype": "float32"}
    again = Reader()
    swap.build_empty(again, manifest)
    again.load_state_dict(model.state_dict())
    swap.check(again)
    x = text_of(token)
    assert torch.equal(again.key(x), model.key(x))
    assert again.half().key.leading.output.dtype == torch.float32 and torch.equal(again.key.leading.output, wanted)
    for wrong in ({"dtype": "int8"}, {}, "x", {"dtype": "float32", "more": 1}):
        manifest["layers"]["key"]["leading"] = wrong
        with pytest.raises(CheckpointError, match="leading"):
            swap.build_empty(Reader(), manifest)


def test_found_where_the_first_token_is_always_the_same():
    model, token = Reader(), 20 * torch.randn(16)
    sites = read(model, only=["key", "own"]).every_site
    calls = [{"sample": torch.randn(2, 4, 16), "text": text_of(token, 2)} for _ in range(3)]
    found = finder.find(model, calls, sites)
    assert list(found) == ["key"] and torch.equal(found["key"], token)
    assert not finder.find(model, [{**calls[0], "text": calls[0]["text"][:1].expand(2, -1, -1)}], sites)  # one prompt
    calls[2]["text"][1, 0, 3] += 0.1
    assert not finder.find(model, calls, sites)
    assert not finder.find(model, [{"sample": torch.randn(2, 16), "text": torch.randn(2, 16)}], sites)
