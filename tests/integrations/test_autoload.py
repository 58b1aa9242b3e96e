"""A packed checkpoint opens without ``import hfq``, and ``import hfq`` costs nothing."""

from __future__ import annotations

import subprocess
import sys

import torch
from safetensors.torch import load_file

from hfq import _autoload

LOAD = """
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(input_ids=torch.arange(24).reshape(2, 12) * 7 % 99)[0]
from safetensors.torch import save_file
save_file({"logits": logits}, sys.argv[2])
out["layer"] = type(model.model.layers[0].mlp.up_proj).__module__
out["config"] = type(model.config.quantization_config).__name__
"""


def test_a_new_process_that_never_imports_hfq(packed, outputs, child, tmp_path):
    """Same bits as in the process that quantized, also through the lazy import of the pipeline factory."""
    from transformers import AutoModelForCausalLM

    found = child("assert 'hfq' not in sys.modules\n" + LOAD, packed("llama"), tmp_path / "logits.safetensors")
    assert found["layer"].startswith("hfq.") and found["config"] == "RTNConfig"
    here = outputs(AutoModelForCausalLM.from_pretrained(packed("llama")))
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], here)


def test_import_is_lazy_and_cheap(child):
    """Before torch: nothing but the standard library. After torch: no library of Hugging Face."""
    found = child("""
import time
start = time.perf_counter()
import hfq
out["seconds"] = time.perf_counter() - start
heavy = ("torch", "transformers", "diffusers", "peft", "numpy", "hfq.config")
out["loaded"] = [name for name in heavy if name in sys.modules]
out["names"] = "RTNConfig" in dir(hfq) and "quantize" in dir(hfq)
out["methods"] = len(hfq.methods())
import torch
out["after_torch"] = [name for name in heavy[1:] if name in sys.modules and name != "numpy"]
import transformers
out["after_transformers"] = "hfq.config" in sys.modules
start = time.perf_counter()
import transformers.quantizers
middle = time.perf_counter()
out["registered"] = "hfq" in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING
""")
    assert found["loaded"] == [] and found["after_torch"] == [] and not found["after_transformers"]
    assert found["seconds"] < 0.5
    assert found["names"] and found["methods"] == 37 and found["registered"]


def test_torch_first_imported_inside_transformers_quantizers(child):
    """The package is already running when the hook is installed: it registers as soon as the package is ready."""
    found = child("""
import transformers.quantizers
assert "hfq" in sys.modules
import transformers.modeling_utils
out["registered"] = "hfq" in transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING
""")
    assert found["registered"]


def test_peft_first_imported_inside_the_trainer(child):
    """``Trainer`` imports peft before it is itself complete."""
    found = child("""
from transformers import Trainer
assert "peft" in sys.modules
import peft
out["registered"] = [name in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING for name in ("HFQ_QALORA", "HFQ_RANK_DECAY")]
from hfq.integrations.peft import RankDecayCallback
""")
    assert found["registered"] == [True, True]


def test_import_after_the_libraries(child):
    """With the entry point off: registration happens at ``import hfq``, in every library that is there."""
    found = child("""
import transformers.quantizers
import diffusers.quantizers.auto as diffusers_auto
auto = transformers.quantizers.auto
out["before"] = "hfq" in auto.AUTO_QUANTIZER_MAPPING or "hfq" in sys.modules
import hfq
out["after"] = "hfq" in auto.AUTO_QUANTIZER_MAPPING and "hfq" in diffusers_auto.AUTO_QUANTIZER_MAPPING
import importlib
importlib.reload(hfq)
out["hooks"] = sum(type(finder).__module__ == "hfq._autoload" for finder in sys.meta_path)
config = hfq.RTNConfig()
from hfq.integrations.registration import register_transformers
register_transformers()
out["types"] = sum(cls.__name__ == "HfqConfig" for cls in auto.LOADING_ATTRIBUTES_CONFIG_TYPES)
""", autoload=False)
    assert not found["before"] and found["after"] and found["hooks"] == 1 and found["types"] == 1


def test_a_broken_hfq_breaks_nobody_else(child):
    """torch and transformers import even if hfq cannot; the reason is logged."""
    found = child("""
from importlib.abc import MetaPathFinder

class Broken(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("hfq.config", "hfq.integrations.registration"):
            raise RuntimeError("no hfq today")

sys.meta_path.insert(0, Broken())
import torch
import transformers.quantizers
out["fine"] = "gptq" in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING
out["registered"] = "hfq" in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING
""")
    assert found["fine"] and not found["registered"] and "no hfq today" in found["stderr"]


def test_the_entry_point_needs_the_standard_library_only():
    """It runs in the middle of ``import torch``; anything of torch would be half initialised."""
    code = "import sys, hfq._autoload as a; a.install(); sys.exit(len({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_install_never_raises(monkeypatch, caplog):
    class Refuses(list):
        def insert(self, *args):
            raise RuntimeError("read-only list")

    monkeypatch.setattr(sys, "meta_path", Refuses())
    _autoload.install()
    assert "read-only list" in caplog.text


def test_the_entry_point_is_declared():
    from importlib.metadata import entry_points

    found = [entry.value for entry in entry_points(group="torch.backends") if entry.name == "hfq"]
    assert found == ["hfq._autoload:install"]
