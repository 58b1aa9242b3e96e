"""What the graph finds in models of many architectures, and that every transform it allows keeps the outputs."""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from hfq.graph import read
from hfq.graph.pairs import discover
from hfq.graph.proof import floats, relative_error
from hfq.graph.table import summary, table
from hfq.transforms import fold, rotate

pytest.importorskip("transformers")


def _load_zoo() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("hfq_model_zoo", Path(__file__).with_name("model_zoo.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hfq_model_zoo"] = module
    spec.loader.exec_module(module)
    return module


zoo = _load_zoo()

# Model: {kind: (proven, refused)} for two blocks a stack (three in LLaVA's vision tower, two stacks in Swin).
EXPECTED = {
    "llama": {"norm": (4, 0), "vo": (2, 0), "updown": (2, 0), "qk": (2, 0), "rotation": (1, 0)},
    "llama-eager": {"norm": (4, 0), "vo": (2, 0), "updown": (2, 0), "qk": (2, 0), "rotation": (1, 0)},
    "qwen3": {"norm": (4, 4), "vo": (2, 0), "updown": (2, 0), "qk": (0, 4), "rotation": (1, 0)},
    "gemma3": {"norm": (4, 8), "vo": (2, 0), "updown": (2, 0), "qk": (0, 4), "rotation": (0, 1)},
    "mistral": {"norm": (4, 0), "vo": (2, 0), "updown": (2, 0), "qk": (2, 0), "rotation": (1, 0)},
    "gpt2": {"norm": (4, 0), "vo": (2, 0), "updown": (0, 2), "qk": (2, 0), "rotation": (1, 0)},
    "opt": {"norm": (4, 0), "vo": (2, 0), "updown": (2, 0), "qk": (2, 0), "rotation": (1, 0)},
    "opt-postnorm": {"norm": (0, 4), "vo": (2, 0), "updown": (2, 0), "qk": (2, 0), "rotation": (0, 1)},
    "phi3": {"norm": (4, 0), "vo": (2, 0), "updown": (2, 0), "qk": (2, 0), "rotation": (1, 0)},
    "falcon": {"norm": (2, 0), "vo": (2, 0), "updown": (0, 2), "qk": (2, 0), "rotation": (1, 0)},
    "falcon-new": {"norm": (4, 0), "vo": (2, 0), "updown": (0, 2), "qk": (2, 0), "rotation": (1, 0)},
    "mixtral": {"norm": (4, 0), "vo": (2, 0), "updown": (2, 0), "qk": (2, 0), "rotation": (1, 0)},
    "mixtral-eager": {"norm": (4, 0), "vo": (2, 0), "updown": (2, 0), "qk": (2, 0), "rotation": (1, 0)},
    "bert": {"norm": (0, 4), "vo": (2, 0), "updown": (0, 2), "qk": (2, 0), "rotation": (0, 1)},
    "t5": {"norm": (10, 0), "vo": (6, 0), "updown": (4, 0), "qk": (6, 0), "rotation": (2, 0)},
    "t5-gated": {"norm": (10, 0), "vo": (6, 0), "updown": (4, 0), "qk": (6, 0), "rotation": (2, 0)},
    "whisper": {"norm": (10, 0), "vo": (6, 0), "updown": (0, 4), "qk": (6, 0), "rotation": (2, 0)},
    "vit": {"norm": (4, 0), "vo": (2, 0), "updown": (0, 2), "qk": (2, 0), "rotation": (1, 0)},
    "swin": {"norm": (8, 0), "vo": (4, 0), "updown": (0, 4), "qk": (4, 0), "rotation": (2, 0)},
    "clip": {"norm": (8, 0), "vo": (4, 0), "updown": (0, 4), "qk": (4, 0), "rotation": (2, 0)},
    "llava": {"norm": (10, 0), "vo": (5, 0), "updown": (2, 3), "qk": (5, 0), "rotation": (1, 1)},
    "mamba": {"norm": (2, 0), "updown": (0, 2), "direct": (2, 0), "rotation": (1, 0)},
}

# Model: pairs of its first block, names without the block.
MEMBERS = {
    "llama": {"norm": ["input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj",
                       "post_attention_layernorm -> mlp.gate_proj, mlp.up_proj"],
              "vo": ["self_attn.v_proj -> self_attn.o_proj"], "updown": ["mlp.up_proj -> mlp.down_proj"],
              "qk": ["self_attn.q_proj <-> self_attn.k_proj"]},
    "gemma3": {"norm": ["input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj",
                        "pre_feedforward_layernorm -> mlp.gate_proj, mlp.up_proj"]},
    "gpt2": {"norm": ["ln_1 -> attn.c_attn", "ln_2 -> mlp.c_fc"], "vo": ["attn.c_attn[64:96] -> attn.c_proj"],
             "qk": ["attn.c_attn[0:32] <-> attn.c_attn[32:64]"]},
    "opt": {"updown": ["fc1 -> fc2"]},
    "phi3": {"vo": ["self_attn.qkv_proj[48:64] -> self_attn.o_proj"],
             "updown": ["mlp.gate_up_proj[48:96] -> mlp.down_proj"],
             "qk": ["self_attn.qkv_proj[0:32] <-> self_attn.qkv_proj[32:48]"]},
    "falcon": {"norm": ["input_layernorm -> self_attention.query_key_value, mlp.dense_h_to_4h"],
               "vo": ["self_attention.query_key_value[40:48] -> self_attention.dense"]},
    # One group of rows a key-value head: [query, query, key, value], twice.
    "falcon-new": {"vo": ["self_attention.query_key_value[16 of 64] -> self_attention.dense"]},
    "mixtral": {"norm": ["input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj",
                         "post_attention_layernorm -> mlp.gate, mlp.experts.gate_up_proj"],
                "updown": ["mlp.experts.gate_up_proj[48:96] -> mlp.experts.down_proj"]},
    "t5-gated": {"updown": ["layer.1.DenseReluDense.wi_1 -> layer.1.DenseReluDense.wo"]},
    "mamba": {"norm": ["norm -> mixer.in_proj"], "direct": ["mixer.x_proj[0:4] -> mixer.dt_proj"]},
}
REASONS = {
    "gemma3": {"rotation": "post_attention_layernorm cannot be folded", "qk": "normalised by"},
    "qwen3": {"qk": "q_norm"},
    "opt-postnorm": {"rotation": "cannot be folded", "norm": "added to another tensor"},
    "bert": {"rotation": "cannot be folded", "norm": "added to another tensor", "updown": "passes through gelu"},
    "llava": {"rotation": "is also read by", "updown": "passes through sigmoid"},
    "vit": {"updown": "passes through gelu"},
}


@pytest.mark.parametrize("name", list(EXPECTED))
def test_pairs_and_transforms(name):
    model, call = zoo.build(name)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    plan = read(model)
    report = discover(plan, call)
    assert report.counts() == EXPECTED[name], table({name: report}, details=True)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(pair.error is not None and pair.error < 1e-12 for pair in report.proven())
    assert all(pair.reason for pair in report.refused())
    _check_members(name, plan, report)
    before = floats(call())
    folded = fold.fold_norms(model, plan, report)
    assert len(folded) == EXPECTED[name]["norm"][0]
    assert all(pair.sources[0].part.get_gain().eq(1).all() for pair in report.proven("norm"))
    assert relative_error(floats(call()), before) < 1e-4
    done = rotate.rotate_stream(model, plan, report, call=call, generator=torch.Generator().manual_seed(0))
    assert len(done) == EXPECTED[name]["rotation"][0] and not any(pair.reason for pair in done)
    assert relative_error(floats(call()), before) < 1e-4
    assert len(rotate.rotate_heads(model, plan, report)) == EXPECTED[name].get("vo", (0, 0))[0]
    for site in plan.sites:
        if site.kind != "experts" and not site.bypassed:
            rotate.online_input(site)
    assert relative_error(floats(call()), before) < 1e-4


def _check_members(name, plan, report):
    block = plan.blocks[0].name
    for kind, wanted in MEMBERS.get(name, {}).items():
        found = [str(pair).split(" (")[0].removeprefix(kind).strip().replace(block + ".", "")
                 for pair in report.proven(kind, block)]
        assert found == wanted
    for kind, text in REASONS.get(name, {}).items():
        reasons = [pair.reason for pair in report.refused(kind)]
        assert any(text in reason for reason in reasons), reasons


@pytest.mark.parametrize("name", ["llama", "vit", "falcon-new", "t5"])
def test_random_rotation_and_random_matrix(name):
    model, call = zoo.build(name)
    plan = read(model)
    report = discover(plan, call)
    before = floats(call())
    place = report.proven("rotation")[0].place
    changed = copy.deepcopy(next(iter(report.proven("rotation")[0].readers)).part.weight)
    assert rotate.rotate_stream(model, plan, report, kind="random", call=call, stacks=[place])
    assert relative_error(floats(call()), before) < 1e-4
    assert not torch.allclose(changed, report.proven("rotation")[0].readers[0].part.weight)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "phi3", "falcon", "mixtral", "t5", "swin", "mamba"])
