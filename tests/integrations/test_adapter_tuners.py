"""The tuners HFQ_QALORA (before the quantizer) and HFQ_RANK_DECAY (after it, down to rank 0)."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn

from hfq.errors import CheckpointError, ConfigError, QuantizationError
from hfq.formats import affine
from hfq.integrations.peft import QALoraConfig, RankDecayCallback, RankDecayConfig, decay_step, learning_groups
from hfq.kernels import use
from hfq.layers.packed import PackedModule

IDS = torch.arange(24).reshape(2, 12) * 7 % 99
NAMES = ["q_proj", "down_proj"]

pytestmark = pytest.mark.filterwarnings("ignore:.*slow backend.*", "ignore:Could not find a config file")


@pytest.fixture
def load(packed, floats):
    """``load("packed")`` or ``load("float")`` is a fresh model."""
    def get(base: str = "float"):
        return transformers.AutoModelForCausalLM.from_pretrained((packed if base == "packed" else floats)("llama"))

    return get


def logits(model) -> torch.Tensor:
    with torch.no_grad(), use(wna16="reference"):
        return model.eval()(IDS).logits


def qalora(base: str = "float", **more) -> QALoraConfig:
    grid = {"bits": 4, "group_size": 16} if base == "float" else {}
    return QALoraConfig(**{"r": 4, "target_modules": NAMES, **grid, **more})


def decay(**more) -> RankDecayConfig:
    return RankDecayConfig(**{"r": 8, "target_modules": NAMES, "bits": 3, "phase_steps": 2, **more})


def train(model, steps: int, first: int = 0, rate: float = 1e-3):
    """Plain gradient steps, so that the optimiser has no state; the decay is brought to each step before it."""
    model.train()
    for step in range(first, first + steps):
        if any("rank_decay" in name for name, _ in model.named_parameters()):
            decay_step(model, step)
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.grad is not None:
                    parameter.sub_(rate * parameter.grad)
    return model


def fill(model, adapter: str = "default"):
    """Low-rank updates that change codes: as they are made, they are zero."""
    generator = torch.Generator().manual_seed(len(adapter))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(f"qalora_B.{adapter}"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


# Before the quantizer


@pytest.mark.parametrize("base", ["float", "packed"])
def test_it_starts_as_the_rounded_model(base, load):
    model = load(base)
    tuned = get_peft_model(model, qalora(base))
    wanted = load(base)
    for name in (name for name, m in wanted.named_modules() if name.rpartition(".")[2] in NAMES):
        layer = wanted.get_submodule(name)
        if base == "float":
            layer.weight.data = affine.dequantize(affine.quantize(layer.weight.data, qalora().spec(4)))
    torch.testing.assert_close(logits(tuned), logits(wanted), rtol=0, atol=0 if base == "float" else 1e-6)
    with tuned.disable_adapter():
        torch.testing.assert_close(logits(tuned), logits(load(base)), rtol=0, atol=0)


@pytest.mark.parametrize("base", ["float", "packed"])
def test_trained_saved_loaded_merged(base, load, tmp_path):
    """By every route; the merge is what the adapter computed, and saves as a packed checkpoint."""
    tuned = get_peft_model(load(base), qalora(base))
    start = logits(tuned)
    train(fill(tuned), 3, rate=1e-4)
    wanted = logits(tuned)
    assert (wanted - start).abs().max() > 1e-3
    scales = [p for name, p in tuned.named_parameters() if "qalora_scale" in name]
    assert scales and all(p.requires_grad and p.grad is not None for p in scales)
    tuned.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    assert torch.equal(logits(again), wanted) and not any(p.requires_grad for p in again.parameters())
    direct = load(base)
    direct.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(direct), wanted)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), wanted)
    tuned.merge_adapter()
    torch.testing.assert_close(logits(tuned), wanted, rtol=0, atol=1e-5)
    tuned.unmerge_adapter()
    assert torch.equal(logits(tuned), wanted)
    whole = tuned.merge_and_unload()
    torch.testing.assert_close(logits(whole), wanted, rtol=0, atol=1e-5)
    assert isinstance(whole.model.layers[0].mlp.down_proj, PackedModule)
    whole.save_pretrained(tmp_path / "whole")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(loaded), wanted, rtol=0, atol=1e-5)


def test_updates_below_half_a_step_change_no_code(load):
    """And larger ones change exactly the codes that they reach."""
    tuned = get_peft_model(load("packed"), qalora("packed", r=1, target_modules=["q_proj"]))
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    base = layer.get_base_layer()
    before = layer.codes(["default"])
    assert torch.equal(before.codes, base.packed()[0].qweight.new_tensor(before.codes))
    step = affine.expand(before.scale.float(), 32, before.spec)
    assert torch.equal(affine.dequantize(before), base.dequantize(dtype=torch.float32))
    with torch.no_grad():
        layer.hfq_qalora_A["default"].zero_()[0, 5] = 1
        layer.hfq_qalora_B["default"][:, 0] = 0.49 * step[:, 5]
    assert torch.equal(layer.codes(["default"]).codes, before.codes)
    with torch.no_grad():
        layer.hfq_qalora_B["default"][3, 0] = 1.01 * step[3, 5] * (1 if before.codes[3, 5] < 8 else -1)
    changed = layer.codes(["default"]).codes != before.codes
    assert changed.sum() == 1 and changed[3, 5]


def test_a_second_update(load):
    tuned = fill(get_peft_model(load(), qalora()))
    first = logits(tuned)
    tuned.add_adapter("second", qalora(r=2))
    tuned.set_adapter("second")
    assert not torch.equal(logits(tuned), first)
    fill(tuned, "second")
    tuned.base_model.set_adapter(["default", "second"])
    both = logits(tuned)
    tuned.merge_adapter(["default", "second"])
    torch.testing.assert_close(logits(tuned), both, rtol=0, atol=1e-5)
    tuned.unmerge_adapter()
    tuned.set_adapter("default")
    assert torch.equal(logits(tuned), first)
    tuned.add_adapter("other", qalora(group_size=8))
    with pytest.raises(QuantizationError, match="different grids"):
        tuned.merge_adapter(["default", "other"])
    tuned.delete_adapter("other")
    tuned.delete_adapter("second")
    tuned.set_adapter("default")
    assert torch.equal(logits(tuned), first)


def test_sixteen_bits_round_nothing(load):
    tuned = get_peft_model(load(), qalora(bits=16))
    assert torch.equal(logits(tuned), logits(load()))
    train(fill(tuned), 2, rate=0.1)
    wanted = logits(tuned)
    whole = tuned.merge_and_unload()
    torch.testing.assert_close(logits(whole), wanted, rtol=0, atol=1e-5)
    assert not any(isinstance(m, PackedModule) for m in whole.modules())


def test_convolutions_as_two_of_them():
    """The change of a kernel is the composition of two convolutions."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
    tuned = get_peft_model(nn.Sequential(conv), qalora(target_modules=["0"], r=2, bits=16))
    layer = tuned.base_model.model[0]
    with torch.no_grad():
        layer.hfq_qalora_B["default"].normal_()
        x = torch.zeros(1, 4, 5, 5)
        x[0, 1, 2, 2] = 1
        down = layer.hfq_qalora_A["default"].view(2, 4, 3, 3)
        wanted = nn.functional.conv2d(nn.functional.conv2d(x, down, padding=1),
                                      layer.hfq_qalora_B["default"].view(8, 2, 1, 1))  # fmt: skip
        torch.testing.assert_close(tuned(x) - conv(x), wanted, rtol=0, atol=1e-5)


