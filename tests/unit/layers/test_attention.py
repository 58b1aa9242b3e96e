"""Quantized attention inputs: found without a table, exact where they should be, rebuilt from the manifest."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from hfq.errors import CheckpointError, QuantizationError
from hfq.formats import ActivationSpec, activation
from hfq.layers import attention, swap

COMMON = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON, intermediate_size=96, num_key_value_heads=2),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, intermediate_size=96, num_key_value_heads=2, head_dim=16),
    "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64),
    "opt": lambda: transformers.OPTConfig(**COMMON, ffn_dim=96, word_embed_proj_dim=64),
}
IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones_like(IDS)
PADDED[0, :4] = 0


def make(kind: str, implementation: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def logits(model: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, attention_mask=PADDED, **more).logits[:, 4:]


def names_of(model: Any) -> list[str]:
    return attention.find(model, lambda: model(IDS))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_parts_are_found_and_an_empty_part_changes_nothing(kind: str, implementation: str) -> None:
    model = make(kind, implementation)
    before, names = logits(model), names_of(model)
    assert [name.rpartition(".")[2] for name in names] == [{"gpt2": "attn"}.get(kind, "self_attn")] * 2
    assert model.config._attn_implementation == implementation  # looking leaves no trace
    for name in names:
        attention.install(model, name, attention.AttentionQuant(16))
    assert torch.equal(logits(model), before)
    assert attention.uninstall(model) == names and model.config._attn_implementation == implementation
    for name in names:
        attention.install(model, name, attention.AttentionQuant(16, hadamard=True))
    difference = (logits(model) - before).abs().max()
    assert 0 < difference <= 1e-6 * before.abs().max() + 1e-6  # H H^T = 1 in the products, by a computation that ran


def test_queries_keys_and_values_are_rounded_as_the_grid_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make("llama"), []
    name = names_of(model)[0]
    specs = {"query": ActivationSpec(8), "key": ActivationSpec(4), "value": ActivationSpec(3, symmetric=True)}
    original = transformers.integrations.sdpa_attention.sdpa_attention_forward

    def inner(module: Any, *tensors: Any, **kwargs: Any) -> Any:
        seen.append([t.clone() for t in tensors[:3]])
        return original(module, *tensors, **kwargs)

    monkeypatch.setattr(transformers.integrations.sdpa_attention, "sdpa_attention_forward", inner)
    attention.install(model, names_of(model)[1], attention.AttentionQuant(16))  # routes the config
    logits(model)
    exact, seen[:] = seen[0], []
    attention.install(model, name, attention.AttentionQuant(16, **specs))
    logits(model)
    for tensor, wanted, spec in zip(seen[0], exact, specs.values(), strict=True):
        # Keys are rounded as a cache stores them, with float16 scales: a number on an edge may go the other way.
        near = (tensor - activation.fake(wanted, spec)).abs() <= 2**-10 * wanted.abs().amax(-1, keepdim=True)
        assert near.float().mean() >= (0.97 if spec.bits == 4 else 1) and not torch.equal(tensor, wanted)


def test_gradients_pass() -> None:
    model = make("llama")
    spec = ActivationSpec(4)
    for name in names_of(model):
        attention.install(model, name, attention.AttentionQuant(16, query=spec, key=spec, value=spec, hadamard=True))
    model(IDS, labels=IDS).loss.backward()
    for projection in ("q_proj", "k_proj", "v_proj"):
        assert getattr(model.model.layers[0].self_attn, projection).weight.grad.norm() > 0


def test_copies_generate_with_parts_of_their_own() -> None:
    model, spec = make("llama"), ActivationSpec(3)
    for name in names_of(model):
        attention.install(model, name, attention.AttentionQuant(16, key=spec, value=spec))
    clone = copy.deepcopy(model)
    assert torch.equal(logits(clone), logits(model))
    attention.uninstall(clone)
    assert not torch.equal(logits(clone), logits(model)) and len(attention.parts(model)) == 2


def test_the_manifest_rebuilds_the_parts() -> None:
    model = make("qwen3")
    for name in names_of(model):
        attention.install(model, name, attention.AttentionQuant(16, key=ActivationSpec(4), hadamard=True))
    manifest = swap.describe(model)
    again = make("qwen3")
    swap.build_empty(again, manifest)
    assert swap.describe(again) == manifest and torch.equal(logits(again), logits(model))
    swap.build_empty(again, manifest)  # what is there stays
    assert "attention" not in swap.describe(make("qwen3"))


DAMAGE = {
    "no module": {"module": 3},
    "another module": {"module": "model.layers.7.self_attn"},
    "an unknown field": {"softmax": 8},
    "a grid that is none": {"key": {"bits": 17}},
    "a static grid": {"key": ActivationSpec(8, granularity="tensor", dynamic=False).to_dict()},
    "a size that is none": {"head_dim": -3},
    "an order without a matrix": {"head_dim": 7, "hadamard": True},
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_entries_are_refused(what: str) -> None:
    entry = {"module": "model.layers.0.self_attn", **attention.AttentionQuant(16).describe(), **DAMAGE[what]}
    with pytest.raises(CheckpointError):
        swap.build_empty(make("llama"), {"layers": {}, "rotations": [], "attention": [entry]})


def test_what_cannot_be_installed_is_refused() -> None:
    model = make("llama")
    name = names_of(model)[0]
    with pytest.raises(QuantizationError, match="no module"):
        attention.install(model, "model.layers.9.self_attn", attention.AttentionQuant(16))
    attention.install(model, name, attention.AttentionQuant(16))
    with pytest.raises(QuantizationError, match="already"):
        attention.install(model, name, attention.AttentionQuant(16))
    with pytest.raises(QuantizationError, match="dynamic"):
        attention.AttentionQuant(16, key=ActivationSpec(8, granularity="tensor", dynamic=False))
    with pytest.raises(QuantizationError, match="order 7"):
        attention.AttentionQuant(7, hadamard=True)
    with pytest.raises(QuantizationError, match="config"):
        attention.install(torch.nn.Sequential(torch.nn.Linear(2, 2)), "0", attention.AttentionQuant(2))
