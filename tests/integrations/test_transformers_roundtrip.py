"""Quantize, save, load again: bit-equal on every route that transformers offers."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    ResNetConfig,
    ResNetForImageClassification,
    pipeline,
)

import hfq
from hfq.config import HfqConfig
from hfq.integrations.guard import PackedRename
from hfq.layers.conv import QConv2d

DISK = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "disk", "model.layers.1": "disk",
        "model.norm": "cpu", "lm_head": "cpu"}


def stored(folder):
    """Name, shape and dtype of every tensor in a checkpoint."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            found |= {k: (handle.get_slice(k).get_shape(), handle.get_slice(k).get_dtype()) for k in handle.keys()}  # noqa: SIM118
    return found


def packed_modules(model):
    return {name: model.get_submodule(name) for name in model.config.quantization_config.manifest["layers"]}


@pytest.fixture(scope="module")
def reference(floats, outputs):
    """The quantized model that never left memory, and its logits."""
    config = hfq.RTNConfig(bits=4, group_size=16)
    model = AutoModelForCausalLM.from_pretrained(floats("llama"), quantization_config=config)
    return model, outputs(model)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "bert", "vit"])
def test_round_trip_of_each_kind_of_layer(name, floats, packed, outputs):
    float_model = _load(name, floats(name))
    before = outputs(float_model)
    config = hfq.RTNConfig(bits=4, group_size=16)
    memory = type(float_model).from_pretrained(floats(name), quantization_config=config)
    again = _load(name, packed(name))
    assert torch.equal(outputs(memory), outputs(again))
    assert not torch.equal(before, outputs(again)), "nothing was quantized"
    assert set(packed_modules(again)) == set(packed_modules(memory)) and len(packed_modules(again)) >= 4
    for module in packed_modules(again).values():
        assert not isinstance(module, torch.nn.Linear)
        assert not any(p.requires_grad for p in module.parameters())
        assert not list(module.buffers())
    assert not any(p.is_meta for p in again.parameters())
    assert again.is_quantized and again.hf_quantizer.is_trainable and again.hf_quantizer.is_compileable


def _load(name, folder):
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    auto = {"bert": AutoModelForSequenceClassification, "vit": AutoModelForImageClassification}
    return auto.get(name, AutoModelForCausalLM).from_pretrained(folder)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_names_on_disk(name, floats, packed):
    """Every packed layer has its codes under the float weight's name, with one more axis."""
    was, now = stored(floats(name)), stored(packed(name))
    # transformers saves some models under the names of their first release.
    was, now = ({key.replace("block_sparse_moe", "mlp"): value for key, value in x.items()} for x in (was, now))
    config = json.loads((packed(name) / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "hfq" and config["method"] == "rtn" and config["format_version"] == 1
    assert not [key for key in now if "qweight" in key]
    for layer in config["manifest"]["layers"]:
        codes = [key for key, (_, dtype) in now.items() if dtype == "U8" and "zero" not in key]
        mains = [key for key in codes if key.rpartition(".")[0] == layer]
        assert mains, layer
        for key in mains:
            rank = 3 if key.endswith(("experts.gate_up_proj", "experts.down_proj")) else 2
            assert len(now[key][0]) == rank + 1
            assert key not in was or len(was[key][0]) == rank


def test_sharded(packed, outputs, reference, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed("llama"))
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.0.mlp.up_proj.weight" in index and not [key for key in index if "qweight" in key]
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path)), reference[1])


def test_device_map_auto(packed, outputs, reference):
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(packed("llama"), device_map="auto")), reference[1])


def test_disk_offload_and_saving_it_again(packed, outputs, reference, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed("llama"), device_map=DISK, offload_folder=tmp_path / "off")
    assert sum(p.is_meta for p in model.parameters()) > 20
    assert not list((tmp_path / "off").glob("*")), "packed tensors are read from the checkpoint, not written again"
    assert torch.equal(outputs(model), reference[1])
    assert sum(p.is_meta for p in model.parameters()) > 20
    model.save_pretrained(tmp_path / "again")
    assert set(stored(tmp_path / "again")) == set(stored(packed("llama")))
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), reference[1])


def test_experts_with_disk_offload_saved_again(packed, outputs, tmp_path):
    straight = AutoModelForCausalLM.from_pretrained(packed("mixtral"))
    model = AutoModelForCausalLM.from_pretrained(packed("mixtral"), device_map=DISK, offload_folder=tmp_path / "off")
    assert torch.equal(outputs(model), outputs(straight))
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), outputs(straight))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_quantizing_an_offloaded_model(method, floats, outputs, tmp_path):
    """Same bits as in memory; what was on disk stays there, packed; and it can be saved."""
    data = torch.arange(64).reshape(4, 16) * 5 % 99
    options = {"bits": 4, "group_size": 16, "calibration_seqlen": 16, "progress": False}
    memory, offloaded = (
        AutoModelForCausalLM.from_pretrained(
            floats("llama"), quantization_config=HfqConfig(method=method, calibration=data, **options), **where
        )
        for where in ({}, {"device_map": DISK, "offload_folder": tmp_path / "off"})
    )
    assert sum(p.is_meta for p in offloaded.parameters()) > 20
    assert torch.equal(outputs(offloaded), outputs(memory))
    offloaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), outputs(memory))


