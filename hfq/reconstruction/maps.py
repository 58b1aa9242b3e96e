"""Learned maps on the pairs of one block: what each does to the weights, biases and norms of its two sides.

For a linear that reads ``x``: ``x W^T + b = ((x - d) A^-1)(W A^T)^T + (b + W d)``. The side that writes ``x`` takes
``(. - d) A^-1``, the side that reads it ``W A^T`` and ``b + W d``. A map is a vector (one scale a channel), a bank of
blocks (heads, rotary pairs) or the full matrix at a norm's output, which then runs as a product of its own.

All functions here are differentiable, take weights as ``[..., out, in]``, and work in the dtype of their arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hfq.graph.links import Link, Pair
from hfq.transforms.affine import Diagonal, MaskedMatrix, RotaryBlocks

__all__ = ["BlockMap", "MatrixMap", "PairMap", "ScaleMap", "State"]

Weights = tuple[torch.Tensor, "torch.Tensor | None"]


@dataclass
class State:
    """A map at one moment: ``A``, its inverse, and the shift by class (or ``None``)."""

    forward: torch.Tensor
    back: torch.Tensor
    shift: torch.Tensor | None


class PairMap(nn.Module):
    """Base: a pair, its map and its shift.

    Attributes:
        pair: proven.
        map: what is learned.
        shift: ``[classes]``, or ``None``.
        exact: whether the function of the block stays as it is (a free map under rotary embeddings does not keep it).
    """

    def __init__(self, pair: Pair, learned: nn.Module, shift: torch.Tensor | None = None) -> None:
        super().__init__()
        self.pair, self.map, self.exact = pair, learned, True
        self.shift = None if shift is None else nn.Parameter(shift.detach().float().clone())

    def state(self, dtype: torch.dtype = torch.float32) -> State:
        forward, back = self.map.pair(dtype)  # type: ignore[operator]
        return State(forward, back, None if self.shift is None else self.shift.to(dtype))

    def read(self, link: Link, weight: torch.Tensor, bias: torch.Tensor | None, state: State) -> Weights:
        """The side that reads what is transformed."""
        raise NotImplementedError

    def write(self, link: Link, weight: torch.Tensor, bias: torch.Tensor | None, state: State) -> Weights:
        """The side that writes it."""
        raise NotImplementedError

    def mirror(self, link: Link, weight: torch.Tensor, bias: torch.Tensor | None, state: State) -> Weights:
        """The partner that writes the other factor of a product (keys beside queries, gate beside up)."""
        raise NotImplementedError

    def norm(self, gain: torch.Tensor, bias: torch.Tensor | None, state: State) -> dict[str, torch.Tensor]:
        """New "gain" and "bias" of the norm that writes, and "matrix" and "shift" of the part at its output."""
        raise NotImplementedError


def _moved(bias: torch.Tensor | None, weight: torch.Tensor, index: torch.Tensor, state: State) -> torch.Tensor | None:
    """``b + W d`` with the weight before the map."""
    if state.shift is None:
        return bias
    full = torch.where(index >= 0, state.shift[index.clamp_min(0)], 0.0)
    return weight @ full if bias is None else bias + weight @ full


class ScaleMap(PairMap):
    """One scale a class: every kind of pair."""

    map: Diagonal

    def _spread(self, link: Link, scale: torch.Tensor) -> torch.Tensor:
        index = link.index.to(scale.device)
        return torch.where(index >= 0, scale[index.clamp_min(0)], 1.0)

    def read(self, link: Link, weight: torch.Tensor, bias: torch.Tensor | None, state: State) -> Weights:
        bias = _moved(bias, weight, link.index.to(weight.device), state)
        return weight * self._spread(link, state.forward), bias

    def write(self, link: Link, weight: torch.Tensor, bias: torch.Tensor | None, state: State) -> Weights:
        factor = self._spread(link, state.back)
        if state.shift is not None and bias is not None:
            index = link.index.to(weight.device)
            bias = bias - torch.where(index >= 0, state.shift[index.clamp_min(0)], 0.0)
        return weight * factor[:, None], None if bias is None else bias * factor

    def mirror(self, link: Link, weight: torch.Tensor, bias: torch.Tensor | None, state: State) -> Weights:
        factor = self._spread(link, state.forward)
        return weight * factor[:, None], None if bias is None else bias * factor

    def norm(self, gain: torch.Tensor, bias: torch.Tensor | None, state: State) -> dict[str, torch.Tensor]:
        found = {"gain": gain * state.back}
        if bias is not None:
            found["bias"] = (bias if state.shift is None else bias - state.shift) * state.back
        elif state.shift is not None:
            found["shift"] = -state.shift * state.back
        return found


class MatrixMap(PairMap):
    """A full matrix at a norm's output, which runs online: its readers take all of the norm's channels in order."""

    map: MaskedMatrix

    def state(self, dtype: torch.dtype = torch.float32, stored: torch.dtype | None = None) -> State:
        """With ``stored`` the inverse is the one in that dtype, and the weights undo exactly it."""
        state = super().state(dtype)
        forward, back = state.forward[0], state.back[0]
        if stored is not None and stored != dtype:
            back = back.to(stored).to(dtype)
            forward = torch.linalg.inv(back)
        return State(forward, back, state.shift)

    def read(self, link: Link, weight: torch.Tensor, bias: torch.Tensor | None, state: State) -> Weights:
        return weight @ state.forward.mT, _moved(bias, weight, link.index.to(weight.device), state)

    def norm(self, gain: torch.Tensor, bias: torch.Tensor | None, state: State) -> dict[str, torch.Tensor]:
        found = {"gain": gain, "matrix": state.back}
        if bias is not None:
            found["bias"] = bias if state.shift is None else bias - state.shift
        elif state.shift is not None:
            found["shift"] = -state.shift
        return found


class BlockMap(PairMap):
    """A bank of small matrices: one a head (values), or one a head or a rotary pair (queries and keys).

    Args:
        places: by id of the link, ``(channels [m, r], bank [m])``: the channels on that side and the matrix of each.
    """

    map: MaskedMatrix | RotaryBlocks

    def __init__(
        self, pair: Pair, learned: nn.Module, places: dict[int, tuple[torch.Tensor, torch.Tensor]],
        shift: torch.Tensor | None = None,
    ) -> None:
        super().__init__(pair, learned, shift)
        self.places = places

    def read(self, link: Link, weight: torch.Tensor, bias: torch.Tensor | None, state: State) -> Weights:
        channels, bank = self._at(link, weight)
        bias = _moved(bias, weight, link.index.to(weight.device), state)
        chosen = weight.index_select(-1, channels.flatten()).unflatten(-1, tuple(channels.shape))
        turned = torch.einsum("...or,...sr->...os", chosen.movedim(-2, -3), state.forward[bank])
        return _replaced(weight, -1, channels, turned.movedim(-3, -2).flatten(-2)), bias

    def write(self, link: Link, weight: torch.Tensor, bias: torch.Tensor | None, state: State) -> Weights:
        if state.shift is not None and bias is not None:
            index = link.index.to(weight.device)
            bias = bias - torch.where(index >= 0, state.shift[index.clamp_min(0)], 0.0)
        return self._turned(link, weight, bias, state.back)

    def mirror(self, link: Link, weight: torch.Tensor, bias: torch.Tensor | None, state: State) -> Weights:
        return self._turned(link, weight, bias, state.forward.mT)

    def _turned(self, link: Link, weight: torch.Tensor, bias: torch.Tensor | None, matrices: torch.Tensor) -> Weights:
        """Outputs ``y`` of every set of channels become ``y @ matrix``."""
        channels, bank = self._at(link, weight)
        chosen = weight.index_select(-2, channels.flatten()).unflatten(-2, tuple(channels.shape))
        turned = matrices[bank].mT @ chosen
        new = _replaced(weight, -2, channels, turned.flatten(-3, -2))
        if bias is not None:
            part = bias.index_select(-1, channels.flatten()).unflatten(-1, tuple(channels.shape))
            part = (part[..., None, :] @ matrices[bank]).squeeze(-2)
            bias = _replaced(bias, -1, channels, part.flatten(-2))
        return new, bias

    def _at(self, link: Link, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        channels, bank = self.places[id(link)]
        return channels.to(like.device), bank.to(like.device)


def _replaced(tensor: torch.Tensor, axis: int, channels: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """``tensor`` with the slices ``channels`` along ``axis`` replaced by those of ``new``, in that order."""
    flat = channels.flatten()
    if len(flat) == tensor.shape[axis] and bool((flat == torch.arange(len(flat), device=flat.device)).all()):
        return new
    return tensor.index_copy(axis, flat, new)


def head_places(pair: Pair) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Where the heads of a "vo" pair lie: on the writing side, and repeated for shared heads on the reading side."""
    assert pair.heads is not None
    source = pair.sources[0]
    first = {int(source.index[row[0]]): number for number, row in enumerate(pair.heads)}
    places = {id(link): (pair.heads, torch.arange(len(pair.heads))) for link in pair.sources}
    for link, heads in zip(pair.readers, pair.reader_heads, strict=True):
        places[id(link)] = heads, torch.tensor([first[int(link.index[row[0]])] for row in heads])
    return places


