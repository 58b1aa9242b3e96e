"""An integer-only decoder in the place of a float one: token ids in, integer rows for the integer head out.

It stands where the module stood that held the embedding, the blocks and the final norm, and answers the call of the
model class around it. No float tensor is made between the ids and the head's logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfq.errors import DataError
from hfq.kernels import dyadic
from hfq.layers.integer import IntegerModule, pack_rows, start_stream
from hfq.layers.integer_block import IntegerBlock, Numbers, Stream

__all__ = ["Answer", "IntegerCache", "IntegerDecoder", "Rotary", "integer_modules"]


@dataclass
class Answer:
    """What the decoder gives back, in the form that model classes of transformers read.

    ``last_hidden_state`` is int32 ``[B, T, C + 3]``: codes, zero point, mantissa and shift of every row.
    """

    last_hidden_state: Tensor
    past_key_values: Any = None
    hidden_states: None = None
    attentions: None = None

    def __getitem__(self, index: int) -> Any:
        return (self.last_hidden_state, self.past_key_values)[index]


class IntegerCache:
    """Keys and values of every block as int8, in buffers that grow by doubling.

    Any cache with ``update`` and ``get_seq_length`` will do in its place; this one is made where none is given.
    """

    def __init__(self, blocks: int) -> None:
        self._held: list[tuple[Tensor, Tensor] | None] = [None] * blocks
        self._length = [0] * blocks

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that a block has seen."""
        return self._length[layer_idx]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append ``[B, G, T, D]``; returns everything so far."""
        start = self._length[layer_idx]
        stop = start + keys.shape[-2]
        held = self._held[layer_idx]
        if held is None or held[0].shape[-2] < stop:
            room = max(stop, 2 * start, 32)
            new = tuple(t.new_empty(*t.shape[:2], room, t.shape[-1]) for t in (keys, values))
            if held is not None:
                for to, old in zip(new, held, strict=True):
                    to[:, :, :start] = old[:, :, :start]
            held = self._held[layer_idx] = new  # type: ignore[assignment]
        assert held is not None
        for to, fresh in zip(held, (keys, values), strict=True):
            to[:, :, start:stop] = fresh
        self._length[layer_idx] = stop
        return held[0][:, :, :stop], held[1][:, :, :stop]


class Rotary(IntegerModule):
    """Cosines and sines of every position, int16 in units of ``2**-14``.

    Args:
        positions: rows of the table.
        count: turning pairs of channels.
    """

    kind = "rotary"
    cos: nn.Parameter
    sin: nn.Parameter

    def __init__(self, positions: int, count: int, device: Any = None) -> None:
        super().__init__()
        self.positions, self.count = positions, count
        for name in ("cos", "sin"):
            self.put(name, torch.empty(positions, count, dtype=torch.int16, device=device))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions ``[B, T]`` to int32 ``[B * T, 1, count]`` each."""
        rows = ids.reshape(-1)
        return self.cos[rows].to(torch.int32)[:, None], self.sin[rows].to(torch.int32)[:, None]

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "positions": self.positions, "count": self.count}

    @classmethod
    def from_float(cls, cos: Tensor, sin: Tensor) -> Rotary:
        """``[positions, count]`` tables below 2 in magnitude."""
        made = cls(*cos.shape)
        for name, table in (("cos", cos), ("sin", sin)):
            made.put(name, (table.double() * (1 << 14)).round().clamp(-32767, 32767).to(torch.int16))
        return made