def test_headless_and_back(packed, outputs, reference, tmp_path):
    body = AutoModel.from_pretrained(packed("llama"))
    expected = outputs(reference[0].model)
    assert torch.equal(outputs(body), expected)
    body.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path)), expected)


def test_bfloat16_keeps_the_scales(packed):
    model = AutoModelForCausalLM.from_pretrained(packed("llama"), dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert model.model.norm.weight.dtype == torch.bfloat16 and layer.scale.dtype == torch.float16
    model.to(torch.bfloat16)
    assert layer.scale.dtype == torch.float16


def test_pipeline(packed, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "with_tokenizer"
    shutil.copytree(packed("llama"), folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0").save_pretrained(folder)
    text = pipeline("text-generation", model=str(folder))("w5 w6 w7", max_new_tokens=4, do_sample=False)
    assert text[0]["generated_text"].startswith("w5 w6 w7")


def test_dequantize_while_loading(packed, outputs, reference, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed("llama"), quantization_config=hfq.RTNConfig(dequantize=True))
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear and not hasattr(model, "hf_quantizer")
    _same_weights(model, reference[0])
    torch.testing.assert_close(outputs(model), reference[1], rtol=0, atol=2e-2)  # the kernel's own rounding
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert len(stored(tmp_path)["model.layers.0.mlp.up_proj.weight"][0]) == 2
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path)), outputs(model))


def _same_weights(model, packed_model):
    for name, module in packed_modules(packed_model).items():
        assert type(model.get_submodule(name)) is torch.nn.Linear
        assert torch.equal(model.get_submodule(name).weight, module.weight)


@pytest.mark.parametrize("call", [lambda m: m.dequantize(), hfq.dequantize], ids=["method", "function"])
def test_dequantize_afterwards(call, packed, outputs, reference, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed("llama"))
    model.save_pretrained(tmp_path / "packed")
    call(model)
    assert not model.is_quantized and not hasattr(model.config, "quantization_config")
    _same_weights(model, reference[0])
    torch.testing.assert_close(outputs(model), reference[1], rtol=0, atol=2e-2)  # the kernel's own rounding
    model.save_pretrained(tmp_path / "float")
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "float")), outputs(model))
    hfq.quantize(model, hfq.RTNConfig(bits=8))  # float again, so it may be quantized again


def test_live_model(floats, outputs, reference, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(floats("llama"))
    report = hfq.quantize(model, hfq.RTNConfig(bits=4, group_size=16))
    assert model.hfq_report is report and torch.equal(outputs(model), reference[1])
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path)), reference[1])


