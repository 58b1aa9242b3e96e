from __future__ import annotations

import pytest
import torch

from hfq.errors import QuantizationError
from hfq.evaluation.rescale import rescale, widen_channels


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                         num_attention_heads=6, num_key_value_heads=2, head_dim=8)
    return LlamaForCausalLM(config).double().eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(20).view(2, 10)).logits


@pytest.mark.parametrize("change", [lambda m: rescale(m, 0.3, seed=1), lambda m: widen_channels(m, [3, 40])])
def test_the_function_stays(change):
    model = llama()
    before, weights = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    change(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-10, atol=1e-12)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, weights[n])}
    assert {"model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"} <= changed


def test_every_linear_weight_changes_and_by_the_asked_spread():
    model, start = llama(), llama()
    rescale(model, 0.1, seed=0)
    for (name, new), old in zip(model.named_parameters(), start.parameters(), strict=True):
        if name.endswith("proj.weight"):
            ratio = (new / old).log().std().item()
            # q, k, gate: one factor an element; v, o, up, down: two or one
            assert 0.05 < ratio < 0.2, name
    for seed, same in ((0, True), (1, False)):
        other = rescale(llama(), 0.1, seed=seed).model.layers[1].mlp.up_proj.weight
        assert torch.equal(other, model.model.layers[1].mlp.up_proj.weight) == same


def test_outlier_channels_reach_the_inputs():
    model, seen = llama(), {}
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    logits(model)
    before = seen["x"].abs().amax((0, 1))
    widen_channels(model, [5], factor=30)
    logits(model)
    after = seen["x"].abs().amax((0, 1))
    torch.testing.assert_close(after[5], 30 * before[5])
    torch.testing.assert_close(after[6:], before[6:])


def test_other_families_are_refused():
    with pytest.raises(QuantizationError, match="not Llama-like"):
        rescale(torch.nn.Sequential(torch.nn.Linear(2, 2)))
