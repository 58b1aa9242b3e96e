"""Second moments against the same sums written out, from hooks on whole forward passes of the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from hfq.calibration import hessian, walk
from hfq.errors import QuantizationError
from hfq.graph import Site, read


def rows_of(model, name, batches):
    """The inputs of module ``name`` in whole passes, ``[B, T, K]`` a batch."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    handle.remove()
    return seen


def reference(rows, weights=None, masks=None):
    total, count = 0, 0
    for i, x in enumerate(rows):
        w = torch.ones(x.shape[:2]) if weights is None else weights[i]
        m = torch.ones(x.shape[:2]) if masks is None or masks[i] is None else masks[i]
        x, w, m = x.double().reshape(-1, x.shape[-1]), w.double().reshape(-1), m.reshape(-1).bool()
        total, count = total + (x[m] * w[m, None]).t() @ x[m], count + int(m.sum())
    return 2 / count * total, count


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_linear_sites(llama, batches, padded, weighted):
    model, data = llama(), batches(padded=padded)
    weights = [torch.rand(batch["input_ids"].shape) for batch in data] if weighted else None
    masks = [batch.get("attention_mask") for batch in data]
    for step in walk.walk(read(model), data):
        found = hessian.collect(step, weights=weights)
        assert list(found) == [site.name for site in step.block.sites]
        for name, one in found.items():
            expected, count = reference(rows_of(model, name, data), weights, masks)
            assert one.tokens == count == data.tokens
            assert one.matrix.dtype == torch.float32 and torch.equal(one.matrix, one.matrix.t().contiguous())
            torch.testing.assert_close(
                one.matrix.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())
            )


def test_sites_with_one_input_share_one_matrix(llama, batches):
    step = next(walk.walk(read(llama()), batches()))
    found = {name.rsplit(".")[-1]: one for name, one in hessian.collect(step).items()}
    assert found["q_proj"] is found["k_proj"] is found["v_proj"] and found["gate_proj"] is found["up_proj"]
    assert len({id(one) for one in found.values()}) == 4


def test_unit_weights_change_no_bit(llama, batches):
    data = batches(padded=True)
    step = next(walk.walk(read(llama()), data))
    plain, unit = hessian.collect(step), hessian.collect(step, weights=[torch.ones(b["input_ids"].shape) for b in data])
    assert all(torch.equal(plain[name].matrix, unit[name].matrix) for name in plain)


def test_the_pass_ends_after_the_last_wanted_site(llama, batches):
    model, ran = llama(), []
    step = next(walk.walk(read(model), batches()))
    step.block.module.mlp.down_proj.register_forward_hook(lambda *_: ran.append(1))
    step.block.module.self_attn.k_proj.register_forward_hook(lambda *_: ran.append("k"))
    found = hessian.collect(step, ["model.layers.0.self_attn.q_proj"])
    assert list(found) == ["model.layers.0.self_attn.q_proj"]
    assert ran.count(1) == 1 and len(step) == 3, "only the first batch runs to the end"


def test_order_of_batches_does_not_matter(llama, batches):
    data = batches(rows=8)
    turned = type(data)(data.items[::-1])
    first, second = (hessian.collect(next(walk.walk(read(llama()), d))) for d in (data, turned))
    assert all(torch.equal(first[name].matrix, second[name].matrix) for name in first)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts(batches, padded, implementation):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = MixtralConfig(
        **sizes, num_hidden_layers=1, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
        experts_implementation=implementation,
    )  # fmt: skip
    torch.manual_seed(0)
    model, data = MixtralForCausalLM(config).eval(), batches(rows=6, padded=padded)
    weights = [torch.rand(batch["input_ids"].shape) for batch in data]
    captured = []
    bank = model.model.layers[0].mlp.experts
    handle = bank.register_forward_pre_hook(lambda m, args: captured.append(args))
    with torch.no_grad():
        for batch in data:
            model(**batch, use_cache=False)
    handle.remove()
    step = next(walk.walk(read(model), data))
    found = hessian.collect(step, weights=weights)[step.block.name + ".mlp.experts"]
    assert model.config._experts_implementation == implementation
    for e in range(4):
        sums, count = {"gate_up_proj": 0, "down_proj": 0}, 0
        for (x, chosen, _), w, batch in zip(captured, weights, data, strict=True):
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).reshape(-1).bool()
            x = x.reshape(-1, x.shape[-1])
            hit = (chosen == e).any(-1) & mask
            gate, up = (x[hit] @ bank.gate_up_proj[e].t()).chunk(2, -1)
            inner, scale = torch.nn.functional.silu(gate) * up, w.reshape(-1)[hit, None].double()
            sums["gate_up_proj"] += (x[hit].double() * scale).t() @ x[hit].double()
            sums["down_proj"] += (inner.double() * scale).t() @ inner.double()
            count += int(hit.sum())
        for name, total in sums.items():
            assert found[name][e].tokens == count
            expected = (2 / max(count, 1) * total).detach()
            torch.testing.assert_close(found[name][e].matrix.double(), expected, rtol=1e-4, atol=1e-9)
    assert step.expert_tokens[step.block.name + ".mlp.experts"] == [found["down_proj"][e].tokens for e in range(4)]


class Mixed(nn.Module):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv, self.a = nn.LayerNorm(6), nn.Conv1d(6, 6, 3, padding=1), nn.Linear(6, 6)
            self.table, self.grouped = nn.Embedding(5, 6), nn.Conv1d(6, 6, 1, groups=2)

        def forward(self, x, ids):
            y = self.conv(self.norm(x).transpose(1, 2))
            return x + self.grouped(y).transpose(1, 2) + self.a(x) + self.table(ids)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Block() for _ in range(2))

    def forward(self, x, ids):
        for layer in self.layers:
            x = layer(x, ids)
        return x