def test_rates_follow_the_scale(load):
    model = load()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.copy_(10 * model.model.layers[0].mlp.down_proj.weight)
    tuned = get_peft_model(model, qalora(target_modules=["down_proj"]))
    groups = learning_groups(tuned)
    rates = {group["layer"].split("layers.")[-1][0]: group["lr"] for group in groups[:-1]}
    assert rates["1"] == pytest.approx(10 * rates["0"], rel=1e-3)
    assert groups[-1]["layer"] == "scales" and groups[-1]["weight_decay"] == 0
    torch.optim.AdamW(groups).step()
    with pytest.raises(ConfigError, match="is_trainable"):
        learning_groups(load())


# After the quantizer


def test_the_helper_starts_as_the_error(load):
    """At full rank nothing of the rounding is left; with less of it, less is made good."""
    errors = []
    float_logits = logits(load())
    for r in (1, 8, 32):
        tuned = get_peft_model(load(), decay(r=r))
        errors.append(float((logits(tuned) - float_logits).norm()))
        assert "hfq_rank_decay_L" in " ".join(get_peft_model_state_dict(tuned))
    rounded = logits(get_peft_model(load(), decay(step=100)))
    assert errors[2] < 1e-4 < errors[1] < errors[0] < float((rounded - float_logits).norm())


