"""What every method for diffusion models owes its users, one row a method and a form of its options."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import hfq
from hfq.errors import DataError
from hfq.layers import attention, swap

pytest.importorskip("diffusers")


@dataclass(frozen=True)
class Row:
    """A method with options that make it quick on a toy model.

    Attributes:
        head: whether it packs the last convolution too.
        first: whether it packs the first one.
        attention: whether it quantizes the products of attentions.
    """

    slug: str
    options: dict[str, Any] = field(default_factory=dict)
    head: bool = False
    first: bool = True
    attention: bool = True


ROWS = {
    row.slug: row
    for row in (
        Row("rtn"),
        Row("gptq"),
        Row("q_diffusion", {"steps": 2, "activation_steps": 2, "batch_size": 4}, head=True),
        Row("dgq", {"steps": 0, "groups": 4}, first=False),
        Row("quest", {"rounding_steps": 1, "time_steps": 1, "critical_steps": 1, "batch_size": 2, "timewise": True},
            head=True),
        Row("efficientdm", {"steps": 2, "keep_shortcuts": False}, head=True, attention=False),
    )
}
COMMON = {"bits": 4, "activation_bits": 8, "progress": False}


def calls_of(model: Any, count: int = 2) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    return [{"sample": torch.randn(2, model.config.in_channels, 8, 8, generator=generator),
             "timestep": torch.tensor(7 + 20 * i)} for i in range(count)]  # fmt: skip


def quantized(zoo: Any, slug: str, **more: Any) -> tuple[Any, Any]:
    model = zoo.unet()
    options = {**COMMON, **ROWS[slug].options, **more}
    return model, hfq.quantize(model, hfq.HfqConfig(method=slug, **options), calls_of(model))


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**call).sample for call in calls_of(model)])


def digest(model: Any) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@pytest.fixture(scope="module", params=ROWS)
def done(request: pytest.FixtureRequest, zoo: Any) -> tuple[str, Any, Any]:
    """Each method once, as its row says."""
    return request.param, *quantized(zoo, request.param)


@pytest.mark.parametrize("slug", ROWS)
def test_sixteen_bits_change_nothing(slug: str, zoo: Any) -> None:
    model, report = quantized(zoo, slug, bits=16, activation_bits=16)
    assert not report.packed and not attention.parts(model)
    assert (output(model) - output(zoo.unet())).abs().max() < 1e-4


def test_the_report_is_complete(done: tuple[str, Any, Any]) -> None:
    slug, model, report = done
    packed = swap.packed_modules(model)
    assert {row.module for row in report.packed} == set(packed)
    assert len(packed) == 49 + ROWS[slug].head + ROWS[slug].first
    for row in report.packed:
        assert row.error is not None and 0 < row.error < 1 and row.kernel
        assert row.extra["activation"]["bits"] == 8 and row.tokens
    assert len(report.attached) == len(attention.parts(model)) == 4 * ROWS[slug].attention
    assert ROWS[slug].head or report.rows["conv_out"].reason
    assert report.from_dict(json.loads(report.to_json())).to_dict() == report.to_dict()


def test_reloads_to_the_same_output(done: tuple[str, Any, Any], tmp_path: Any) -> None:
    _, model, _ = done
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    again = type(model).from_pretrained(tmp_path)
    assert again.dtype == torch.float32 and torch.equal(output(again), output(model))
    assert hfq.dequantize(again) is again and not swap.packed_modules(again) and not attention.parts(again)


def test_other_timesteps_and_batches(done: tuple[str, Any, Any]) -> None:
    _, model, _ = done
    with torch.no_grad():
        for rows in (1, 5):
            found = model(torch.randn(rows, 3, 16, 16), torch.tensor(3)).sample
            assert found.shape == (rows, 3, 16, 16) and torch.isfinite(found).all()


@pytest.mark.parametrize("slug", ROWS)
def test_skips_and_overrides(slug: str, zoo: Any) -> None:
    inner = "up_blocks.0.resnets.0"
    wide = {f"{inner}.conv1": {"bits": 8}, "*.to_q": {"activation_bits": 16}, "conv_out": {"bits": 8}}
    model, report = quantized(zoo, slug, modules_to_not_convert=["mid_block", f"{inner}.conv2"], overrides=wide)
    assert isinstance(model.get_submodule(f"{inner}.conv2"), torch.nn.Conv2d)
    assert not [name for name in swap.packed_modules(model) if name.startswith("mid_block")]
    assert model.get_submodule(f"{inner}.conv1").spec.bits == 8 and model.conv_out.spec.bits == 8
    assert model.up_blocks[0].attentions[0].to_q.product_input is None
    assert report.rows["mid_block.resnets.0.conv1"].status == "float" and torch.isfinite(output(model)).all()


def test_the_same_bytes_again(zoo: Any, done: tuple[str, Any, Any]) -> None:
    slug, model, _ = done
    assert digest(quantized(zoo, slug)[0]) == digest(model)


@pytest.mark.parametrize("slug", ROWS)
def test_without_data(slug: str, zoo: Any) -> None:
    with pytest.raises(DataError, match="needs calibration data"):
        hfq.quantize(zoo.unet(), hfq.HfqConfig(method=slug, **COMMON, **ROWS[slug].options))
