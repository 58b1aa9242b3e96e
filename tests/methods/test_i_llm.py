"""I-LLM: what its specification promises, and the shared checks of methods in the form that an integer model allows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import hfq
from hfq.errors import CheckpointError, ConfigError, DataError, QuantizationError
from hfq.evaluation.perplexity import perplexity
from hfq.layers.integer import IntegerModule
from hfq.layers.integer_decoder import IntegerDecoder
from hfq.reconstruction import smoothing
from hfq.reconstruction.integer import Packer
from hfq.reconstruction.smoothing import Learning
from hfq.reconstruction.transformed import BlockTransform

SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128,
                         "max_position_embeddings": 64}
GATED = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2}
COMMON = {"calibration_samples": 8, "calibration_seqlen": 16, "progress": False, "epochs": 0}


def build(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    model: Any
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**GATED, head_dim=16, tie_word_embeddings=False))
    elif kind == "opt":
        model = OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64))
    elif kind == "relu":
        model = LlamaForCausalLM(LlamaConfig(**GATED, hidden_act="relu", attention_bias=True, mlp_bias=True))
    else:
        model = LlamaForCausalLM(LlamaConfig(**GATED, tie_word_embeddings=True))
    with torch.no_grad():  # weights that matter: random initial ones leave the stream almost as it is
        for name, p in model.named_parameters():
            p.mul_(4) if p.dim() == 2 else p.add_(torch.randn_like(p) * (0.2 if "bias" not in name else 0.1))
    return model.eval()


def ids(rows: int = 8, length: int = 16, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def config_of(**more: Any) -> Any:
    return hfq.ILLMConfig(**{**COMMON, **more})


def quantized(kind: str = "llama", **more: Any) -> tuple[Any, Any]:
    model = build(kind)
    return model, hfq.quantize(model, config_of(**more), ids())


@torch.no_grad()
def logits(model: Any, x: torch.Tensor, **more: Any) -> torch.Tensor:
    return model(x, **more).logits


# -- Must hold -------------------------------------------------------------------------------------------------------
@pytest.mark.must_hold("i_llm", 1)
def test_smoothing_leaves_the_block_as_it_is() -> None:
    from hfq.calibration.data import normalise
    from hfq.calibration.walk import walk
    from hfq.methods.i_llm import _read
    from hfq.reconstruction.smoothing import smooth_block
    from hfq.report import Report

    model, config = build(), config_of(bits=4, activation_bits=4, epochs=3)
    before, data = logits(model, ids(2)), normalise(ids(), samples=8, seqlen=16)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan, pairs, decoder = _read(model, data, config)
    learning = Learning(epochs=3, lr=0.05, batch_size=4, activation_bits=4, kv_bits=4)
    for step, block in zip(walk(plan, data, streams=("quantized", "float")), decoder.blocks, strict=False):
        own = [pair for pair in pairs if pair.place == block.name]
        assert {p.kind for p in own if p.proven} == {"norm", "vo", "qk", "updown", "gate"}
        steps = smooth_block(model, step, block, own, config.spec_for, learning,
                             generator=torch.Generator().manual_seed(0), report=Report())
        assert set(steps) == {site.name for site in step.block.sites}
    from hfq.layers import attention

    attention.uninstall(model)
    assert torch.allclose(logits(model, ids(2)), before, atol=1e-4 * float(before.abs().max()))
    scale = model.model.layers[0].mlp.act_fn.scale  # x sigmoid(x / s)
    assert (scale - 1).abs().max() > 0.05
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        changed = getattr(model.model.layers[1].self_attn, name).weight
        assert (changed / old[f"model.layers.1.self_attn.{name}.weight"] - 1).abs().max() > 0.05


@pytest.mark.must_hold("i_llm", 1)
def test_shifts_are_learned_behind_norms_with_biases() -> None:
    """Where norms have biases, they and the values learn a shift; the function stays, and the block comes closer."""
    model, plain = build("opt"), build("opt")
    freeze, moved = BlockTransform.freeze, list[float]()

    def noted(self: BlockTransform) -> Any:
        before = logits(model, ids(2))
        shifts = [one.shift for one in self.maps if one.shift is not None]
        assert len(shifts) == 3  # after both norms, and of the values
        moved.append(min(float(shift.detach().abs().max()) for shift in shifts))
        codes = freeze(self)
        after = logits(model, ids(2))
        # (queries, keys and values are on a grid of eight bits)
        assert (after - before).norm() < 0.1 * before.norm()
        return codes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockTransform, "freeze", noted)
        hfq.quantize(model, config_of(epochs=2, bits=4), ids())
    assert len(moved) == 2 and min(moved) > 0
    wanted = logits(plain, ids(2))
    assert (logits(model, ids(2)) - wanted).norm() < 0.5 * wanted.norm()
    assert not Learning(epochs=0).options(True).shift and not Learning().options(False).shift


class Floats(TorchDispatchMode):
    """Notes every operation that makes a floating tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += 1
        if any(isinstance(t, torch.Tensor) and t.is_floating_point() for t in tree_flatten(out)[0]):
            self.seen.append(str(func))
        return out


