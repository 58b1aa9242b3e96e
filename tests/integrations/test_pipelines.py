"""Pipelines: recorded calls, components quantized in place, saved, reloaded, offloaded, adapted; what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

accelerate = pytest.importorskip("accelerate")
diffusers = pytest.importorskip("diffusers")

import hfq  # noqa: E402
from hfq.errors import CheckpointError, ConfigError, DataError  # noqa: E402

RTN = {"method": "rtn", "bits": 4, "group_size": 16}


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory, zoo):
    folder = tmp_path_factory.mktemp("text_pipeline")
    zoo.text_to_image(folder).save_pretrained(folder / "float")
    return folder / "float"


@pytest.fixture
def text(text_folder):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(text_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_record_keeps_distinct_timesteps_and_rows(text, tmp_path, zoo):
    """Uniform over the loop (with a scheduler that calls twice at one timestep), a number of rows each, both halves."""
    calls = hfq.record_calls(text, prompts=zoo.PROMPTS, steps=3, samples=3, batch_size=2, num_inference_steps=9,
                             folder=tmp_path / "calls")  # fmt: skip
    assert calls.component == "unet" and calls.guidance and calls.steps == 10
    assert len(calls.timesteps.unique()) == 3
    for timestep in calls.timesteps.unique():
        assert calls.at(timestep).samples == 2 * 3
    assert {"sample", "timestep", "encoder_hidden_states"} == set(calls[0])
    half = calls[0]["encoder_hidden_states"].chunk(2)
    assert torch.equal(half[0][0], half[0][1]) and not torch.equal(half[1][0], half[1][1])
    again = hfq.RecordedCalls.load(tmp_path / "calls")
    assert again.sha256 == calls.sha256 and again.descriptor == calls.descriptor
    # The embedding of a prompt is written once, not at every timestep.
    assert len(list((tmp_path / "calls").glob("*.safetensors"))) < 2 * len(calls) + 3


def test_halves_of_guidance_that_are_called_one_by_one(tmp_path, zoo):
    """Recorded as one call, the half without a prompt first, as by the pipelines that make one."""
    pipe = zoo.text_to_video(tmp_path)
    single = []
    pipe.transformer.register_forward_pre_hook(lambda module, args, given: single.append(given), with_kwargs=True)
    calls = hfq.record_calls(pipe, "transformer", zoo.PROMPTS[:3], steps=2, batch_size=2, num_inference_steps=4,
                             **zoo.VIDEO)  # fmt: skip
    assert calls.guidance and len(calls) == 4 and calls.samples == 2 * 2 * 3
    asked, plain = single[:2]
    for name in ("hidden_states", "encoder_hidden_states", "timestep"):
        assert torch.equal(calls[0][name], torch.cat([plain[name], asked[name]]))
    alone = hfq.record_calls(pipe, "transformer", zoo.PROMPTS[:3], steps=2, num_inference_steps=4,
                             **{**zoo.VIDEO, "guidance_scale": 1.0}, guidance=False)  # fmt: skip
    assert not alone.guidance and alone.samples == 2 * 3


def test_recording_does_not_depend_on_the_batch(text, zoo):
    one = hfq.record_calls(text, prompts=zoo.PROMPTS[:2], every=4, batch_size=1, num_inference_steps=6, seed=5)
    both = hfq.record_calls(text, prompts=zoo.PROMPTS[:2], every=4, batch_size=2, num_inference_steps=6, seed=5)
    first = next(iter(one.at(one.timesteps[0])))["sample"]
    torch.testing.assert_close(both[0]["sample"][[0, 2]], first)
    repeat = hfq.record_calls(text, prompts=zoo.PROMPTS[:2], every=4, batch_size=2, num_inference_steps=6, seed=5)
    assert repeat.sha256 == both.sha256


def test_calls_are_a_sequence_that_can_be_cut(text, tmp_path, zoo):
    calls = hfq.record_calls(text, prompts=zoo.PROMPTS, steps=2, num_inference_steps=4)
    parts = calls.cut(3)
    assert parts.samples == calls.samples and [len(c["sample"]) for c in parts][:3] == [3, 3, 2]
    assert torch.equal(torch.cat([c["sample"] for c in parts[:3]]), calls[0]["sample"])
    assert isinstance(calls[1:], hfq.RecordedCalls) and len(calls[1:]) == 1
    saved = hfq.RecordedCalls.load(parts.save(tmp_path / "parts"))
    assert saved.sha256 == parts.sha256
    with pytest.raises(DataError, match="no call was recorded at timestep"):
        calls.at(3.5)


def test_components_outside_the_loop_and_other_pipelines(text, zoo):
    words = hfq.record_calls(text, "text_encoder", zoo.PROMPTS)
    assert set(words[0]) == {"input_ids"} and math.isnan(words.timesteps[0]) and not words.guidance
    plain = hfq.record_calls(zoo.unconditional(), samples=3, steps=2, num_inference_steps=4)
    assert plain.samples == 6 and not plain.guidance
    classes = hfq.record_calls(zoo.class_conditional(), "transformer", [1, 2, 3], steps=2, num_inference_steps=4)
    assert classes.guidance and classes.samples == 12 and set(classes[0]) == {
        "hidden_states", "timestep", "class_labels"}


def test_recording_spills(text, monkeypatch, tmp_path, zoo):
    """Over the limit tensors are in files; what is read is the same."""
    memory = hfq.record_calls(text, prompts=zoo.PROMPTS, every=2, num_inference_steps=4)
    monkeypatch.setattr("hfq.integrations.recording.MEMORY", 1000)
    disk = hfq.record_calls(text, prompts=zoo.PROMPTS, every=2, num_inference_steps=4)
    assert disk._store.spilled > 0 and disk.sha256 == memory.sha256


def test_damaged_recordings(text, tmp_path, zoo):
    calls = hfq.record_calls(text, prompts=zoo.PROMPTS[:1], steps=1, num_inference_steps=4)
    folder = calls.save(tmp_path / "calls")
    with pytest.raises(DataError, match="already"):
        calls.save(folder)
    with pytest.raises(CheckpointError, match="no recording was finished"):
        hfq.RecordedCalls.load(tmp_path)
    index = json.loads((folder / "calls.json").read_text())
    for change, message in (({"version": 99}, "version 99"), ({"calls": [{}]}, "damaged"),
                            ({"record": {"x": 1}}, "damaged")):  # fmt: skip
        (folder / "calls.json").write_text(json.dumps(index | change))
        with pytest.raises(CheckpointError, match=message):
            hfq.RecordedCalls.load(folder)
    (folder / "calls.json").write_text(json.dumps(index).replace("000000.safetensors", "../x.safetensors"))
    with pytest.raises(CheckpointError, match="outside"):
        hfq.RecordedCalls.load(folder)
    (folder / "calls.json").write_text(json.dumps(index))
    (folder / "000000.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        hfq.RecordedCalls.load(folder)


def test_quantized_pipeline_reloads_in_a_new_process(text, tmp_path, child, zoo):
    """Two components, one of them with recorded calls; the same picture in another process, sharded too."""
    configs = {"unet": hfq.GPTQConfig(bits=4, group_size=16), "text_encoder": RTN}
    assert hfq.quantize_pipeline(text, configs, zoo.PROMPTS, steps=2, num_inference_steps=4) is text
    assert text.unet.is_quantized and text.text_encoder.hfq_report.packed
    assert text.unet.hfq_report.totals["data"]["guidance"] is True
    picture = zoo.draw(text)
    text.save_pretrained(tmp_path / "whole")
    text.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded" / "unet").glob("*.safetensors"))) > 1
    code = """
