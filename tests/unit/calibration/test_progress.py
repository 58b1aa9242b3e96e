"""Progress files: complete or absent, installed to the same bytes, refused when they belong to another run."""

from __future__ import annotations

import json

import pytest
import torch

from hfq.calibration import walk
from hfq.calibration.progress import Progress, state_digest
from hfq.errors import CheckpointError
from hfq.formats import QuantSpec, affine
from hfq.graph import read
from hfq.layers import swap
from hfq.report import Report

SPEC = QuantSpec(4, 16)


class Killed(Exception):
    pass


def run(model, batches, folder, stop=None, streams=("quantized", "float"), **options):
    """Pack every site; also change a norm, which is in no manifest. Stops in the middle of block ``stop``."""
    report, given = Report(), []
    for step in walk.walk(read(model), batches, progress_dir=folder, report=report, streams=streams, **options):
        given.append(step.index)
        size = step.outputs[0].abs().mean()
        noise = torch.rand(1, generator=walk.generator(0, step.index))
        for i, site in enumerate(step.block.sites):
            if stop == step.index and i == 2:
                raise Killed
            step.swap(site, affine.quantize(site.weight.data.float() * (1 + 0.1 * noise), SPEC))
        step.block.module.input_layernorm.weight.data.mul_(1 + noise * size)
        report.curves[step.block.name] = [float(noise)]
        report.note(f"did {step.index}")
    return report, given


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("streams", [("quantized",), ("quantized", "float")])
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_resume(llama, batches, tmp_path, stop, streams):
    whole = llama()
    report, _ = run(whole, batches(), None, streams=streams)
    broken = llama()
    with pytest.raises(Killed):
        run(broken, batches(), tmp_path, stop, streams)
    assert len(list(tmp_path.glob("block-*"))) == stop
    resumed = llama()
    again, given = run(resumed, batches(), tmp_path, streams=streams)
    assert given == list(range(stop, 3))
    same(whole, resumed)
    assert again.to_dict() == report.to_dict()
    assert resumed.model.layers[0].mlp.up_proj.label == "model.layers.0.mlp.up_proj"
    third = llama()
    _, given = run(third, batches(), tmp_path, streams=streams)
    assert given == []
    same(whole, third)
    ids = batches()[0]["input_ids"]
    assert torch.equal(whole(ids).logits, third(ids).logits)


def test_another_run_is_refused(llama, batches, tmp_path):
    run(llama(), batches(), tmp_path, fingerprint={"bits": 4, "seed": 0})
    with pytest.raises(CheckpointError, match="bits was 4, is 3") as caught:
        run(llama(), batches(), tmp_path, fingerprint={"bits": 3, "seed": 0})
    assert "seed" not in str(caught.value) and "start over" in str(caught.value)
    with pytest.raises(CheckpointError, match="data was"):
        run(llama(), batches(rows=4), tmp_path, fingerprint={"bits": 4, "seed": 0})
    other = llama()
    other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(CheckpointError, match=r"model\.layers\.0 differs"):
        run(other, batches(), tmp_path, fingerprint={"bits": 4, "seed": 0})


def test_damaged_files(llama, batches, tmp_path):
    run(llama(), batches(), tmp_path)
    (first, *_) = sorted(tmp_path.glob("block-*"))
    content = first.read_bytes()
    first.write_bytes(content[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        run(llama(), batches(), tmp_path)
    first.write_bytes(content)
    (tmp_path / "fingerprint.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        run(llama(), batches(), tmp_path)
    (tmp_path / "fingerprint.json").unlink()
    with pytest.raises(CheckpointError, match="no fingerprint"):
        run(llama(), batches(), tmp_path)


def test_a_gap_is_not_jumped(llama, batches, tmp_path):
    run(llama(), batches(), tmp_path)
    files = sorted(tmp_path.glob("block-*"))
    files[1].unlink()
    _, given = run(llama(), batches(), tmp_path)
    assert given == [1, 2]


def test_a_failed_write_leaves_nothing(llama, batches, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hfq.calibration.files.save_file", full)
    with pytest.raises(OSError, match="No space"):
        run(llama(), batches(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["fingerprint.json"]


def test_leftovers_of_a_kill_are_cleaned(tmp_path):
    (tmp_path / "block-00000-x.safetensors.tmp99").write_bytes(b"half")
    Progress(tmp_path, {}, ["x"])
    assert [path.name for path in tmp_path.iterdir()] == ["fingerprint.json"]
    assert json.loads((tmp_path / "fingerprint.json").read_text())["blocks"] == ["x"]


def test_digest_sees_every_bit(llama):
    a, b = llama(), llama()
    assert state_digest(a) == state_digest(b)
    b.model.norm.weight.data[3] += 1e-6
    assert state_digest(a) != state_digest(b)
    assert swap.describe(a)["layers"] == {}
