"""From a manifest to empty layers: exact where it fits, one clear error where it does not, nothing changed then."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from hfq.errors import CheckpointError
from hfq.formats import QuantSpec, affine
from hfq.layers import Hadamard, PackedModule, install_rotation, swap
from hfq.layers.packed import PackedModule as Base

pytestmark = pytest.mark.filterwarnings("ignore:.*slow backend:RuntimeWarning")


class Body(nn.Module):
    base_model_prefix = "model"

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 64)
        self.block = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64, bias=False))
        self.norm = nn.LayerNorm(64)

    def forward(self, ids):
        return self.norm(self.block(self.embed(ids)))


class Headed(nn.Module):
    base_model_prefix = "model"

    def __init__(self):
        super().__init__()
        self.model = Body()
        self.head = nn.Linear(64, 20)

    def forward(self, ids):
        return self.head(self.model(ids))


class Bank(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 12, 8))

    def forward(self, x):
        return x @ self.up[0].t()


IDS = torch.arange(20)[None]


def packed():
    model = Headed()
    for name, spec, online in (
        ("model.embed", QuantSpec(8), None), ("model.block.0", QuantSpec(4, 32), None),
        ("model.block.2", QuantSpec(3, 32, symmetric=True), Hadamard(96, signs=torch.ones(96, dtype=torch.int8))),
        ("head", QuantSpec(2, 16, zero_point="float"), None),
    ):  # fmt: skip
        weight = model.get_submodule(name).weight.detach()
        codes = affine.quantize(weight if online is None else online.fold(weight), spec)
        swap.swap(model, name, codes, online=online)
    install_rotation(model, "model.block.0", "model.block.2", "hadamard", {"signs": torch.ones(64, dtype=torch.int8)})
    return model


def on_meta(cls=Headed):
    with torch.device("meta"):
        return cls()


def test_round_trip_through_json_on_meta():
    model = packed()
    manifest = json.loads(json.dumps(swap.describe(model)))
    other = on_meta()
    names = swap.build_empty(other, manifest)
    assert names == ["model.embed", "model.block.0", "model.block.2", "head"]
    assert {p.device.type for p in other.parameters()} == {"meta"}
    assert {k: (v.shape, v.dtype) for k, v in other.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in model.state_dict().items()
    }
    other.load_state_dict(model.state_dict(), assign=True)
    swap.check(other)
    swap.freeze(other)
    assert torch.equal(other(IDS), model(IDS))
    assert swap.describe(other) == manifest
    assert all(module.label == name for name, module in swap.packed_modules(other).items())


def test_on_a_real_device_and_twice():
    model, other = packed(), Headed()
    swap.build_empty(other, swap.describe(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS), model(IDS))
    assert swap.build_empty(other, swap.describe(model)) == []
    assert torch.equal(other(IDS), model(IDS))


def test_the_skeleton_s_dtype_is_the_compute_dtype():
    other = on_meta().to(torch.bfloat16)
    swap.build_empty(other, swap.describe(packed()))
    layer = other.model.block[0]
    assert layer.compute_dtype == torch.bfloat16 and layer.bias.dtype == torch.bfloat16
    assert layer.scale.dtype == torch.float16 and layer.qweight.dtype == torch.uint8


def test_without_and_with_a_head():
    """A headless model from the checkpoint of a headed one, and the other way round."""
    model = packed()
    body = on_meta(Body)
    assert swap.build_empty(body, swap.describe(model)) == ["embed", "block.0", "block.2"]
    state = {k.removeprefix("model."): v for k, v in model.state_dict().items() if k.startswith("model.")}
    body.load_state_dict(state, assign=True)
    assert torch.equal(body(IDS), model.model(IDS))
    headed = on_meta()
    assert swap.build_empty(headed, swap.describe(model.model)) == ["model.embed", "model.block.0", "model.block.2"]


def test_part_of_a_model():
    """A block by itself, as the progress file of a run holds it."""
    model = packed()
    block = on_meta(Body).block
    assert swap.build_empty(block, swap.describe(model.model.block)) == ["0", "2"]
    block.load_state_dict(model.model.block.state_dict(), assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(block(x), model.model.block(x))


def edited(change):
    manifest = copy.deepcopy(swap.describe(packed()))
    change(manifest)
    return manifest


def entry(field, value, name="model.block.0"):
    return lambda m: m["layers"][name].__setitem__(field, value)


def spec(field, value):
    return lambda m: m["layers"]["model.block.0"]["spec"].__setitem__(field, value)


def online(field, value):
    return lambda m: m["layers"]["model.block.2"]["online"].__setitem__(field, value)


def another(name):
    return lambda m: m["layers"].__setitem__(name, m["layers"]["head"])


def rotation(field, value):
    return lambda m: m["rotations"][0].__setitem__(field, value)


BAD = {
    "no dictionary": (lambda m: m.__setitem__("layers", []), "dictionary 'layers'"),
    "no list": (lambda m: m.__setitem__("rotations", {}), "list 'rotations'"),
    "newer": (lambda m: m.__setitem__("version", 999), "999.*upgrade"),
    "odd version": (lambda m: m.__setitem__("version", "1"), "version '1'"),
    "unknown part": (lambda m: m.__setitem__("codebooks", {}), "codebooks"),
    "damaged entry": (lambda m: m["layers"].__setitem__("model.block.0", 3), "model.block.0"),
    "unknown kind": (entry("kind", "ternary"), "model.block.0: unknown kind 'ternary'"),
    "other kind": (entry("kind", "embedding"), "model.block.0: the manifest says embedding"),
    "kind of another type": (entry("kind", ["linear"]), "model.block.0: unknown kind"),
    "another module": (another("model.norm"), "model.norm: no packed layer"),
    "no such module": (another("model.nowhere"), "model.nowhere is packed"),
    "the model itself": (another(""), "entry ''"),
    "an attribute": (another("forward"), "forward is packed"),
    "negative size": (entry("out_features", -96), "model.block.0: out_features=-96"),
    "zero size": (entry("in_features", 0), "model.block.0: in_features=0"),
    "absurd size": (entry("out_features", 1 << 60), "model.block.0: out_features=1152921504606846976"),
    "size of text": (entry("in_features", "64"), "model.block.0: in_features='64'"),
    "size of truth": (entry("in_features", True), "in_features=True"),
    "size of another model": (entry("in_features", 128), "model.block.0: in_features is 128 in the manifest and 64"),
    "rows of another model": (entry("out_features", 21, "model.embed"), "model.embed: out_features is 21"),
    "bits 9": (spec("bits", 9), "model.block.0.*bits=9"),
    "bits text": (spec("bits", "4"), "model.block.0.*bits='4'"),
    "negative group": (spec("group_size", -5), "model.block.0.*group_size=-5"),
    "unknown dtype": (spec("scale_dtype", "float8"), "model.block.0.*float8"),
    "unknown format field": (spec("levels", 3), "model.block.0.*levels"),
    "format of another type": (entry("spec", 4), "model.block.0.*not valid"),
    "missing field": (lambda m: m["layers"]["model.block.0"].pop("bias"), "model.block.0: .*are needed"),
    "unknown field": (entry("low_rank", 8), "model.block.0: .*low_rank"),
    "bias of text": (entry("bias", "yes"), "model.block.0: bias='yes'"),
    "bias of a table": (entry("bias", True, "model.embed"), "model.embed: bias=True"),
    "unknown transform": (online("kind", "givens"), "model.block.2: unknown online"),
    "transform of another size": (online("size", 64), "model.block.2.online: size is 64"),
    "transform block": (online("block", 7), "model.block.2: .*block of 7"),
    "negative transform block": (online("block", -8), "model.block.2: .*block of -8"),
    "transform of text": (entry("online", "hadamard"), "model.block.0.online"),
    "rotation of nothing": (rotation("module", "model.block.9"), "model.block.9"),
    "rotation without a place": (lambda m: m["rotations"].__setitem__(0, {"side": "in"}), "damaged rotation"),
    "rotation side": (rotation("side", "up"), "model.block.0.*damaged"),
    "rotation kind": (rotation("kind", "givens"), "model.block.0.*givens"),
    "rotation size": (rotation("size", -4), "model.block.0.*damaged"),
    "absurd rotation": (rotation("size", 1 << 40), "model.block.0.*fits nothing"),
    "rotation of another model": (rotation("size", 128), "model.block.0.*size 128, which fits nothing"),
    "rotation block": (rotation("block", 0), "model.block.0.*block of 0"),
    "rotation block of text": (rotation("block", "8"), "model.block.0"),
    "rotation with more": (rotation("angle", 3), "model.block.0.*damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_manifest_is_one_clear_error(name):
    change, words = BAD[name]
    manifest = edited(change)
    model = on_meta()
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(CheckpointError, match=words):
        swap.build_empty(model, manifest)
    assert {n: type(m) for n, m in model.named_modules()} == before, "the model was changed all the same"


@pytest.mark.parametrize("manifest", [None, [], "manifest", 7])
def test_no_manifest(manifest):
    with pytest.raises(CheckpointError, match="dictionary is needed"):
        swap.build_empty(on_meta(), manifest)


def test_nothing_is_allocated_for_an_absurd_size():
    """On a real device too, where an allocation would fail in another way, or succeed."""
    manifest = edited(entry("out_features", 1 << 30))
    with pytest.raises(CheckpointError, match="out_features is 1073741824"):
        swap.build_empty(Headed(), manifest)


def test_packed_otherwise_than_the_manifest_says():
    model = packed()
    manifest = edited(spec("bits", 8))
    with pytest.raises(CheckpointError, match="model.block.0 is packed already"):
        swap.build_empty(model, manifest)


EXPERTS = {
    "count": ("experts", 3, "bank.up: experts is 3"), "turned": ("transposed", True, "bank.up: out_features"),
    "no truth": ("transposed", 1, "bank.up is packed"), "columns": ("in_features", -1, "bank.up: in_features=-1"),
    "unknown": ("gate", 1, "bank.up: .*gate"),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_bad_experts(name):
    model = nn.ModuleDict({"bank": Bank()})
    codes = {"up": [affine.quantize(w.detach(), QuantSpec(4)) for w in model.bank.up]}
    swap.swap_experts(model, "bank", codes)
    manifest = swap.describe(model)
    other = nn.ModuleDict({"bank": Bank()})
    swap.build_empty(other, copy.deepcopy(manifest))
    assert isinstance(other.bank, PackedModule) and PackedModule is Base
    field, value, words = EXPERTS[name]
    manifest["layers"]["bank"]["params"]["up"][field] = value
    with pytest.raises(CheckpointError, match=words):
        swap.build_empty(nn.ModuleDict({"bank": Bank()}), manifest)
    with pytest.raises(CheckpointError, match="bank: .*no such experts|bank.up is packed"):
        swap.build_empty(nn.ModuleDict({"bank": nn.Linear(8, 12)}), swap.describe(model))
