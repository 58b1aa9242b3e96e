"""Put an integer decoder into a model, describe it for the manifest, and rebuild it empty before a checkpoint loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hfq.errors import CheckpointError
from hfq.layers import manifest as record
from hfq.layers.integer import IntegerEmbedding, IntegerHead, IntegerMatrix, IntegerModule, IntegerNorm
from hfq.layers.integer_block import ROLES, BlockShape, Grids, IntegerBlock, Numbers, place
from hfq.layers.integer_decoder import IntegerDecoder, Rotary, integer_modules

__all__ = ["assemble", "build", "check", "describe", "install"]

_SHIFTS = 1 << 10
_BODY = {"body", "head", "names", "numbers", "limit", "offset", "modules", "rotary", "blocks", "head_module"}


def assemble(
    names: Mapping[str, str], numbers: Numbers, outer: Mapping[str, IntegerModule],
    blocks: Mapping[str, IntegerBlock], rotary: Rotary | None, limit: int, offset: int = 0,
) -> IntegerDecoder:
    """A decoder from its parts.

    Args:
        names: as of :class:`IntegerDecoder`.
        outer: role ("embed", "positions", "norm") to module.
        blocks: name within the stack to block.
    """
    decoder = IntegerDecoder(names, list(blocks.values()), numbers, limit, offset)
    for role, module in outer.items():
        place(decoder, names[role], module)
    stack = nn.ModuleDict() if any(not key.isdigit() for key in blocks) else nn.ModuleList()
    for key, block in blocks.items():
        stack.add_module(key, block)
    place(decoder, names["stack"], stack)
    if rotary is not None:
        decoder.add_module("hfq_rotary", rotary)
    return decoder


def install(model: nn.Module, body: str, head: str, decoder: IntegerDecoder, top: IntegerHead) -> None:
    """Replace the module ``body`` and the output head of ``model``."""
    training = model.training
    model.set_submodule(body, decoder)
    model.set_submodule(head, top)
    decoder.train(training)
    for name, module in integer_modules(model).items():
        module.label = name
    model.hfq_integer = {"body": body, "head": head}  # type: ignore[assignment]


def describe(model: nn.Module) -> dict[str, Any] | None:
    """The manifest entry of the integer decoder of ``model``, JSON only; ``None`` if there is none."""
    places = getattr(model, "hfq_integer", None)
    if places is None:
        return None
    decoder, head = (model.get_submodule(places[key]) for key in ("body", "head"))
    return {**places, **decoder.describe(), "head_module": head.describe()}  # type: ignore[operator]


def check(model: nn.Module) -> None:
    """Raise :class:`CheckpointError`, naming the tensor, if what was loaded cannot be computed with."""
    for name, module in integer_modules(model).items():
        module.label = module.label or name
        if not any(p.is_meta for p in module.parameters(recurse=False)):
            module.check()


def build(model: nn.Module, entry: Any) -> None:
    """Replace the float decoder of ``model`` by an empty integer one, as the manifest's ``entry`` says.

    Raises:
        CheckpointError: the entry is damaged, or of another model.
    """
    record.fields("integer decoder", entry, _BODY)
    body, head = entry["body"], entry["head"]
    for name in (body, head):
        if not isinstance(name, str) or not _has(model, name):
            raise CheckpointError(f"{name!r} is an integer decoder's in the checkpoint; {type(model).__name__} has no "
                                  "such module: load it with the class that it was saved from")
    if isinstance(model.get_submodule(body), IntegerDecoder):
        return
    builder = _Builder(model, body, Numbers.from_dict(entry["numbers"]))
    decoder = builder.decoder(entry)
    top = builder.module("head", entry["head_module"], model.get_submodule(head), head)
    assert isinstance(top, IntegerHead)
    for name, block in decoder.blocks.named_children():
        block.check_sizes(f"{body}.{entry['names']['stack']}.{name}")  # type: ignore[operator]
    install(model, body, head, decoder, top)


def _has(model: nn.Module, name: str) -> bool:
    return bool(name) and name in dict(model.named_modules())


class _Builder:
    """Empty modules from entries, every size compared with the float module in its place."""

    def __init__(self, model: nn.Module, body: str, numbers: Numbers) -> None:
        self.root, self.body, self.numbers = model.get_submodule(body), body, numbers
        self.device = next((p.device for p in self.root.parameters()), torch.device("cpu"))

    def float_module(self, path: Any) -> nn.Module:
        if not isinstance(path, str) or not _has(self.root, path):
            raise CheckpointError(f"{self.body}.{path} is in the manifest of the integer decoder; there is no such "
                                  "module in the model")
        return self.root.get_submodule(path)

    def decoder(self, entry: Mapping[str, Any]) -> IntegerDecoder:
        names, modules = entry["names"], entry["modules"]
        known = {"embed", "norm", "stack", "positions"}
        if not isinstance(names, Mapping) or not set(names) <= known or not known - {"positions"} <= set(names):
            raise CheckpointError(f"{self.body}: the names of the integer decoder are damaged: {names!r}")
        if not isinstance(modules, Mapping) or set(modules) != set(names) - {"stack"}:
            raise CheckpointError(f"{self.body}: the manifest lists other modules than names")
        outer = {role: self.module(role, modules[role], self.float_module(names[role]), names[role])
                 for role in modules}
        stack = dict(self.float_module(names["stack"]).named_children())
        entries = entry["blocks"]
        if not isinstance(entries, list) or len(entries) != len(stack):
            raise CheckpointError(f"{self.body}.{names['stack']}: the manifest has another number of blocks than the "
                                  f"model, which has {len(stack)}")
        blocks = {key: self.block(f"{names['stack']}.{key}", one, index)
                  for index, (key, one) in enumerate(zip(stack, entries, strict=True))}
        limit, offset = _number(self.body, entry, "limit", 1, 1 << 26), _number(self.body, entry, "offset", 0, 1 << 16)
        rotary = None
        if entry["rotary"] is not None:
            record.fields("rotary", entry["rotary"], {"kind", "positions", "count"})
            count = _number("rotary", entry["rotary"], "count", 1, 1 << 12)
            if entry["rotary"]["positions"] != limit:
                raise CheckpointError("the rotary table of the manifest has another length than the model's positions")
            rotary = Rotary(limit, count, self.device)
        return assemble(names, self.numbers, outer, blocks, rotary, limit, offset)

    def block(self, path: str, entry: Any, index: int) -> IntegerBlock:
        record.fields(path, entry, {"roles", "shape", "modules", "grids"})
        roles, modules, where = entry["roles"], entry["modules"], f"{self.body}.{path}"
        if not isinstance(roles, Mapping) or not set(roles) <= set(ROLES) or set(modules) != set(roles):
            raise CheckpointError(f"{where}: the roles in the manifest are damaged")
        shape = _shape(where, entry["shape"])
        made = IntegerBlock(roles, shape, self.numbers, index)
        for role, name in roles.items():
            target = self.float_module(f"{path}.{name}")
            place(made, name, self.module(role, modules[role], target, f"{path}.{name}"))
        grids = entry["grids"]
        record.fields(where, grids, {"kind", "channels", "groups", "gated", "shifts"})
        channels, inner = shape.groups * shape.size, made.part("up").out_features
        fits = made.part("query").out_features == shape.heads * shape.size and (
            made.part("key").out_features == made.part("value").out_features == channels
        )
        shifts = grids["shifts"]
        good = isinstance(shifts, list) and len(shifts) == 4
        good = good and all(type(s) is int and abs(s) < _SHIFTS for s in shifts)
        sizes = (grids["channels"], grids["groups"]) == (channels, shape.groups) and grids["gated"] in (0, inner)
        if not fits or not good or not sizes:
            raise CheckpointError(f"{where}: heads and grids in the manifest do not fit the model")
        made.add_module("hfq_grids", Grids(channels, shape.groups, grids["gated"], tuple(shifts), self.device))
        return made

    def module(self, role: str, entry: Any, target: nn.Module, where: str) -> IntegerModule:
        kind = entry.get("kind") if isinstance(entry, Mapping) else None
        make: Callable[..., IntegerModule]
        shift = _number(where, entry, "shift", -_SHIFTS, _SHIFTS) if kind else 0
        if kind == "norm" and role in ("norm", "norm1", "norm2", "query_norm", "key_norm"):
            record.fields(where, entry, {"kind", "size", "shift", "centred", "bias"})
            vectors = [p for p in target.parameters(recurse=False) if p.dim() == 1]
            if not vectors or not isinstance(entry["centred"], bool) or not isinstance(entry["bias"], bool):
                raise CheckpointError(f"{where}: the manifest says norm, the model has {type(target).__name__}")
            size = record.size(where, entry, "size", vectors[0].shape[0])
            return IntegerNorm(size, shift, centred=entry["centred"], bias=entry["bias"], device=self.device)
        classes = {"matrix": IntegerMatrix, "embedding": IntegerEmbedding, "head": IntegerHead}
        wanted = {"embed": "embedding", "positions": "embedding", "head": "head"}.get(role, "matrix")
        weight = getattr(target, "weight", None)
        if kind != wanted or not isinstance(weight, torch.Tensor) or weight.dim() != 2:
            raise CheckpointError(f"{where}: {kind!r} in the manifest for {type(target).__name__}")
        record.fields(where, entry, {"kind", "in_features", "out_features", "bits", "shift", "bias_shift"})
        rows = record.size(where, entry, "out_features", weight.shape[0])
        columns = record.size(where, entry, "in_features", weight.shape[1])
        bias = entry["bias_shift"]
        if bias is not None:
            bias = _number(where, entry, "bias_shift", -_SHIFTS, _SHIFTS)
        make = classes[wanted]
        return make(columns, rows, _number(where, entry, "bits", 2, 8), shift, bias, device=self.device)


def _shape(where: str, entry: Any) -> BlockShape:
    record.fields(where, entry, {"heads", "groups", "size", "activation", "interleaved"})
    heads, groups, size = (_number(where, entry, key, 1, 1 << 16) for key in ("heads", "groups", "size"))
    if heads % groups or entry["activation"] not in ("silu", "relu") or not isinstance(entry["interleaved"], bool):
        raise CheckpointError(f"{where}: the shape in the manifest is damaged: {dict(entry)}")
    return BlockShape(heads, groups, size, entry["activation"], entry["interleaved"])


def _number(where: str, entry: Mapping[str, Any], key: str, low: int, high: int) -> int:
    value = entry.get(key)
    if type(value) is not int or not low <= value <= high:
        raise CheckpointError(f"{where}: {key}={value!r} in the manifest is out of range")
    return value
