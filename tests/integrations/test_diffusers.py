"""Diffusers: data-free quantization on load, saving, loading again, whole pipelines."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

diffusers = pytest.importorskip("diffusers")

import hfq  # noqa: E402
from hfq.errors import CheckpointError, DataError  # noqa: E402


def unet() -> diffusers.UNet2DModel:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


def image(model):
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8), torch.tensor([10])).sample


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    unet().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(floats, tmp_path_factory):
    model = diffusers.UNet2DModel.from_pretrained(floats, quantization_config=hfq.RTNConfig(bits=4, group_size=16))
    folder = tmp_path_factory.mktemp("packed_unet")
    model.save_pretrained(folder)
    return folder, image(model), model


def test_round_trip(packed, floats):
    folder, expected, memory = packed
    assert len(memory.hfq_report.packed) >= 8 and not torch.equal(image(unet()), expected)
    saved = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "hfq" and len(saved["manifest"]["layers"]) == len(memory.hfq_report.packed)
    again = diffusers.UNet2DModel.from_pretrained(folder)
    assert torch.equal(image(again), expected) and again.is_quantized
    assert again.hfq_report.to_dict()["rows"] == memory.hfq_report.to_dict()["rows"]
    packed_layers = [again.get_submodule(name) for name in saved["manifest"]["layers"]]
    assert not any(p.requires_grad or p.is_meta for module in packed_layers for p in module.parameters())
    assert again.hf_quantizer.is_serializable and again.hf_quantizer.is_trainable


def test_saved_again_and_sharded(packed, tmp_path):
    folder, expected, _ = packed
    diffusers.UNet2DModel.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(image(diffusers.UNet2DModel.from_pretrained(tmp_path)), expected)


def test_half_precision_keeps_the_scales(packed, tmp_path):
    folder, _, memory = packed
    model = diffusers.UNet2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    name = next(iter(model.config.quantization_config.manifest["layers"]))
    one, other = model.get_submodule(name), memory.get_submodule(name)
    assert one.scale.dtype == torch.float16 and torch.equal(one.scale, other.scale)
    assert model.conv_in.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    assert torch.equal(diffusers.UNet2DModel.from_pretrained(tmp_path).get_submodule(name).scale, other.scale)


def test_live_model(packed, tmp_path):
    model = unet()
    hfq.quantize(model, hfq.RTNConfig(bits=4, group_size=16))
    model.save_pretrained(tmp_path)
    assert torch.equal(image(diffusers.UNet2DModel.from_pretrained(tmp_path)), packed[1])


def test_dequantize(packed, tmp_path):
    model = diffusers.UNet2DModel.from_pretrained(packed[0])
    model.dequantize()
    assert not [m for m in model.modules() if hasattr(m, "qweight")]
    torch.testing.assert_close(image(model), packed[1], rtol=0, atol=2e-2)  # the kernel's own rounding
    model.save_pretrained(tmp_path)
    again = diffusers.UNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(image(again), image(model)) and not getattr(again, "is_quantized", False)
    hfq.dequantize(diffusers.UNet2DModel.from_pretrained(packed[0])).save_pretrained(tmp_path / "function")
    assert torch.equal(image(diffusers.UNet2DModel.from_pretrained(tmp_path / "function")), image(model))


@pytest.mark.parametrize("how", ["mapping", "backend"])
def test_pipeline(how, tmp_path):
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(num_train_timesteps=20)).save_pretrained(tmp_path / "float")
    config = {
        "mapping": {"quant_mapping": {"unet": hfq.RTNConfig(bits=4, group_size=16)}},
        "backend": {"quant_backend": "hfq", "quant_kwargs": {"method": "rtn", "bits": 4, "group_size": 16},
                    "components_to_quantize": ["unet"]},
    }[how]
    pipe = diffusers.DDPMPipeline.from_pretrained(
        tmp_path / "float", quantization_config=diffusers.PipelineQuantizationConfig(**config)
    )
    pipe.set_progress_bar_config(disable=True)

    def draw(pipe):
        return pipe(generator=torch.manual_seed(0), num_inference_steps=2, output_type="np").images

    assert pipe.unet.is_quantized
    first = draw(pipe)
    pipe.save_pretrained(tmp_path / "packed")
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path / "packed")
    again.set_progress_bar_config(disable=True)
    assert (draw(again) == first).all()


def test_diffusers_without_hfq_stops(packed, child):
    found = child("""
import diffusers
try:
    diffusers.UNet2DModel.from_pretrained(sys.argv[1])
    out["result"] = "loaded"
except Exception as error:
    out["result"] = f"{type(error).__name__}: {error}"
assert "hfq" not in sys.modules
""", packed[0], autoload=False)
    assert found["result"].startswith("ValueError: Unknown quantization type")


def test_missing_tensor_and_wrong_shape(packed, tmp_path):
    tensors = load_file(packed[0] / "diffusion_pytorch_model.safetensors")
    with safe_open(packed[0] / "diffusion_pytorch_model.safetensors", framework="pt") as handle:
        metadata = handle.metadata()
    name = next(key for key in tensors if key.endswith("qweight"))
    for case, broken, message in (
        ("missing", {k: v for k, v in tensors.items() if k != name}, "lacks"),
        ("shape", tensors | {name: tensors[name][..., :-1].contiguous()}, "has shape"),
    ):
        folder = tmp_path / case
        folder.mkdir()
        (folder / "config.json").write_bytes((packed[0] / "config.json").read_bytes())
        save_file(broken, folder / "diffusion_pytorch_model.safetensors", metadata)
        with pytest.raises(CheckpointError, match=message):
            diffusers.UNet2DModel.from_pretrained(folder)


def test_a_method_with_data_says_so_before_loading(floats):
    with pytest.raises(DataError, match="needs calibration data"):
        diffusers.UNet2DModel.from_pretrained(floats, quantization_config=hfq.GPTQConfig())
