"""Texts to windows of tokens."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hfq.errors import DataError

__all__ = ["SUFFIXES", "Texts", "column", "padding", "read_file"]

SUFFIXES = (".txt", ".md", ".json", ".jsonl")
# A source without a length (a stream) is read until it holds about this many times the characters that are needed.
_STREAM_FACTOR = 32


def column(row: Any, wanted: str | None) -> str | None:
    """The text column of ``row``, or ``None`` if the row is not text."""
    if not isinstance(row, Mapping):
        return None
    texts = [str(key) for key, value in row.items() if isinstance(value, str)]
    if wanted is not None:
        if wanted not in row:
            raise DataError(f"text_column={wanted!r} is not among the columns found: {sorted(map(str, row))}")
        return wanted
    if "input_ids" in row or not texts:
        return None
    if "text" in texts:
        return "text"
    if len(texts) > 1:
        raise DataError(f"several columns hold text: {sorted(texts)}; choose one with text_column")
    return texts[0]


def read_file(path: Path) -> list[Any]:
    """Rows of a ``.json`` (list, or title to text) or ``.jsonl`` file, paragraphs of any other text file."""
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in content.splitlines() if line.strip()]
        if path.suffix == ".json":
            loaded = json.loads(content)
            if isinstance(loaded, Mapping):
                loaded = [loaded[key] for key in sorted(loaded)]
            if not isinstance(loaded, list):
                raise DataError(f"{path.name} holds {type(loaded).__name__}: a list of texts or rows is needed")
            return loaded
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} cannot be read as {path.suffix or 'text'}: {error}") from error
    return [part for part in content.split("\n\n") if part.strip()]


def tokenizer(processor: Any) -> Any:
    return getattr(processor, "tokenizer", None) or processor


def padding(processor: Any) -> int:
    found = tokenizer(processor)
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(found, name, None)
        if isinstance(value, int):
            return value
    return 0


def _call_options(found: Any, **wanted: Any) -> dict[str, Any]:
    """Those options that the tokenizer takes (any callable may serve as one)."""
    parameters = inspect.signature(found).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return wanted
    return {key: value for key, value in wanted.items() if key in parameters}


class Texts:
    """Turns texts into rows ``{"input_ids": [seqlen]}``."""

    def __init__(
        self, processor: Any, samples: int | None, seqlen: int | None, seed: int, *, streaming: bool = False
    ) -> None:
        if processor is None:
            raise DataError("calibration texts need a tokenizer: pass processor (a tokenizer or the id of one)")
        if seqlen is None or seqlen < 1:
            raise DataError(f"seqlen={seqlen}: calibration texts need a length of at least one token")
        self.tokenizer = tokenizer(processor)
        self.pad = padding(processor)
        self.samples, self.seqlen, self.seed, self.streaming = samples, seqlen, seed, streaming

    def _tokens(self, text: str, special: bool) -> list[int]:
        options = _call_options(self.tokenizer, add_special_tokens=special, verbose=False)
        out = self.tokenizer(text, **options)
        ids = out["input_ids"] if isinstance(out, Mapping) or hasattr(out, "keys") else out
        ids = torch.as_tensor(ids).reshape(-1).tolist()
        return ids

    def _read(self, texts: Iterable[str]) -> Iterator[str]:
        budget = _STREAM_FACTOR * self.samples * self.seqlen if self.streaming and self.samples is not None else None
        for text in texts:
            if not isinstance(text, str):
                raise DataError(f"among the calibration texts is a {type(text).__name__}: {str(text)[:60]!r}")
            yield text
            if budget is not None:
                budget -= len(text)
                if budget < 0:
                    return

    def windows(self, texts: Iterable[str]) -> list[dict[str, torch.Tensor]]:
        """Join by a blank line, tokenize once, cut into windows, sample."""
        ids = self._tokens("\n\n".join(self._read(texts)), special=False)
        count = len(ids) // self.seqlen
        wanted = count if self.samples is None else self.samples
        if count < max(wanted, 1):
            raise DataError(
                f"the calibration text is too short: found {len(ids)} tokens, "
                f"{max(wanted, 1) * self.seqlen} are needed for {max(wanted, 1)} windows of {self.seqlen}; "
                "give more text, or lower calibration_samples or calibration_seqlen"
            )
        chosen = random.Random(self.seed).sample(range(count), wanted)
        return [{"input_ids": torch.tensor(ids[i * self.seqlen : (i + 1) * self.seqlen])} for i in chosen]

    def truncated(self, texts: Iterable[str]) -> list[dict[str, torch.Tensor]]:
        """One row a text, cut at ``seqlen``; empty texts are left out."""
        result: list[dict[str, torch.Tensor]] = []
        for text in self._read(texts):
            if self.samples is not None and len(result) == self.samples:
                break
            ids = self._tokens(text, special=True)[: self.seqlen]
            if ids:
                result.append({"input_ids": torch.tensor(ids)})
        found = sum(len(row["input_ids"]) for row in result)
        if found < self.seqlen:
            raise DataError(
                f"the calibration texts are too short: found {found} tokens, at least {self.seqlen} are needed; "
                "give more text or lower calibration_seqlen"
            )
        return result
