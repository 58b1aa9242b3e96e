"""One guess finds a paper: its slug names its file, its test and its card, and appears nowhere below the methods."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from hfq.methods import METHODS

ROOT = Path(__file__).parents[2]
FOLDERS = {"hfq": "hfq", "integrations": "hfq.integrations"}
# Solvers that carry the name they are known by; the methods of that name are thin users of them.
SANCTIONED = {"gptq": {"hfq/rounding/gptq.py"}, "flexround": {"hfq/rounding/flexround.py"}}
BELOW = ("formats", "kernels", "graph", "layers", "calibration", "transforms", "rounding", "reconstruction", "training",
         "allocation", "evaluation")


def test_table_and_files_agree():
    files = {path.stem for path in (ROOT / "hfq" / "methods").glob("*.py")} - {"__init__"}
    assert files <= set(METHODS), f"files without a row: {sorted(files - set(METHODS))}"
    assert {slug for slug, method in METHODS.items() if method.available} == files
    for slug, method in METHODS.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", slug) and method.slug == slug
        assert method.config.endswith("Config") and method.title and method.domain
        assert slug == "rtn" or re.fullmatch(r"\d{4}\.\d{4,5}", method.arxiv)
    assert len({method.config for method in METHODS.values()}) == len(METHODS)


@pytest.mark.parametrize("slug", [slug for slug, method in METHODS.items() if method.available])
def test_a_method_file_defines_its_config_and_recipe(slug):
    tree = ast.parse((ROOT / "hfq" / "methods" / f"{slug}.py").read_text())
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    functions = {node.name: [a.arg for a in node.args.args] for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert METHODS[slug].config in classes
    assert functions.get("quantize") == ["model", "data", "config", "report"]
    assert [name for name in classes if name.endswith("Config")] == [METHODS[slug].config]


def test_tests_and_cards_are_named_after_methods():
    for path in (ROOT / "tests" / "methods").glob("test_*.py"):
        slug = path.stem.removeprefix("test_")
        assert slug in METHODS or slug.startswith("matrix"), f"{path.name} is named after no method"
    for path in (ROOT / "model_cards").glob("*.md"):
        assert path.stem in METHODS or path.stem == "README", f"{path.name} is named after no method"


def identifiers(tree: ast.AST):
    """Names and whole-string constants, docstrings left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"\w+", node.value):
            yield node.lineno, node.value


def test_blocks_do_not_know_methods():
    pattern = re.compile("(?:^|_)(" + "|".join(map(re.escape, METHODS)) + ")(?:$|_)", re.I)
    bad = []
    for folder in BELOW:
        for path in (ROOT / "hfq" / folder).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            own = {slug for slug, paths in SANCTIONED.items() if name in paths or path.stem == "__init__"}
            found = [(0, path.stem), *identifiers(ast.parse(path.read_text()))]
            for line, word in found:
                match = pattern.search(word)
                if match and match[1].lower() not in own:
                    bad.append(f"{name}:{line} speaks of the method {match[1]!r} ({word})")
    assert not bad, "\n".join(bad)


def test_package_list_is_the_folders_on_disk():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    on_disk = set()
    for folder, name in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            on_disk.add(".".join((name, *init.parent.relative_to(ROOT / folder).parts)))
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.parent.relative_to(ROOT)} has no __init__.py"
    assert sorted(listed) == sorted(on_disk)
    for word in ("utils", "common", "core", "helpers"):
        assert not any(name.endswith(f".{word}") for name in listed)
        assert not list((ROOT / "hfq").rglob(f"{word}.py"))


def test_no_paths_of_a_machine_in_tracked_files():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(?<![\w./~$}])/(?:work|root|home|Users|mnt|opt|tmp|scratch)/\w")
    bad = []
    for name in done.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".safetensors", ".png", ".jpg") or not path.is_file() or path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if pattern.search(line):
                bad.append(f"{name}:{number}: {line.strip()[:80]}")
    assert not bad, "\n".join(bad)
