"""Rotary embeddings: every arrangement is recognised on a module, undone and applied again; others are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hfq.errors import CheckpointError, QuantizationError
from hfq.layers import attention, rotary
from hfq.layers.rotary import Positions, RotarySpec

SPECS = [RotarySpec(start, size, pairing, angles) for start, size in ((0, 16), (0, 8), (8, 8))
         for pairing in ("half", "next") for angles in ("half", "next", "all")]


def pair(spec: RotarySpec, tokens: int = 9, batch: int = 2, scale: float = 1.0) -> rotary.Pair:
    once = torch.rand(batch, tokens, spec.size // 2, generator=torch.Generator().manual_seed(2)) * 6
    full = {"half": torch.cat([once, once], -1), "next": once.repeat_interleave(2, -1), "all": once}[spec.angles]
    return full.cos() * scale, full.sin() * scale


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_turning_and_undoing(spec: RotarySpec) -> None:
    x = torch.randn(2, 3, 9, 16, generator=torch.Generator().manual_seed(1))
    angles = spec.angles_of(pair(spec, scale=1.3))
    turned = spec.turn(x, angles, 1)
    assert torch.allclose(spec.undo(turned, angles), x, atol=1e-5) and not torch.allclose(turned, x, atol=0.1)
    # <turn(x), y> = <x, adjoint(y)>
    y = torch.randn_like(x)
    assert (turned * y).sum() == pytest.approx(float((x * spec.adjoint(y, angles)).sum()), rel=1e-3)
    assert RotarySpec.from_dict(spec.to_dict()) == spec


class Toy(nn.Module):
    """An attention module that rotates its keys in a given arrangement, and a model of two of them."""

    def __init__(self, spec: RotarySpec | None, after: bool = False) -> None:
        super().__init__()
        self.spec, self.after, self.layer_idx = spec, after, 0
        self.config = transformers.LlamaConfig(attn_implementation="sdpa")
        self.proj = nn.Linear(16, 32)

    def forward(self, hidden: torch.Tensor, position_embeddings: Any = None) -> torch.Tensor:
        keys = self.proj(hidden).view(*hidden.shape[:2], 2, 16).transpose(1, 2)
        if self.spec is not None and position_embeddings is not None:
            keys = self.spec.turn(keys, self.spec.angles_of(position_embeddings), 1)
        if self.after:
            keys = keys + torch.arange(keys.shape[2])[:, None] / 4
        function = transformers.AttentionInterface().get_interface(self.config._attn_implementation, None)
        return function(self, keys, keys, keys, None, scaling=0.25)[0]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_arrangement_is_recognised(spec: RotarySpec) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": Toy(spec)})
    found = rotary.prove(model, ["a"], lambda: model["a"](torch.randn(2, 9, 16), position_embeddings=pair(spec)))
    x = torch.randn(2, 2, 9, 16)
    given = pair(spec)
    assert found["a"] is not None
    assert torch.allclose(found["a"].turn(x, found["a"].angles_of(given), 1), spec.turn(x, spec.angles_of(given), 1))


def test_no_positions_are_recognised_too_and_others_refused() -> None:
    spec = SPECS[0]
    for model, given, match in (
        (Toy(None), None, None), (Toy(spec, after=True), pair(spec), "not understood"),
        (Toy(None, True), None, "enter"),
    ):
        whole = nn.ModuleDict({"a": model})

        def call(whole: Any = whole, given: Any = given) -> Any:
            return whole["a"](torch.randn(2, 9, 16), position_embeddings=given)

        if match is None:
            assert rotary.prove(whole, ["a"], call) == {"a": None}
        else:
            with pytest.raises(QuantizationError, match=match):
                rotary.prove(whole, ["a"], call)
    with pytest.raises(QuantizationError, match="not called"):
        rotary.prove(nn.ModuleDict({"a": Toy(spec)}), ["a"], lambda: None)


def test_damaged_records_are_refused() -> None:
    good = SPECS[0].to_dict()
    for change in ({"size": 7}, {"pairing": "third"}, {"start": -1}, {"angles": None}, {"more": 1}):
        with pytest.raises(CheckpointError):
            RotarySpec.from_dict({**good, **change})


def test_positions_are_stored_once_for_all_layers() -> None:
    spec, store = SPECS[0], Positions()
    whole = pair(spec, 300, 1)
    at = 0
    for count in (100, 1, 1, 198):
        part = tuple(t[:, at:at + count] for t in whole)
        at += count
        for _ in range(3):  # three layers get the same tensors
            store.append(part, spec.angles_of(part), at)
    for start, stop in ((0, 300), (99, 103), (250, 300)):
        for found, wanted in zip(store.range(start, stop), spec.angles_of(whole), strict=True):
            assert torch.equal(found, wanted[:, start:stop])
    assert store.nbytes < 1.4 * sum(t.nbytes for t in spec.angles_of(whole))
    store.change(1, None, 101)
    store.change(1, None, 101)  # the second layer's turn
    with pytest.raises(QuantizationError, match="positions"):
        store.append(part, spec.angles_of(part), 400)


def test_rows_with_padding_have_angles_of_their_own() -> None:
    spec, store = SPECS[0], Positions()
    same = tuple(t.expand(2, -1, -1) for t in pair(spec, 4, 1))
    store.append(same, spec.angles_of(same), 4)
    assert store.blocks[0][0].shape[0] == 1
    other = pair(spec, 3, 2)
    store.append(other, spec.angles_of(other), 7)
    cos, _ = store.range(0, 7)
    assert torch.equal(cos[:, :4], spec.angles_of(same)[0]) and torch.equal(cos[:, 4:], spec.angles_of(other)[0])
    store.change(1, lambda t: t.flip(0), None)
    assert torch.equal(store.range(4, 7)[0], spec.angles_of(other)[0].flip(0))


def test_every_module_of_a_model_is_proven() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, vocab_size=32)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.arange(1, 8)[None]
    names = attention.find(model, lambda: model(ids))
    assert rotary.prove(model, names, lambda: model(ids)) == dict.fromkeys(names, RotarySpec(0, 8, "half", "half"))
