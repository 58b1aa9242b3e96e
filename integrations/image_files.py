"""Images in folders and on the Hub, read into :class:`hfq.integrations.inputs_vision.Images`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

from hfq.errors import DataError
from hfq.integrations.inputs_vision import SUFFIXES, Images

__all__ = ["read"]

_SPLITS = {"train": ("train", "training"), "test": ("val", "validation", "valid", "test")}


def read(source: str | os.PathLike[str], split: str, count: int | None, seed: int | None) -> Images:
    """Images of one split; see :func:`hfq.integrations.inputs_vision.open_images`.

    Raises:
        DataError: no such folder or data set, no image in it, or one that cannot be read.
    """
    path = Path(source).expanduser()
    if split not in _SPLITS:
        raise DataError(f"split {split!r}: 'train' and 'test' are there")
    if path.is_dir():
        return _folder(path, split, count, seed)
    if path.exists():
        raise DataError(f"images {str(source)!r} is a file: name a folder with one folder of images a class, or a data "
                        "set of the Hub")
    return _hub(str(source), split, count)


def _folder(path: Path, split: str, count: int | None, seed: int | None) -> Images:
    own = next((path / name for name in _SPLITS[split] if (path / name).is_dir()), None)
    root = own or path
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    found: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        files = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in SUFFIXES)
        if own is None:
            files = [p for i, p in enumerate(files) if (i % 5 == 0) == (split == "test")]
        found += [(p, label) for p in files]
    if not found:
        raise DataError(f"{root} holds no image in folders of classes ({', '.join(SUFFIXES)} are read)")
    chosen = [found[i] for i in _indices(len(found), count, seed)]
    title = f"{path.name}, {own.name if own else 'every fifth' if split == 'test' else 'four of five'}"
    return Images([_open(p) for p, _ in chosen], [label for _, label in chosen], tuple(classes), title)


def _indices(total: int, count: int | None, seed: int | None) -> list[int]:
    if count is None or count >= total:
        return list(range(total))
    if seed is None:
        return [i * total // count for i in range(count)]
    return sorted(torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist())


def _open(path: Path) -> object:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error


def _hub(name: str, split: str, count: int | None) -> Images:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"{name!r} is no folder, and reading it from the Hub needs `pip install hfq[eval]`")
    import datasets

    path, _, column = name.partition(":")
    wanted = ("train",) if split == "train" else ("validation", "test")
    try:
        parts = datasets.load_dataset(path, streaming=True)
        rows = next((parts[key] for key in wanted if key in parts), None)
        if rows is None:
            raise DataError(f"{path} has no split {' or '.join(wanted)}: {', '.join(parts)} are there")
        features = rows.features or {}
        image = column or next((k for k, f in features.items() if isinstance(f, datasets.Image)), "image")
        label = next((k for k, f in features.items() if isinstance(f, datasets.ClassLabel)), "label")
        taken = list(rows.take(1000 if count is None else count))
        items = [row[image].convert("RGB") for row in taken]
        labels = [int(row[label]) for row in taken]
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise DataError(f"images {name!r} is no folder here and could not be read from the Hub "
                        f"({type(error).__name__}: {error}); give a folder, or a data set with a column of images and "
                        "one of classes") from error
    names = tuple(getattr(features.get(label), "names", None) or map(str, range(max(labels, default=0) + 1)))
    return Images(items, labels, names, f"{path}, {split}")