def test_live_model_with_converted_experts(outputs, tmp_path):
    """A model that was never loaded has no record of its conversions; saving must not invent one for packed experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, vocab_size=99, num_key_value_heads=2, num_local_experts=4, head_dim=8)
    model = MixtralForCausalLM(config).eval()
    # One layer's experts stay float, so both forms are in one checkpoint.
    hfq.quantize(model, hfq.RTNConfig(bits=4, group_size=16, modules_to_not_convert=["model.layers.1.mlp.experts"]))
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path)), outputs(model))


def test_tied_head_is_untied_when_asked_for(outputs, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=99, tie_word_embeddings=True)).save_pretrained(tmp_path / "float")
    left = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=hfq.RTNConfig(bits=8))
    assert left.lm_head.weight is left.model.embed_tokens.weight and "tied" in left.hfq_report.rows["lm_head"].reason
    left.save_pretrained(tmp_path / "left")
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "left")), outputs(left))

    config = hfq.RTNConfig(bits=8, overrides={"lm_head": {"bits": 4}})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert model.hfq_report.rows["lm_head"].status == "packed" and not model.config.tie_word_embeddings
    assert type(model.model.embed_tokens) is torch.nn.Embedding
    model.save_pretrained(tmp_path / "head")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "head")
    again.tie_weights()
    assert torch.equal(outputs(again), outputs(model)) and not torch.equal(outputs(again), outputs(left))


def test_report_travels_with_the_weights(packed, reference):
    again = AutoModelForCausalLM.from_pretrained(packed("llama"))
    report = again.hfq_report
    assert report.to_dict()["rows"] == reference[0].hfq_report.to_dict()["rows"]
    assert report.totals["versions"]["hfq"] == hfq.__version__ and report.totals["seed"] == 0
    summary = again.config.quantization_config.summary
    assert summary["packed"] == len(report.packed) == 14 and summary["bits_per_weight"] == report.bits_per_weight()


def test_config_given_as_a_dict(floats, outputs, reference):
    given = {"quant_method": "hfq", "method": "rtn", "bits": 4, "group_size": 16}
    model = AutoModelForCausalLM.from_pretrained(floats("llama"), quantization_config=given)
    assert torch.equal(outputs(model), reference[1])


def test_overrides_and_skipped_modules(floats, tmp_path, outputs):
    overrides = {"*.down_proj": {"bits": 3, "group_size": 8}, "model.layers.1.mlp.up_proj": {"bits": 16}}
    config = HfqConfig(method="rtn", bits=4, modules_to_not_convert=["self_attn"], overrides=overrides)
    model = AutoModelForCausalLM.from_pretrained(floats("llama"), quantization_config=config)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert type(model.model.layers[1].mlp.up_proj) is torch.nn.Linear
    assert model.model.layers[0].mlp.down_proj.spec.bits == 3 and model.model.layers[0].mlp.up_proj.spec.bits == 4
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path)), outputs(model))


def test_sixteen_bits_change_nothing(floats, outputs, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(floats("llama"), quantization_config=hfq.RTNConfig(bits=16))
    assert torch.equal(outputs(model), outputs(AutoModelForCausalLM.from_pretrained(floats("llama"))))
    assert not model.hfq_report.packed
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path)), outputs(model))


def test_a_copy_saves_too(packed, outputs, reference, tmp_path):
    model = copy.deepcopy(AutoModelForCausalLM.from_pretrained(packed("llama")))
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path)), reference[1])


def test_the_state_dict_argument_is_ignored_by_transformers(packed, outputs, reference, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed("llama"))
    model.save_pretrained(tmp_path, state_dict={})
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path)), reference[1])


def test_loading_options_are_taken_from_the_call(packed):
    config = hfq.RTNConfig(cpu_memory="cached", bits=2)
    model = AutoModelForCausalLM.from_pretrained(packed("llama"), quantization_config=config)
    loaded = model.config.quantization_config
    assert loaded.cpu_memory == "cached" and loaded.bits == 4


def test_the_saved_name_is_reversible():
    names = ["a.b.qweight", "a.b.scale", "a.experts.up_qweight", "a.experts.up_scale"]
    rename = PackedRename(names, "model", {"a.b", "a.experts"})
    for disk, memory in (("a.b.weight", "a.b.qweight"), ("a.experts.up", "a.experts.up_qweight")):
        assert rename.rename_source_key(disk)[0] == memory
        assert rename.rename_source_key(f"model.{disk}")[0] == f"model.{memory}"
        assert rename.reverse_transform().rename_source_key(memory)[0] == disk
    for other in ("a.c.weight", "a.b.scale", "a.b.bias", "b.weight", "aa.b.weight"):
        assert rename.rename_source_key(other)[0] == other
    assert rename.reverse_transform().rename_source_key("c.d.qweight")[0] == "c.d.qweight"


def test_packed_embedding_keeps_the_dtype_of_the_model(tmp_path):
    """transformers takes a model's dtype from its first floating-point tensor, which is then a scale."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=128, **sizes), dtype=dtype).eval()
        config = hfq.RTNConfig(bits=4, group_size=32, overrides={"embed_tokens": {"bits": 8}}, progress=False)
        report = hfq.quantize(model, config)
        assert report.rows["model.embed_tokens"].status == "packed" and model.dtype == dtype
        model.save_pretrained(tmp_path / str(dtype))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(dtype))
        ids = torch.arange(12)[None]
        assert again.dtype == again.lm_head.weight.dtype == dtype
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_packed_first_convolution_keeps_the_dtype_of_the_model(tmp_path):
    """A convolution in front of a normalisation has no bias: its scales would be the model's first floating tensor."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic", "num_labels": 3}
    x = torch.randn(2, 3, 32, 32)
    for dtype in (torch.float32, torch.bfloat16):
        model = ResNetForImageClassification(ResNetConfig(**sizes)).to(dtype).eval()
        hfq.quantize(model, hfq.RTNConfig(bits=4, group_size=-1, progress=False))
        assert isinstance(model.resnet.embedder.embedder.convolution, QConv2d) and model.dtype == dtype
        model.save_pretrained(tmp_path / str(dtype))
        again = ResNetForImageClassification.from_pretrained(tmp_path / str(dtype)).eval()
        assert again.dtype == again.classifier[1].weight.dtype == dtype
        assert torch.equal(again(x.to(dtype)).logits, model(x.to(dtype)).logits)
