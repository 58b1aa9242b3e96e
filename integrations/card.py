"""The model card of a packed checkpoint: written from its config, its report and its measured results, nothing else."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hfq.config import HfqConfig
from hfq.errors import CheckpointError, HfqError
from hfq.integrations.results import Results, markdown
from hfq.methods import METHODS
from hfq.report import Report

__all__ = ["folder_card", "make_card", "write_card"]

# What every Config has and a reader learns elsewhere in the card.
_HIDDEN = {"quant_method", "method", "calibration", "processor", "manifest", "summary", "format_version", "hfq_version"}
# Ending of an architecture's name -> task on the Hub. The class that loads it is "Auto" + "Model" + the ending.
_TASKS = {
    "ForCausalLM": "text-generation", "ForImageClassification": "image-classification", "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification", "ForObjectDetection": "object-detection",
}


def make_card(
    config: HfqConfig, report: Report | None, *, results: Results | None = None, repo_id: str = "",
    architecture: str = "", model_type: str = "", plots: Sequence[str] = (),
) -> Any:
    """A ``huggingface_hub.ModelCard``.

    Args:
        config: config of the packed model (with ``summary``, which quantizing fills).
        report: one row a module; ``None`` if it is lost.
        results: measured numbers; only these become numbers of the card.
        repo_id: name under which the card shows how to load the model.
        architecture, model_type: as in ``config.json``.
        plots: pictures to show, relative to the card.

    Raises:
        HfqError: jinja2 is not installed.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise HfqError("writing a model card needs jinja2: `pip install hfq[card]`")
    from huggingface_hub import ModelCard

    results = results or Results()
    method = METHODS[config.method]
    summary = config.summary or {}
    template = files("hfq.integrations").joinpath("templates/card.md.jinja").read_text(encoding="utf-8")
    name = repo_id.rpartition("/")[2] or (results.base_model.rpartition("/")[2] or architecture) + f"-{method.slug}"
    return ModelCard.from_template(
        _metadata(config, results, name, architecture, model_type), template_str=template,
        name=name, repo_id=repo_id or "path/or/name", method=method, config=config, summary=summary, results=results,
        auto_class=f"AutoModel{_ending(architecture)}", bits_per_weight=summary.get("bits_per_weight"),
        options=_options(config), table=markdown(results.rows) if results.rows else "",
        packed=_kinds(report, "packed"), left=_reasons(report), notes=report.notes if report else [],
        data=_data(summary.get("data")), plots=plots,
    )


def folder_card(folder: str | os.PathLike[str], repo_id: str = "", results: Results | None = None) -> Any:
    """The card of a saved checkpoint, from what lies in its folder.

    Raises:
        CheckpointError: the folder holds no packed checkpoint.
    """
    import json

    from hfq.integrations.saving import read_report

    path = Path(folder) / "config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no readable config.json ({error}): name a saved model") from None
    if (saved.get("quantization_config") or {}).get("quant_method") != "hfq":
        raise CheckpointError(f"{folder} holds no model packed by hfq")
    return make_card(
        HfqConfig.from_dict(saved["quantization_config"]), read_report(folder), results=results or Results.load(folder),
        repo_id=repo_id, architecture=(saved.get("architectures") or [""])[0], model_type=saved.get("model_type", ""),
        plots=sorted(str(p.relative_to(folder)) for p in (Path(folder) / "plots").glob("*.png")),
    )


def write_card(folder: str | os.PathLike[str], repo_id: str = "", results: Results | None = None) -> Path:
    """Write ``README.md`` (and the results) into the folder of a saved checkpoint."""
    card = folder_card(folder, repo_id, results)
    if results is not None:
        results.save(folder)
    path = Path(folder) / "README.md"
    card.save(path)
    return path


def _metadata(config: HfqConfig, results: Results, name: str, architecture: str, model_type: str) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    ending = _ending(architecture)
    tags = ["hfq", "quantized", config.method, f"{config.bits}-bit"] + ([model_type] if model_type else [])
    known: dict[str, Any] = {"library_name": "transformers", "tags": tags}
    if results.base_model:
        known |= {"base_model": results.base_model, "base_model_relation": "quantized"}
    if results.license:
        known["license"] = results.license
    if ending:
        known["pipeline_tag"] = _TASKS[ending]
    method = METHODS[config.method]
    if method.arxiv:
        tags.append(f"arxiv:{method.arxiv}")
    row = results.this
    if row is not None and row.get("perplexity") is not None and results.dataset:
        known["model_name"] = name
        known["eval_results"] = [EvalResult(
            task_type="text-generation", dataset_type=_slug(results.dataset), dataset_name=results.dataset,
            metric_type="perplexity", metric_name="perplexity", metric_value=round(row["perplexity"], 4),
        )]
    if row is not None and row.get("accuracy") is not None and results.dataset:
        known["model_name"] = name
        known["eval_results"] = [EvalResult(
            task_type="image-classification", dataset_type=_slug(results.dataset), dataset_name=results.dataset,
            metric_type="accuracy", metric_name="top-1", metric_value=round(row["accuracy"], 4),
        )]
    return ModelCardData(**known)


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _ending(architecture: str) -> str:
    return next((ending for ending in _TASKS if architecture.endswith(ending)), "")


def _options(config: HfqConfig) -> dict[str, Any]:
    """The options that differ from the defaults, and the three everybody asks for."""
    default = type(config)().to_dict()
    always = ("bits", "group_size", "symmetric", "seed")
    return {
        key: value for key, value in config.to_dict().items()
        if key not in _HIDDEN and (key in always or value != default.get(key))
    }


def _kinds(report: Report | None, status: str) -> dict[str, int]:
    return dict(Counter(row.kind for row in report if row.status == status)) if report else {}


def _reasons(report: Report | None) -> dict[str, list[str]]:
    """Reason to the modules that stayed float for it."""
    found: dict[str, list[str]] = {}
    for row in report or ():
        if row.status != "packed":
            found.setdefault(row.reason or row.status, []).append(row.module)
    return found


def _data(descriptor: Any) -> str:
    """The calibration data in words."""
    if not isinstance(descriptor, dict):
        return ""
    return ", ".join(f"{key}: {value}" for key, value in descriptor.items() if value is not None)
