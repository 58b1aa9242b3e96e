"""Two processes on shares of the data give the result of one, also when the shares are not equal."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path

import pytest
import torch

CHILD = """
import os
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from hfq.calibration import data, hessian, importance, observers, ranks, walk
from hfq.formats import QuantSpec, affine
from hfq.graph import read
from hfq.report import Report

os.environ.update(given)
if "RANK" in os.environ:
    dist.init_process_group("gloo")
torch.manual_seed(0)
sizes = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
if kind == "mixtral":
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4)).eval()
else:
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
ids = torch.randint(0, 100, (rows, 16), generator=torch.Generator().manual_seed(1))
batches = data.normalise([{"input_ids": row[: 16 - i % 3]} for i, row in enumerate(ids)], batch_size=1, samples=None)
report, result = Report(), {}
progress = out + ".progress" if kind == "resume" else None
for step in walk.walk(read(model), batches, streams=("quantized", "float"), report=report, progress_dir=progress):
    weights = importance.weights(step, "actnorm", 0.01)
    seen = observers.Percentile(99.0)
    for i in range(len(step)):
        seen.update(step.hidden(i))
    seen.reduce()
    result[f"{step.index} range"] = torch.stack(seen.range())
    for name, one in hessian.collect(step, weights=weights).items():
        parts = {name: one}
        if isinstance(one, dict):
            parts = {f"{name}.{p}.{e}": h for p, several in one.items() for e, h in enumerate(several)}
        result.update({f"H {key}": h.matrix for key, h in parts.items()})
        result.update({f"N {key}": torch.tensor(h.tokens) for key, h in parts.items()})
    for site in step.block.sites:
        if site.kind == "experts":
            continue
        scale = 1 + 1e-3 * result[f"H {site.name}"].diagonal()
        step.swap(site, affine.quantize(site.weight.data * scale, QuantSpec(4, 16)))
result.update({f"W {key}": value for key, value in model.state_dict().items()})
result.update({f"rows {row.module}": torch.tensor(row.tokens) for row in report})
torch.save(result, f"{out}.{ranks.rank()}")
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
"""


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["transformers.models.llama.modeling_llama", "transformers.models.mixtral.modeling_mixtral", "hfq.calibration.walk"]
)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def run(
    folder: Path, name: str, rows: int, kind: str, processes: int, program: str = CHILD
) -> list[dict[str, torch.Tensor]]:
    address = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    children = []
    for rank in range(processes):
        given = {"RANK": str(rank), **address} if processes > 1 else {}
        values = {"rows": rows, "kind": kind, "out": str(folder / name), "given": given}
        children.append(CONTEXT.Process(target=exec, args=(program, values)))
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=60)
        assert child.exitcode == 0, "the process failed or hangs: see its error output"
    return [torch.load(f"{folder / name}.{rank}") for rank in range(processes)]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    assert all(torch.equal(a[key], b[key]) for key in a), [key for key in a if not torch.equal(a[key], b[key])]


@pytest.mark.slow
@pytest.mark.parametrize("rows, kind", [(7, "llama"), (5, "mixtral")])
def test_two_processes_equal_one(tmp_path: Path, rows: int, kind: str) -> None:
    (one,) = run(tmp_path, "one", rows, kind, 1)
    first, second = run(tmp_path, "two", rows, kind, 2)
    assert_equal(first, second)
    assert_equal(one, first)


@pytest.mark.slow
def test_a_process_without_data_and_a_common_progress_folder(tmp_path: Path) -> None:
    (one,) = run(tmp_path, "one", 1, "llama", 1)
    first, second = run(tmp_path, "two", 1, "resume", 2)
    for other in (first, second):
        for key in one:
            assert torch.equal(one[key], other[key]), key
    assert len(list((tmp_path / "two.progress").glob("block-*"))) == 2


METHODS = """
import os
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
import hfq
from hfq.calibration import ranks

os.environ.update(given)
if "RANK" in os.environ:
    dist.init_process_group("gloo")
ids = torch.randint(0, 100, (rows, 20), generator=torch.Generator().manual_seed(1))
common = dict(bits=4, group_size=16, calibration_samples=rows, calibration_seqlen=20, calibration_batch_size=1,
              progress=False)
result = {}
for name, config, data in (
    ("rsq", hfq.RSQConfig(expansion=2, **common), [{"input_ids": row[: 20 - 3 * i]} for i, row in enumerate(ids)]),
    ("frequency", hfq.RSQConfig(strategy="tokenfreq", **common), ids),
    ("flexround", hfq.FlexRoundConfig(steps=6, holdout=0.3, input_mix=0.5, **common), ids),
):
    torch.manual_seed(0)
    sizes = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).eval()
    hfq.quantize(model, config, data)
    result.update({f"{name} {key}": value.clone() for key, value in model.state_dict().items()})
torch.save(result, f"{out}.{ranks.rank()}")
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_whole_methods(tmp_path: Path) -> None:
    (one,) = run(tmp_path, "one", 5, "llama", 1, METHODS)
    first, second = run(tmp_path, "two", 5, "llama", 2, METHODS)
    assert_equal(first, second)
    assert_equal(one, first)


WHOLE = """
import os
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
import hfq
from hfq.calibration import ranks

os.environ.update(given)
if "RANK" in os.environ:
    dist.init_process_group("gloo")
torch.manual_seed(0)
sizes = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).eval()
ids = torch.randint(0, 100, (rows, 20), generator=torch.Generator().manual_seed(1))
config = hfq.OSTQuantConfig(
    activation_bits=3, steps=6, batch_size=3, rotate_lr=0.1, scale_lr=0.01, rounding="nearest", progress=False,
    calibration_samples=rows, calibration_seqlen=20, calibration_batch_size=2,
)
report = hfq.quantize(model, config, [{"input_ids": row[: 20 - 3 * i]} for i, row in enumerate(ids)])
result = {key: value.clone() for key, value in model.state_dict().items()}
result["curve"] = torch.tensor(report.curves["transforms"])
torch.save(result, f"{out}.{ranks.rank()}")
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_training_of_the_whole_model_sums_gradients_over_processes(tmp_path: Path) -> None:
    (one,) = run(tmp_path, "one", 5, "llama", 1, WHOLE)
    first, second = run(tmp_path, "two", 5, "llama", 2, WHOLE)
    assert_equal(first, second)
    # Sums in another order: equal but for rounding, as long as no rounding of an input flips.
    torch.testing.assert_close(first["curve"][:3], one["curve"][:3], rtol=1e-3, atol=0)
    assert one["curve"][-1] < one["curve"][0]