def test_decayed_to_nothing_then_merged(load, tmp_path):
    tuned = get_peft_model(load(), decay())
    layer = tuned.base_model.model.model.layers[0].mlp.down_proj
    seen = []
    for step in range(9):
        train(tuned, 1, first=step, rate=0.1)
        seen.append(layer.rank("default"))
        if layer.rank("default"):
            with pytest.raises(QuantizationError, match=r"at rank \d.*no codes.*step 8"):
                tuned.merge_adapter()
    assert seen == [8, 8, 4, 4, 2, 2, 1, 1, 0]
    state = get_peft_model_state_dict(tuned)
    assert not any("decay_L" in name or "decay_R" in name for name in state)
    wanted = logits(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["step"] == 8
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert torch.equal(logits(again), wanted)
    assert sorted(get_peft_model_state_dict(again)) == sorted(state)
    whole = again.merge_and_unload()
    torch.testing.assert_close(logits(whole), wanted, rtol=0, atol=1e-5)
    whole.save_pretrained(tmp_path / "whole")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(loaded), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("route", ["PeftModel", "load_adapter"])
def test_resumed_in_the_middle_is_the_run_without_a_break(route, load, tmp_path):
    """Inside a phase and at its end: same bits; the factorisation is not done twice."""
    for stop in (3, 4):
        whole = train(get_peft_model(load(), decay()), 7, rate=0.1)
        first = train(get_peft_model(load(), decay()), stop, rate=0.1)
        folder = tmp_path / str(stop)
        first.save_pretrained(folder)
        if route == "PeftModel":
            second = PeftModel.from_pretrained(load(), folder, is_trainable=True)
        else:
            second = load()
            second.load_adapter(folder, is_trainable=True)
        train(second, 7 - stop, first=stop, rate=0.1)
        one, other = (get_peft_model_state_dict(m) for m in (whole, second))
        found = {name.removeprefix("base_model.model."): tensor for name, tensor in other.items()}
        assert len(found) == len(one)
        assert all(torch.equal(found[name.removeprefix("base_model.model.")], tensor) for name, tensor in one.items())


def test_a_trainer_decays_and_resumes(load, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in torch.cat([IDS] * 4)]
    finals = []
    for stop in (None, 3):
        tuned = get_peft_model(load(), decay(r=2))
        arguments = transformers.TrainingArguments(
            tmp_path / str(stop), max_steps=5, save_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            learning_rate=1e-3, disable_tqdm=True, optim="sgd", lr_scheduler_type="constant")  # fmt: skip
        if stop is None:
            transformers.Trainer(tuned, arguments, train_dataset=rows, callbacks=[RankDecayCallback()]).train()
        else:
            resumed = transformers.Trainer(tuned, arguments, train_dataset=rows, callbacks=[RankDecayCallback()])
            resumed.train(resume_from_checkpoint=str(tmp_path / "None" / f"checkpoint-{stop}"))
        assert tuned.base_model.model.model.layers[0].mlp.down_proj.rank("default") == 0
        finals.append(get_peft_model_state_dict(tuned))
    assert all(torch.equal(finals[1][name], tensor) for name, tensor in finals[0].items())


def test_a_second_helper_has_a_weight_of_its_own(load):
    tuned = train(get_peft_model(load(), decay()), 2, rate=0.1)
    first = logits(tuned)
    tuned.add_adapter("second", decay(r=4, phase_steps=1, train_base=False))
    tuned.set_adapter("second")
    train(tuned, 4, rate=0.1)
    assert decay_step(tuned, 4) == 0
    done = logits(tuned)
    tuned.set_adapter("default")
    assert torch.equal(logits(tuned), first)
    with pytest.raises(ConfigError, match="one at a time"):
        tuned.base_model.set_adapter(["default", "second"])
        tuned(IDS)
    tuned.set_adapter("second")
    whole = tuned.merge_and_unload(adapter_names=["second"])
    torch.testing.assert_close(logits(whole), done, rtol=0, atol=1e-5)


def test_rounding_the_sum_is_another_weight(load):
    tuned = get_peft_model(load(), decay(r=4))
    layer = tuned.base_model.model.model.layers[0].mlp.down_proj
    scale, zero = layer._grid("default")
    added = layer.effective(["default"])
    summed = layer._latent("default") + layer.change("default")
    assert (affine.fake(summed, scale, zero, layer.grids["default"]) - added).abs().max() > 0


# What both refuse


@pytest.mark.parametrize("make", [qalora, decay])
def test_bad_configs(make, load):
    for more, message in (
        ({"r": 0}, "r=0: a rank"), ({"r": 2.5}, "r=2.5"), ({"bits": 9}, "bits=9"), ({"bias": "some"}, "bias="),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            make(**more)
    for more, message in (
        ({"r": 33}, "r=33 is above the layer model.layers.0"), ({"bits": None}, "say with bits="),
        ({"target_modules": ["q_proj", "down_prog"]}, "no module 'down_prog'; did you mean 'down_proj'"),
        ({"target_modules": ["input_layernorm"]}, "takes no HFQ_.* adapter"),
    ):  # fmt: skip
        model = load()
        with pytest.raises(ConfigError, match=message):
            get_peft_model(model, make(**more))


def test_more_bad_configs(load):
    with pytest.raises(ConfigError, match="phase_steps"):
        decay(phase_steps=None)
    with pytest.raises(ConfigError, match="schedule='square'"):
        decay(schedule="square")
    with pytest.raises(ConfigError, match="init='zeros'"):
        decay(init="zeros")
    with pytest.raises(ConfigError, match="clip="):
        qalora(clip="tight")
    with pytest.raises(ConfigError, match="packed in 4 bits already"):
        get_peft_model(load("packed"), qalora("packed", bits=3))
    with pytest.raises(ConfigError, match="is packed: the error of its rounding"):
        get_peft_model(load("packed"), decay(bits=None))
    with pytest.raises(ConfigError, match="no HFQ_RANK_DECAY adapter"):
        decay_step(load(), 1)
    tuned = get_peft_model(load(), decay())
    decay_step(tuned, 5)
    with pytest.raises(ConfigError, match="step 1 lies before step 5"):
        decay_step(tuned, 1)


@pytest.mark.parametrize("make", [qalora, decay])
def test_an_adapter_of_another_base(make, load, tmp_path):
    """The hash says so, and the model is left as it was."""
    tuned = get_peft_model(load(), make())
    tuned.save_pretrained(tmp_path)
    for route in ("PeftModel", "load_adapter", "second"):
        other = load()
        with torch.no_grad():
            other.model.layers[1].mlp.down_proj.weight[3, 3] += 0.5
        names = [name for name, _ in other.named_modules()]
        if route == "second":
            other = get_peft_model(other, make())
        with pytest.raises(CheckpointError, match="trained on another base"):
            if route == "PeftModel":
                PeftModel.from_pretrained(other, tmp_path)
            else:
                other.load_adapter(tmp_path, "second")
        if route != "second":
            assert [name for name, _ in other.named_modules()] == names
        else:
            assert "second" not in " ".join(name for name, _ in other.named_parameters())
    half = PeftModel.from_pretrained(load().to(torch.bfloat16), tmp_path)
    assert all(p.dtype == torch.float32 for name, p in half.named_parameters() if name.endswith(("_A", "_L.default")))


def test_configs_before_peft(child):
    """Whichever library is imported first, the types are there."""
    found = child("""
import hfq
out["type"] = hfq.RankDecayConfig(phase_steps=3).peft_type.value
from hfq.integrations.peft.qalora import QALoraConfig
import peft
out["known"] = peft.PeftConfig.from_peft_type(peft_type="HFQ_QALORA", r=3).r
""")
    assert found["type"] == "HFQ_RANK_DECAY" and found["known"] == 3 and "could not register" not in found["stderr"]


def test_loaded_without_hfq(load, tmp_path, child):
    get_peft_model(load("packed"), qalora("packed")).save_pretrained(tmp_path / "one")
    get_peft_model(load(), decay()).save_pretrained(tmp_path / "two")
    found = child(
        """
from peft import AutoPeftModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    out[str(model.peft_config["default"].peft_type.value)] = sum(type(m).__name__.endswith("Layer") and
        hasattr(m, "base_digest") for m in model.modules())
""",
        tmp_path / "one", tmp_path / "two")  # fmt: skip
    assert found["HFQ_QALORA"] == found["HFQ_RANK_DECAY"] == 4
