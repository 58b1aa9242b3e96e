"""Rows of tensors to batches: splitting given batches, padding, checks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from hfq.calibration.cache import leaves, rebuild
from hfq.errors import DataError

__all__ = ["batch", "batch_rows", "batch_tokens", "call", "is_call", "length", "rows"]

# Known columns and the number of axes that one row has.
RANKS = {
    "input_ids": 1,
    "attention_mask": 1,
    "token_type_ids": 1,
    "position_ids": 1,
    "decoder_input_ids": 1,
    "decoder_attention_mask": 1,
    "inputs_embeds": 2,
    "pixel_values": 3,
    "pixel_mask": 2,
    "input_features": 2,
    "input_values": 1,
    "bool_masked_pos": 1,
}
MAIN = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")


def _tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, (list, tuple)) or hasattr(value, "__array__"):
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            return None
    return None


def _mapping(item: Any) -> Mapping[str, Any]:
    """A row or batch as a mapping; a bare tensor gets the name that its dtype suggests."""
    if isinstance(item, Mapping):
        return item
    if hasattr(item, "keys") and hasattr(item, "__getitem__"):
        return {key: item[key] for key in item.keys()}  # noqa: SIM118
    if isinstance(item, (tuple, list)) and item and isinstance(item[0], torch.Tensor):
        item = item[0]  # (input, label) of a vision data set, or the one-tuple of a TensorDataset
    tensor = _tensor(item)
    if tensor is None or tensor.dtype == torch.bool:
        raise DataError(f"a calibration item of type {type(item).__name__} is not understood")
    # Bytes of three or four axes are pictures that no processor has seen: what checks images says so.
    picture = tensor.is_floating_point() or (tensor.dtype == torch.uint8 and tensor.ndim > 2)
    return {"pixel_values" if picture else "input_ids": tensor}


def is_call(item: Any, accepted: Collection[str] | None) -> bool:
    """Whether ``item`` is a recorded call: a dict of tensors with names that are not known columns of rows."""
    if not isinstance(item, Mapping) or any(key in RANKS for key in item):
        return False
    usable = [
        key for key, value in item.items() if any(True for _ in leaves(value)) and (accepted is None or key in accepted)
    ]
    return bool(usable)


def call(item: Any, number: int) -> dict[str, Any]:
    """A recorded call, its tensors on the CPU."""
    if not isinstance(item, Mapping):
        raise DataError(f"recorded call {number} is a {type(item).__name__}: a dict of keywords is needed")

    def check(path: tuple[Any, ...], tensor: torch.Tensor) -> torch.Tensor:
        _finite(".".join(map(str, path)), tensor, number)
        return tensor.detach().cpu()

    return rebuild(dict(item), check)


def _finite(name: str, tensor: torch.Tensor, number: int) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise DataError(f"calibration sample {number}: {name} has NaN or infinite elements")


def rows(
    items: Iterable[Any], accepted: Collection[str] | None, seqlen: int | None
) -> Iterator[dict[str, torch.Tensor]]:
    """Single rows out of rows and batches; unknown columns left out, token columns cut at ``seqlen``."""
    number = 0
    for item in items:
        columns = _mapping(item)
        tensors = {
            key: t for key, value in columns.items() if (t := _tensor(value)) is not None and _wanted(key, accepted)
        }
        main = next((key for key in MAIN if key in tensors), None)
        if main is None:
            names = sorted(accepted) if accepted is not None else sorted(RANKS)
            raise DataError(
                f"calibration sample {number} has the keys {sorted(map(str, columns))}, none of which the model can be "
                f"fed with; accepted: {names}, or a column of text"
            )
        if tensors[main].numel() == 0:
            raise DataError(f"calibration sample {number}: {main} is empty")
        extra = tensors[main].ndim - RANKS[main]
        if extra not in (0, 1):
            raise DataError(
                f"calibration sample {number}: {main} has shape {list(tensors[main].shape)}, "
                f"{RANKS[main]} axes a row are needed"
            )
        size = tensors[main].shape[0] if extra else 1
        for index in range(size):
            row = {key: t[index] if extra and t.shape[:1] == (size,) else t for key, t in tensors.items()}
            for key, tensor in row.items():
                _finite(key, tensor, number)
            yield _cut(row, seqlen)
            number += 1


def _wanted(key: str, accepted: Collection[str] | None) -> bool:
    return key in accepted if accepted is not None else key in RANKS


def _cut(row: dict[str, torch.Tensor], seqlen: int | None) -> dict[str, torch.Tensor]:
    """Token columns cut at ``seqlen`` and without the padding that a tokenizer may have added."""
    tokens = row.get("input_ids")
    if tokens is None or tokens.ndim != 1:
        return row
    size = len(tokens)
    along = {key for key, t in row.items() if t.ndim >= 1 and t.shape[0] == size and not key.startswith("decoder_")}
    return {key: t[:seqlen] if key in along else t for key, t in row.items()}


def batch(found: Sequence[dict[str, torch.Tensor]], batch_size: int, pad: int) -> list[dict[str, Any]]:
    """Consecutive rows stacked; token rows of different length are padded at the end, with an attention mask."""
    result: list[dict[str, Any]] = []
    group: list[dict[str, torch.Tensor]] = []
    for row in found:
        if group and (len(group) == batch_size or not _stackable(group[0], row)):
            result.append(_stack(group, pad))
            group = []
        group.append(row)
    if group:
        result.append(_stack(group, pad))
    return result


def _stackable(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape or a[k].ndim == b[k].ndim == 1 for k in a)


def _stack(group: list[dict[str, torch.Tensor]], pad: int) -> dict[str, Any]:
    padded: dict[str, torch.Tensor] = {}
    ragged = False
    for key in group[0]:
        tensors = [row[key] for row in group]
        if len({t.shape for t in tensors}) > 1:
            ragged = True
            fill = pad if key.endswith("input_ids") else 0
            longest = max(len(t) for t in tensors)
            tensors = [torch.nn.functional.pad(t, (0, longest - len(t)), value=fill) for t in tensors]
        padded[key] = torch.stack(tensors)
    if ragged and "attention_mask" not in padded and "input_ids" in padded:
        longest = padded["input_ids"].shape[1]
        mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in group]
        padded["attention_mask"] = torch.tensor(mask)
    return padded


def batch_rows(one: Mapping[str, Any]) -> int:
    for _, tensor in leaves(dict(one)):
        if tensor.ndim:
            return tensor.shape[0]
    return 1


def batch_tokens(one: Mapping[str, Any]) -> int:
    if isinstance(one.get("attention_mask"), torch.Tensor) and one["attention_mask"].ndim == 2:
        return int((one["attention_mask"] != 0).sum())
    ids = one.get("input_ids")
    return ids.numel() if isinstance(ids, torch.Tensor) else batch_rows(one)


def length(batches: Sequence[Mapping[str, Any]]) -> int | None:
    """Longest token row, ``None`` for other data."""
    sizes = [one["input_ids"].shape[-1] for one in batches if isinstance(one.get("input_ids"), torch.Tensor)]
    return max(sizes, default=None)
