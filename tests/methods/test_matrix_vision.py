"""What every method for vision transformers owes its users, one row a method and a form of its options."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from killing import killed

import hfq
from hfq import kernels
from hfq.calibration.step import Step
from hfq.errors import ConfigError
from hfq.layers import attention, swap
from hfq.layers.conv import QConv2d


@dataclass(frozen=True)
class Row:
    """A method with options that make it quick on a toy model."""

    slug: str
    options: dict[str, Any] = field(default_factory=dict)
    walks: bool = True  # goes block by block; others show in their own tests that a killed run goes on


LEARN = {"steps": 8, "mlp_steps": 8, "candidates": 16, "attention_candidates": 5, "rounds": 1, "lr": 1e-2}
QUICK = {"coarse": 6, "clip_search_steps": 24, "noise_steps": 12, "mean_steps": 6, "search_rows": 128}
ROWS = {
    row.slug: row
    for row in (
        Row("rtn", {"observer": "percentile"}),
        Row("gptq", {"observer": "percentile"}),
        Row("repquant", {"clip_steps": 10}),
        Row("noisyquant", QUICK),
        Row("aphq_vit", LEARN),
        Row("adaquant", {"steps": 12, "attention_steps": 5}, walks=False),
        Row("lrp_qvit", {"mixed": False, "clip_shares": [0.99, 1.0]}),
        Row("mptq_vit", {"candidates": 12, "low": 0.4, "rounds": 1, "search_rows": 64}),
    )
}
PAPERS = [slug for slug in ROWS if slug not in ("rtn", "gptq")]
COMMON = {"bits": 4, "activation_bits": 4, "calibration_samples": 8, "calibration_batch_size": 4, "progress": False}
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))
BLOCK = "vit.layers.0"


def tiny(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8,
        num_labels=5, initializer_range=0.1))  # fmt: skip
    with torch.no_grad():
        for name, module in model.named_modules():
            if "layernorm_" in name:
                module.weight.mul_(torch.exp(torch.randn(32)))
    return model.eval()


def quantized(slug: str, **more: Any) -> tuple[Any, Any]:
    model = tiny()
    return model, hfq.quantize(model, hfq.HfqConfig(method=slug, **{**COMMON, **ROWS[slug].options, **more}), IMAGES)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES[:4]).logits


def digest(model: Any) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("slug", ROWS)
def test_sixteen_bits_change_nothing(slug: str) -> None:
    model, report = quantized(slug, bits=16, activation_bits=16)
    assert not report.packed and not attention.parts(model)
    assert (logits(model) - logits(tiny())).abs().max() < 1e-3


@pytest.mark.parametrize("slug", ROWS)
def test_the_report_is_complete(slug: str) -> None:
    model, report = quantized(slug)
    packed = swap.packed_modules(model)
    assert {row.module for row in report.packed} == set(packed) and len(packed) == 12
    for row in report.packed:
        layer = packed[row.module]
        stored = sum(t.nbytes for name, t in layer.state_dict().items() if name != "bias")
        assert row.bits == pytest.approx(8 * stored / row.numel) and row.error is not None and 0 < row.error < 1
        assert row.extra["activation"]["bits"] == 4 and row.kernel == swap.kernel_of(layer) != "reference"
        assert row.tokens == 8 * 17
    assert {row.module for row in report.attached} == {f"vit.layers.{i}.attention.hfq_attention" for i in range(2)}
    assert report.rows["classifier"].status == "float" and report.rows["classifier"].reason
    assert report.from_dict(json.loads(report.to_json())).to_dict() == report.to_dict()


@pytest.mark.parametrize("slug", ROWS)
def test_skips_and_overrides(slug: str) -> None:
    skip = [f"{BLOCK}.attention.q_proj", "*.mlp.fc2"]
    wide = {f"{BLOCK}.attention.v_proj": {"bits": 8, "activation_bits": 8}, "*.o_proj": {"activation_bits": 16}}
    model, _ = quantized(slug, modules_to_not_convert=skip, overrides=wide)
    block = model.vit.layers[0]
    assert type(block.attention.q_proj) is torch.nn.Linear and type(block.mlp.fc2) is torch.nn.Linear
    assert block.attention.v_proj.spec.bits == block.attention.v_proj.activation.bits == 8
    assert block.attention.o_proj.activation is None and block.attention.k_proj.activation.bits == 4
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("slug", PAPERS)
def test_wrong_options_are_named(slug: str) -> None:
    for wrong in ({"bitz": 4}, {"bits": 9}, {"activation_bits": 9}, {"activation_bits": 1}, {"kv_bits": 4}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            hfq.HfqConfig(method=slug, **wrong)


@pytest.mark.parametrize("slug", [slug for slug, row in ROWS.items() if row.walks])
def test_same_seed_same_bytes_and_killed_runs_go_on(slug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = digest(quantized(slug)[0])
    assert digest(quantized(slug)[0]) == whole
    own, seen = Step.swap, []
    with killed(after=8):  # in the second block
        quantized(slug, work_dir=tmp_path)
    monkeypatch.setattr(Step, "swap", lambda self, site, *a, **k: seen.append(site) or own(self, site, *a, **k))
    model, report = quantized(slug, work_dir=tmp_path)
    assert len(seen) == 6 and digest(model) == whole and len(report.packed) == 12 and len(report.attached) == 2


@pytest.mark.parametrize("slug", ROWS)
def test_the_fast_kernels_compute_what_the_reference_does(slug: str) -> None:
    model, _ = quantized(slug, bits=8, activation_bits=8)
    fast = logits(model)
    with kernels.use(wna16="reference", wnan="reference", attention="reference"):
        exact = logits(model)
    assert (fast - exact).norm() <= 2e-2 * exact.norm()  # codes on an edge
    assert (exact - logits(tiny())).norm() > (fast - exact).norm()


def test_saved_models_load_bit_exactly_in_a_new_process(tmp_path: Path) -> None:
    wanted = {}
    for slug in ROWS:
        model, _ = quantized(slug)
        model.save_pretrained(tmp_path / slug)
        wanted[slug] = logits(model).tolist()
    torch.save(IMAGES[:4], tmp_path / "images.pt")
    script = (
        "import json, sys, torch\n"
        "from transformers import AutoModelForImageClassification as Auto\n"
        "torch.set_num_threads(int(sys.argv[2]))\n"
        "images = torch.load(sys.argv[1] + '/images.pt')\n"
        "with torch.no_grad():\n"
        "    found = {m: Auto.from_pretrained(sys.argv[1] + '/' + m)(images).logits.tolist() for m in sys.argv[3:]}\n"
        "engine = {'hfq.calibration.walk', 'hfq.rounding.nearest', 'hfq.reconstruction.static'}\n"
        "assert not engine & set(sys.modules), 'loading needs no method and no calibration code'\n"
        "print(json.dumps(found))\n"
    )
    command = [sys.executable, "-P", "-c", script, str(tmp_path), str(torch.get_num_threads()), *ROWS]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == wanted


def distance(slug: str, **options: Any) -> float:
    """From the float models, on images that were not calibrated with; a single random model tells little."""
    options = {**COMMON, "calibration_samples": 16, **options}
    images, total = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(9)), 0.0
    for seed in range(3):
        model = tiny(seed)
        with torch.no_grad():
            wanted = model(images[16:]).logits
            hfq.quantize(model, hfq.HfqConfig(method=slug, **options), images[:16])
            total += float((model(images[16:]).logits - wanted).norm() / wanted.norm())
    return total


@pytest.fixture(scope="module")
def plain_distance() -> float:
    return distance("rtn", observer="minmax")


@pytest.mark.parametrize("slug", PAPERS)
def test_nearer_to_the_float_model_than_the_plain_baseline(slug: str, plain_distance: float) -> None:
    assert distance(slug, **ROWS[slug].options) < plain_distance


@pytest.mark.parametrize("slug", ["repquant", "noisyquant", "adaquant"])  # the others start at logits of classes
def test_towers_that_ask_for_causal_attention_at_each_call(slug: str) -> None:
    """Text in front of images: the module itself does not say that it is causal."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.CLIPModel(transformers.CLIPConfig(
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        text_config={**sizes, "vocab_size": 50, "max_position_embeddings": 8}, projection_dim=8)).eval()
    data = [{"input_ids": torch.arange(1, 13).reshape(2, 6), "pixel_values": IMAGES[i : i + 2]} for i in (0, 2)]
    report = hfq.quantize(model, hfq.HfqConfig(method=slug, **{**COMMON, **ROWS[slug].options}), data)
    assert [row.module for row in report.attached] == ["vision_model.encoder.layers.0.self_attn.hfq_attention"]
    assert any("causal" in note for note in report.notes)
    with torch.no_grad():
        assert torch.isfinite(model(**data[0]).logits_per_image).all()


