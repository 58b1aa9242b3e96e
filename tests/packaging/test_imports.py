"""Who may import whom: strictly down the list of ranks, or inside the same folder, without loops."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
RANK = {
    "errors": 0, "report": 0, "fields": 0, "memory": 0, "formats": 1, "kernels": 2, "graph": 2, "layers": 3,
    "calibration": 4, "transforms": 4, "rounding": 4,
    "reconstruction": 5, "training": 5, "allocation": 5, "evaluation": 5,
    "config": 6, "compose": 7, "widths": 7, "methods": 8, "api": 9, "integrations": 10,
}
HUGGING_FACE = {"transformers", "diffusers", "peft", "accelerate", "optimum", "huggingface_hub", "datasets"}
HOMES = {"hfq": ("hfq",), "integrations": ("hfq", "integrations")}  # folder -> import name


def modules(root: Path = ROOT) -> dict[tuple[str, ...], Path]:
    """Import name -> file, for every module of the package."""
    return {
        (*prefix, *path.relative_to(root / folder).with_suffix("").parts): path
        for folder, prefix in HOMES.items()
        for path in sorted((root / folder).rglob("*.py"))
    }


def imports(tree: ast.AST, module: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and full name of everything imported, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, tuple(alias.name.split("."))) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module[: -node.level] if node.level else ()
            base += tuple((node.module or "").split(".")) if node.module else ()
            yield from ((node.lineno, (*base, alias.name)) for alias in node.names)


def violation(module: tuple[str, ...], to: tuple[str, ...]) -> str:
    """Why ``module`` may not import ``to``; empty if it may."""
    home = module[1]
    if to[0] == "integrations":
        return "integrations is hfq.integrations: a bare import loads a second copy"
    if to[0] in HUGGING_FACE:
        mixin = home == "config" and to[0] == "transformers"
        return "" if mixin or home == "integrations" else "Hugging Face libraries belong in integrations/"
    if to[0] != "hfq" or len(to) == 1 or to[1] == "__version__" or home == "__init__":
        return ""
    if home == "methods" and to[:2] == ("hfq", "methods") and module[-1] != "__init__" and len(to) > 2:
        return "methods do not import each other"
    if to[1] == home:
        return ""
    if home not in RANK:
        return f"{home} has no rank"
    return "" if RANK.get(to[1], 99) < RANK[home] else f"{home} is not above {to[1]}"


def violations(root: Path) -> list[str]:
    found = []
    for module, path in modules(root).items():
        for line, to in imports(ast.parse(path.read_text()), module):
            if reason := violation(module, to):
                found.append(f"{path.relative_to(root)}:{line} imports {'.'.join(to)}: {reason}")
    return found


def test_imports_point_down():
    bad = violations(ROOT)
    assert not bad, "\n".join(bad)


def test_the_rule_itself(tmp_path):
    cases = {
        "hfq/formats/a.py": ["from hfq.kernels import dispatch", "import transformers"],
        "hfq/kernels/a.py": ["from hfq.graph import read", "from ..layers import swap"],
        "hfq/methods/rtn.py": ["from hfq.methods.gptq import quantize", "def f():\n    from hfq import api"],
        "hfq/evaluation/a.py": ["from hfq.allocation import cost"],
        "hfq/config.py": ["import diffusers", "from hfq.methods import METHODS"],
        "integrations/a.py": ["import integrations.cli"],
    }
    for name, lines in cases.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        allowed = "import torch\nfrom hfq.errors import HfqError\nfrom hfq import __version__\n"
        path.write_text(allowed + "\n".join(lines) + "\n")
    assert len(violations(tmp_path)) == sum(map(len, cases.values()))


def top_level_imports(path: Path, module: tuple[str, ...], known: dict[tuple[str, ...], Path]) -> set[tuple[str, ...]]:
    """Modules of the package that importing ``module`` imports at once."""
    tree = ast.parse(path.read_text())
    body = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    found = set()
    for _, to in imports(ast.Module(body, []), module):
        for name in (to, to[:-1], (*to, "__init__"), (*to[:-1], "__init__")):
            if name in known and name != module:
                found.add(name)
                break
    return found


def test_no_import_loops():
    known = modules()
    graph = {module: top_level_imports(path, module, known) for module, path in known.items()}
    done: set[tuple[str, ...]] = set()

    def visit(module: tuple[str, ...], path: list[tuple[str, ...]]) -> None:
        if module in path:
            loop = [*path[path.index(module):], module]
            raise AssertionError("import loop: " + " -> ".join(".".join(m) for m in loop))
        if module not in done:
            for to in sorted(graph[module]):
                # A package's __init__ that re-exports a module is no loop for that module's siblings.
                if not (to[-1] == "__init__" and to[:-1] == module[:-1]):
                    visit(to, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])


def test_autoload_is_standard_library_only():
    path = ROOT / "hfq" / "_autoload.py"
    for line, to in imports(ast.parse(path.read_text()), ("hfq", "_autoload")):
        inside = to[0] == "hfq"  # allowed inside functions: by then transformers or diffusers is being imported
        assert inside or to[0] in sys.stdlib_module_names, f"_autoload.py:{line} imports {'.'.join(to)}"
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("hfq"), "importing torch must not import hfq"
