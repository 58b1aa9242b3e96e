"""Relevance: what each rule promises, and that it is kept through whole models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from hfq.allocation import relevance, rules
from hfq.errors import DataError, QuantizationError

X = torch.randn(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
W = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
R = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_rules_conserve() -> None:
    found = rules.positive(R, X, W, nn.functional.linear)
    assert float(found.sum()) == pytest.approx(float(R.sum()), rel=1e-9)
    a, b = rules.bilinear(R, X, W.t(), torch.matmul)
    assert float(a.sum() + b.sum()) == pytest.approx(float(R.sum()), rel=1e-9)
    a, c = rules.residual(R, R + 1, R.flip(0), 3)
    assert torch.allclose((a + c).reshape(3, -1).sum(1), R.reshape(3, -1).sum(1))
    found = rules.linear_map(R[0], X[:, :5], lambda x: x.mean(0))
    assert float(found.sum()) == pytest.approx(float(R[0].sum()), rel=1e-9)
    assert rules.divide(torch.ones(2), torch.zeros(2)).tolist() == [0, 0]


def test_branches_get_shares_by_magnitude_image_by_image() -> None:
    a, c, r = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.rand(2, 3, 4)
    alone = [rules.residual(r[i : i + 1], a[i : i + 1], c[i : i + 1], 1) for i in range(2)]
    for side, whole in enumerate(rules.residual(r, a, c, 2)):
        assert torch.allclose(whole, torch.cat([pair[side] for pair in alone]), atol=1e-5)
    with pytest.raises(QuantizationError, match="2 images"):
        rules.residual(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 2), 2)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.cumsum(self.one(x), -1))


def test_what_has_no_rule_is_refused_and_nothing_stays_changed() -> None:
    model = Odd()
    with pytest.raises(QuantizationError, match="cumsum"):
        relevance.propagate(model, {"x": torch.randn(2, 4)}, dtype=torch.float64)
    assert model.one.weight.dtype == torch.float32 and model.one.weight.requires_grad
    assert not model.one._forward_hooks and model.training
    with pytest.raises(DataError, match="targets"):
        relevance.propagate(nn.Linear(4, 3), {"input": torch.randn(2, 4)}, targets=torch.tensor([0, 9]))


def test_eager_and_fused_attention_and_gated_language_models() -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
                                    image_size=16, patch_size=8, num_labels=3)
    model, batch = transformers.ViTForImageClassification(config).eval(), {"pixel_values": torch.randn(2, 3, 16, 16)}
    fused = relevance.shares(model, [batch]).shares
    model.set_attn_implementation("eager")
    eager = relevance.shares(model, [batch]).shares
    assert list(fused) == list(eager) and all(eager[n] == pytest.approx(v, rel=1e-3) for n, v in fused.items())
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, vocab_size=32, num_attention_heads=4,
        num_key_value_heads=2)).eval()  # fmt: skip
    found = relevance.propagate(llama, {"input_ids": torch.randint(0, 32, (2, 5))}, watch=["model.layers.0"])
    assert found.sums["model.layers.0", "input"].tolist() == pytest.approx([1, 1], rel=0.05)
    assert {"model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.scores", "lm_head"} <= set(found.amounts)