@pytest.mark.must_hold("i_llm", 7)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "opt", "relu"])
def test_no_float_between_ids_and_logits(kind: str) -> None:
    model, _ = quantized(kind)
    head = model.get_output_embeddings()
    body = model.model.decoder if kind == "opt" else model.model
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, :3] = 0
    more = torch.cat((mask, mask[:, -1:]), 1)
    with Floats() as watch, torch.no_grad():
        cache = body(ids(2), attention_mask=mask, use_cache=True).past_key_values
        hidden = body(ids(2, 1), attention_mask=more, past_key_values=cache).last_hidden_state
        found = head.logits(hidden)
    assert not watch.seen and watch.count > 200
    assert found.data.dtype == torch.int32 and hidden.dtype == torch.int32
    for parameter in model.parameters():
        assert not parameter.is_floating_point() or not parameter.numel()
    with Floats() as watch, torch.no_grad():
        model(ids(2))
    assert len(watch.seen) <= 8, watch.seen  # the way out: one scale a row, one product


@pytest.mark.must_hold("i_llm", 8)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "opt", "relu"])
def test_logits_are_the_same_bits_however_they_are_computed(kind: str) -> None:
    model, _ = quantized(kind)
    x = ids(8)
    whole = logits(model, x)
    assert torch.equal(logits(model, x), whole)
    assert torch.equal(torch.cat([logits(model, row[None]) for row in x]), whole)
    cache, steps = None, []
    with torch.no_grad():
        for t in range(16):
            out = model(x[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
        assert torch.equal(torch.cat(steps, 1), whole)
        first = model(x[:, :7], use_cache=True)
        second = model(x[:, 7:], past_key_values=first.past_key_values)
        assert torch.equal(torch.cat((first.logits, second.logits), 1), whole)
    padded, mask = torch.zeros(8, 21, dtype=torch.long), torch.zeros(8, 21, dtype=torch.long)
    for row in range(8):  # a different amount of padding in every row
        padded[row, row % 5 : row % 5 + 16], mask[row, row % 5 : row % 5 + 16] = x[row], 1
    found = logits(model, padded, attention_mask=mask)
    assert all(torch.equal(found[row, row % 5 : row % 5 + 16], whole[row]) for row in range(8))
    assert cache is not None and cache.get_seq_length() == 16


@pytest.mark.must_hold("i_llm", 9)
def test_accumulators_are_bounded_by_the_config() -> None:
    model, _ = quantized()
    block = next(iter(model.model.blocks.children()))
    block.part("down").in_features = 1 << 17
    with pytest.raises(QuantizationError, match=r"here\.mlp\.down_proj: sums of 131072 products of 255 x 127 overflow"):
        block.check_sizes("here")


@pytest.mark.must_hold("i_llm", 10)
def test_perplexity(small_lm: Any) -> None:
    windows, data = small_lm.windows(10), torch.tensor(small_lm.windows(12, part="train", seed=0))
    found = {"float": perplexity(small_lm.make(), windows)}
    common, four = {"calibration_samples": 12, "calibration_seqlen": 128}, {"bits": 4, "activation_bits": 4}
    for name, options in {
        "w8a8": {}, "w6a6": {"bits": 6, "activation_bits": 6}, "w4a4 start": four,
        "w4a4 searched ranges": {**four, "weight_clip": "mse"},
        "w4a4": {**four, "epochs": 12, "lr": 1e-2, "batch_size": 2},
    }.items():
        model = small_lm.make()
        hfq.quantize(model, config_of(**common, **options), data)
        found[name] = perplexity(model, windows)
    assert found["w8a8"] <= 1.05 * found["float"], found
    assert found["w8a8"] < found["w6a6"] < found["w4a4"] < found["w4a4 start"], found
    assert found["w4a4"] < found["w4a4 searched ranges"], found


# -- what every method owes ------------------------------------------------------------------------------------------
def test_the_report_is_complete() -> None:
    model, report = quantized(overrides={"*.v_proj": {"bits": 4}})
    parts = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    wanted = {f"model.layers.{i}.{part}_proj" for i in range(2) for part in parts}
    assert {row.module for row in report.packed} == wanted | {"lm_head", "model.embed_tokens"} and not report.refused
    for row in report.packed:
        layer = model.get_submodule(row.module)
        stored = sum(p.nbytes for p in layer.parameters())
        assert row.bits == pytest.approx(8 * stored / row.numel) and row.kernel == "integer" and 0 < row.error < 0.2
    assert model.model.layers[0].self_attn.v_proj.bits == 4 and model.model.layers[0].self_attn.k_proj.bits == 8
    assert report.totals["bits_per_weight"] < 8.5
    assert report.from_dict(json.loads(report.to_json())).to_dict() == report.to_dict()


def test_same_seed_same_bytes() -> None:
    one, two = (quantized(epochs=2)[0].state_dict() for _ in range(2))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("epochs", [0, 2])
def test_stopped_and_resumed_is_uninterrupted(
    epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"bits": 4, "activation_bits": 6, "epochs": epochs}
    whole, wanted = quantized(**options)
    block, seen = Packer.block, list[str]()

    def stop(self: Packer, place: Any, *args: Any) -> Any:
        if len(seen) == 1:
            raise KeyboardInterrupt
        seen.append(place.name)
        return block(self, place, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Packer, "block", stop)
        with pytest.raises(KeyboardInterrupt):
            quantized(work_dir=tmp_path, **options)
    monkeypatch.setattr(smoothing, "smooth_block", lambda *a, smooth=smoothing.smooth_block, **k: (
        seen.append(a[2].name) or smooth(*a, **k)))
    model, report = quantized(work_dir=tmp_path, **options)
    assert seen == ["model.layers.0", "model.layers.1"]  # the first block was not smoothed again
    ours, theirs = model.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert report.rows == wanted.rows and report.curves == wanted.curves


@pytest.mark.must_hold("i_llm", 10)
def test_blocks_learn_behind_quantized_ones() -> None:
    """Inputs of linears and of gated units are quantized while a block learns, and in the stream that it gives."""
    from hfq.calibration.step import Step

    called = Step.output_tree
    streams: dict[int, torch.Tensor] = {}

    def noted(self: Step, i: int, inputs: Any = None) -> Any:
        output = called(self, i, inputs)
        if inputs is self.inputs and self.index == 0:
            streams[len(streams)] = output[0] if isinstance(output, tuple) else output
        return output

    losses = {}
    for bits in (8, 6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Step, "output_tree", noted)
            _, report = quantized(epochs=1, nonlinear_bits=bits)
        losses[bits] = report.curves["model.layers.0"][0]
    half = len(streams) // 2
    assert not torch.equal(streams[0], streams[half])  # the unit's width reaches the stream
    assert losses[6] > losses[8]  # and the loss


@pytest.mark.parametrize("options", [
    {"bitz": 4}, {"bits": 16}, {"activation_bits": 16}, {"group_size": 64}, {"symmetric": False}, {"nonlinear_bits": 5},
    {"modules_to_not_convert": ["*.down_proj"]}, {"overrides": {"*": {"bits": 16}}},
])
def test_wrong_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        quantized(**options)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "opt", "relu"])
def test_saved_models_load_bit_exactly(kind: str, tmp_path: Path) -> None:
    model, _ = quantized(kind, bits=6, activation_bits=7)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.get_submodule("model.decoder" if kind == "opt" else "model"), IntegerDecoder)
    assert torch.equal(logits(loaded, ids(2)), logits(model, ids(2)))
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(logits(loaded.to(torch.bfloat16), ids(2)), logits(model, ids(2)).bfloat16())


