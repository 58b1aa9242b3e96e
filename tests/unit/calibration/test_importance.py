"""Token scores against their definitions, and the weights made of them."""

from __future__ import annotations

import pytest
import torch

from hfq.calibration import hessian, importance, walk
from hfq.errors import ConfigError, DataError, QuantizationError
from hfq.graph import read

HEADS = 4


def attention_of(model, batch):
    """Probabilities of every layer by the model's own eager implementation."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(**batch, use_cache=False, output_attentions=True).attentions
    return found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_received(llama, batches, implementation, padded):
    data = batches(padded=padded)
    model = llama(attn_implementation=implementation)
    scores = [importance.attention(step) for step in walk.walk(read(model), data)]
    reference = llama(attn_implementation="eager")
    for i, batch in enumerate(data):
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).float()
        for layer, probabilities in enumerate(attention_of(reference, batch)):
            expected = (probabilities * mask[:, None, :, None]).sum((1, 2)) * mask
            torch.testing.assert_close(scores[layer][i], expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(scores[layer][i].sum(1), HEADS * mask.sum(1))  # rows of probabilities sum to 1


def test_left_padding(llama):
    ids = torch.randint(1, 100, (2, 8))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    step = next(walk.walk(read(llama()), [{"input_ids": ids, "attention_mask": mask}]))
    (score,) = importance.attention(step)
    assert torch.isfinite(score).all() and not score[0, :3].any()
    torch.testing.assert_close(score.sum(1), HEADS * mask.sum(1).float())


def test_kernels_that_cannot_be_watched_are_switched_and_restored(llama, batches):
    expected = importance.attention(next(walk.walk(read(llama()), batches())))
    model = llama(attn_implementation="flex_attention")
    step = next(walk.walk(read(llama()), batches()))
    block = model.model.layers[0]
    block.load_state_dict(step.block.module.state_dict())
    step.block.module = block
    found = importance.attention(step)
    assert model.config._attn_implementation == "flex_attention"
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_bidirectional_and_cross_attention(batches):
    from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification

    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": HEADS}
    model = ViTForImageClassification(ViTConfig(**vision, image_size=16, patch_size=4)).eval()
    step = next(walk.walk(read(model), [{"pixel_values": torch.randn(2, 3, 16, 16)}]))
    (score,) = importance.attention(step)
    torch.testing.assert_close(score.sum(1), torch.full((2,), HEADS * 17.0))
    config = T5Config(vocab_size=100, d_model=32, d_ff=48, num_layers=1, num_heads=HEADS, d_kv=8)
    data = [{**b, "decoder_input_ids": b["input_ids"]} for b in batches()]
    for step in walk.walk(read(T5ForConditionalGeneration(config).eval()), data):
        score = importance.attention(step)[0]
        torch.testing.assert_close(score.sum(1), torch.full((2,), HEADS * 12.0))


def test_no_attention_is_an_error(batches):
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, state_size=4)).eval()
    with pytest.raises(QuantizationError, match="no self-attention"):
        importance.attention(next(walk.walk(read(model), batches())))


def test_other_scores(llama, batches):
    data = batches(rows=6, padded=True)
    step = next(walk.walk(read(llama()), data))
    x, out = step.hidden(0), step.outputs[0]
    mask = data[0]["attention_mask"].bool()
    torch.testing.assert_close(importance.act_norm(step)[0], x.norm(dim=-1) * mask)
    torch.testing.assert_close(importance.act_diff(step)[0], -(x - out).norm(dim=-1) * mask)
    for row in range(2):
        kept = x[row][mask[row]]
        expected = torch.cdist(kept, kept).square().mean(1)
        torch.testing.assert_close(importance.token_sim(step)[0][row][mask[row]], expected, rtol=1e-4, atol=1e-5)
    ids = torch.cat([b["input_ids"][b["attention_mask"].bool()] for b in data])
    counts = torch.bincount(ids, minlength=100)
    torch.testing.assert_close(importance.token_freq(step)[0], -counts[data[0]["input_ids"]].float() * mask)


def test_parts_of_the_sequence(llama, batches):
    step = next(walk.walk(read(llama()), batches(tokens=32)))
    assert importance.first_n(step)[0][0].tolist() == [1.0] * 4 + [0.0] * 28
    assert importance.first_last_n(step)[0][0].tolist() == [1.0] + [0.0] * 30 + [1.0]
    assert importance.weights(step, "firstn")[0][0].tolist() == [8.0] * 4 + [0.0] * 28


@pytest.mark.parametrize("padded", [False, True])
def test_normalise(padded):
    scores, mask = torch.rand(3, 10) * 5, None
    if padded:
        mask = torch.ones(3, 10, dtype=torch.bool)
        mask[1, 7:] = False
        scores[1, 7:] = 100.0
    w = importance.normalise(scores, 0.01, 1.0, mask)
    keep = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    for row in range(3):
        kept = w[row][keep[row]]
        torch.testing.assert_close(kept.mean(), torch.tensor(1.0))
        torch.testing.assert_close(kept.max() / kept.min(), torch.tensor(100.0))
        assert not w[row][~keep[row]].any()
    torch.testing.assert_close(importance.normalise(scores * 3 + 7, 0.01, 1.0, mask), w)
    for equal in (importance.normalise(scores, 0.3, 0.3, mask), importance.normalise(torch.ones(3, 10), 0.01, 1, mask)):
        assert torch.equal(equal, keep.float())


def test_weights_fit_the_hessian(llama, batches):
    data = batches(padded=True)
    step = next(walk.walk(read(llama()), data))
    for strategy in importance.STRATEGIES:
        w = importance.weights(step, strategy, 0.01, 1.0)
        assert [x.shape for x in w] == [b["input_ids"].shape for b in data]
        one = hessian.collect(step, weights=w)["model.layers.0.mlp.down_proj"].matrix
        assert torch.linalg.eigvalsh(one.double()).min() > -1e-6 * one.abs().max()


def test_expansion(batches):
    data = batches(rows=6, tokens=10, padded=True)
    assert importance.expand(data, 1) is data
    more = importance.expand(data, 3)
    assert len(more) == 3 * len(data) and more.tokens == 3 * data.tokens and more.samples == 3 * data.samples
    assert torch.equal(more[0]["input_ids"], data[0]["input_ids"])
    full = batches(tokens=10)
    assert torch.equal(importance.expand(full, 3)[len(full)]["input_ids"], full[0]["input_ids"].roll(3, 1))
    for old, new in zip([*data] * 3, more, strict=True):
        kept = old["attention_mask"].bool()
        assert torch.equal(old["input_ids"][~kept], new["input_ids"][~kept]), "padding stays where it is"
        for row in range(len(kept)):
            assert torch.equal(old["input_ids"][row][kept[row]].sort()[0], new["input_ids"][row][kept[row]].sort()[0])
    assert more.descriptor["expansion"] == 3 and more.descriptor["sha256"] != data.descriptor["sha256"]


def test_refusals(llama, batches):
    step = next(walk.walk(read(llama()), batches()))
    with pytest.raises(ConfigError, match="attncon"):
        importance.weights(step, "x")
    with pytest.raises(ConfigError, match="r_min"):
        importance.normalise(torch.ones(1, 2), 2.0, 1.0)
    with pytest.raises(ConfigError, match="expansion=0"):
        importance.expand(batches(), 0)
    with pytest.raises(DataError, match="input_ids"):
        importance.expand(type(batches())([{"pixel_values": torch.ones(1)}]), 2)
