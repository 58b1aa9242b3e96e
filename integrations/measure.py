"""Load models by name or folder and measure them by the comparison protocol, for the command line and the examples."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hfq.errors import CheckpointError, DataError
from hfq.evaluation.agreement import agreement
from hfq.evaluation.latency import Speed, speeds
from hfq.evaluation.memory import disk_bytes
from hfq.evaluation.perplexity import perplexity
from hfq.integrations import environment, inputs, inputs_vision
from hfq.integrations.results import Results

__all__ = [
    "DEMO", "PROTOCOL", "Text", "kernels_used", "load_model", "load_tokenizer", "open_text", "origin", "resolve", "row",
    "sample", "saved_config", "timed_rows",
]

DEMO = "demo"
PROTOCOL = ("Perplexity of the first {count} windows of {length} tokens, no overlap, no token added in front, "
            "mean loss inside the windows, float32.")


@dataclass
class Text:
    """Training and test text, and what they are in a few words."""

    train: str
    test: str
    title: str

    def windows(self, tokenizer: Any, count: int, length: int) -> list[list[int]]:
        """The first ``count`` windows of the test part (fewer if it is short, at least one)."""
        tokens = tokenizer(self.test, add_special_tokens=False, verbose=False)["input_ids"]
        return inputs.windows(tokens, length, max(1, min(count, len(tokens) // length)))


def open_text(data: str | os.PathLike[str] = DEMO) -> Text:
    """``"demo"`` (Wikipedia introductions), a file, or the id of a dataset on the Hub.

    Raises:
        DataError: there is no such text.
    """
    if str(data) == DEMO:
        return Text(*inputs.demo_text(), "English Wikipedia introductions, every tenth by title")
    title = Path(data).name if os.path.exists(data) else str(data)
    return Text(*inputs.read_text(data), f"{title}, every tenth text")


def resolve(model: str | os.PathLike[str]) -> str:
    """``"demo"`` is the demo model in the cache, ``"vit"``, ``"swin"``, ... those of images."""
    if str(model) in inputs_vision.RECIPES and not os.path.exists(model):
        return str(inputs_vision.demo_vision(str(model)))
    return str(inputs.demo_model()) if str(model) == DEMO else str(model)


def load_model(name: str | os.PathLike[str], **options: Any) -> Any:
    """Load a model with the class that its config names.

    Args:
        name: folder or Hub id, or ``"demo"``.
        options: passed to ``from_pretrained`` (``quantization_config``, ``dtype``, ``device_map``, ...).

    Raises:
        CheckpointError: there is no such model, or it is of an unknown class.
    """
    import transformers

    name = resolve(name)
    if os.path.isdir(name) and not (Path(name) / "config.json").exists():
        raise CheckpointError(f"{name} has no config.json: it is not the folder of a saved model")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except OSError as error:
        raise CheckpointError(f"no model {name!r}: {_first_line(error)}") from error
    architecture = (config.architectures or [""])[0]
    cls = getattr(transformers, architecture, None)
    if cls is None and type(config) in transformers.AutoModelForImageClassification._model_mapping:
        cls = transformers.AutoModelForImageClassification  # a model of hfq.integrations.models
    if cls is None:
        raise CheckpointError(f"{name} is a {architecture or type(config).__name__}, which transformers does not have")
    return cls.from_pretrained(name, **options).eval()


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """Tokenizer of a folder or Hub id.

    Raises:
        DataError: it has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve(name))
    except (OSError, ValueError) as error:
        raise DataError(f"{name} has no tokenizer: {_first_line(error)}") from error


def row(name: str, model: Any, windows: Sequence[Sequence[int]], *, folder: str | os.PathLike[str] | None = None,
        reference: Any = None) -> dict[str, Any]:
    """Quality and size of one model.

    Args:
        name: name of the row.
        model: causal language model.
        windows: test windows ``[W, T]``.
        folder: where it is saved, for its bytes on disk.
        reference: float model to compare the logits with.
    """
    found: dict[str, Any] = {"name": name, "perplexity": perplexity(model, windows, progress=environment.progress)}
    if reference is not None:
        compared = agreement(reference, model, windows)
        found |= {"kl": compared.kl, "top1": compared.top1}
    if folder is not None and os.path.isdir(folder):
        found["disk_bytes"] = disk_bytes(folder)
    report = getattr(model, "hfq_report", None)
    if report is not None:
        found |= {
            "bits_per_weight": report.bits_per_weight(), "quantize_seconds": report.totals.get("seconds"),
            "peak_memory_bytes": report.totals.get("peak_memory_bytes"), "kernel": kernels_used(model),
        }
    return {key: value for key, value in found.items() if value is not None}


def timed_rows(rows: Sequence[dict[str, Any]], models: Mapping[str, Any], windows: Sequence[Sequence[int]], *,
               new_tokens: int = 32) -> dict[str, Speed]:
    """Measure the speed of all models in turns (the first is the baseline) and enter it in their rows."""
    found = speeds(models, torch.tensor(windows[:1]), new_tokens=new_tokens)
    for entry in rows:
        if speed := found.get(entry["name"]):
            entry |= {"decode": speed.decode, "decode_ratio": speed.decode_ratio, "prefill_ratio": speed.prefill_ratio}
    return found


def sample(model: Any, tokenizer: Any, prompt: str = "The history of the city of Rome", new_tokens: int = 24) -> str:
    """A greedy continuation of ``prompt``."""
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
    out = model.generate(**ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def kernels_used(model: Any, rows: int = 1) -> str:
    """Backends that serve the packed layers for ``rows`` tokens, the most used first; empty for a float model."""
    from collections import Counter

    from hfq.kernels import explain
    from hfq.layers import swap

    chosen = Counter(
        line.backend for module in swap.packed_modules(model).values() for line in explain(module, rows) if line.chosen
    )
    return ", ".join(name for name, _ in chosen.most_common())


def saved_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """``quantization_config`` of a saved model; empty for a float one."""
    path = Path(folder) / "config.json"
    return json.loads(path.read_text()).get("quantization_config") or {} if path.is_file() else {}


def origin(model: str | os.PathLike[str]) -> Results:
    """Results without numbers: the base model and its licence, as far as they are known for sure.

    The base model is known if ``model`` is a Hub id; the licence if a card lies beside the weights.
    """
    if str(model) == DEMO:
        return Results(base_model=inputs.MODEL_ID, license=inputs.MODEL_FILE.license.lower())
    if str(model) in inputs_vision.RECIPES:
        return Results()  # trained here: it is on no Hub
    if not os.path.exists(model):
        return Results(base_model=str(model))
    path = Path(model) / "README.md"
    if not path.is_file():
        return Results()
    from huggingface_hub import ModelCard

    found = ModelCard.load(path).data.get("license")
    return Results(license=found if isinstance(found, str) else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
