"""Scales on proven pairs: any positive numbers leave the logits as they are; what is not proven is refused."""

import pytest
import torch
import transformers as tf

from hfq import graph
from hfq.errors import QuantizationError
from hfq.graph.gates import discover_gates
from hfq.graph.pairs import discover
from hfq.layers.attached import ScaledSiLU
from hfq.report import Report
from hfq.transforms import scale

TEXT = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
GQA = dict(TEXT, num_key_value_heads=2, head_dim=8)


def build(name):
    torch.manual_seed(0)
    if name == "llama":
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**GQA))
    elif name == "qwen3":
        model = tf.Qwen3ForCausalLM(tf.Qwen3Config(**GQA))
    elif name == "gpt2":
        model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                                                 bos_token_id=1, eos_token_id=2))
    else:
        text = {key: value for key, value in TEXT.items() if key != "intermediate_size"}
        model = tf.OPTForCausalLM(tf.OPTConfig(**text, ffn_dim=48, word_embed_proj_dim=32))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))

    def call():
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    return model.eval(), call


def found(name):
    model, call = build(name)
    plan = graph.read(model)
    pairs = discover(plan, call)
    gates = discover_gates(plan, call)
    return model, call, plan, pairs, gates


def factors(classes, seed=0):
    return torch.empty(classes).uniform_(-1.5, 1.5, generator=torch.Generator().manual_seed(seed)).exp()


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", {"norm": 4, "vo": 2, "updown": 2, "qk": 2, "gate": 2}),
        ("qwen3", {"norm": 4, "vo": 2, "updown": 2, "gate": 2}),  # a norm lies between projection and attention
        ("gpt2", {"norm": 4, "vo": 2, "qk": 2}),  # a curved activation lies between the two linears of the MLP
        ("opt", {"norm": 4, "vo": 2, "updown": 2, "qk": 2}),
    ],
)
def test_every_proven_pair_keeps_the_logits(name, kinds):
    model, call, plan, pairs, gates = found(name)
    before = call()
    counts = {}
    for number, pair in enumerate([*pairs.proven(), *(p for p in gates if p.proven)]):
        if pair.kind == "rotation":
            continue
        at = [link.part.module._parameters[link.tensor].detach().clone() for link in (*pair.sources, *pair.readers)]
        scale.apply_scale(pair, factors(pair.classes, number), model=model)
        moved = [not torch.equal(old, link.part.module._parameters[link.tensor])
                 for old, link in zip(at, (*pair.sources, *pair.readers), strict=True)]
        error = (call() - before).norm() / before.norm()
        assert error < 1e-4, f"{pair}: {error}"
        if pair.kind in kinds:
            assert all(moved)
            counts[pair.kind] = counts.get(pair.kind, 0) + 1
    assert counts == kinds


def test_one_value_serves_a_rotary_pair_and_the_heads_that_share_a_key():
    _, _, _, pairs, _ = found("llama")
    pair = pairs.proven("qk")[0]
    keys, queries = pair.partners[0].index, pair.sources[0].index
    assert pair.classes == 2 * 8 // 2  # two key heads of eight channels, two channels a rotary pair
    assert torch.equal(keys[:4], keys[4:8]) and torch.equal(queries[:8], queries[8:16])
    untied = pairs.proven("vo")[0]
    assert untied.classes == 16 and torch.equal(untied.readers[0].index[:8], untied.readers[0].index[8:16])


def test_query_and_key_of_normalised_heads_are_refused_with_the_reason():
    _, _, plan, pairs, _ = found("qwen3")
    refused = pairs.refused("qk")[0]
    assert "normalised" in refused.reason
    with pytest.raises(QuantizationError, match="normalised"):
        scale.apply_scale(refused, torch.ones(refused.classes))
    report = Report()
    scale.smooth(plan.model, plan, pairs, {}, kinds=("qk",), report=report)
    assert any("normalised" in note for note in report.notes)


def test_smoothing_follows_its_formula_and_floors():
    act, weight = torch.tensor([4.0, 0.0, 100.0]), torch.tensor([1.0, 0.5, 0.0])
    s = scale.smoothing(act, weight, 0.5)
    assert s[0].item() == pytest.approx(2.0) and s[1].item() == pytest.approx((1e-5 / 0.5) ** 0.5)
    assert s[2].item() == pytest.approx((100 / 1e-5) ** 0.5) and torch.isfinite(s).all()
    assert torch.allclose(scale.smoothing(act, weight, 1.0), torch.tensor([4.0, 1e-5, 100.0]).double())
    with pytest.raises(QuantizationError, match="finite"):
        scale.smoothing(torch.tensor([float("inf")]), torch.ones(1))


def test_smoothing_evens_out_the_inputs():
    model, call, plan, pairs, _ = found("llama")
    norm = model.model.layers[0].input_layernorm
    with torch.no_grad():
        norm.weight[3] *= 50
        for linear in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj,
                       model.model.layers[0].self_attn.v_proj):
            linear.weight[:, 3] /= 50
    before = call()
    maxima, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            def hook(module, args, name=name):
                maxima[name] = args[0].abs().flatten(0, 1).amax(0)
            handles.append(module.register_forward_pre_hook(hook))
    call()
    spread = {name: float(m.max() / m.median()) for name, m in maxima.items()}
    done = scale.smooth(model, plan, pairs, dict(maxima))
    call()
    for handle in handles:
        handle.remove()
    assert len(done) == 8
    q = "model.layers.0.self_attn.q_proj"
    assert float(maxima[q].max() / maxima[q].median()) < 0.4 * spread[q]
    assert (call() - before).norm() <= 1e-4 * before.norm()


def test_gates_scale_their_activation():
    model, call, _, _, gates = found("llama")
    before = call()
    for pair in gates:
        scale.apply_scale(pair, factors(48), model=model)
        scale.apply_scale(pair, factors(48, 1), model=model)  # scales on top of scales
    assert isinstance(model.model.layers[0].mlp.act_fn, ScaledSiLU)
    assert (call() - before).norm() <= 1e-4 * before.norm()
    for block in model.model.layers:
        block.mlp.act_fn = torch.nn.SiLU()
    assert (call() - before).norm() > 1e-2 * before.norm()


def test_gates_whose_activation_is_a_function_are_refused():
    class Mlp(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.gate = torch.nn.Linear(8, 12), torch.nn.Linear(8, 12)
            self.down = torch.nn.Linear(12, 8)

        def forward(self, x):
            return x + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))

    model = torch.nn.Sequential(Mlp(), Mlp())
    plan = graph.read(model)
    gates = discover_gates(plan, lambda: model(torch.randn(2, 3, 8)))
    assert len(gates) == 2 and not any(pair.proven for pair in gates)
    assert "does more than that" in gates[0].reason


@pytest.mark.parametrize("vector", [torch.zeros(32), torch.full((32,), float("nan")), torch.ones(31)])
def test_bad_vectors_are_refused(vector):
    _, _, _, pairs, _ = found("llama")
    with pytest.raises(QuantizationError):
        scale.apply_scale(pairs.proven("norm")[0], vector)


def test_negative_scales_are_refused_where_a_relu_lies_between():
    _, _, _, pairs, _ = found("opt")
    pair = pairs.proven("updown")[0]
    with pytest.raises(QuantizationError, match="positive"):
        scale.apply_scale(pair, -torch.ones(pair.classes))
