"""Quantized caches in transformers: used by generate, saved and loaded, and refused where they would be wrong."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import hfq
from hfq.errors import CheckpointError, ConfigError, DataError, QuantizationError
from hfq.integrations import kv_cache
from hfq.integrations.kv_cache import QuantizedLayer
from hfq.layers import attention

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


def llama(**more: Any) -> Any:
    options = {**TEXT, "num_key_value_heads": 2, "attention_bias": True, **more}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))


def mixtral() -> Any:
    options = {**TEXT, "num_key_value_heads": 2, "num_local_experts": 4, "head_dim": 8}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**options))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99,
                                                                n_positions=32))


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, max_position_embeddings=32))


def vit() -> Any:
    sizes = {key: value for key, value in TEXT.items() if key != "vocab_size"}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=16, patch_size=8))


IDS = torch.arange(24).reshape(2, 12) * 7 % 99


def quantized(model: Any = None, **more: Any) -> Any:
    torch.manual_seed(0)
    model = llama().eval() if model is None else model.eval()
    hfq.quantize(model, hfq.RTNConfig(**{"bits": 16, "kv_bits": 4, "progress": False, **more}),
                 IDS if more.get("kv_cache") else None)
    return model


def generated(model: Any, **more: Any) -> Any:
    return model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, return_dict_in_generate=True, **more)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("make", [llama, gpt2, mixtral], ids=lambda make: make.__name__)
def test_generate_uses_the_cache_by_itself(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    before = logits(model)
    quantized(model)
    assert (logits(model) - before).norm() > 1e-4 * before.norm()
    result = generated(model)
    assert all(isinstance(layer, QuantizedLayer) for layer in result.past_key_values.layers)
    assert result.past_key_values.get_seq_length() == 17
    with attention.exact(model), torch.no_grad():
        exact = generated(model).sequences
    with attention.without(model), torch.no_grad():
        assert torch.equal(exact, generated(model).sequences)
    assert torch.equal(generated(model, cache_implementation="static").sequences, result.sequences)
    assert torch.equal(generated(copy.deepcopy(model)).sequences, result.sequences)


def test_a_cache_of_a_given_length() -> None:
    model = quantized()
    wanted = generated(model).sequences
    cache = kv_cache.make(model, max_length=17)
    assert torch.equal(generated(model, past_key_values=cache).sequences, wanted)
    assert cache.get_max_length() == 17
    with pytest.raises(QuantizationError, match="allocated for 17 tokens, 18"), torch.no_grad():
        model(IDS[:, :1], past_key_values=cache)
    static = StaticCache(config=model.config, max_cache_len=17)
    assert torch.equal(generated(model, past_key_values=static).sequences, wanted)
    assert isinstance(static.layers[0], QuantizedLayer) and static.layers[0].get_max_length() == 17
    assert not static.is_compileable and not model.hf_quantizer.is_compileable
    with pytest.raises(ConfigError, match="kv_bits"):
        kv_cache.make(llama())


def test_assisted_generation_cuts_the_cache_back() -> None:
    model = quantized()
    torch.manual_seed(5)
    helper = llama(tie_word_embeddings=True).eval()
    one = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS[:1], **one), model.generate(IDS[:1], assistant_model=helper, **one))


FORMATS = {
    "uniform": {"kv_bits": 4},
    "codebook": {"kv_bits": 16, "kv_cache": {"kv_bits": 4, "prefill": "quantized"}},
    "windows": {"kv_bits": 16, "kv_cache": {"kv_bits": 4, "key_axis": "window", "datatype": "int", "outliers": 0.0,
                                           "window": 4, "residual": 8}},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_ways_to_generate(name: str) -> None:
    """A cache goes on where another call ended, is copied, cut back, spread over beams, and read with padding."""
    model = quantized(**FORMATS[name])
    one = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}

    def chat(copied: bool) -> torch.Tensor:
        result = generated(model)
        cache = copy.deepcopy(result.past_key_values) if copied else result.past_key_values
        more = torch.cat([result.sequences, IDS[:, :3]], 1)
        answer = model.generate(more, past_key_values=cache, **one)
        assert cache.get_seq_length() == answer.shape[1] - 1
        return answer

    assert torch.equal(chat(False), chat(True))
    with attention.exact(model):
        answer = chat(False)
        assert torch.equal(answer, model.generate(answer[:, :21], **one))
    wanted = model.generate(IDS[:1], **one)
    assert torch.equal(model.generate(IDS[:1], prompt_lookup_num_tokens=3, **one), wanted)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    padded = {"attention_mask": mask, "num_beams": 3, **one}
    with attention.exact(model):
        exact = model.generate(IDS, **padded)
    with attention.without(model):
        assert torch.equal(exact, model.generate(IDS, **padded))
    if name != "windows":  # where a window begins depends on the padding
        alone = model.generate(IDS[:1, 4:], num_beams=3, **one)
        assert torch.equal(model.generate(IDS, **padded)[0, 12:], alone[0, 8:])
    static = StaticCache(config=model.config, max_cache_len=17)
    for _ in range(2):
        assert torch.equal(model.generate(IDS[:1], past_key_values=static, **one), wanted)
        static.reset()
    assert model.generate(IDS, num_return_sequences=3, **{**one, "do_sample": True}).shape == (6, 17)


def test_copies_of_a_cache_share_the_format() -> None:
    model = quantized(**FORMATS["codebook"])
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        again = copy.deepcopy(cache)
        answers = [model(IDS[:, :3], past_key_values=one).logits for one in (again, cache)]
    assert torch.equal(*answers)
    first, second = again.layers[0].store, again.layers[1].store
    assert first.quant is cache.layers[0].store.quant and first.positions is second.positions
    assert first.positions is not cache.layers[0].store.positions
    assert not {t.data_ptr() for t in first.tensors()} & {t.data_ptr() for t in cache.layers[0].store.tensors()}
    copied = copy.deepcopy(model).model.layers[0].self_attn.hfq_attention
    assert copied.kv is not cache.layers[0].store.quant and copied.kv.same_as(cache.layers[0].store.quant)


def test_another_attention_function_does_not_bypass_the_cache() -> None:
    """Only the routed function reads what was stored: any other one would see the newest token alone."""
    for options in FORMATS.values():
        model = quantized(**options)
        wanted = generated(model).sequences
        for name, routed in (("sdpa", "hfq"), ("eager", "hfq_eager")):
            model.set_attn_implementation(name)
            assert torch.equal(generated(model).sequences, wanted) and model.config._attn_implementation == routed
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(QuantizationError, match="set to 'flash_attention_2'.*'sdpa'"):
        logits(model)


def test_inference_mode_may_end_while_the_cache_lives() -> None:
    model = quantized(**FORMATS["codebook"])
    with torch.inference_mode():
        cache = model(IDS, use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([1, 0]))
    with torch.no_grad():  # positions that differ between the rows now
        places = torch.tensor([[12, 13], [3, 4]])
        found = model(IDS[:, :2], past_key_values=cache, position_ids=places).logits
        same = model(IDS.flip(0), use_cache=True).past_key_values
        assert torch.allclose(found, model(IDS[:, :2], past_key_values=same, position_ids=places).logits, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_at_two_thousand_tokens(name: str) -> None:
    torch.manual_seed(0)
    model = quantized(llama(head_dim=16, max_position_embeddings=4096), **FORMATS[name])
    ids = torch.randint(0, 99, (1, 2051))
    with torch.no_grad():
        cache = model(ids[:, :2048], use_cache=True).past_key_values
        whole = [(2048, kv_cache.nbytes(cache))]
        cache.layers[0].store.crop(2045)
        cache.layers[1].store.crop(2045)
        model(ids[:, :3], past_key_values=cache)
        whole.append((2048, kv_cache.nbytes(cache)))
    parts = [part.cache for part in attention.parts(model).values()]
    for tokens, found in whole:
        wanted = sum(part.nbytes_of(1, tokens) for part in parts)
        shared = 0 if parts[0].rotary is None else tokens * parts[0].rotary.size * 4  # positions, once for both layers
        assert found == pytest.approx(wanted - shared, rel=0.05)
        assert found < 0.4 * 2 * 2 * tokens * 2 * 16 * 4


def test_what_reads_the_cache_is_explained(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from hfq.integrations.cli.app import app
    from hfq.layers import kv_install

    wide = llama(head_dim=32, attention_bias=False)
    model = quantized(wide, **FORMATS["codebook"])
    table = hfq.explain(model)  # a model with nothing but caches
    names = [f"model.layers.{i}.self_attn.hfq_attention.{side}" for i in range(2) for side in ("key", "value")]
    assert list(table) == names
    chosen = {name: [c.backend for c in lines if c.chosen] for name, lines in table.items()}
    assert set(map(tuple, chosen.values())) == {("float",)}
    there = kv_install.explain(model, device="cuda")
    assert all([c.backend for c in lines if c.chosen] == ["triton"] for lines in there.values())
    many = kv_install.explain(model, 100, device="cuda")[names[0]]
    assert many[0].backend == "triton" and "at most" in many[0].reason and not many[0].chosen
    model.save_pretrained(tmp_path)
    shown = CliRunner().invoke(app, ["explain", str(tmp_path)], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert shown.exit_code == 0 and "triton" in shown.output and "2×32" in shown.output, shown.output
    shown = CliRunner().invoke(app, ["explain", str(tmp_path), "--module", names[0]], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and "uniform codes" in shown.output and "one pass" in shown.output, shown.output
    packed = quantized(bits=4, kv_bits=3)
    table = hfq.explain(packed)
    assert "model.layers.0.mlp.up_proj" in table and names[0] in table
    assert any(c.chosen for c in table[names[0]])
    with pytest.raises(ConfigError, match="nothing to explain"):
        hfq.explain(llama())


def test_sliding_windows_are_cut_by_the_mask() -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99, sliding_window=5,
    )
    model = quantized(transformers.MistralForCausalLM(config))
    with attention.without(model):
        plain = [generated(model).sequences, generated(model, cache_implementation="static").sequences]
    with attention.exact(model):
        for wanted, more in zip(plain, ({}, {"cache_implementation": "static"}), strict=True):
            assert torch.equal(generated(model, **more).sequences, wanted)
    assert generated(model).past_key_values.get_seq_length() == 17


def test_eager_attention_reads_the_same_cache() -> None:
    model = quantized()
    torch.manual_seed(0)
    eager = llama()
    eager.set_attn_implementation("eager")
    eager = quantized(eager)
    assert eager.config._attn_implementation == "hfq_eager" and model.config._attn_implementation == "hfq"
    assert torch.equal(generated(eager).sequences, generated(model).sequences)
    assert (logits(eager) - logits(model)).norm() <= 1e-5 * logits(model).norm()


CONFIGS = {
    "uniform": lambda: hfq.RTNConfig(bits=16, kv_bits=3, progress=False),
    "carried": lambda: hfq.GPTQConfig(bits=4, calibration_seqlen=12, progress=False,
                                           kv_cache={"kv_bits": 2, "outliers": 0.05}),
    "own": lambda: hfq.KVQuantConfig(kv_bits=3, calibration_seqlen=12, progress=False),
}


def test_saved_caches_load_in_a_new_process(tmp_path: Path) -> None:
    wanted = {}
    for name, make in CONFIGS.items():
        torch.manual_seed(0)
        model, config = llama().eval(), make()
        hfq.quantize(model, config, IDS if config.wants_data else None)
        assert len(attention.parts(model)) == 2
        model.save_pretrained(tmp_path / name)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(logits(again), logits(model))
        loaded = again.hf_quantizer.quantization_config
        assert loaded.to_dict()["manifest"] == config.to_dict()["manifest"] and loaded.kv_cache == config.kv_cache
        assert not any(p.requires_grad for part in attention.parts(again).values() for p in part.parameters())
        wanted[name] = [logits(model).tolist(), generated(model).sequences.tolist()]
    torch.save(IDS, tmp_path / "ids.pt")
    script = (
        "import json, sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "torch.set_num_threads(int(sys.argv[2]))\n"
        "ids, found = torch.load(sys.argv[1] + '/ids.pt'), {}\n"
        "for name in sys.argv[3:]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/' + name)\n"
        "    with torch.no_grad():\n"
        "        y = model(ids, use_cache=False).logits.tolist()\n"
        "    found[name] = [y, model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0).tolist()]\n"
        "assert not {'hfq.calibration.keys', 'hfq.formats.kv_fit'} & set(sys.modules), 'loading fits nothing'\n"
        "print(json.dumps(found))\n"
    )
    command = [sys.executable, "-P", "-c", script, str(tmp_path), str(torch.get_num_threads()), *CONFIGS]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == wanted


def test_dequantize_takes_the_cache_away() -> None:
    torch.manual_seed(0)
    model = llama().eval()
    before = logits(model)
    quantized(model)
    assert hfq.dequantize(model) is model and not attention.parts(model)
    assert torch.equal(logits(model), before) and model.config._attn_implementation == "sdpa"
    assert type(generated(model).past_key_values.layers[0]).__name__ == "DynamicLayer"


def test_a_carried_cache_is_fitted_to_the_packed_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama().eval()
    config = hfq.RTNConfig(bits=2, group_size=32, progress=False, kv_cache=hfq.KVQuantConfig(kv_bits=3))
    with pytest.raises(DataError, match="calibration"):
        hfq.quantize(model, config)
    report = hfq.quantize(model, config, IDS)
    rows = {row.kind for row in report.packed}
    assert rows == {"linear", "cache"} and report.bits_per_weight() < 5
    again = hfq.HfqConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.kv_cache == {"kv_bits": 3, "method": "kvquant"} and again._cache.kv_bits == 3 and again.wants_data
    for wrong, word in (
        ({"kv_cache": 4}, "kv_cache=4"), ({"kv_cache": {"method": "gptq"}}, "gptq"),
        ({"kv_cache": {"bitz": 4}}, "bitz"),
        ({"kv_cache": {"kv_bits": 4}, "kv_bits": 3}, "say it once"),
        ({"kv_cache": {"calibration": "x.txt"}}, "calibration"),
    ):
        with pytest.raises(ConfigError, match=word):
            hfq.RTNConfig(**wrong)


def test_models_without_a_cache_are_refused() -> None:
    for make in (vit, bert):
        with pytest.raises(ConfigError, match="no key-value cache"):
            quantized(make())
    config = transformers.BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=99,
    )
    with pytest.raises(ConfigError, match="encoder-decoder"):
        quantized(transformers.BartForConditionalGeneration(config))


def test_other_caches_are_refused() -> None:
    model = quantized()
    with torch.no_grad():
        three = quantized(kv_bits=3)(IDS, use_cache=True).past_key_values
        with pytest.raises(ConfigError, match="another quantization config"):
            model(IDS[:, :1], past_key_values=three)
        plain = llama().eval()(IDS, use_cache=True).past_key_values
        with pytest.raises(ConfigError, match="not quantized"):
            model(IDS[:, :1], past_key_values=plain)
        same = quantized()(IDS, use_cache=True).past_key_values  # an equal config may go on
        model(IDS[:, :1], past_key_values=same)
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        floats = hfq.dequantize(copy.deepcopy(model))
        for other in (llama().eval(), floats):  # would attend to the newest token alone
            with pytest.raises(QuantizationError, match="attention is not quantized"):
                other(IDS[:, :1], past_key_values=cache)
        with attention.without(model), pytest.raises(QuantizationError, match="attention is not quantized"):
            model(IDS[:, :1], past_key_values=cache)
    fitted = [quantized(kv_bits=16, kv_cache={"kv_bits": 3, "outliers": share}) for share in (0.0, 0.05)]
    with torch.no_grad(), pytest.raises(ConfigError, match="another quantization config"):
        fitted[0](IDS[:, :1], past_key_values=fitted[1](IDS, use_cache=True).past_key_values)


def test_a_changed_cache_or_gradients_are_refused() -> None:
    model = quantized()
    cache = model(IDS, use_cache=True).past_key_values
    with pytest.raises(QuantizationError, match="gradients"):
        model(IDS[:, :1], past_key_values=cache)
    model(IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.norm() > 0
    for name in ("offloaded", "offloaded_static"):
        with pytest.raises(ConfigError, match="offload"):
            generated(model, cache_implementation=name)
    elsewhere = DynamicCache()
    elsewhere.offloading = True
    with pytest.raises(ConfigError, match="offload"):
        model(IDS, past_key_values=elsewhere)


def test_a_model_that_decodes_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaAttention.forward

    def forward(self: Any, hidden_states: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None and self.layer_idx == 1 and past_key_values.get_seq_length(1):
            hidden_states = hidden_states * 1.5  # something that depends on the kind of the cache
            hidden_states = hidden_states / (1.5 if past_key_values.layers[1].keys is not None else 1.0)
        return original(self, hidden_states, *args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    with pytest.raises(QuantizationError, match="does not decode"):
        quantized()


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = quantized(kv_bits=16, kv_cache={"kv_bits": 3})
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.hfq_attention.kv.key_low"
    assert name in tensors and tensors[name].dtype == torch.float16
    for change, word in (
        ({name: tensors[name] + 1000}, "key_low"), ({name: tensors[name][:3].clone()}, "key_low"),
        ({name.replace("low", "encode"): tensors[name.replace("low", "encode")] * float("nan")}, "key_encode"),
    ):
        save_file({**tensors, **change}, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=word):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    save_file({key: value for key, value in tensors.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks .*key_low"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_head_widths_that_no_byte_divides() -> None:
    for bits in (2, 3, 4):
        result = generated(quantized(llama(head_dim=10), kv_bits=bits))
        store = result.past_key_values.layers[0].store
        assert store.sides["key"].blocks[0].packed.nbytes == 2 * 2 * 64 * 10 * bits / 8


def test_rows_of_different_length() -> None:
    """A padded row generates what it does alone, with ranges a channel and a token."""
    for options in ({"kv_bits": 4}, {"kv_bits": 16, "kv_cache": {"kv_bits": 4, "prefill": "quantized"}}):
        model = quantized(**options)
        ids = torch.cat([torch.zeros(1, 4, dtype=torch.long), IDS[:1, 4:]], 1)
        both, mask = torch.cat([ids, IDS[1:]]), torch.ones(2, 12, dtype=torch.long)
        mask[0, :4] = 0
        common = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        together = model.generate(both, attention_mask=mask, **common)
        assert torch.equal(together[0, 12:], model.generate(IDS[:1, 4:], **common)[0, 8:])
        assert torch.equal(together[1], model.generate(IDS[1:], **common)[0])


def test_a_cache_made_empty_by_hand() -> None:
    model, cache = quantized(), DynamicCache()
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    assert cache.get_seq_length() == 12 and kv_cache.nbytes(cache) == sum(
        layer.store.nbytes for layer in cache.layers)
