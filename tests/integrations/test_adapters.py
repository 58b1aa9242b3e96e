"""LoRA on packed layers by every route that PEFT, transformers and diffusers offer."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn

import hfq
from hfq.errors import ConfigError, QuantizationError
from hfq.kernels import use
from hfq.layers.packed import PackedModule

IDS = torch.arange(24).reshape(2, 12) * 7 % 99
NAMES = ["q_proj", "down_proj"]

pytestmark = pytest.mark.filterwarnings("ignore:.*slow backend.*", "ignore:Could not find a config file")


@pytest.fixture
def model(packed):
    return transformers.AutoModelForCausalLM.from_pretrained(packed("llama"))


def logits(model) -> torch.Tensor:
    with torch.no_grad(), use(wna16="reference"):
        return model.eval()(IDS).logits


def fill(model, std: float = 0.1, seed: int = 0, only: str = "lora_B|lora_embedding_A|lora_magnitude"):
    """Adapters that do something: as they are made, one of their factors is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(only, name):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def config(**more) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": NAMES, **more})


VARIANTS = {
    "plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"}, "eva": {"init_lora_weights": "eva"},
    "mica": {"init_lora_weights": "mica"}, "bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "groups": {"use_qalora": True, "qalora_group_size": 16},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_saves_and_comes_back(variant, model, packed, tmp_path):
    base = logits(model)
    tuned = get_peft_model(model, config(**VARIANTS[variant])).train()
    if variant != "orthogonal":
        torch.testing.assert_close(logits(tuned), base, rtol=0, atol=1e-6)
    fill(tuned, only="lora_[AB]")
    loss = tuned(IDS, labels=IDS).loss
    loss.backward()
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    assert any(p.grad.abs().sum() > 0 for p in trained)
    wanted = logits(tuned)
    assert (wanted - base).abs().max() > 1e-4
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), base)
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(packed("llama")), tmp_path)
    assert torch.equal(logits(again), wanted)
    assert not any(p.requires_grad for p in again.parameters())
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path)), wanted)


def test_the_routes_of_transformers(model, packed, tmp_path):
    base = logits(model)
    model.add_adapter(config(), "first")
    fill(model)
    wanted = logits(model)
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    again = transformers.AutoModelForCausalLM.from_pretrained(packed("llama"))
    again.load_adapter(tmp_path, "first")
    assert torch.equal(logits(again), wanted)
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), wanted)


def test_an_adapter_of_the_packed_model_fits_the_float_one_and_back(model, floats, tmp_path):
    tuned = fill(get_peft_model(model, config(r=2)))
    tuned.save_pretrained(tmp_path)
    whole = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(floats("llama")), tmp_path)
    first, second = (dict(one.named_parameters()) for one in (tuned, whole))
    for name in (name for name in first if "lora_" in name):
        assert torch.equal(first[name], second[name])
    assert (logits(whole) - logits(tuned)).norm() < 0.3 * logits(tuned).norm()


def test_several_adapters(model, tmp_path):
    tuned = fill(get_peft_model(model, config(), "one"))
    one = logits(tuned)
    tuned.add_adapter("two", config(r=2, target_modules=["q_proj", "o_proj"]))
    assert torch.equal(logits(tuned), one)
    tuned.set_adapter("two")
    two = logits(fill(tuned, only=r"lora_B\.two", seed=5))
    assert not torch.equal(one, two)
    tuned.base_model.set_adapter(["one", "two"])
    both = logits(tuned)
    assert not torch.equal(both, one) and not torch.equal(both, two)
    tuned.set_adapter("one")
    assert torch.equal(logits(tuned), one)
    tuned.add_weighted_adapter(["one", "two"], [1.0, 1.0], "mean", combination_type="cat")
    tuned.set_adapter("mean")
    torch.testing.assert_close(logits(tuned), both, rtol=0, atol=1e-5)
    tuned.delete_adapter("mean")
    tuned.delete_adapter("two")
    tuned.set_adapter("one")
    assert torch.equal(logits(tuned), one)


def test_all_linear_means_packed_layers_too(model):
    tuned = get_peft_model(model, config(target_modules="all-linear"))
    found = {name.rpartition(".")[2] for name in tuned.base_model.targeted_module_names}
    assert found == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    tuned.add_adapter("other", config(target_modules="all-linear"))
    assert tuned.peft_config["other"].target_modules == tuned.peft_config["default"].target_modules