import torch
from diffusers import DiffusionPipeline
sys.path.insert(0, sys.argv[2])
import pipeline_zoo as zoo
for name in ("whole", "sharded"):
    pipe = DiffusionPipeline.from_pretrained(sys.argv[1] + "/" + name, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    out[name] = zoo.draw(pipe).double().flatten().tolist()
"""
    found = child(code, tmp_path, Path(zoo.__file__).parent)
    for name in ("whole", "sharded"):
        assert torch.equal(torch.tensor(found[name], dtype=torch.float64), picture.double().flatten())


def test_data_free_through_the_pipelines_own_config(text_folder, zoo):
    config = diffusers.PipelineQuantizationConfig(quant_mapping={"unet": hfq.RTNConfig(bits=4, group_size=16)})
    pipe = diffusers.DiffusionPipeline.from_pretrained(text_folder, quantization_config=config, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    live = diffusers.DiffusionPipeline.from_pretrained(text_folder, safety_checker=None)
    live.set_progress_bar_config(disable=True)
    assert torch.equal(zoo.draw(pipe), zoo.draw(hfq.quantize_pipeline(live, {"unet": RTN})))


def test_scheduler_steps_and_batch_may_change(text, zoo):
    hfq.quantize_pipeline(text, {"unet": hfq.GPTQConfig(bits=4)}, zoo.PROMPTS, steps=2, num_inference_steps=4)
    text.scheduler = diffusers.EulerDiscreteScheduler.from_config(text.scheduler.config)
    images = zoo.draw(text, num_inference_steps=5, prompt=zoo.PROMPTS[:3], generator=None, height=16, width=16)
    assert images.shape[0] == 3 and torch.isfinite(images).all()
    assert torch.isfinite(zoo.draw(text, guidance_scale=1.0)).all()


@pytest.mark.parametrize("how", ["whole models", "layer by layer"])
def test_offloaded_pipelines(how, text_folder, tmp_path, zoo):
    """What ``enable_model_cpu_offload`` does, and what ``enable_sequential_cpu_offload`` does with one component."""
    pictures = []
    for offload in (False, True):
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(text_folder, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        if offload and how == "whole models":
            pipe.enable_model_cpu_offload(device="cpu")
        elif offload:
            accelerate.cpu_offload(pipe.unet, torch.device("cpu"), offload_buffers=True)
        hfq.quantize_pipeline(pipe, {"unet": hfq.GPTQConfig(bits=4, group_size=16)}, zoo.PROMPTS, steps=2,
                              num_inference_steps=4)  # fmt: skip
        pictures.append(zoo.draw(pipe))
        assert hasattr(pipe.unet, "_hf_hook") == offload
        pipe.save_pretrained(tmp_path / str(offload))
    # Offloaded layers compute with the reference, others with kernels that round on their own.
    torch.testing.assert_close(pictures[0], pictures[1], rtol=0, atol=2e-2)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "True", safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(zoo.draw(again), pictures[0])


def test_lora_on_a_quantized_unet(text, tmp_path, zoo):
    """An adapter of the float model loads on the packed one, linears and convolutions alike, and can be fused."""
    from peft import LoraConfig

    base = zoo.draw(hfq.quantize_pipeline(text, {"unet": RTN}))
    config = LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights="gaussian")
    donor = zoo.text_unet()
    donor.add_adapter(config)
    with torch.no_grad():
        for name, parameter in donor.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    donor.save_lora_adapter(tmp_path)
    text.unet.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    adapted = zoo.draw(text)
    assert not torch.equal(adapted, base)
    text.unet.disable_lora()
    assert torch.equal(zoo.draw(text), base)
    text.unet.enable_lora()
    with pytest.warns(UserWarning, match="rounds weights"):
        text.unet.fuse_lora()
    fused = zoo.draw(text)
    assert (fused - adapted).norm() < (base - adapted).norm()
    text.unet.unfuse_lora()
    assert torch.equal(zoo.draw(text), adapted)
    text.unet.unload_lora()
    assert torch.equal(zoo.draw(text), base)
    with pytest.raises(ConfigError, match="init_lora_weights"):
        text.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="pissa"), adapter_name="other")


def test_lora_weights_of_a_pipeline(text, tmp_path, zoo):
    """``save_lora_weights`` of a trained UNet, ``load_lora_weights`` into another pipeline, two of them mixed."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    base = zoo.draw(hfq.quantize_pipeline(text, {"unet": RTN}))
    text.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "conv1"]))
    with torch.no_grad():
        for name, parameter in text.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    adapted = zoo.draw(text)
    layers = get_peft_model_state_dict(text.unet)
    type(text).save_lora_weights(tmp_path, unet_lora_layers=layers)
    text.unet.delete_adapters("default")
    text.unet.unload_lora()
    text.load_lora_weights(tmp_path, adapter_name="one")
    assert torch.equal(zoo.draw(text), adapted) and not torch.equal(adapted, base)
    text.load_lora_weights(tmp_path, adapter_name="two")
    text.set_adapters(["one", "two"], [0.5, 0.5])
    torch.testing.assert_close(zoo.draw(text), adapted, rtol=0, atol=1e-2)
    text.unload_lora_weights()
    assert torch.equal(zoo.draw(text), base)