def test_names_do_not_matter(name):
    model, call = zoo.build(name)
    expected = discover(read(model), call)
    renamed, call = zoo.build(name)
    count = _rename(renamed)
    names = {part for path, _ in renamed.named_modules() for part in path.split(".") if part and not part.isdigit()}
    assert count > 10 and all(part.startswith("m_") for part in names)
    found = discover(read(renamed), call)
    assert [_anonymous(pair) for pair in found] == [_anonymous(pair) for pair in expected]


def _anonymous(pair):
    sides = [[link.index.tolist() for link in side] for side in (pair.sources, pair.readers, pair.partners)]
    return pair.kind, pair.proven, sides, pair.classes, pair.through, pair.rotates, pair.bias_moves


def _rename(model: nn.Module) -> int:
    """Give every submodule a name that says nothing; the model's own code still finds it by its old one."""
    count, classes = 0, {}
    for module in list(model.modules()):
        if isinstance(module, (nn.ModuleList, nn.Sequential)) or not module._modules:
            continue
        names = {old: f"m_{index}" for index, old in enumerate(module._modules)}
        module._modules = {names[old]: child for old, child in module._modules.items()}
        module.__dict__["old_names"] = names
        module.__class__ = classes.setdefault(type(module), _with_old_names(type(module)))
        count += len(names)
    return count


