"""A quantization killed with SIGKILL, or ended with Ctrl-C, at any point goes on to the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hfq
from hfq.calibration import walk
from hfq.config import HfqConfig
from hfq.errors import CheckpointError

CHILD = """
import signal
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from hfq.calibration import data, hessian, walk
from hfq.formats import QuantSpec, affine
from hfq.graph import read
from hfq.report import Report
from safetensors.torch import save_file

signal.signal(signal.SIGINT, signal.default_int_handler)
said = open(out + ".said", "w")
torch.manual_seed(0)
config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4)
model = LlamaForCausalLM(config).eval()
batches = data.normalise(torch.randint(0, 100, (6, 24)), batch_size=2)
steps = walk.walk(read(model), batches, streams=("quantized", "float"), progress_dir=progress, report=Report())
for step in steps:
    said.write(f"block {step.index}\\n")
    said.flush()
    found = hessian.collect(step)
    for site in step.block.sites:
        noise = torch.rand(site.weight.shape, generator=walk.generator(0, step.index))
        scale = found[site.name].matrix.diagonal().mean()
        step.swap(site, affine.quantize(site.weight + 1e-3 * noise * scale, QuantSpec(4, 32)))
save_file({k: v.clone() for k, v in model.state_dict().items()}, out)
said.write("done\\n")
said.close()
"""


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["transformers.models.llama.modeling_llama", "transformers.models.mixtral.modeling_mixtral", "hfq.calibration.walk"]
)


class Run:
    """The quantization above in a process of its own; it writes down which blocks it was handed."""

    def __init__(self, folder: Path) -> None:
        self.out, self.progress = folder / "out.safetensors", folder / "progress"
        self.said = Path(f"{self.out}.said")
        self.said.unlink(missing_ok=True)
        values = {"progress": str(self.progress), "out": str(self.out)}
        self.process = CONTEXT.Process(target=exec, args=(CHILD, values))
        self.process.start()

    def lines(self) -> list[str]:
        return self.said.read_text().splitlines() if self.said.exists() else []

    def wait_for(self, line: str) -> None:
        end = time.monotonic() + 60
        while line not in self.lines():
            assert self.process.is_alive() and time.monotonic() < end, "the run ended before it was to be killed"
            time.sleep(0.001)

    def end(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        self.process.join(timeout=60)
        assert self.process.exitcode not in (0, None)

    def finish(self) -> list[str]:
        self.process.join(timeout=60)
        assert self.process.exitcode == 0, "see its error output"
        assert self.lines()[-1] == "done"
        return self.lines()[:-1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    run = Run(tmp_path_factory.mktemp("whole"))
    assert run.finish() == [f"block {i}" for i in range(6)]
    return run.out.read_bytes()


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path, uninterrupted: bytes) -> None:
    draw, kills = random.Random(0), 0
    for block in (0, 1, 1, 3, 4):  # each run goes on where the last one was killed
        run = Run(tmp_path)
        finished = len(list(run.progress.glob("block-*.safetensors")))
        run.wait_for(f"block {max(block, finished)}")
        time.sleep(draw.uniform(0, 0.02))  # somewhere in the body, the next pass, or the writing of the file
        run.end(signal.SIGKILL)
        kills += 1
    finished = len(list(run.progress.glob("block-*.safetensors")))
    assert kills == 5 and finished >= 3
    run = Run(tmp_path)
    assert run.finish() == [f"block {i}" for i in range(finished, 6)]
    assert run.out.read_bytes() == uninterrupted


@pytest.mark.slow
def test_ctrl_c(tmp_path: Path, uninterrupted: bytes) -> None:
    run = Run(tmp_path)
    run.wait_for("block 1")
    run.end(signal.SIGINT)
    assert not list(run.progress.glob("*.tmp*"))
    run = Run(tmp_path)
    assert len(run.finish()) <= 5
    assert run.out.read_bytes() == uninterrupted


class _Stopped(Exception):
    """Where a run is cut off in the tests below."""


METHODS: dict[str, dict[str, Any]] = {
    "rsq": {"expansion": 2, "bits": 4},
    "flexround": {"steps": 5, "bits": 4},
    "layerwise_quant": {"backend": {"method": "rsq"}, "target_bits": 3.0},
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_go_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """A rotation is made again before the walk: the finished blocks have to meet the same rotated weights."""
    ids = torch.randint(0, 100, (6, 24), generator=torch.Generator().manual_seed(1))
    finish = walk._Walk._finish

    def run(seed: int = 0, stop: int | None = None, change: int | None = None) -> tuple[Any, Any]:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100)).eval()
        if change is not None:
            model.model.layers[change].mlp.up_proj.weight.data[0, 0] += 0.01
        done: list[str] = []

        def cut(self: Any, step: Any) -> None:
            finish(self, step)
            if self.saved is not None:  # not the walk that scores the blocks
                done.append(step.block.name)
            if len(done) == stop:
                raise _Stopped

        monkeypatch.setattr(walk._Walk, "_finish", cut)
        config = HfqConfig(
            method=method, group_size=32, calibration_samples=6, calibration_seqlen=24, calibration_batch_size=2,
            progress=False, seed=seed, work_dir=None if folder is None else str(folder), **METHODS[method],
        )  # fmt: skip
        report = hfq.quantize(model, config, ids)
        return {key: value.clone() for key, value in model.state_dict().items()}, report

    folder: Path | None = None
    expected, whole = run()
    folder = tmp_path
    for stop in (1, 2):  # cut off after the first block, and after the second
        with pytest.raises(_Stopped):
            run(stop=stop)
    assert len(list(folder.glob("block-*"))) == 2
    found, report = run()
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert [asdict(row) for row in report] == [asdict(row) for row in whole] and report.curves == whole.curves
    for other in ({"seed": 1}, {"change": 3}):
        with pytest.raises(CheckpointError, match="another run|other weights"):
            run(**other)