def test_convolutions_and_embeddings():
    model = Mixed().eval()
    data = [{"x": torch.randn(2, 7, 6), "ids": torch.randint(0, 5, (2, 7))} for _ in range(2)]
    plan = read(model, kinds=("linear", "conv", "embedding"))
    step = next(walk.walk(plan, data))
    found = hessian.collect(step, ["layers.0.conv", "layers.0.table"])
    normed = [model.layers[0].norm(b["x"]).transpose(1, 2) for b in data]
    padded = torch.cat([nn.functional.pad(x, (1, 1)) for x in normed])
    patches = padded.unfold(2, 3, 1).permute(0, 2, 1, 3).reshape(-1, 18).double()
    torch.testing.assert_close(
        found["layers.0.conv"].matrix.double(), 2 / 28 * (patches.t() @ patches).detach(), rtol=1e-5, atol=1e-6
    )
    table = found["layers.0.table"]
    assert torch.equal(table.counts, torch.bincount(torch.cat([b["ids"].reshape(-1) for b in data]), minlength=5))
    assert torch.equal(table.matrix, 2 * torch.eye(6))
    with pytest.raises(QuantizationError, match="groups"):
        hessian.collect(step, ["layers.0.grouped"])
    with pytest.raises(QuantizationError, match="other rows"):
        weights = [torch.ones(2, 5) for _ in data]
        hessian.collect(step, ["layers.0.a"], weights=weights)


def test_refusals(llama, batches):
    step = next(walk.walk(read(llama()), batches()))
    with pytest.raises(QuantizationError, match="no site 'x'"):
        hessian.collect(step, ["x"])
    with pytest.raises(QuantizationError, match="2 token weights for 3 batches"):
        hessian.collect(step, weights=[torch.ones(2, 12)] * 2)
    other = nn.Linear(4, 4)
    with pytest.raises(QuantizationError, match="never called"):
        hessian.collect(step, [Site("elsewhere", other, "linear", 4, 4, 16)])


class Chosen(nn.Module):
    """A block whose tokens each go through one of three linears: which of them run depends on the batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Embedding(3, width)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        chosen, found = (rows @ self.router.weight.t()).argmax(-1), torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            if (chosen == number).any():
                found[chosen == number] = expert(rows[chosen == number])
        return x + 0.1 * self.out(found).view_as(x)


class Routed(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.layers = nn.ModuleList(Chosen(width) for _ in range(2))

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def test_linears_that_only_some_batches_reach():
    torch.manual_seed(0)
    model = Routed().eval()
    data = [{"input_ids": torch.randint(0, 20, (1, 2))} for _ in range(30)]
    names = [f"layers.0.experts.{number}" for number in range(3)] + ["layers.0.out"]
    rows = {name: rows_of(model, name, data) for name in names}
    calls = [len(found) for found in rows.values()]
    assert min(calls) > 0 and sorted(calls)[1] < len(data)  # each is reached, but not in every batch
    step = next(iter(walk.walk(read(model), data)))
    found = hessian.collect(step, names)
    for name in names:
        expected, count = reference([x.reshape(1, -1, x.shape[-1]) for x in rows[name]])
        assert found[name].tokens == count
        torch.testing.assert_close(found[name].matrix.double(), expected, rtol=1e-5, atol=1e-7)


def test_cross_attention_counts_the_tokens_of_the_encoder_alike():
    """Also where both sequences are equally long: weights and padding are those of the rows that a site reads."""
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=96, decoder_start_token_id=0)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    for length in (12, 7):
        masks = [(torch.arange(n)[None] < torch.tensor([[n], [size]])).long() for n, size in ((12, 5), (length, 6))]
        batch = {
            "input_ids": torch.randint(0, 96, (2, 12)), "attention_mask": masks[0],
            "decoder_input_ids": torch.randint(0, 96, (2, length)), "decoder_attention_mask": masks[1],
        }  # fmt: skip
        layer = "decoder.block.0.layer"
        names = {f"{layer}.1.EncDecAttention.k": (None, masks[0]), f"{layer}.0.SelfAttention.k": (True, masks[1]),
                 f"{layer}.1.EncDecAttention.q": (True, masks[1])}  # fmt: skip
        rows = {name: rows_of(model, name, [batch]) for name in names}
        step = next(s for s in walk.walk(read(model), [batch]) if s.block.name.startswith("decoder"))
        weights = [torch.rand(2, length)]
        found = hessian.collect(step, list(names), weights)
        for name, (weighted, mask) in names.items():
            expected, count = reference(rows[name], weights if weighted else None, [mask])
            assert found[name].tokens == count == int(mask.sum())
            torch.testing.assert_close(found[name].matrix.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_decoder_without_a_mask_does_not_take_the_encoders():
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=96, decoder_start_token_id=0)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    mask = (torch.arange(12)[None] < torch.tensor([[12], [5]])).long()
    batch = {"input_ids": torch.randint(0, 96, (2, 12)), "attention_mask": mask,
             "decoder_input_ids": torch.randint(0, 96, (2, 12))}  # fmt: skip
    tokens = {s.block.name: next(iter(hessian.collect(s).values())).tokens for s in walk.walk(read(model), [batch])}
    assert tokens == {"encoder.block.0": 17, "decoder.block.0": 24}