@pytest.mark.parametrize("variant", ["plain", "dora", "rslora", "bias"])
def test_merging_rounds_says_so_and_can_be_undone(variant, model):
    tuned = fill(get_peft_model(model, config(**VARIANTS[variant])), only="lora_B|magnitude")
    wanted = logits(tuned)
    with pytest.warns(UserWarning, match="rounds weights to 4-bit codes again"):
        tuned.merge_adapter()
    merged = logits(tuned)
    with tuned.disable_adapter():
        off = logits(tuned)
    assert 0 < (merged - wanted).norm() < 0.35 * (wanted - off).norm()
    assert torch.equal(logits(tuned), wanted), "disabling takes the merge back"
    with pytest.warns(UserWarning):
        tuned.merge_adapter()
    tuned.unmerge_adapter()
    assert torch.equal(logits(tuned), wanted)


def test_several_adapters_are_rounded_once(model):
    tuned = fill(get_peft_model(model, config(), "one"))
    tuned.add_adapter("two", config())
    fill(tuned, only=r"lora_B\.two", seed=5)
    with pytest.warns(UserWarning):
        tuned.merge_adapter(["one", "two"])
    together = logits(tuned)
    tuned.unmerge_adapter()
    with pytest.warns(UserWarning):
        tuned.merge_adapter(["one"])
        tuned.merge_adapter(["two"])
    assert torch.equal(logits(tuned), together)


def test_groups_merge_exactly_and_the_model_saves(model, tmp_path):
    """QA-LoRA: the logits stay, in the merged model and in the one that is loaded again."""
    base = logits(model)
    tuned = fill(get_peft_model(model, config(**VARIANTS["groups"], target_modules="all-linear")), 0.3)
    wanted = logits(tuned)
    assert (wanted - base).abs().max() > 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = tuned.merge_and_unload()
    torch.testing.assert_close(logits(whole), wanted, rtol=0, atol=1e-4)
    assert not any("lora" in name for name, _ in whole.named_modules())
    whole.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), wanted, rtol=0, atol=1e-4)
    # 4 bits and two float32 for each 16 of them; before, a float16 and a byte.
    report = again.hfq_report
    assert report.bits_per_weight() == 8 and any("adapters were merged" in note for note in report.notes)
    assert again.config.quantization_config.summary["bits_per_weight"] == 8


def test_groups_on_quantized_and_transformed_inputs_merge_exactly():
    """The adapter sees what the product sees."""
    from hfq.formats import ActivationSpec, affine
    from hfq.layers.linear import QLinear
    from hfq.layers.online import Hadamard

    torch.manual_seed(0)
    spec, part = hfq.formats.QuantSpec(4, 16), Hadamard(32)
    one = QLinear(32, 24, spec, online=part, activation=ActivationSpec(8))
    one.set_codes("weight", affine.quantize(part.fold(torch.randn(24, 32) * 0.1), spec))
    tuned = fill(get_peft_model(nn.Sequential(one), config(**VARIANTS["groups"], target_modules=["0"])), 0.3)
    x = torch.randn(5, 32)
    with torch.no_grad(), use(wnan="reference"):
        wanted, plain = tuned(x), one(x)
        assert (wanted - plain).abs().max() > 0.05
        tuned.merge_adapter()
        torch.testing.assert_close(tuned(x), wanted, rtol=0, atol=1e-4)


def test_what_cannot_merge_says_why(model):
    tuned = fill(get_peft_model(model, config(use_qalora=True, qalora_group_size=8)))
    before = logits(tuned)
    with pytest.raises(QuantizationError, match="qalora_group_size=16 or a multiple"):
        tuned.merge_adapter()
    assert torch.equal(logits(tuned), before)
    tuned.add_adapter("wide", config(use_qalora=True, qalora_group_size=16))
    with pytest.raises(QuantizationError, match="different groups cannot be merged"):
        tuned.merge_adapter(["wide", "default"])
    tuned.add_adapter("plain", config())
    with pytest.raises(QuantizationError, match="in groups and another one"):
        tuned.merge_adapter(["plain", "default"])
    tuned.add_adapter("dora", config(use_dora=True))
    with pytest.raises(QuantizationError, match="depends on the weight"):
        tuned.merge_adapter(["plain", "dora"])


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga"])
def test_starts_that_change_the_weight_are_refused(start, model):
    more = {"loftq_config": {"loftq_bits": 4}} if start == "loftq" else {}
    with pytest.raises(ConfigError, match="takes its product out of the weight"):
        get_peft_model(model, LoraConfig(r=2, target_modules=NAMES, init_lora_weights=start, **more))


def test_bad_configs(model, packed):
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(model, config(target_modules=["nowhere"]))
    with pytest.raises(ValueError, match="positive integer"):
        get_peft_model(model, config(r=0))
    with pytest.raises(ConfigError, match="r=33 is above the layer"):
        get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(packed("llama")), config(r=33))
    with pytest.raises(ConfigError, match="use_dora"):
        get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(packed("llama")),
                       config(use_qalora=True, use_dora=True))  # fmt: skip
    experts = transformers.AutoModelForCausalLM.from_pretrained(packed("mixtral"))
    with pytest.raises(ConfigError, match="experts are one module"):
        get_peft_model(experts, config(target_modules=["experts"]))


