"""Bad input: one clear error for each, nothing lost. One row a case: what is done, the error, words of its message."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import hfq
from hfq.config import HfqConfig
from hfq.errors import CheckpointError, ConfigError, DataError, HfqError, QuantizationError
from hfq.integrations.saving import save


class Bench(NamedTuple):
    """What an action may use."""

    tmp: Path
    floats: Path
    packed: Path
    patch: pytest.MonkeyPatch

    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.floats)

    def loaded(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.packed)

    def quantize(self, model: Any = None, data: Any = None, **values: Any) -> Any:
        return hfq.quantize(self.model() if model is None else model, hfq.RTNConfig(**values), data)

    def calibrate(self, data: Any, **values: Any) -> Any:
        values = {"bits": 4, "calibration_samples": 4, "calibration_seqlen": 8, "progress": False, **values}
        return hfq.quantize(self.model(), hfq.GPTQConfig(**values), data)

    def copy(self) -> Path:
        folder = self.tmp / "copy"
        shutil.copytree(self.packed, folder)
        return folder

    def open(self, folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder)

    def with_config(self, change: Callable[[dict[str, Any]], None]) -> Any:
        """Load a copy of the packed model after a change to its quantization config."""
        folder = self.copy()
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
        return self.open(folder)

    def with_layer(self, **entry: Any) -> Any:
        """The same with a change to one layer of the manifest."""
        def change(config: dict[str, Any]) -> None:
            layer = config["manifest"]["layers"]["model.layers.0.mlp.up_proj"]
            holder = next((v for v in (layer, *layer.values()) if isinstance(v, dict) and set(entry) <= set(v)), None)
            assert holder is not None, f"no place for {entry} in {layer}"
            holder.update(entry)

        return self.with_config(change)

    def with_tensors(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> Any:
        """Load a copy of the packed model after a change to its tensors."""
        folder = self.copy()
        file = folder / "model.safetensors"
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata()
        tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
        change(tensors)
        save_file(tensors, file, metadata)
        return self.open(folder)

    def sharded(self) -> Path:
        self.loaded().save_pretrained(self.tmp / "shards", max_shard_size="8KB")
        return self.tmp / "shards"


def rtn(**values: Any) -> Callable[[Bench], Any]:
    return lambda bench: hfq.RTNConfig(**values)


def used_generator() -> Any:
    generator = (torch.arange(8) for _ in range(4))
    list(generator)
    return generator


def truncate(file: Path, keep: float) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])


def lose_a_shard(b: Bench) -> Any:
    folder = b.sharded()
    sorted(folder.glob("*.safetensors"))[1].unlink()
    return b.open(folder)


def cut_a_shard(b: Bench) -> Any:
    folder = b.sharded()
    truncate(sorted(folder.glob("*.safetensors"))[1], 0.5)
    return b.open(folder)


def cut_the_file(keep: float) -> Callable[[Bench], Any]:
    def act(b: Bench) -> Any:
        folder = b.copy()
        truncate(folder / "model.safetensors", keep)
        return b.open(folder)

    return act


def other_file(content: bytes) -> Callable[[Bench], Any]:
    def act(b: Bench) -> Any:
        folder = b.copy()
        (folder / "model.safetensors").write_bytes(content)
        return b.open(folder)

    return act


def weights_of_the_float_model(b: Bench) -> Any:
    folder = b.copy()
    shutil.copy(b.floats / "model.safetensors", folder / "model.safetensors")
    return b.open(folder)


def save_over(content: str) -> Callable[[Bench], Any]:
    def act(b: Bench) -> Any:
        folder = b.tmp / "out"
        folder.mkdir()
        (folder / content).write_text("mine")
        return save(b.loaded(), folder)

    return act


def save_into_a_file(b: Bench) -> Any:
    (b.tmp / "file").write_text("mine")
    return save(b.loaded(), b.tmp / "file", overwrite=True)


def full_disk(b: Bench) -> Any:
    """The disk fills up while the weights are written over an older model."""
    folder = b.tmp / "out"
    save(b.loaded(), folder)
    model = b.loaded()

    def write(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    b.patch.setattr("transformers.modeling_utils.safe_save_file", write)
    return save(model, folder, overwrite=True)


def meta_model(b: Bench) -> Any:
    with torch.device("meta"):
        return b.quantize(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(b.floats)))


def nan_weight(b: Bench) -> Any:
    model = b.model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    return b.quantize(model)


def nan_activation(b: Bench) -> Any:
    model = b.model()
    model.model.layers[1].input_layernorm.weight.data.fill_(3e38)  # finite, and its products are not
    config = hfq.GPTQConfig(calibration_samples=4, calibration_seqlen=8, progress=False)
    return hfq.quantize(model, config, torch.arange(32).reshape(4, 8))


def twice(b: Bench) -> Any:
    return b.quantize(b.loaded())


def other_class(b: Bench) -> Any:
    return AutoModelForCausalLM.from_pretrained(b.packed, quantization_config=hfq.GPTQConfig())


IDS = torch.arange(32).reshape(4, 8)
NEWER = "written by a newer hfq"

CASES: list[tuple[str, Callable[[Bench], Any], type[Exception], str]] = [
    # -- config
    ("unknown field", rtn(group_szie=64),
     ConfigError, "unknown field 'group_szie' of RTNConfig; did you mean 'group_size'?"),
    ("unknown field, nothing near", rtn(zzz=1),
     ConfigError, "unknown field 'zzz' of RTNConfig; known: activation_bits"),
    ("positional argument", lambda b: hfq.RTNConfig(4), ConfigError, "keyword arguments only"),
    ("nine bits", rtn(bits=9), ConfigError, "bits=9 of RTNConfig: an integer from 1 to 8 or 16 is allowed"),
    ("no bits", rtn(bits=0), ConfigError, "bits=0"),
    ("negative bits", rtn(bits=-4), ConfigError, "bits=-4"),
    ("bits as text", rtn(bits="4"), ConfigError, "bits='4' of RTNConfig: an integer from 1 to 8 or 16 is allowed"),
    ("bits as a float", rtn(bits=4.0), ConfigError, "bits=4.0"),
    ("bits as a bool", rtn(bits=True), ConfigError, "bits=True"),
    ("bits left out", rtn(bits=None), ConfigError, "bits=None"),
    ("group below -1", rtn(group_size=-2), ConfigError, "group_size=-2"),
    ("group as text", rtn(group_size="all"), ConfigError, "group_size='all'"),
    ("group that fits no layer", lambda b: b.quantize(group_size=4096),
     ConfigError, "group_size=4096 fits no layer: the widest has 48"),
    ("symmetric as a number", rtn(symmetric=1), ConfigError, "symmetric=1 of RTNConfig: True or False is allowed"),
    ("activations of a weight method", lambda b: hfq.RSQConfig(activation_bits=8),
     ConfigError, "activation_bits=8: rsq does not quantize activations"),
    ("activation bits out of range", rtn(activation_bits=12), ConfigError, "activation_bits=12"),
    ("cache of an odd width", rtn(kv_bits=9), ConfigError, "kv_bits=9"),
    ("choice misspelt", rtn(clip="msee"), ConfigError, "clip='msee' of RTNConfig: one of 'none', 'mse'"),
    ("skip list as text", rtn(modules_to_not_convert="lm_head"), ConfigError, "a list of strings or None is allowed"),
    ("skip list of numbers", rtn(modules_to_not_convert=[1]), ConfigError, "modules_to_not_convert=[1]"),
    ("dtype that is none", rtn(compute_dtype="float7"), ConfigError, "compute_dtype='float7'"),
    ("integer dtype", rtn(compute_dtype=torch.int8), ConfigError, "compute_dtype=torch.int8"),
    ("negative seed", rtn(seed=-1), ConfigError, "seed=-1"),
    ("no samples", rtn(calibration_samples=0), ConfigError, "calibration_samples=0"),
    ("no batch", rtn(calibration_batch_size=0), ConfigError, "calibration_batch_size=0"),
    ("memory mode misspelt", rtn(cpu_memory="cache"),
     ConfigError, "cpu_memory='cache' of RTNConfig: one of 'compact', 'cached'"),
    ("overrides as a list", rtn(overrides=["x"]), ConfigError, "overrides=['x'] of RTNConfig: a dict is allowed"),
    ("override that is no dict", rtn(overrides={"x": 3}), ConfigError, "overrides['x']=3"),
    ("override of an unknown field", rtn(overrides={"x": {"bit": 3}}), ConfigError, "did you mean 'bits'?"),
    ("override out of range", rtn(overrides={"x": {"bits": 9}}), ConfigError, "overrides['x']['bits']=9"),
    ("override with a bad format", rtn(overrides={"x": {"zero_point": "half"}}),
     ConfigError, "overrides['x']: zero_point='half'"),
    ("override of activations", lambda b: hfq.RSQConfig(overrides={"x": {"activation_bits": 8}}),
     ConfigError, "does not quantize activations"),
    ("override that matches nothing", lambda b: b.quantize(overrides={"layers.9": {"bits": 3}}),
     ConfigError, "overrides['layers.9'] matches no module"),
    ("no method", lambda b: HfqConfig(bits=4), ConfigError, "HfqConfig needs method="),
    ("unknown method", lambda b: HfqConfig(method="rsqq"), ConfigError, "method 'rsqq' is not known to hfq"),
    ("planned method", lambda b: hfq.QPETRConfig, ConfigError, "is planned and not part of hfq"),
    ("class and method differ", rtn(method="gptq"), ConfigError, "RTNConfig is the config of 'rtn'"),
    ("dictionary of another library", lambda b: HfqConfig.from_dict({"quant_method": "gptq", "bits": 4}),
     ConfigError, "not an hfq model"),
    ("dictionary with a typing error", lambda b: HfqConfig.from_dict({"method": "rtn", "bitz": 4}),
     ConfigError, "did you mean 'bits'?"),
    ("dequantize a float model", lambda b: AutoModelForCausalLM.from_pretrained(
        b.floats, quantization_config=hfq.RTNConfig(dequantize=True)), ConfigError, "this checkpoint is not packed"),
    # -- model
    ("no model", lambda b: hfq.quantize("model", hfq.RTNConfig()), ConfigError, "the model is str"),
    ("model without layers", lambda b: b.quantize(torch.nn.LayerNorm(4)),
     ConfigError, "has no layer that rtn could quantize"),
    ("model on meta", meta_model, ConfigError, "is on the meta device"),
    ("model quantized before", twice, ConfigError, "is already quantized (quantization_config of hfq)"),
    ("dequantize what is float", lambda b: hfq.dequantize(b.model()), ConfigError, "nothing to dequantize"),
    ("explain what is float", lambda b: hfq.explain(b.model()), ConfigError, "nothing to explain"),
    ("NaN in a weight", nan_weight, QuantizationError, "NaN"),
    # -- data
    ("data missing", lambda b: b.calibrate(None), DataError, "gptq needs calibration data"),
    ("data missing on load", lambda b: AutoModelForCausalLM.from_pretrained(
        b.floats, quantization_config=hfq.GPTQConfig()), DataError, "GPTQConfig(calibration=...)"),
    ("data empty", lambda b: b.calibrate([]), DataError, "empty"),
    ("data of numbers", lambda b: b.calibrate(7), DataError, "int"),
    ("data with wrong keys", lambda b: b.calibrate([{"labels_only": "x"}] * 9, text_column="body"),
     DataError, "labels_only"),
    ("generator used before", lambda b: b.calibrate(used_generator()), DataError, "used before"),
    ("file that is not there", lambda b: b.calibrate("missing.txt"), DataError, "missing.txt"),
    ("text without a tokenizer", lambda b: b.calibrate(["some words"] * 9), DataError, "tokenizer"),
    ("processor that is not there", lambda b: b.calibrate(["a"] * 9, processor=str(b.tmp / "no")),
     DataError, "cannot be loaded"),
    ("NaN in the data", lambda b: b.calibrate([{"inputs_embeds": torch.full((8, 32), float("nan"))}]),
     DataError, "inputs_embeds"),
    ("NaN in the activations", nan_activation, DataError, "layers.1"),
    # -- checkpoint
    ("missing shard", lose_a_shard, (OSError, CheckpointError), "safetensors"),
    ("truncated shard", cut_a_shard, CheckpointError, "is truncated or damaged"),
    ("truncated file", cut_the_file(0.7), CheckpointError, "is truncated or damaged"),
    ("empty file", cut_the_file(0.0), CheckpointError, "is truncated or damaged"),
    ("file of another kind", other_file(b"not safetensors at all" * 9), CheckpointError, "is truncated or damaged"),
    ("tensor missing", lambda b: b.with_tensors(
        lambda t: t.pop("model.layers.0.mlp.up_proj.weight")),
        CheckpointError, "the checkpoint lacks model.layers.0.mlp.up_proj.qweight"),
    ("scale missing", lambda b: b.with_tensors(
        lambda t: t.pop("model.layers.0.mlp.up_proj.scale")),
        CheckpointError, "lacks model.layers.0.mlp.up_proj.scale"),
    ("wrong shape", lambda b: b.with_tensors(lambda t: t.update({
        "model.layers.0.mlp.up_proj.weight": torch.zeros(1, 48, 15, dtype=torch.uint8)})),
        CheckpointError, "has shape [1, 48, 15]"),
    ("wrong dtype", lambda b: b.with_tensors(lambda t: t.update({
        "model.layers.0.mlp.up_proj.weight": torch.zeros(1, 48, 16)})),
        CheckpointError, "is F32, torch.uint8 is needed"),
    ("float weights under a packed config", weights_of_the_float_model, CheckpointError, "has shape"),
    ("scales that are NaN", lambda b: b.with_tensors(
        lambda t: t["model.layers.0.mlp.up_proj.scale"].fill_(float("nan"))),
        CheckpointError, "model.layers.0.mlp.up_proj"),
    ("zero point out of range", lambda b: b.with_tensors(
        lambda t: t["model.layers.0.mlp.up_proj.zero_point"].fill_(200)),
        CheckpointError, "model.layers.0.mlp.up_proj"),
    ("negative size", lambda b: b.with_layer(in_features=-32), CheckpointError, "up_proj"),
    ("absurd size", lambda b: b.with_layer(out_features=10**15), CheckpointError, "up_proj"),
    ("size as text", lambda b: b.with_layer(in_features="32"), CheckpointError, "up_proj"),
    ("another size", lambda b: b.with_layer(in_features=48), CheckpointError, "up_proj"),
    ("bits of a layer out of range", lambda b: b.with_layer(bits=77), CheckpointError, "bits"),
    ("bits of a layer changed", lambda b: b.with_layer(bits=8), CheckpointError, "has shape"),
    ("format of the future", lambda b: b.with_config(lambda c: c.update(format_version=999)),
     CheckpointError, "format_version=999"),
    ("method of the future", lambda b: b.with_config(lambda c: c.update(method="new_paper", hfq_version="7.0")),
     CheckpointError, NEWER),
    ("field of the future", lambda b: b.with_config(lambda c: c.update(new_field=1)), CheckpointError, NEWER),
    ("bits of the config out of range", lambda b: b.with_config(lambda c: c.update(bits=-3)),
     CheckpointError, "bits=-3"),
    ("manifest gone", lambda b: b.with_config(lambda c: c.pop("manifest")), CheckpointError, "without 'manifest'"),
    ("manifest of another kind", lambda b: b.with_config(lambda c: c.update(manifest="x")),
     CheckpointError, "manifest is str"),
    ("manifest without layers", lambda b: b.with_config(lambda c: c.update(manifest={})),
     CheckpointError, "without 'manifest' and its 'layers'"),
    ("layer that is not there", lambda b: b.with_config(lambda c: c["manifest"]["layers"].update(
        {"model.layers.9.x": next(iter(c["manifest"]["layers"].values()))})), CheckpointError, "model.layers.9.x"),
    ("config class of another method", other_class, ValueError, "RTNConfig"),
    # -- run
    ("output folder not empty", save_over("notes.txt"), ConfigError, "is not empty"),
    ("output folder with a model", save_over("config.json"), ConfigError, "--overwrite"),
    ("output is a file", save_into_a_file, ConfigError, "is a file"),
    ("disk full while saving", full_disk, CheckpointError, "is as it was before"),
]


@pytest.fixture
def bench(tmp_path, floats, packed, monkeypatch):
    return Bench(tmp_path, floats("llama"), packed("llama"), monkeypatch)


@pytest.mark.parametrize(("action", "error", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_one_clear_error(action, error, words, bench):
    with pytest.raises(error) as caught:
        action(bench)
    message = str(caught.value)
    assert words in message
    if isinstance(caught.value, HfqError):
        assert "Traceback" not in message and len(message) < 700


def test_there_are_enough_cases():
    assert len(CASES) >= 60 and len({case[0] for case in CASES}) == len(CASES)
    assert sum(issubclass(error, HfqError) for _, _, error, _ in CASES if isinstance(error, type)) >= 60


def test_a_full_disk_leaves_the_old_folder(bench, outputs):
    with pytest.raises(CheckpointError):
        full_disk(bench)
    bench.patch.undo()
    folder = bench.tmp / "out"
    assert torch.equal(outputs(bench.open(folder)), outputs(bench.loaded()))
    assert sorted(path.name for path in bench.tmp.iterdir()) == ["out"], "nothing temporary is left behind"


def test_a_refused_folder_is_untouched(bench):
    with pytest.raises(ConfigError):
        save_over("notes.txt")(bench)
    assert [path.name for path in (bench.tmp / "out").iterdir()] == ["notes.txt"]


def test_overwrite_replaces_everything(bench, outputs):
    folder = bench.tmp / "out"
    folder.mkdir()
    (folder / "stale.safetensors").write_text("old")
    save(bench.loaded(), folder, overwrite=True)
    assert not (folder / "stale.safetensors").exists() and (folder / "hfq_report.json").exists()
    assert torch.equal(outputs(bench.open(folder)), outputs(bench.loaded()))
    assert [path.name for path in bench.tmp.iterdir()] == ["out"]


def test_an_interrupt_while_saving_leaves_the_old_folder(bench):
    folder = bench.tmp / "out"
    save(bench.loaded(), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(bench.loaded(), folder, overwrite=True, extra=stop)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in bench.tmp.iterdir()] == ["out"]


def test_partial_results_are_allowed_when_asked_for(bench):
    model = bench.model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(QuantizationError):
        bench.quantize(model)