def test_bad_components(text, zoo):
    for name, message in (("unett", "did you mean 'unet'"), ("unet.mid_block", "inside a component"),
                          ("safety_checker", "not loaded"), ("scheduler", "not a model")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            hfq.quantize_pipeline(text, {name: RTN})
    with pytest.raises(ConfigError, match="no pipeline"):
        hfq.record_calls(text.unet, "unet")
    with pytest.raises(ConfigError, match="at least one"):
        hfq.quantize_pipeline(text, {})
    with pytest.raises(ConfigError, match="no Config"):
        hfq.quantize_pipeline(text, {"unet": 4})
    with pytest.raises(ConfigError, match="have no config"):
        hfq.quantize_pipeline(text, {"unet": RTN}, {"vae": zoo.PROMPTS})
    assert not getattr(text.unet, "is_quantized", False)


def test_bad_calibration(text, zoo):
    gptq = {"unet": hfq.GPTQConfig(bits=4)}
    with pytest.raises(DataError, match="needs prompts"):
        hfq.quantize_pipeline(text, gptq)
    with pytest.raises(DataError, match="a list of at least one"):
        hfq.record_calls(text, prompts=[])
    with pytest.raises(ConfigError, match="without prompts"):
        hfq.record_calls(zoo.unconditional(), prompts=zoo.PROMPTS)
    with pytest.raises(DataError, match="removes the unconditional half"):
        hfq.quantize_pipeline(text, gptq, zoo.PROMPTS, guidance_scale=1.0)
    with pytest.raises(ConfigError, match="did you mean 'num_inference_steps'"):
        hfq.record_calls(text, prompts=zoo.PROMPTS, num_inference_step=4)
    with pytest.raises(ConfigError, match="seed="):
        hfq.record_calls(text, prompts=zoo.PROMPTS, generator=torch.Generator())
    with pytest.raises(DataError, match="raise num_inference_steps"):
        hfq.record_calls(text, prompts=zoo.PROMPTS, steps=9, num_inference_steps=4)
    with pytest.raises(ConfigError, match="give one"):
        hfq.record_calls(text, prompts=zoo.PROMPTS, steps=2, every=2)
    with pytest.raises(ConfigError, match="samples=0"):
        hfq.record_calls(text, prompts=zoo.PROMPTS, samples=0)
    with torch.no_grad():
        text.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(DataError, match="NaN or infinite"):
        hfq.record_calls(text, prompts=zoo.PROMPTS[:1], num_inference_steps=2)


def test_recorded_calls_that_do_not_fit(text, zoo):
    calls = hfq.record_calls(text, prompts=zoo.PROMPTS, steps=2, num_inference_steps=4)
    gptq = {"unet": hfq.GPTQConfig(bits=4)}
    with pytest.raises(ConfigError, match="calls of 'unet' were given for 'text_encoder'"):
        hfq.quantize_pipeline(text, {"text_encoder": hfq.GPTQConfig(bits=4)}, calls)
    with pytest.raises(DataError, match="guidance_scale=1 removes the unconditional half"):
        hfq.quantize_pipeline(text, gptq, calls, guidance_scale=1.0)
    halved = hfq.record_calls(text, prompts=zoo.PROMPTS, steps=2, num_inference_steps=4, guidance_scale=1.0,
                              guidance=False)  # fmt: skip
    assert not halved.guidance
    halved.record = halved.record.__class__(**{**vars(halved.record), "meant": None})
    with pytest.raises(DataError, match="lack the unconditional half"):
        hfq.quantize_pipeline(text, gptq, halved)
    text.scheduler = diffusers.DDIMScheduler(num_train_timesteps=50)
    with pytest.raises(DataError, match="has none above 50"):
        hfq.quantize_pipeline(text, gptq, calls)


def test_half_precision_on_a_cpu(text, zoo):
    text.unet.to(torch.float16)
    with pytest.raises(ConfigError, match="float16 and runs on a CPU"):
        hfq.quantize_pipeline(text, {"unet": RTN})
    with pytest.raises(ConfigError, match="float16 and runs on a CPU"):
        hfq.record_calls(text, prompts=zoo.PROMPTS)


def test_missing_and_nested_components_on_reload(text, tmp_path):
    hfq.quantize_pipeline(text, {"unet": RTN}).save_pretrained(tmp_path / "packed")
    shutil.copytree(tmp_path / "packed", tmp_path / "nested")
    (tmp_path / "nested" / "inner").mkdir()
    (tmp_path / "nested" / "unet").rename(tmp_path / "nested" / "inner" / "unet")
    for folder in ("nested", "packed"):
        if folder == "packed":
            shutil.rmtree(tmp_path / "packed" / "unet")
        with pytest.raises((OSError, ValueError), match="unet|config.json"):
            diffusers.DiffusionPipeline.from_pretrained(tmp_path / folder, safety_checker=None)