def rotary_places(pair: Pair) -> tuple[dict[int, tuple[torch.Tensor, torch.Tensor]], int] | str:
    """Where the rotary pairs of a "qk" pair lie, and how many there are; a text if there are none."""
    query, key = pair.sources[0], pair.partners[0]
    numbers: dict[int, int] = {}
    sides: list[tuple[torch.Tensor, torch.Tensor]] = []
    for link in (key, query):
        rows, banks = [], []
        for label in range(pair.classes):
            channels = torch.nonzero(link.index == label).flatten().tolist()
            if link is key and len(channels) != 2:
                continue  # not rotated: left as it is
            if label not in numbers and link is query:
                continue
            if len(channels) % 2:
                return "a rotary pair of a key meets an odd number of query channels"
            bank = numbers.setdefault(label, len(numbers))
            rows += [channels[i:i + 2] for i in range(0, len(channels), 2)]
            banks += [bank] * (len(channels) // 2)
        sides.append((torch.tensor(rows, dtype=torch.long).reshape(-1, 2), torch.tensor(banks, dtype=torch.long)))
    if not numbers:
        return "no two channels of a key rotate together"
    return {id(key): sides[0], id(query): sides[1]}, len(numbers)


def key_heads(pair: Pair, size: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]] | str:
    """Heads of ``size`` channels on both sides of a "qk" pair; a text if the channels do not fall into such heads."""
    query, key = pair.sources[0], pair.partners[0]
    keys, queries = (torch.nonzero(link.index >= 0).flatten() for link in (key, query))
    if len(keys) % size or len(queries) % size:
        return f"heads of {size} channels do not fill {len(keys)} keys and {len(queries)} queries"
    keys, queries = keys.reshape(-1, size), queries.reshape(-1, size)
    known = {tuple(sorted(key.index[row].tolist())): number for number, row in enumerate(keys)}
    banks = [known.get(tuple(sorted(query.index[row].tolist()))) for row in queries]
    if len(known) != len(keys) or None in banks:
        return f"queries and keys do not meet in heads of {size} channels"
    return {id(key): (keys, torch.arange(len(keys))), id(query): (queries, torch.tensor(banks))}


def untied(pair: Pair, size: int) -> Pair | str:
    """A "qk" pair with one class a key channel, whatever rotary embeddings tie together."""
    from dataclasses import replace

    places = key_heads(pair, size)
    if isinstance(places, str):
        return places
    (keys, _), (queries, bank) = places[id(pair.partners[0])], places[id(pair.sources[0])]
    key = torch.full_like(pair.partners[0].index, -1)
    query = torch.full_like(pair.sources[0].index, -1)
    key[keys.flatten()] = torch.arange(keys.numel())
    query[queries.flatten()] = (bank[:, None] * size + torch.arange(size)).flatten()
    sources, partners = [Link(pair.sources[0].part, query)], [Link(pair.partners[0].part, key)]
    return replace(pair, sources=sources, partners=partners, classes=keys.numel())
