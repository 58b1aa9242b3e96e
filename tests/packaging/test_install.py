"""What a user installs: the wheel, the sdist, and the cost of `import hfq`. Everything runs in child processes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Slow to import, used by few: none of them may be loaded before it is needed.
LAZY = ["diffusers", "peft", "datasets", "scipy", "matplotlib", "typer", "rich", "pandas", "optimum", "gguf"]


def python(code: str, *, path: Path | None = None, cwd: Path | None = None) -> str:
    environment = dict(os.environ, PYTHONPATH=str(path) if path else "", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c", textwrap.dedent(code)],
                          env=environment, cwd=cwd or "/", capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_import_is_lazy_and_quick():
    out = python(f"""
        import sys, time
        import torch
        import transformers.utils.quantization_config
        start = time.perf_counter()
        import hfq
        print(time.perf_counter() - start)
        print([name for name in {LAZY!r} if name in sys.modules])
        print(any(name.startswith("hfq.methods.") for name in sys.modules))
    """)
    seconds, loaded, methods = out.split("\n")[:3]
    assert loaded == "[]", f"import hfq loads {loaded}"
    assert methods == "False", "import hfq loads methods that nobody asked for"
    assert float(seconds) < 10, f"import hfq takes {seconds} s after torch and transformers' configs"


def test_importing_torch_does_not_import_hfq():
    code = "import sys, torch; print([m for m in ('transformers', 'hfq.config', 'hfq.formats') if m in sys.modules])"
    assert python(code) == "[]\n"


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """Folder with the wheel and the sdist, built from a copy of what belongs to the package."""
    folder = tmp_path_factory.mktemp("build")
    source, out = folder / "source", folder / "dist"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("hfq", "integrations"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--outdir", str(out)]
    if importlib.util.find_spec("setuptools") is not None:
        from importlib.metadata import version

        if int(version("setuptools").split(".")[0]) >= 77:
            command.append("--no-isolation")
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


@pytest.fixture(scope="session")
def installed(built, tmp_path_factory) -> Path:
    """The wheel alone in a folder, before everything else on the path; dependencies come from this environment."""
    target = tmp_path_factory.mktemp("site")
    wheel = next(built.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def sources() -> set[str]:
    """Every file that must be in the wheel."""
    return {
        f"{prefix}/{path.relative_to(ROOT / folder)}"
        for folder, prefix in (("hfq", "hfq"), ("integrations", "hfq/integrations"))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.slow
def test_wheel_holds_every_file(built):
    names = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    assert sources() <= names, sorted(sources() - names)
    assert not [name for name in names if name.startswith(("tests/", "examples/", "integrations/"))]


@pytest.mark.slow
def test_sdist_holds_integrations(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for path in (ROOT / "integrations").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert str(path.relative_to(ROOT)) in names
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names


@pytest.mark.slow
def test_wheel_entry_points(installed):
    text = next(installed.glob("hfq-*.dist-info/entry_points.txt")).read_text()
    assert "hfq = hfq._autoload:install" in text.partition("[torch.backends]")[2]
    assert "hfq = hfq.integrations.cli:main" in text.partition("[console_scripts]")[2]


@pytest.mark.slow
def test_wheel_quantizes_and_reloads(installed, tmp_path):
    code = f"""
        import pathlib, torch
        import hfq, hfq.integrations
        for module in (hfq, hfq.integrations):
            assert pathlib.Path(module.__file__).is_relative_to({str(installed)!r}), module.__file__
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2)).eval()
        report = hfq.quantize(model, hfq.RTNConfig(bits=4, group_size=32))
        assert len(report.packed) == 14, str(report)
        ids = torch.arange(12)[None]
        before = model(ids).logits
        model.save_pretrained({str(tmp_path)!r})
        again = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
        assert torch.equal(again(ids).logits, before)
        print(hfq.__version__)
    """
    assert python(code, path=installed)