def test_saved_models_load_in_a_new_process(tmp_path: Path) -> None:
    model, _ = quantized()
    model.save_pretrained(tmp_path)
    wanted = logits(model, ids(2))
    script = (
        "import json, sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "x = torch.tensor(json.loads(sys.argv[2]))\n"
        "with torch.no_grad():\n    print(json.dumps(model(x).logits.tolist()))\n"
        "assert not {'hfq.calibration.walk', 'hfq.graph.decoder', 'hfq.reconstruction.integer'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-P", "-c", script, str(tmp_path), json.dumps(ids(2).tolist())]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == wanted.tolist()


def test_generation() -> None:
    model, _ = quantized()
    prompt, options = ids(2, 5), {"do_sample": False, "pad_token_id": 0}
    greedy = model.generate(prompt, max_new_tokens=8, **options)
    x = prompt
    for _ in range(8):
        x = torch.cat((x, logits(model, x)[:, -1:].argmax(-1)), 1)
    assert torch.equal(greedy, x)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), prompt), 1)
    mask = (torch.arange(8) >= 3).long().expand(2, 8)
    assert torch.equal(model.generate(padded, attention_mask=mask, max_new_tokens=8, **options)[:, 3:], greedy)
    assert model.generate(prompt, max_new_tokens=4, num_beams=3, **options).shape == (2, 9)
    out = model.generate(prompt, max_new_tokens=2, return_dict_in_generate=True, **options)
    keys = [layer.keys for layer in out.past_key_values.layers]
    assert {key.dtype for key in keys} == {torch.int8}


