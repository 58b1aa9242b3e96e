"""``hfq.api`` on plain torch models: no Hugging Face library is in the way."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from hfq import api, methods
from hfq.api import Environment
from hfq.calibration.data import Batches
from hfq.errors import ConfigError, QuantizationError
from hfq.methods import rtn
from hfq.methods.rtn import RTNConfig
from hfq.report import Report, Row


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    """No environment, whatever other tests installed."""
    monkeypatch.setattr(api, "_ENVIRONMENT", Environment())


SITES = [f"layers.{i}.{name}" for i in range(2) for name in ("up", "down")]


def test_quantize_fills_report_config_and_model():
    model, config = Model(), RTNConfig(bits=4, group_size=16)
    x = torch.randn(3, 32)
    before = model(x)
    report = api.quantize(model, config)
    assert model.hfq_report is report and [row.module for row in report.packed] == SITES
    assert report.rows["head"].status == "float" and report.rows["head"].reason
    assert list(config.manifest["layers"]) == SITES and config.summary["packed"] == 4 and config.summary["float"] == 1
    assert 4 < report.bits_per_weight() < 6 and config.summary["bits_per_weight"] == report.bits_per_weight()
    assert {"seconds", "peak_memory_bytes", "packed_bytes", "seed", "data", "versions"} <= set(report.totals)
    assert 0.01 < (model(x) - before).norm() / before.norm() < 0.3
    json.dumps(config.to_dict())
    assert Report.from_dict(json.loads(report.to_json())).to_dict() == report.to_dict()
    weights = sum(p.nbytes for name in SITES for p in model.get_submodule(name).parameters() if p.ndim > 1)
    assert report.totals["packed_bytes"] == weights


def test_global_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    model = Model()
    torch.manual_seed(5)
    api.quantize(model, RTNConfig())
    assert torch.equal(torch.rand(1), expected)


def test_explain_names_a_kernel_for_every_layer():
    model = Model()
    api.quantize(model, RTNConfig())
    table = api.explain(model)
    assert list(table) == SITES
    assert all(any(choice.chosen for choice in choices) for choices in table.values())


def test_dequantize_gives_float_modules_back():
    model = Model()
    api.quantize(model, RTNConfig(bits=8))
    weight = model.layers[0].up.weight.clone()
    assert api.dequantize(model) is model and type(model.layers[0].up) is nn.Linear
    assert torch.equal(model.layers[0].up.weight, weight)
    api.quantize(model, RTNConfig(bits=8))


def test_compute_dtype_reaches_the_layers():
    model = Model()
    api.quantize(model, RTNConfig(compute_dtype="bfloat16"))
    assert {model.get_submodule(name).compute_dtype for name in SITES} == {torch.bfloat16}


def leaving(name):
    """A recipe that does everything but one module."""

    def quantize(model, data, config, report):
        rtn.quantize(model, data, config, report)
        del report.rows[name]

    return quantize


def test_a_site_without_a_row_is_an_error(monkeypatch):
    monkeypatch.setattr(methods, "recipe", lambda slug: leaving("layers.1.up"))
    with pytest.raises(QuantizationError, match=r"could not do 1 of 4 modules: layers\.1\.up: .*left it out"):
        api.quantize(Model(), RTNConfig())


def test_refused_rows_are_an_error_unless_allowed(monkeypatch):
    def refuse(model, data, config, report):
        for name in SITES:
            report.refuse(name, "not today")

    monkeypatch.setattr(methods, "recipe", lambda slug: refuse)
    with pytest.raises(QuantizationError, match="could not do 4 of 4 modules.*not today.*allow_partial"):
        api.quantize(Model(), RTNConfig())
    report = api.quantize(Model(), RTNConfig(allow_partial=True))
    assert len(report.refused) == 4 and report.bits_per_weight() is None


def test_what_the_environment_is_asked(monkeypatch):
    asked = []

    def placement(model):
        asked.append("placement")

    monkeypatch.setattr(api, "_ENVIRONMENT", Environment(
        placement=placement,
        load_processor=lambda model, config, data: asked.append("processor"),
        attach=lambda model, config: asked.append(("attach", config.manifest is not None)),
        detach=lambda model: asked.append("detach"),
        is_packed=lambda model, config: None,
        untie=lambda model, name: asked.append(name),
    ))
    seen = []

    def record(model, data, config, report):
        seen.append((data, config.walk_options()))
        for name in SITES:
            report.add(Row(name))

    monkeypatch.setattr(methods, "recipe", lambda slug: record)
    config = RTNConfig(work_dir="progress here", calibration=[{"x": torch.randn(1, 32)} for _ in range(4)])
    api.quantize(Model(), config)
    data, options = seen[0]
    assert isinstance(data, Batches) and data.descriptor["count"] == 4
    assert options["progress_dir"] == "progress here" and options["fingerprint"]["bits"] == 4
    assert asked == ["placement", *SITES, "processor", ("attach", True)] and config._environment is None


def test_a_failed_run_lets_go_of_the_environment(monkeypatch):
    def fail(model, data, config, report):
        raise QuantizationError("on purpose")

    monkeypatch.setattr(methods, "recipe", lambda slug: fail)
    config = RTNConfig()
    with pytest.raises(QuantizationError, match="on purpose"):
        api.quantize(Model(), config)
    assert config._environment is None and config.manifest is None


def test_quantized_models_are_refused(monkeypatch):
    monkeypatch.setattr(api, "_ENVIRONMENT", Environment(is_packed=lambda model, config: "somebody else"))
    with pytest.raises(ConfigError, match=r"already quantized \(somebody else\)"):
        api.quantize(Model(), RTNConfig())


def test_methods_is_a_copy_of_the_table():
    table = api.methods()
    table.clear()
    assert api.methods()
