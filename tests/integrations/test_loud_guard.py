"""A transformers that does not know hfq stops with an error; it never answers with random weights."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

import hfq

OPEN = """
import torch
from transformers import AutoModel, AutoModelForCausalLM
assert "hfq" not in sys.modules
for name in sys.argv[1:]:
    for auto in (AutoModelForCausalLM, AutoModel):
        key = f"{name} {auto.__name__}"
        try:
            auto.from_pretrained(name)
            out[key] = "loaded"
        except Exception as error:
            out[key] = f"{type(error).__name__}: {error}"
assert "hfq" not in sys.modules
"""


@pytest.fixture(scope="module")
def folders(packed, floats, tmp_path_factory):
    """Packed checkpoints of every kind that could slip through."""
    made = {name: packed(name) for name in ("llama", "gpt2", "mixtral")}
    # Only the experts are packed: every other weight is float and would load.
    config = hfq.RTNConfig(bits=4, group_size=16, modules_to_not_convert=["self_attn"])
    model = AutoModelForCausalLM.from_pretrained(floats("mixtral"), quantization_config=config)
    assert {row.kind for row in model.hfq_report.packed} == {"experts"}
    made["experts"] = tmp_path_factory.mktemp("experts")
    model.save_pretrained(made["experts"])
    # One layer only, saved again after loading, in shards.
    config = hfq.RTNConfig(bits=4, modules_to_not_convert=["self_attn", "layers.0", "up_proj", "gate_proj"])
    model = AutoModelForCausalLM.from_pretrained(floats("llama"), quantization_config=config)
    assert len(model.hfq_report.packed) == 1
    model.save_pretrained(tmp_path_factory.mktemp("first") / "x")
    made["one"] = tmp_path_factory.mktemp("one")
    model.save_pretrained(made["one"], max_shard_size="10KB")
    again = AutoModelForCausalLM.from_pretrained(made["one"])
    made["one again"] = tmp_path_factory.mktemp("one_again")
    again.save_pretrained(made["one again"])
    return made


def test_without_hfq_loading_stops(folders, floats, child):
    found = child(OPEN, floats("llama"), *folders.values(), autoload=False)
    found.pop("stderr")
    # The float model loads: what stops the others is their weights, not the environment.
    assert {found.pop(f"{floats('llama')} {auto}") for auto in ("AutoModelForCausalLM", "AutoModel")} == {"loaded"}
    assert len(found) == 2 * len(folders)
    quiet = {key: value for key, value in found.items() if value == "loaded"}
    assert not quiet, f"loaded with random weights: {quiet}"
    assert all("mismatched" in value for value in found.values()), found


def test_with_hfq_the_same_folders_load(folders):
    for folder in folders.values():
        saved = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert AutoModelForCausalLM.from_pretrained(folder).is_quantized and saved["manifest"]["layers"]

