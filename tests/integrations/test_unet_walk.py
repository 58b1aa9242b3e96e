"""The walk through UNets and diffusion transformers: order, inputs with skips, convolutions, attention, resuming."""

from __future__ import annotations

import copy

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

import hfq  # noqa: E402
from hfq.calibration import walk  # noqa: E402
from hfq.calibration.cache import leaves  # noqa: E402
from hfq.calibration.capture import calls_of, quiet  # noqa: E402
from hfq.errors import QuantizationError  # noqa: E402
from hfq.graph import read, trace  # noqa: E402
from hfq.graph.units import promote  # noqa: E402
from hfq.layers import attention  # noqa: E402
from hfq.layers.products import AttentionProducts  # noqa: E402
from hfq.report import Report  # noqa: E402

KINDS = ("unet", "text_unet", "transformer")


def model_and_calls(zoo, kind: str, rows: int = 2, calls: int = 2):
    torch.manual_seed(5)
    model, found = getattr(zoo, kind)(), []
    for t in range(calls):
        given = {"sample": torch.randn(rows, model.config.in_channels, 8, 8), "timestep": torch.tensor(10 * t + 5)}
        if kind == "text_unet":
            given["encoder_hidden_states"] = torch.randn(rows, 16, 16)
        if kind == "transformer":
            given = {"hidden_states": given["sample"], "timestep": given["timestep"].expand(rows),
                     "class_labels": torch.arange(rows)}  # fmt: skip
        found.append(given)
    return model, found


def output(model, calls):
    with torch.no_grad():
        return torch.cat([model(**call).sample for call in calls])


def plan_of(model, calls):
    plan = read(model)
    promote(plan)
    with quiet(model):
        trace.order_groups(plan, lambda: model(**calls[0]))
    return plan


@pytest.mark.parametrize("kind", KINDS)
def test_steps_come_in_order_with_what_they_really_see(kind, zoo):
    """Every unit is handed out when the ones before it are done; both streams are those of whole passes."""
    model, calls = model_and_calls(zoo, kind)
    reference, seen = copy.deepcopy(model), {}
    for step in walk.walk(plan_of(model, calls), calls, streams=("quantized", "float"), report=Report()):
        seen[step.block.name] = (step.inputs[:], step.float_inputs[:], [t.clone() for t in step.outputs])
        with torch.no_grad():
            for site in step.block.sites:
                site.module.weight.add_(0.02 * torch.randn_like(site.module.weight))
    for number, stand in enumerate((model, reference)):
        blocks = plan_of(stand, calls).blocks
        assert [block.name for block in blocks] == list(seen)
        for index, call in enumerate(calls):
            with quiet(stand):
                for name, tree in calls_of(stand, blocks, call, {block.name: 1 for block in blocks}):
                    for (_, got), (_, real) in zip(leaves(seen[name][number][index]), leaves(tree), strict=True):
                        assert torch.equal(got, real), name
    for name, (_, floats, targets) in seen.items():
        args, kwargs = floats[0]
        with torch.no_grad():
            assert torch.equal(next(t for _, t in leaves(reference.get_submodule(name)(*args, **kwargs))), targets[0])


