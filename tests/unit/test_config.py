"""Configs: what they accept, what they save, what they share."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import re
from dataclasses import dataclass

import pytest
import torch

import hfq
from hfq import methods
from hfq.config import FORMAT_VERSION, HfqConfig, option
from hfq.errors import CheckpointError, ConfigError
from hfq.fields import accepts
from hfq.methods.rtn import RTNConfig


@dataclass(kw_only=True, eq=False, repr=False)
class FullConfig(RTNConfig):
    """A method with every feature, for the checks of the base class."""

    supports_activation_bits = True
    supports_kv_bits = True

    strength: float = option(0.5, range=(0.0, 1.0), per_module=True)
    passes: int | None = option(None, range=(1, 9))
    names: list[str] = option(["a"])

    def check(self) -> None:
        if self.passes == 3 and self.symmetric:
            raise ConfigError("passes=3 cannot be symmetric")


def test_base_class_gives_the_class_of_the_method():
    config = HfqConfig(method="rtn", bits=3)
    assert type(config) is RTNConfig and config.bits == 3 and config.method == "rtn"
    assert type(HfqConfig.from_dict({"method": "rtn", "bits": 3})) is RTNConfig
    assert type(HfqConfig.from_dict({"quant_method": "hfq", "method": "rtn"})) is RTNConfig


def test_quant_method_is_a_string_with_a_value():
    config = RTNConfig()
    assert config.quant_method == "hfq" and config.quant_method.value == "hfq" and isinstance(config.quant_method, str)
    assert {"hfq": 1}[config.quant_method] == 1
    assert json.loads(json.dumps(config.quant_method)) == "hfq"


def test_every_field_can_be_named_in_the_signature():
    names = set(inspect.signature(RTNConfig).parameters)
    common = {"bits", "group_size", "symmetric", "activation_bits", "kv_bits", "modules_to_not_convert", "overrides",
              "calibration", "calibration_samples", "calibration_seqlen", "calibration_batch_size", "processor", "seed",
              "allow_partial", "compute_dtype", "text_column", "cpu_memory"}
    assert common <= names


@pytest.mark.parametrize("values", [
    {"bits": 16}, {"bits": 1}, {"group_size": 0}, {"strength": 1}, {"passes": None}, {"names": ["x", "y"]},
    {"activation_bits": 8, "kv_bits": 2}, {"modules_to_not_convert": ("lm_head",)},
    {"overrides": {"*.q_proj": {"bits": 8, "strength": 0.1}, "lm_head": {"bits": 16}}},
    {"compute_dtype": torch.bfloat16}, {"calibration": "file.txt"},
])
def test_round_trip_through_json(values):
    config = FullConfig(**values)
    again = json.loads(json.dumps(config.to_dict()))
    # FullConfig shares the slug of RTNConfig: read with its own class.
    fields = {k: v for k, v in again.items() if k not in ("format_version", "hfq_version")}
    assert FullConfig(**fields).to_dict() == config.to_dict()


def test_compute_dtype_is_saved_as_a_name():
    config = RTNConfig(compute_dtype=torch.bfloat16)
    assert config.to_dict()["compute_dtype"] == "bfloat16" and config.torch_compute_dtype is torch.bfloat16


def test_private_attributes_are_shared_by_copies_and_not_saved():
    def rows():
        yield "text"

    generator, processor = rows(), object()
    config = RTNConfig(calibration=generator, processor=processor, work_dir="somewhere", progress=False)
    clone = copy.deepcopy(config)
    assert clone is not config and clone.data is generator and clone._processor is processor
    assert clone.work_dir == "somewhere"
    clone.overrides["x"] = {"bits": 2}
    assert config.overrides == {}
    saved = config.to_dict()
    assert saved["calibration"] is None and saved["processor"] is None
    assert not {"work_dir", "progress", "dequantize"} & set(saved) and not any(key.startswith("_") for key in saved)


def test_a_data_loader_does_not_stop_saving():
    loader = torch.utils.data.DataLoader(torch.arange(4))
    config = RTNConfig(calibration=loader)
    json.dumps(config.to_dict())
    assert config.data is loader and dict(config)["bits"] == 4


def test_local_paths_are_not_saved(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("words")
    assert RTNConfig(calibration=str(file)).to_dict()["calibration"] is None
    assert RTNConfig(calibration="user/set").to_dict()["calibration"] == "user/set"


def test_pickle_keeps_the_fields():
    config = pickle.loads(pickle.dumps(RTNConfig(bits=3, overrides={"a": {"bits": 2}})))
    assert config.bits == 3 and config.overrides == {"a": {"bits": 2}} and config.quant_method.value == "hfq"


def test_mutable_defaults_are_not_shared():
    first, second = FullConfig(), FullConfig()
    first.names.append("b")
    first.overrides["x"] = {}
    assert second.names == ["a"] and second.overrides == {}


def test_spec_follows_overrides_in_order():
    config = RTNConfig(bits=4, group_size=64, overrides={
        "*.mlp.*": {"bits": 3, "group_size": 32}, "layers.1.mlp.down": {"bits": 8}, "layers.2": {"bits": 16},
    })
    assert (config.spec_for("layers.0.attn.q").bits, config.spec_for("layers.0.attn.q").group_size) == (4, 64)
    assert (config.spec_for("layers.0.mlp.up").bits, config.spec_for("layers.0.mlp.up").group_size) == (3, 32)
    assert (config.spec_for("layers.1.mlp.down").bits, config.spec_for("layers.1.mlp.down").group_size) == (8, 32)
    assert config.spec_for("layers.2.attn.q") is None
    assert config.spec_for("layers.20.attn.q").bits == 4


def test_plan_follows_bits_and_names():
    names = ("a", "b", "head")

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([Block(), Block()])
            self.head = torch.nn.Linear(4, 9)

    def asked(**values):
        return [site.name for site in RTNConfig(**values).plan(Model()).sites]

    every = [f"layers.{i}.{n}" for i in range(2) for n in names[:2]]
    assert asked() == every and asked(bits=16) == []
    assert asked(overrides={"head": {"bits": 8}}) == [*every, "head"]
    assert asked(overrides={"*": {"bits": 8}}) == every, "a wildcard does not ask for heads"
    assert asked(overrides={"layers.0": {"bits": 16}, "layers.0.b": {"bits": 3}}) == every[1:], "later patterns win"
    assert asked(bits=16, overrides={"*.a": {"bits": 4}}) == [every[0], every[2]]
    assert asked(modules_to_not_convert=["b"]) == [every[0], every[2]]
    skipped = RTNConfig(overrides={"layers.0": {"bits": 16}}).plan(Model()).skipped
    assert skipped["layers.0.a"] == "16 bits: left as it is" and "head" in skipped["head"]


def test_value_for_reads_method_fields():
    config = FullConfig(strength=0.25, overrides={"a": {"strength": 0.75}})
    assert config.value_for("a", "strength") == 0.75 and config.value_for("b", "strength") == 0.25


def test_changed_fields_are_checked_again():
    config = RTNConfig()
    config.bits = 9
    with pytest.raises(ConfigError, match="bits=9"):
        config.validate()


def test_loading_attributes_are_those_that_differ():
    assert RTNConfig().get_loading_attributes() == {}
    assert RTNConfig(cpu_memory="cached", bits=3).get_loading_attributes() == {"cpu_memory": "cached"}


def test_record_of_a_packed_model_survives():
    config = RTNConfig()
    config.manifest, config.summary = {"layers": {"a": {"bits": 4}}}, {"packed": 1}
    again = HfqConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.manifest == config.manifest and again.summary == config.summary
    assert again.to_dict() == config.to_dict()
    assert again.to_dict()["hfq_version"] == hfq.__version__


def test_the_writers_version_is_kept():
    saved = RTNConfig().to_dict() | {"hfq_version": "0.0.9"}
    assert HfqConfig.from_dict(saved).to_dict()["hfq_version"] == "0.0.9"


def test_keys_of_loaders_are_tolerated():
    saved = RTNConfig().to_dict() | {"_load_in_4bit": False, "load_in_8bit": False}
    assert HfqConfig.from_dict(saved).bits == 4


def test_from_dict_with_extra_arguments():
    config, unused = HfqConfig.from_dict({"method": "rtn"}, return_unused_kwargs=True, bits=3, other=1)
    assert config.bits == 3 and unused == {"other": 1}


@pytest.mark.parametrize(("saved", "error", "message"), [
    ({"format_version": FORMAT_VERSION + 1}, CheckpointError, "written by a newer hfq"),
    ({"format_version": 999}, CheckpointError, "format_version=999"),
    ({"format_version": "1"}, CheckpointError, "an integer from 1"),
    ({"format_version": 0}, CheckpointError, "an integer from 1"),
    ({"method": "of_next_year", "hfq_version": "9.0"}, CheckpointError, r"of_next_year.*9\.0"),
    ({"method": next(m.slug for m in methods.METHODS.values() if not m.available)}, CheckpointError, "planned"),
    ({"new_option": 1, "hfq_version": "9.0"}, CheckpointError, r"new_option.*written by a newer hfq \(9\.0\)"),
    ({"quant_method": "gptq"}, CheckpointError, "not an hfq model"),
    ({"bits": 99}, CheckpointError, "bits=99"),
    ({"manifest": [1]}, CheckpointError, "manifest is list"),
    ({"method": None}, CheckpointError, "no 'method'"),
    ({"method": 7}, CheckpointError, "no 'method'"),
])
def test_damaged_or_newer_records(saved, error, message):
    with pytest.raises(error, match=message):
        HfqConfig.from_dict(RTNConfig().to_dict() | saved)


def test_a_method_class_refuses_the_record_of_another():
    saved = RTNConfig().to_dict()
    with pytest.raises(CheckpointError, match="cannot read a config of method 'rtn'"):
        FullConfig.from_dict(saved)


def test_a_method_may_forbid_combinations():
    with pytest.raises(ConfigError, match="passes=3 cannot be symmetric"):
        FullConfig(passes=3, symmetric=True)


def test_repr_shows_what_was_changed():
    assert repr(RTNConfig(bits=3)) == "RTNConfig(bits=3)"
    assert repr(FullConfig(names=["a"])).startswith("FullConfig(")


def test_table_of_methods():
    table = hfq.methods()
    assert len(table) == 37 and table is not methods.METHODS
    assert {m.status for m in table.values()} <= {"available", "planned"}
    assert table["rtn"].available and table["rtn"].config == "RTNConfig" and hfq.RTNConfig is RTNConfig
    assert all(re.fullmatch(r"\d{4}\.\d{4,5}", m.arxiv) for slug, m in table.items() if slug != "rtn")
    assert methods.config_class("rtn") is RTNConfig and callable(methods.recipe("rtn"))


def test_planned_methods_say_so():
    planned = next(m for m in methods.METHODS.values() if not m.available)
    for ask in (lambda: getattr(hfq, planned.config), lambda: HfqConfig(method=planned.slug),
                lambda: methods.recipe(planned.slug)):
        with pytest.raises(ConfigError, match="planned"):
            ask()
    assert planned.config not in dir(hfq) and "RTNConfig" in dir(hfq)


def test_every_available_config_is_importable_and_complete():
    for slug, method in methods.METHODS.items():
        if method.available:
            cls = getattr(hfq, method.config)
            assert cls.method == slug and issubclass(cls, HfqConfig)
            try:
                config = cls()
            except ConfigError:  # a method may need a choice
                continue
            assert type(HfqConfig.from_dict(json.loads(json.dumps(config.to_dict())))) is cls


@pytest.mark.parametrize(("value", "hint", "fits"), [
    (1, int, True), (True, int, False), ("1", int, False), (1, float, True), (float("nan"), float, False),
    (float("inf"), float, False), (True, bool, True), (1, bool, False), (None, int | None, True),
    (["a"], list[str], True), ([1], list[str], False), ("ab", list[str], False), (("a",), list[str], False),
    ({}, dict[str, int], True), ([], dict[str, int], False),
])
def test_types(value, hint, fits):
    assert accepts(value, hint) is fits


def test_a_carried_cache_is_found_by_its_flag_and_shares_the_seed():
    flagged = [slug for slug, method in methods.METHODS.items()
               if method.available and methods.config_class(slug).is_cache]
    assert len(flagged) == 1  # a dict without a method means it
    config = RTNConfig(kv_cache={"kv_bits": 3}, seed=5, progress=False)
    assert type(config._cache) is methods.config_class(flagged[0]) and config.kv_cache["method"] == flagged[0]
    assert config._cache.seed == 5 and config._cache.progress is False and "seed" not in config.kv_cache
    again = HfqConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again._cache.seed == 5 and again.kv_cache == config.kv_cache
    assert RTNConfig(kv_cache={"kv_bits": 3, "seed": 7}, seed=5)._cache.seed == 7
    for wrong in ({"method": "rtn"}, {"method": "gptq", "bits": 4}):
        with pytest.raises(ConfigError, match="cannot carry"):
            RTNConfig(kv_cache=wrong)
    with pytest.raises(ConfigError, match="cannot carry"):
        methods.config_class(flagged[0])(kv_cache={"kv_bits": 3})
