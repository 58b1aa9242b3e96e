"""Tables of pipelines that draw: rows measured in children, grids of pictures, prompts of other pipelines."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import hfq
from hfq.errors import ConfigError, DataError
from hfq.integrations import bench_diffusion, bench_rows, measure_diffusion
from hfq.integrations.bench_tables import Case
from hfq.methods import METHODS

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained pipeline that draws without a prompt."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("pipeline")
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"))
    diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler()).save_pretrained(root / "float")
    (root / "prompts.txt").write_text("one\n\ntwo\nthree\n")
    return root


@pytest.mark.parametrize("table", list(bench_diffusion.TABLES))
def test_tables_have_rows_with_valid_options(table):
    names = set()
    if table == "mixed" and not any(METHODS[method].available for method, _ in bench_diffusion.MIXED.values()):
        with pytest.raises(ConfigError, match="no method for its rows"):
            bench_diffusion.cases("text", [table])
        return
    for model in bench_diffusion.MODELS[table]:
        for case in bench_diffusion.cases(model, [table]):
            assert case.name not in names and case.name.startswith(f"{model}: ") and case.model == model
            names.add(case.name)
            if case.method:
                assert METHODS[case.method].available
                hfq.HfqConfig(method=case.method, **{k: v for k, v in case.options.items() if k != "record"})
    with pytest.raises(ConfigError, match="are the tables"):
        bench_diffusion.cases("text", ["nope"])


def test_rows_grids_and_their_files(folder, tmp_path, monkeypatch):
    model, output = str(folder / "float"), tmp_path / "rows.json"
    monkeypatch.setattr(bench_diffusion.bench_rows, "_measured", lambda case, shared, module: bench_diffusion.measure(
        case, {"data": "prompts", "count": 3, "pictures": str(tmp_path / "rows-pictures")}))
    monkeypatch.setattr(measure_diffusion, "sampling", lambda name: {"num_inference_steps": 2})
    cases = [Case(f"{model}: float, –", model=model)]
    cases += [Case(f"{model}: round to nearest, W{bits}A16", "rtn", {"bits": bits, "group_size": -1}, model=model)
              for bits in (8, 2)]
    calibrated = {"bits": 8, "activation_bits": 8, "group_size": -1, "record": {"steps": 2, "samples": 2}}
    cases.append(Case(f"{model}: round to nearest, W8A8", "rtn", calibrated, model=model))
    rows = bench_diffusion.run(cases, "prompts", 3, output)
    plain, eight, two, inputs_too = rows
    assert two["psnr"] < inputs_too["psnr"] < eight["psnr"] and inputs_too["details"]["config"]["activation_bits"] == 8
    assert "psnr" not in plain and eight["psnr"] > two["psnr"] and eight["bits_per_weight"] > 8
    assert two["disk_bytes"] < eight["disk_bytes"] < plain["disk_bytes"]
    assert len(list((tmp_path / "rows-pictures").glob("float-*"))) == 1  # drawn once for all rows
    strips = {path.stem[-5:]: Image.open(path).size for path in (tmp_path / "rows-pictures").glob("*.png")}
    assert set(strips.values()) == {(24, 8)} and len(strips) == 4
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert drawn == ["float-W2A16.png", "float-W8A16.png", "float-W8A8.png"]
    assert "dB" in bench_diffusion.pivot(rows) and "PSNR" in bench_rows.table(rows, bench_diffusion.PROTOCOL)


def test_a_child_measures_one_row(folder, tmp_path):
    model = str(folder / "float")
    case = Case(f"{model}: float, –", model=model)
    row, = bench_diffusion.run([case], str(folder / "prompts.txt"), 2, tmp_path / "rows.json")
    assert row["name"] == case.name and row["disk_bytes"] > 0 and (tmp_path / "rows.json").exists()


def test_pipelines_that_are_no_demo_need_prompts(folder, tmp_path):
    model = str(folder / "float")
    assert measure_diffusion.is_pipeline(model) and measure_diffusion.is_pipeline("text")
    assert not measure_diffusion.is_pipeline("judge") and not measure_diffusion.is_pipeline(tmp_path)
    with pytest.raises(ConfigError, match="draws no digits"):
        bench_diffusion.run(bench_diffusion.cases(model, ["widths"]), "demo", 2, tmp_path / "rows.json")
    file = folder / "prompts.txt"
    assert measure_diffusion._prompts_of(file) == ["one", "two", "three"]
    with pytest.raises(DataError, match="cannot be read"):
        measure_diffusion._prompts_of(tmp_path / "none.txt")
    file = tmp_path / "single.txt"
    file.write_text("only one\n")
    with pytest.raises(DataError, match="holds 1 prompts"):
        measure_diffusion._prompts_of(file)