class Fused(torch.nn.Module):
    """Attention that no interface shows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = torch.nn.LayerNorm(16), torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj(found.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("slug", ROWS)
def test_attention_that_no_interface_shows_is_told(slug: str) -> None:
    torch.manual_seed(0)
    patches = [torch.nn.Conv2d(3, 16, 8, 8), torch.nn.Flatten(2), Turn()]
    pool = torch.nn.AdaptiveAvgPool2d((1, 16))
    model = torch.nn.Sequential(*patches, Fused(), Fused(), pool, torch.nn.Flatten(), torch.nn.Linear(16, 5)).eval()
    report = hfq.quantize(model, hfq.HfqConfig(method=slug, **{**COMMON, **ROWS[slug].options}), IMAGES)
    assert {"3.qkv", "3.proj", "4.qkv", "4.proj"} <= {row.module for row in report.packed} and not report.attached
    assert any("products of attentions stay floats" in note for note in report.notes)


class Turn(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


@pytest.mark.parametrize("slug", ["gptq", "repquant"])
def test_convolutions_with_groups_are_rounded_to_nearest_and_say_so(slug: str) -> None:
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [16], "depths": [2], "groups_width": 8, "num_labels": 3}
    model = transformers.RegNetForImageClassification(transformers.RegNetConfig(**sizes)).eval()
    report = hfq.quantize(model, hfq.HfqConfig(method=slug, **{**COMMON, **ROWS[slug].options}), IMAGES)
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, QConv2d)}
    for name, module in convolutions.items():
        outside = "outside the blocks" in report.rows[name].reason
        assert outside or ("groups" in report.rows[name].reason) == (module.groups > 1)
        assert module.activation is not None
    assert any(module.groups > 1 for module in convolutions.values())