def test_layers_between_the_blocks_are_units(zoo):
    model, calls = model_and_calls(zoo, "text_unet")
    names = [block.name for block in plan_of(model, calls).blocks]
    assert names[:3] == ["time_embedding.linear_1", "time_embedding.linear_2", "conv_in"]
    inner = "down_blocks.0.attentions.0"
    place = names.index(f"{inner}.proj_in")
    assert names[place : place + 4] == [f"{inner}.proj_in", f"{inner}.transformer_blocks.0", f"{inner}.proj_out",
                                        "down_blocks.0.downsamplers.0.conv"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_eight_bits_in_and_out(kind, method, zoo, tmp_path):
    """Weights, inputs, and both products of every attention; close to the float model, and the same after reloading."""
    model, calls = model_and_calls(zoo, kind)
    expected = output(model, calls)
    report = hfq.quantize(model, hfq.HfqConfig(method=method, bits=8, activation_bits=8), calls)
    found = output(model, calls)
    assert float((found - expected).norm() / expected.norm()) < 0.05
    assert not torch.equal(found, expected)
    attentions = [m for m in model.modules() if hasattr(m, "set_processor")]
    parts = attention.parts(model)
    assert len(parts) == len(attentions) > 1
    assert all(isinstance(part, AttentionProducts) and None not in part.formats.values() for part in parts.values())
    if kind != "transformer":
        left = [name for name, m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
        assert left == ["conv_out"]
    assert all(row.extra["activation"]["bits"] == 8 for row in report.packed if row.kind != "embedding")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(output(again, calls), found)
    assert again.dtype == torch.float32


def test_solved_columns_beat_the_nearest_ones(zoo):
    """Also in the layers between the blocks: each of them gets inputs."""
    model, calls = model_and_calls(zoo, "unet", rows=4)
    expected = output(model, calls)
    wrong = {}
    for method in ("rtn", "gptq"):
        packed = copy.deepcopy(model)
        report = hfq.quantize(packed, hfq.HfqConfig(method=method, bits=3, activation_bits=8), calls)
        wrong[method] = float((output(packed, calls) - expected).norm())
        assert not [row.module for row in report.packed if "nearest" in row.reason]
    assert wrong["gptq"] < 0.9 * wrong["rtn"]


def test_the_last_convolution_when_it_is_asked_for(zoo):
    model, calls = model_and_calls(zoo, "unet")
    config = hfq.GPTQConfig(bits=4, activation_bits=8, overrides={"conv_out": {"bits": 8}, "conv_in": {"bits": 8}})
    report = hfq.quantize(model, config, calls)
    assert report.rows["conv_out"].status == "packed" and report.rows["conv_out"].asked["bits"] == 8
    assert report.rows["conv_in"].asked["bits"] == 8 and not report.rows["conv_out"].reason


def test_an_interrupted_run_goes_on_to_the_same_bytes(zoo, tmp_path, monkeypatch):
    model, calls = model_and_calls(zoo, "unet")
    config = {"method": "gptq", "bits": 4, "activation_bits": 8, "progress": False}
    whole, again = copy.deepcopy(model), copy.deepcopy(model)
    hfq.quantize(whole, hfq.HfqConfig(**config), calls)
    from hfq.reconstruction import static

    done, pack = [], static.pack_block

    def stopping(step, *args, **options):
        if len(done) == 8:
            raise KeyboardInterrupt
        done.append(step.block.name)
        pack(step, *args, **options)

    monkeypatch.setattr(static, "pack_block", stopping)
    with pytest.raises(KeyboardInterrupt):
        hfq.quantize(model, hfq.HfqConfig(**config, work_dir=tmp_path), calls)
    assert any(name.endswith("attentions.0") for name in done) and "conv_in" in done
    monkeypatch.setattr(static, "pack_block", pack)
    report = hfq.quantize(again, hfq.HfqConfig(**config, work_dir=tmp_path), calls)
    assert len(report.packed) == len(whole.hfq_report.packed)
    one, other = again.state_dict(), whole.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_processor_that_hides_its_products(zoo):
    """Quantized attention is never left out silently; any processor with scaled dot products serves."""
    model, calls = model_and_calls(zoo, "text_unet", calls=1)
    floats = copy.deepcopy(model)
    hfq.quantize(model, hfq.RTNConfig(bits=8, activation_bits=8), calls)
    found = output(model, calls)
    assert torch.equal(output(copy.deepcopy(model), calls), found)
    model.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    with pytest.raises(QuantizationError, match="AttnProcessor does not compute with scaled_dot_product_attention"):
        output(model, calls)
    model.set_attn_processor(diffusers.models.attention_processor.AttnProcessor2_0())
    assert torch.equal(output(model, calls), found)
    assert not [m for m in floats.modules() if hasattr(m, "_hfq_caught")]
    hfq.dequantize(model)
    assert not [m for m in model.modules() if hasattr(m, "_hfq_caught")] and not attention.parts(model)
    assert type(model.down_blocks[0].attentions[0].transformer_blocks[0].attn1) is type(
        floats.down_blocks[0].attentions[0].transformer_blocks[0].attn1)