@pytest.mark.parametrize("dora", [False, True])
def test_turned_weights_tables_and_convolutions(dora, packed):
    """GPT-2's ``Conv1D``, an embedding, a convolution: forward, merge, unmerge."""
    from hfq.formats import QuantSpec, affine
    from hfq.layers import substitute, swap

    torch.manual_seed(0)
    gpt2 = transformers.AutoModelForCausalLM.from_pretrained(packed("gpt2"))
    swap.swap(gpt2, "transformer.wpe", affine.quantize(gpt2.transformer.wpe.weight.detach(), QuantSpec(8, 16)))
    conv = nn.Conv2d(4, 8, 3, padding=1)
    layers = nn.Sequential(substitute.pack(conv, affine.quantize(substitute.matrix(conv), QuantSpec(8, 12))), nn.ReLU())
    x = torch.randn(2, 4, 6, 6)
    for model, names, run in ((gpt2, ["c_attn", "wpe"], logits), (layers, ["0"], lambda m: m.eval()(x).detach())):
        base = run(model)
        tuned = fill(get_peft_model(model, config(r=2, target_modules=names, use_dora=dora)), 0.3)
        wanted = run(tuned)
        assert not torch.equal(wanted, base)
        with pytest.warns(UserWarning, match="rounds weights"):
            tuned.merge_adapter()
        assert (run(tuned) - wanted).norm() < 0.2 * (wanted - base).norm()
        tuned.unmerge_adapter()
        assert torch.equal(run(tuned), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_prepared_for_training(reentrant, model):
    """Checkpointed blocks give the gradients of plain ones, with PEFT's own function too; scales keep their dtype."""
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    prepare = prepare_model_for_kbit_training if reentrant else hfq.prepare_for_training
    tuned = fill(get_peft_model(model, config())).train()
    grads = []
    for checkpoint in (False, True):
        if checkpoint:
            assert prepare(model, gradient_checkpointing_kwargs={"use_reentrant": reentrant}) is model
            assert model.is_gradient_checkpointing
        tuned.zero_grad()
        tuned(IDS, labels=IDS).loss.backward()
        grads.append([p.grad.clone() for p in tuned.parameters() if p.requires_grad])
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second)
    assert {name.replace(".base_layer", ""): p.dtype for name, p in model.named_parameters()
            if "lora" not in name} == dtypes  # fmt: skip


def test_a_frozen_model_is_refused(model, floats, tmp_path):
    trainer = transformers.TrainingArguments(tmp_path, report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="attach trainable adapters"):
        transformers.Trainer(model, trainer)
    with pytest.raises(ConfigError, match="no packed layers"):
        hfq.prepare_for_training(transformers.AutoModelForCausalLM.from_pretrained(floats("llama")))
    tuned = get_peft_model(model, config(inference_mode=True))
    for parameter in tuned.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="is_trainable=True"):
        hfq.prepare_for_training(tuned)


def test_trainer_on_a_cpu(model, tmp_path):
    torch.manual_seed(0)
    tuned = get_peft_model(hfq.prepare_for_training(model), config(r=8, lora_alpha=32, target_modules="all-linear"))
    before = float(tuned(IDS, labels=IDS).loss)
    rows = [{"input_ids": row, "labels": row} for row in torch.cat([IDS] * 4)]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=12, learning_rate=3e-2, per_device_train_batch_size=4, logging_steps=1, report_to=[],
        use_cpu=True, save_steps=4, gradient_checkpointing=True, lr_scheduler_type="constant", disable_tqdm=True,
        gradient_checkpointing_kwargs={"use_reentrant": False})  # fmt: skip
    packed_before = {name: m.packed()[0].qweight.clone() for name, m in model.named_modules()
                     if isinstance(m, PackedModule)}  # fmt: skip
    trainer = transformers.Trainer(tuned, arguments, train_dataset=rows)
    trainer.train()
    assert float(tuned(IDS, labels=IDS).loss) < 0.96 * before
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").exists()
    modules = dict(model.named_modules())
    assert all(torch.equal(modules[name].packed()[0].qweight, q) for name, q in packed_before.items())


def test_adapters_load_without_hfq(packed, model, tmp_path, child):
    tuned = fill(get_peft_model(model, config(use_qalora=True, qalora_group_size=16)))
    tuned.save_pretrained(tmp_path)
    found = child(
        """
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
out["layers"] = sorted({type(m).__name__ for m in model.modules() if hasattr(m, "lora_A")})
""",
        tmp_path)  # fmt: skip
    assert found["layers"] == ["PackedLinearLora"]
