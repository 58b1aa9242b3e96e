"""Benchmark tasks through lm-evaluation-harness (extra ``eval``): its tasks, its metrics, our models."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfq.errors import ConfigError, DataError

__all__ = ["evaluate"]


def evaluate(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, limit: int | None = None, batch_size: int = 8,
    shots: int | None = None,
    folder: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Run tasks on a model that is in memory, packed or not.

    Args:
        tasks: names that lm-eval knows ("arc_easy", "piqa", ...) or of YAML files in ``folder``.
        limit: examples a task; ``None`` for all.
        batch_size: sequences a forward.
        shots: examples in the prompt; ``None`` takes each task's own number.
        folder: of additional task definitions.

    Returns:
        One row a task and metric: ``{"task", "metric", "value", "stderr", "examples"}``.

    Raises:
        ConfigError: lm-eval is not installed, or a task is unknown.
        DataError: the data of a task cannot be loaded (tasks read it from the Hub).
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("tasks need lm-evaluation-harness: pip install 'hfq[eval]'")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown or not tasks:
        raise ConfigError(f"unknown tasks {unknown}: `lm-eval ls tasks` lists what there is")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device))
    try:
        found = lm_eval.simple_evaluate(
            model=wrapped, tasks=list(tasks), limit=limit, num_fewshot=shots, task_manager=manager, bootstrap_iters=100,
        )
    except (OSError, ConnectionError) as error:
        raise DataError(f"the data of {', '.join(tasks)} cannot be loaded: {error}") from error
    rows = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, variant = key.partition(",")
            if not isinstance(value, (int, float)) or metric.endswith("_stderr") or not variant:
                continue
            spread = metrics.get(f"{metric}_stderr,{variant}")
            rows.append({
                "task": task, "metric": metric if variant == "none" else f"{metric} ({variant})", "value": float(value),
                "stderr": float(spread) if isinstance(spread, (int, float)) else None,
                "examples": found.get("n-samples", {}).get(task, {}).get("effective"),
            })
    return rows
