"""Tasks of lm-eval on a packed model; on own data, since its tasks read theirs from the Hub."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import hfq
from hfq.errors import ConfigError
from hfq.integrations import tasks

INSTALLED = importlib.util.find_spec("lm_eval") is not None
TASK = """
task: own_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_the_extra_the_error_names_it() -> None:
    with pytest.raises(ConfigError, match=r"hfq\[eval\]"):
        tasks.evaluate(None, None, ["piqa"])


@pytest.mark.skipif(not INSTALLED, reason="needs lm-eval: pip install 'hfq[eval]'")
def test_a_task_of_ones_own(small_lm: Any, tmp_path: Path) -> None:
    rows = [{"text": "The capital of", "choices": [" the", " zzqx"], "label": 0}] * 6
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own.yaml").write_text(TASK.format(file=tmp_path / "rows.json"))
    model = small_lm.make()
    hfq.quantize(model, hfq.RTNConfig(bits=4, group_size=64, progress=False))
    (row,) = tasks.evaluate(model, small_lm.tokenizer, ["own_words"], folder=tmp_path)
    assert row["task"] == "own_words" and row["metric"] == "acc" and row["value"] == 1.0 and row["examples"] == 6
    with pytest.raises(ConfigError, match="unknown tasks"):
        tasks.evaluate(model, small_lm.tokenizer, ["no_such_task"], folder=tmp_path)