class IntegerDecoder(nn.Module):
    """Embedding, blocks and final norm on integers.

    Args:
        names: paths of "embed", "positions" (a table of learned positions, or missing), "norm", and "stack" (the
            container of the blocks), below this module.
        blocks: the blocks.
        numbers: widths.
        limit: positions that the model has.
        offset: of the rows of the table of positions.
    """

    _is_hf_initialized = True

    def __init__(
        self, names: Mapping[str, str], blocks: list[IntegerBlock], numbers: Numbers, limit: int, offset: int = 0
    ) -> None:
        super().__init__()
        self.names, self.numbers, self.limit, self.offset = dict(names), numbers, limit, offset
        self._blocks = len(blocks)

    @property
    def blocks(self) -> nn.Module:
        return self.get_submodule(self.names["stack"])

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Any = None, inputs_embeds: Any = None,
        use_cache: bool | None = None, **kwargs: Any,
    ) -> Answer:
        """As a decoder of transformers is called.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, past + T]``, 1 for tokens and 0 for padding.
            position_ids: ``[B or 1, T]``; by default counted over the tokens that the mask shows.
            past_key_values: a cache with ``update`` and ``get_seq_length``; it will hold int8 keys and values.
            use_cache: make a cache if none is given (the default).
            kwargs: ``output_attentions`` and ``output_hidden_states`` are refused, anything else is ignored.

        Raises:
            DataError: embeddings instead of ids, a mask of another form, or a position beyond the model's.
        """
        if input_ids is None or inputs_embeds is not None:
            raise DataError("an integer decoder takes token ids: it has no float embeddings (inputs_embeds)")
        if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
            raise DataError("an integer decoder has no float attentions or hidden states to give back")
        batch, tokens = input_ids.shape
        if past_key_values is None and use_cache is not False:
            past_key_values = IntegerCache(self._blocks)
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        padding = self._padding(attention_mask, batch, past + tokens)
        positions = self._positions(position_ids, padding, past, tokens, input_ids.device)
        stream = self._embed(input_ids, positions.expand(batch, tokens))
        turn = self._modules.get("hfq_rotary")
        rotary = None if turn is None else turn(positions.expand(batch, tokens))
        for block in self.blocks.children():
            stream = block(stream, rotary, past_key_values, past, padding, batch)
        final = self.get_submodule(self.names["norm"])
        y, root = final(stream[0].data)
        rows = dyadic.requantize(y, self.numbers.activation_bits, self.numbers.mantissa_bits, root)
        return Answer(pack_rows(rows, (batch, tokens)), past_key_values)

    def _embed(self, ids: Tensor, positions: Tensor) -> Stream:
        rows = self.get_submodule(self.names["embed"])(ids.reshape(-1))
        stream = start_stream(rows)
        if "positions" in self.names:
            table = self.get_submodule(self.names["positions"])
            stream = dyadic.add_residual(*stream, table(positions.reshape(-1) + self.offset))
        return stream

    def _padding(self, mask: Tensor | None, batch: int, length: int) -> Tensor | None:
        if mask is None:
            return None
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < length:
            raise DataError(f"attention_mask {tuple(mask.shape)}: an integer decoder takes [{batch}, {length}], 1 for "
                            "tokens and 0 for padding")
        seen = mask[:, :length] != 0
        return None if bool(seen.all()) else seen

    def _positions(
        self, given: Tensor | None, padding: Tensor | None, past: int, tokens: int, device: torch.device
    ) -> Tensor:
        if given is not None:
            found = given
        elif padding is None:
            found = torch.arange(past, past + tokens, device=device)[None]
        else:
            found = (padding.to(torch.int64).cumsum(-1) - 1).clamp_min(0)[:, past:]
        if found.numel() and int(found.max()) >= self.limit:
            raise DataError(f"position {int(found.max())}: this model has {self.limit}; shorten the input")
        return found

    def describe(self) -> dict[str, Any]:
        """The manifest entry of the decoder without its place and its head."""
        turn = self._modules.get("hfq_rotary")
        modules = {role: self.get_submodule(path).describe()  # type: ignore[operator]
                   for role, path in self.names.items() if role != "stack"}
        return {
            "names": dict(self.names), "numbers": self.numbers.to_dict(), "limit": self.limit, "offset": self.offset,
            "modules": modules, "rotary": None if turn is None else turn.describe(),  # type: ignore[operator]
            "blocks": [block.describe() for block in self.blocks.children()],  # type: ignore[operator]
        }


def integer_modules(model: nn.Module) -> dict[str, IntegerModule]:
    """Every integer module by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, IntegerModule)}


