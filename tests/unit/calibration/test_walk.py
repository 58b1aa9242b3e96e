"""The walk hands out what the blocks really see: compared with hooks on whole forward passes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hfq.calibration import hessian, walk
from hfq.calibration.cache import leaves, structure
from hfq.calibration.capture import calls_of, quiet
from hfq.errors import DataError, QuantizationError
from hfq.graph import read
from hfq.report import Report


def real_inputs(model, batches):
    """What every block is called with in plain forward passes."""
    blocks = read(model).blocks
    found = {block.name: [] for block in blocks}
    counts = {block.name: 10**6 for block in blocks}
    with quiet(model):
        for batch in batches:
            for name, tree in calls_of(model, blocks, batch, counts):
                found[name].append(tree)
    return found


def assert_same_calls(got, real):
    assert len(got) == len(real)
    for a, b in zip(got, real, strict=True):
        assert structure(a) == structure(b)
        for (path, x), (_, y) in zip(leaves(a), leaves(b), strict=True):
            assert torch.equal(x, y), path


def check(model, batches, rounded, **options):
    """Walk, round, and compare both streams with whole passes; returns the report and the names of the steps."""
    reference, report, seen = copy.deepcopy(model), Report(), {}
    for step in walk.walk(read(model), batches, streams=("quantized", "float"), report=report, **options):
        targets = [t.clone() for t in step.outputs]
        seen[step.block.name] = (step.inputs[:], step.float_inputs[:], targets)
        rounded(step)
        assert all(torch.isfinite(t).all() for t in step.run())
    now, before = real_inputs(model, batches), real_inputs(reference, batches)
    for name, (quantized, floats, targets) in seen.items():
        assert_same_calls(quantized, now[name])
        assert_same_calls(floats, before[name])
        block = reference.get_submodule(name)
        for (args, kwargs), target in zip(floats, targets, strict=True):
            with torch.no_grad():
                output = block(*args, **kwargs)
            assert torch.equal(next(t for _, t in leaves(output)), target)
    return report, list(seen)


TINY = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip
GQA = {**TINY, "num_key_value_heads": 2, "head_dim": 8}
VISION = {**{k: v for k, v in TINY.items() if k != "vocab_size"}, "image_size": 16, "patch_size": 4}


def zoo(name, batches):
    import transformers as tf

    torch.manual_seed(0)
    images = [{"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(2)]
    both = [{**batch, "decoder_input_ids": batch["input_ids"][:, :5]} for batch in batches]
    if name == "gemma3":  # keywords differ from block to block
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GQA, sliding_window=4, layer_types=kinds)), batches, 3
    if name == "qwen3":
        return tf.Qwen3ForCausalLM(tf.Qwen3Config(**GQA)), batches, 3
    if name == "gpt2":
        return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=100, n_embd=32, n_layer=3, n_head=4)), batches, 3
    if name == "falcon":
        return tf.FalconForCausalLM(tf.FalconConfig(**TINY, alibi=True)), batches, 3
    if name == "mixtral":
        return tf.MixtralForCausalLM(tf.MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2)), batches, 3
    if name == "bert":
        return tf.BertForMaskedLM(tf.BertConfig(**TINY)), batches, 3
    if name == "t5":  # the first block makes a tensor that the others are given
        config = tf.T5Config(vocab_size=100, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)
        return tf.T5ForConditionalGeneration(config), both, 4
    if name == "vit":
        return tf.ViTForImageClassification(tf.ViTConfig(**VISION)), images, 3
    if name == "swin":
        config = tf.SwinConfig(
            image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4
        )
        return tf.SwinForImageClassification(config), images, 4
    if name == "clip":
        config = tf.CLIPConfig(text_config={**TINY, "eos_token_id": 99}, vision_config=VISION)
        return tf.CLIPModel(config), [{**batches[0], **images[0]}], 6
    if name == "llava":
        parts = {"text_config": tf.LlamaConfig(**GQA), "vision_config": tf.CLIPVisionConfig(**VISION)}
        ids = torch.cat([torch.full((2, 16), 99), torch.randint(1, 98, (2, 5))], 1)
        return (
            tf.LlavaForConditionalGeneration(tf.LlavaConfig(**parts, image_token_index=99)),
            [{"input_ids": ids, **images[0]}],
            6,
        )
    config = tf.MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=3, state_size=4)
    return tf.MambaForCausalLM(config), batches, 3


NAMES = ["gemma3", "qwen3", "gpt2", "falcon", "mixtral", "bert", "t5", "vit", "swin", "clip", "llava", "mamba"]


@pytest.mark.parametrize("name", NAMES)
def test_streams_of_many_architectures(name, batches, rounded):
    model, data, count = zoo(name, batches(padded=name in ("qwen3", "bert", "falcon")))
    report, steps = check(model.eval(), data, rounded)
    assert len(steps) == count
    assert not report.notes, "these are all chains"


@pytest.mark.parametrize("driver", ["chain", "capture"])
@pytest.mark.parametrize("padded", [False, True])
def test_both_drivers_agree(llama, batches, rounded, driver, padded):
    check(llama(), batches(padded=padded), rounded, driver=driver)


def test_spilling_changes_nothing(llama, batches, rounded, tmp_path):
    spilled = []

    def change(step):
        spilled.append(any(tmp_path.rglob("*.safetensors")))
        rounded(step)

    check(llama(), batches(), change, memory_limit=0, spill_dir=tmp_path)
    assert all(spilled) and not any(tmp_path.iterdir())


class Skips(nn.Module):
    """Blocks that also read the output of the block before the last: no chain."""

    def __init__(self, inplace=False):
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(inplace) for _ in range(3))

    class Layer(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.norm, self.a, self.b, self.inplace = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), inplace

        def forward(self, x):
            y = self.b(torch.relu(self.a(self.norm(x))))
            return x.add_(y) if self.inplace else x + y

    def forward(self, x):
        old = x = x + 1
        for layer in self.layers:
            x, old = (layer(x), x) if self.layers[0].inplace else (layer(x + 0.1 * old), x)
        return x


@pytest.mark.parametrize("inplace", [False, True])
def test_capture_takes_over_where_blocks_are_no_chain(rounded, inplace):
    batches = [{"x": torch.randn(2, 4, 8)} for _ in range(3)]
    report, steps = check(Skips(inplace), batches, rounded)
    assert len(steps) == 3 and "recorded block by block" in report.notes[0]
    with pytest.raises(QuantizationError, match="no chain"):
        list(walk.walk(read(Skips(inplace)), batches, driver="chain"))


def test_a_block_that_runs_several_times(batches):
    from transformers import AlbertConfig, AlbertForMaskedLM

    model, data = AlbertForMaskedLM(AlbertConfig(**TINY, embedding_size=16)).eval(), batches()
    real = real_inputs(model, data)
    for step in walk.walk(read(model), data):
        assert [step.batch_number(i) for i in range(len(step))] == [0] * 3 + [1] * 3 + [2] * 3
        assert_same_calls(step.inputs[:], real[step.block.name])


def test_memory_does_not_grow_with_depth(llama, batches):
    peaks = {}
    for depth in (2, 8):
        model, peaks[depth] = llama(num_hidden_layers=depth), 0
        for step in walk.walk(read(model), batches(), streams=("quantized", "float")):
            _ = step.outputs[0]
            peaks[depth] = max(peaks[depth], step.inputs.store.bytes)
        assert step.inputs.store.bytes == 0, "everything is freed at the end"
    assert peaks[2] == peaks[8]


def test_the_cache_and_training_mode_are_restored(llama, batches):
    model = llama().train()
    model.model.layers[0].eval()
    for step in walk.walk(read(model), batches()):
        assert not step.block.module.training and not model.config.use_cache
    assert model.training and not model.model.layers[0].training and model.config.use_cache


def test_hooks_of_a_block_run_once(llama, batches):
    """A rotation of the residual stream sits in hooks on blocks: inputs are those before, outputs those after."""
    model = llama()
    model.model.layers[0].register_forward_pre_hook(lambda m, a: (a[0] * 2, *a[1:]))
    model.model.layers[2].register_forward_hook(lambda m, a, out: out * 3)
    before = real_inputs(model, batches())
    for step in walk.walk(read(model), batches()):
        assert_same_calls(step.inputs[:], before[step.block.name])
        assert torch.equal(step.outputs[0], step.block.module(*step.inputs[0][0], **step.inputs[0][1]))


def test_what_is_not_finite_is_named(llama, batches):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has NaN"):
        list(walk.walk(read(model), batches()))
    for stream in (("quantized",), ("quantized", "float")):
        model = llama()
        model.model.layers[1].mlp.up_proj.weight.data *= 1e38
        model.model.layers[1].mlp.gate_proj.weight.data *= 1e10
        with pytest.raises(DataError, match=r"output of model\.layers\.1\.mlp .*before the block was changed"):
            for step in walk.walk(read(model), batches(), streams=stream):
                hessian.collect(step)
    model = llama()
    with pytest.raises(QuantizationError, match=r"model\.layers\.0\.self_attn\.o_proj .*after the block was changed"):
        for step in walk.walk(read(model), batches()):
            step.block.module.self_attn.o_proj.weight.data.fill_(float("inf"))
    model = llama()
    model.model.embed_tokens.weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match=r"input of model\.layers\.0"):
        list(walk.walk(read(model), batches()))


def test_tokens_are_counted_and_have_a_floor(llama, batches):
    data = batches(rows=5, tokens=12, padded=True)
    *_, step = walk.walk(read(llama()), data, min_tokens=data.tokens)
    assert set(step.tokens.values()) == {data.tokens} and data.tokens < 60
    with pytest.raises(QuantizationError, match=r"model\.layers\.0\.self_attn\.q_proj saw 56.*modules_to_not_convert"):
        list(walk.walk(read(llama()), data, min_tokens=data.tokens + 1))


def test_tokens_of_experts(batches):
    model, data, _ = zoo("mixtral", batches())
    model.model.layers[1].mlp.gate.weight.data[2] = 0  # never chosen against positive competitors
    model.model.layers[1].mlp.gate.weight.data[[0, 1]] = 0
    seen = {}
    for step in walk.walk(read(model.eval()), data):
        seen[step.block.name] = step
    for step in seen.values():
        per = step.expert_tokens[f"{step.block.name}.mlp.experts"]
        assert sum(per) == 2 * data.tokens and min(per) == step.tokens[f"{step.block.name}.mlp.experts"]


def test_blocks_that_the_data_never_reaches(batches):
    model, _, _ = zoo("llava", batches())
    report = Report()
    steps = list(walk.walk(read(model.eval()), batches(), report=report))
    assert len(steps) == 3 and all("never reaches" in row.reason for row in report.refused)
    assert len(report.refused) == 18 and all("vision" in row.module for row in report.refused)
    with pytest.raises(QuantizationError, match="never reaches"):
        list(walk.walk(read(model), batches()))


def test_targets_must_be_read_before_the_change(llama, batches, rounded):
    steps = walk.walk(read(llama()), batches())
    step = next(steps)
    step.changed = True
    with pytest.raises(QuantizationError, match="before the block is changed"):
        _ = step.outputs


def test_progress_bar(llama, batches):
    calls = []

    class Bar:
        def __init__(self, total, description):
            calls.append((total, description))

        def update(self):
            calls.append("update")

        def close(self):
            calls.append("close")

    list(walk.walk(read(llama()), batches(), progress=Bar))
    assert calls == [(3, "quantizing blocks"), "update", "update", "update", "close"]


def test_generator_depends_on_seed_and_block_only():
    draw = [torch.rand(2, generator=walk.generator(s, i)).tolist() for s, i in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert draw[0] == draw[3] and len({tuple(d) for d in draw}) == 3


@pytest.mark.parametrize("options", [{"streams": ("float",)}, {"streams": ("quantized", "x")}, {"driver": "x"}])
def test_bad_options(llama, batches, options):
    with pytest.raises(QuantizationError):
        walk.walk(read(llama()), batches(), **options)


def test_no_batches(llama):
    with pytest.raises(DataError, match="no batches"):
        walk.walk(read(llama()), [])
