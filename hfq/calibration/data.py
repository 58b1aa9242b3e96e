"""Calibration data of any form becomes ``Batches``: a list of dicts of forward keywords on the CPU.

Accepted forms: texts (``list[str]``, rows with a text column, a ``.txt``, ``.json`` or ``.jsonl`` file), tokenised rows
or batches (dicts, ``BatchEncoding``), tensors (integers are ``input_ids``, floats ``pixel_values``), a torch
``Dataset`` or ``DataLoader``, a ``datasets`` object, recorded calls (a list of keyword dicts with batch axes), a
callable without arguments that returns one of these, and a Hub id when ``load_hub`` is given.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from hfq.calibration import images as image_forms
from hfq.calibration import rows as row_forms
from hfq.calibration import texts as text_forms
from hfq.calibration.cache import digest, leaves
from hfq.errors import DataError

__all__ = ["Batches", "first_rows", "normalise"]

FORMS = (
    "a list of texts, rows with a text column, tokenised rows, tensors, a Dataset, a DataLoader, recorded calls, "
    "a callable that returns one of these, or the path of a .txt, .json or .jsonl file"
)


@dataclass
class Batches(Sequence[dict[str, Any]]):
    """Batches of forward keywords.

    Attributes:
        items: one dict a batch; tensors on the CPU with the batch axis first.
        descriptor: what is saved with a model: source, sha256, count, length, seed; JSON values only.
    """

    items: list[dict[str, Any]]
    descriptor: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.items)

    @property
    def samples(self) -> int:
        return sum(row_forms.batch_rows(batch) for batch in self)

    @property
    def tokens(self) -> int:
        """Tokens without padding; for data that is not tokens, the number of samples."""
        return sum(row_forms.batch_tokens(batch) for batch in self)

    @property
    def sha256(self) -> str:
        total = hashlib.sha256()
        for batch in self:
            for path, tensor in leaves(batch):
                total.update(repr(path).encode() + digest(tensor))
        return total.hexdigest()


def normalise(
    data: Any,
    *,
    processor: Any = None,
    samples: int | None = 128,
    seqlen: int | None = 512,
    batch_size: int = 8,
    seed: int = 0,
    text_column: str | None = None,
    load_hub: Callable[[str], Any] | None = None,
    packing: Literal["concatenate", "truncate"] = "concatenate",
    accepted: Collection[str] | None = None,
) -> Batches:
    """Bring calibration data of any form into batches.

    Args:
        data: see the module's first lines.
        processor: tokenizer (or a processor that has one); needed for texts only.
        samples: rows to use; ``None`` for all. Fewer rows are taken as they are; joined text must suffice.
        seqlen: tokens a row; longer rows are cut, ``None`` leaves tokenised rows alone.
        batch_size: rows a batch. Recorded calls stay as they were recorded.
        seed: chooses the windows of concatenated text.
        text_column: name of the column with text; found by itself when a row has exactly one column of text or "text".
        load_hub: turns a Hub id into rows.
        packing: texts are either joined by a blank line, tokenized once and cut into windows of ``seqlen`` tokens of
            which ``random.Random(seed).sample`` picks ``samples`` (``"concatenate"``), or tokenized one by one, cut at
            ``seqlen`` and padded within a batch (``"truncate"``).
        accepted: argument names of the model's forward; other columns are left out.

    Raises:
        DataError: the data is empty, too short, of unknown form, not finite, or an iterator that was used before.
    """
    _check_counts(samples, batch_size)
    if isinstance(data, Batches):
        return data
    source, data = _open(data, load_hub)
    head, items = _items(data)
    first = head[0]
    picture = image_forms.column(first)
    text = None if picture is not None else text_forms.column(first, text_column)
    if picture is not None:
        found = image_forms.prepared(itertools.islice(items, samples), picture, processor)
        batches = row_forms.batch(list(row_forms.rows(found, accepted, seqlen)), batch_size, 0)
    elif isinstance(first, str) or text is not None:
        tokens = text_forms.Texts(processor, samples, seqlen, seed, streaming=not hasattr(data, "__len__"))
        found = (item if isinstance(item, str) else _text(item, text) for item in items)
        rows = tokens.windows(found) if packing == "concatenate" else tokens.truncated(found)
        batches = row_forms.batch(rows, batch_size, tokens.pad)
    elif row_forms.is_call(first, accepted):
        calls = [row_forms.call(item, n) for n, item in enumerate(itertools.islice(items, samples))]
        batches = calls
    else:
        kept = list(itertools.islice(row_forms.rows(items, accepted, seqlen), samples))
        batches = row_forms.batch(kept, batch_size, text_forms.padding(processor))
    result = Batches(batches)
    result.descriptor = {
        "source": source,
        "sha256": result.sha256,
        "count": result.samples,
        "length": row_forms.length(batches),
        "tokens": result.tokens,
        "batch_size": batch_size,
        "seed": seed,
        "packing": packing,
    }
    return result


def first_rows(batches: Batches, rows: int) -> Batches:
    """The first ``rows`` rows of ``batches`` (all, if there are no more), with their descriptor."""
    if batches.samples <= rows:
        return batches
    kept: list[dict[str, Any]] = []
    for one in batches:
        size, left = row_forms.batch_rows(one), rows - sum(row_forms.batch_rows(other) for other in kept)
        if left <= 0:
            break
        cut = {key: t[:left] if isinstance(t, torch.Tensor) and t.ndim and t.shape[0] == size else t
               for key, t in one.items()}  # fmt: skip
        kept.append(cut if left < size else one)
    return Batches(kept, {**batches.descriptor, "rows": rows})


def _check_counts(samples: int | None, batch_size: int) -> None:
    if samples is not None and samples < 1:
        raise DataError(f"samples={samples}: at least one is needed")
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size}: at least one is needed")


def _text(item: Any, column: str | None) -> str:
    if not isinstance(item, Mapping) or not isinstance(item.get(column), str):
        keys = sorted(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
        raise DataError(f"a row has no text in column {column!r}: found {keys}")
    return item[column]


def _open(data: Any, load_hub: Callable[[str], Any] | None) -> tuple[str | None, Any]:
    """Resolve paths, Hub ids and callables; returns the name of the source and the data itself."""
    if isinstance(data, (str, Path)):
        path = Path(data)
        if path.is_file():
            return path.name, text_forms.read_file(path)
        if isinstance(data, str) and load_hub is not None and path.suffix not in text_forms.SUFFIXES:
            return data, load_hub(data)
        raise DataError(f"{str(data)!r} is neither a file nor a data set that can be loaded here; accepted: {FORMS}")
    if callable(data) and not isinstance(data, (Sequence, Mapping, torch.Tensor)) and not hasattr(data, "__iter__"):
        if hasattr(data, "__getitem__"):
            return None, data
        made = data()
        if made is None:
            raise DataError(f"the callable given as calibration data returned None; it must return {FORMS}")
        return _open(made, load_hub)
    return None, data


def _items(data: Any) -> tuple[list[Any], Iterator[Any]]:
    """The first item (refusing empty data) and an iterator over all, first included."""
    if data is None:
        raise DataError(f"this method needs calibration data; accepted: {FORMS}")
    if isinstance(data, (torch.Tensor, Mapping)) or hasattr(data, "input_ids"):
        data = [data]
    used = "an iterator that was used before: pass a list, or a callable that makes a fresh iterator"
    if inspect.isgenerator(data) and inspect.getgeneratorstate(data) != inspect.GEN_CREATED:
        raise DataError(f"the calibration data is {used}")
    iterator = _iterate(data)
    head = list(itertools.islice(iterator, 1))
    if not head:
        raise DataError(
            f"the calibration data is {used}"
            if iterator is data
            else f"the calibration data is empty; accepted: {FORMS}"
        )
    return head, itertools.chain(head, iterator)


def _iterate(data: Any) -> Iterator[Any]:
    if isinstance(data, Iterable):
        return iter(data)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return (data[i] for i in range(len(data)))
    raise DataError(f"calibration data of type {type(data).__name__} is not understood; accepted: {FORMS}")
