"""Loading a packed model takes little more memory than its file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hfq

CHILD = """
import sys
import hfq
from hfq.memory import PeakMemory
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])  # imports, thread pools
with PeakMemory(0.002) as memory:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
print(memory.peak)
"""


def packed(folder: Path, layers: int, width: int) -> None:
    config = LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=256,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    hfq.quantize(model, hfq.RTNConfig(bits=4, group_size=128, progress=False))
    model.save_pretrained(folder)


def test_loading_peaks_under_1_3_times_the_file(tmp_path: Path) -> None:
    packed(tmp_path / "small", 1, 128)
    packed(tmp_path / "large", 20, 1024)
    command = [sys.executable, "-P", "-c", CHILD, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    size = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    assert 0.5 * size < int(done.stdout.split()[-1]) < 1.3 * size