# -- bad input -------------------------------------------------------------------------------------------------------
def test_models_that_are_no_plain_decoders_are_refused_with_the_reason() -> None:
    gemma = GemmaForCausalLM(GemmaConfig(**GATED, head_dim=16)).eval()
    with pytest.raises(QuantizationError, match="its activation is gelu; silu and relu are supported"):
        hfq.quantize(gemma, config_of(), ids())
    scaled = GemmaForCausalLM(GemmaConfig(**GATED, head_dim=16, hidden_act="silu", hidden_activation="silu")).eval()
    with pytest.raises(QuantizationError, match="not what its norms, attention and MLP make of the embedding"):
        hfq.quantize(scaled, config_of(), ids())
    post = OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64, do_layer_norm_before=False)).eval()
    with pytest.raises(QuantizationError, match="does not read a norm"):
        hfq.quantize(post, config_of(), ids())
    broken = build()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises((QuantizationError, DataError)):
        hfq.quantize(broken, config_of(), ids())


def test_calls_that_need_floats_are_refused() -> None:
    model, _ = quantized()
    with pytest.raises(DataError, match="position 64: this model has 64"):
        logits(model, ids(1, 65))
    with pytest.raises(DataError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 3, 64))
    with pytest.raises(DataError, match="attentions"):
        model(ids(1), output_attentions=True)
    with pytest.raises(DataError, match=r"attention_mask \(1, 1, 16, 16\)"):
        model(ids(1), attention_mask=torch.ones(1, 1, 16, 16))
    with pytest.raises((QuantizationError, ConfigError)):
        hfq.dequantize(model)


@pytest.mark.parametrize(("damage", "message"), [
    (lambda e: e["blocks"][0]["shape"].update(groups=3), "shape in the manifest is damaged"),
    (lambda e: e["blocks"].pop(), "another number of blocks"),
    (lambda e: e["blocks"][0]["modules"]["up"].update(in_features=1 << 40), "in_features"),
    (lambda e: e["blocks"][0]["modules"]["up"].update(bits=0), "bits=0"),
    (lambda e: e["blocks"][0]["grids"].update(shifts=[0, 0, "x", 0]), "grids in the manifest"),
    (lambda e: e["numbers"].update(kv_bits=99), "out of range"),
    (lambda e: e.update(body="nowhere"), "'nowhere' is an integer decoder's"),
    (lambda e: e.update(more=1), "manifest entry has"),
])
def test_damaged_manifests_are_refused(damage: Any, message: str, tmp_path: Path) -> None:
    model, _ = quantized()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    damage(saved["quantization_config"]["manifest"]["integer"])
    path.write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_damaged_scales_are_refused() -> None:
    from hfq.layers import swap

    model, _ = quantized()
    assert all(isinstance(m, IntegerModule) for m in (model.lm_head, model.model.norm))
    swap.check(model)
    model.model.layers[0].mlp.up_proj.mantissa.data[3] = 0
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.mantissa has scales"):
        swap.check(model)