def _with_old_names(cls: type) -> type:
    def lookup(self, key):
        names = self.__dict__.get("old_names", {})
        return self._modules[names[key]] if key in names else cls.__getattr__(self, key)

    return type(cls.__name__, (cls,), {"__getattr__": lookup, "__module__": cls.__module__})


def test_bfloat16_model():
    model, call = zoo.build("llama")
    model.to(torch.bfloat16)
    plan = read(model)
    report = discover(plan, call)
    assert report.counts() == EXPECTED["llama"]
    before = floats(call())
    assert rotate.rotate_stream(model, plan, report, call=call)
    assert relative_error(floats(call()), before) < 5e-2
    assert all(p.dtype == torch.bfloat16 for n, p in model.named_parameters() if "hfq_rotation" not in n)


def test_generation_with_a_cache_after_rotation():
    model, call = zoo.build("llama")
    plan = read(model)
    ids = torch.randint(3, zoo.VOCAB, (1, 6))
    before = model.generate(ids, max_new_tokens=8, do_sample=False)
    report = discover(plan, call)
    rotate.rotate_stream(model, plan, report)
    rotate.rotate_heads(model, plan, report)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), before)


def test_table_and_rows():
    model, call = zoo.build("gemma3")
    report = discover(read(model), call)
    text = table({"gemma3": report}, details=True)
    assert "rotation refused" in text and "4/8" in text
    rows = {row["kind"]: row for row in summary(report)}
    assert rows["vo"]["example"] == "self_attn.v_proj -> self_attn.o_proj"
    assert {"kind", "place", "sources", "readers", "proven", "error", "reason"} <= set(report.rows()[0])
