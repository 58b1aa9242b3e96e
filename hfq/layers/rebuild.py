"""The manifest of a model's packed layers, and empty layers from a manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from hfq.errors import CheckpointError, QuantizationError
from hfq.layers import attached, attention, grouped_attention, integer_build, products, rounded, switched, times
from hfq.layers import folded as norms
from hfq.layers import manifest as record
from hfq.layers import online as streams
from hfq.layers.banks import empty_banks
from hfq.layers.conv import geometry_of
from hfq.layers.experts import pack_experts
from hfq.layers.inputs import activation_of, online_of
from hfq.layers.kinds import empty, kind_of, matrix_of
from hfq.layers.leading import empty_leading
from hfq.layers.one_weight import OneWeight
from hfq.layers.packed import PackedModule
from hfq.layers.slot import Slot

__all__ = ["build_empty", "describe", "packed_modules"]


_KINDS = ("linear", "conv1d", "conv2d", "embedding")


def packed_modules(model: nn.Module) -> dict[str, PackedModule]:
    """The packed layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}


def describe(model: nn.Module) -> dict[str, Any]:
    """The manifest: what :func:`build_empty` needs to rebuild packed layers, rotations and attention. JSON only."""
    whole = integer_build.describe(model)
    if whole is not None:
        return {"version": record.VERSION, "layers": {}, "rotations": [], "integer": whole}
    lists = {"attention": attention.describe(model), "attached": attached.attached(model) + rounded.describe(model),
             "folded": norms.describe(model), "switched": switched.describe(model)}  # fmt: skip
    return {
        "version": record.VERSION,
        "layers": {name: module.describe() for name, module in packed_modules(model).items()},
        "rotations": streams.rotations(model),
        **{kind: found for kind, found in lists.items() if found},
        **times.describe(model),
    }


def build_empty(model: nn.Module, manifest: Mapping[str, Any]) -> list[str]:
    """Replace float modules by empty packed layers, as ``manifest`` says, before a checkpoint is loaded.

    Everything is checked against the model before anything is allocated or replaced. New tensors are on the device of
    the ones they replace (usually meta). Layers and rotations that are there already stay.

    Returns:
        Names of the replaced modules.

    Raises:
        CheckpointError: the manifest is damaged, of a newer version, or of another model; names the module.
    """
    layers = record.entries(manifest)
    if manifest.get("integer") is not None:
        integer_build.build(model, manifest["integer"])
    _switched(model, manifest, layers)
    given = manifest.get("noise_levels")
    levels = None if given is None else times.from_manifest(model, given)
    todo: list[tuple[str, Callable[[], nn.Module]]] = []
    for name, entry in layers.items():
        place = record.locate(model, name, layers)
        if place is None:
            continue
        module = model.get_submodule(place)
        if isinstance(module, PackedModule):
            if module.describe() != {"activation": None, **entry} and module.describe() != dict(entry):
                raise CheckpointError(f"{name} is packed already, and otherwise than the manifest says")
            continue
        todo.append((place, _builder(name, module, entry, levels)))
    turns = _turns(model, manifest, layers)
    attentions = _attentions(model, manifest, layers, levels)
    beside = _beside(model, manifest, layers)
    for place, norm in _folded(model, manifest, layers):
        norms.install(model, place, norm)
    if levels is not None and times.of(model) is None:
        times.install(model, levels)
    for place, build in todo:
        new = build()
        assert isinstance(new, PackedModule)
        new.label = place
        model.set_submodule(place, new)
    for place, rotation in turns:
        streams.attach(model.get_submodule(place), rotation)
    for place, part in attentions:
        attention.install(model, place, part)
    for place, found in beside:
        if isinstance(found, rounded.RoundedInput):
            rounded.attach_rounding(model.get_submodule(place), found)
        else:
            attached.put(model, place, found)
    return [place for place, _ in todo]


def _placed(
    model: nn.Module, manifest: Mapping[str, Any], kind: str, layers: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The entries of a list of the manifest with the names that the model has for their modules."""
    for entry in record.parts(manifest, kind):
        place = record.locate(model, entry["module"], layers)
        if place is not None:
            yield place, entry


def _switched(model: nn.Module, manifest: Mapping[str, Any], layers: Mapping[str, Any]) -> None:
    """A copy of the float layer for every width, where the width follows the timestep; they are then packed by name."""
    made = []
    for place, entry in _placed(model, manifest, "switched", layers):
        if (found := switched.empty_switched(model, entry, place)) is not None:
            made.append((place, *found))
    for place, schedule, edges in made:
        switched.install(model, place, schedule, edges)


def _attentions(
    model: nn.Module, manifest: Mapping[str, Any], layers: Mapping[str, Any], levels: times.NoiseLevels | None
) -> list[tuple[str, attention.AttentionQuant]]:
    """Empty parts of attention modules, with their places."""
    made = []
    for place, entry in _placed(model, manifest, "attention", layers):
        module, name = model.get_submodule(place), entry["module"]
        if entry.get("form") == "grouped":
            part: attention.AttentionQuant | None = grouped_attention.empty_grouped(module, entry, name, levels)
        else:
            of_products = entry.get("form") == "products"
            part = (products.empty_products(module, entry, name, levels) if of_products
                    else attention.empty_part(module, entry, name))
        made += [] if part is None else [(place, part)]
    return made


def _turns(
    model: nn.Module, manifest: Mapping[str, Any], layers: Mapping[str, Any]
) -> list[tuple[str, streams.StreamRotation]]:
    """Empty rotations of streams, with their places."""
    made = []
    for place, entry in _placed(model, manifest, "rotations", layers):
        block = model.get_submodule(place)
        rotation = streams.empty_rotation(block, entry, entry["module"], _widths(block))
        made += [] if rotation is None else [(place, rotation)]
    return made


def _folded(
    model: nn.Module, manifest: Mapping[str, Any], layers: Mapping[str, Any]
) -> list[tuple[str, norms.Folded]]:
    """What is left of folded norms, with its places."""
    made = []
    for place, entry in _placed(model, manifest, "folded", layers):
        conv = entry.get("conv")
        target = record.locate(model, conv, layers) if isinstance(conv, str) else None
        part = norms.empty_folded(model, entry, place, target)
        made += [] if part is None else [(place, part)]
    return made


def _beside(
    model: nn.Module, manifest: Mapping[str, Any], layers: Mapping[str, Any]
) -> list[tuple[str, nn.Module]]:
    """Empty affine parts, scaled activations and rounded inputs with their places."""
    made = []
    for place, entry in _placed(model, manifest, "attached", layers):
        if entry.get("kind") == "rounded":
            part: nn.Module | None = rounded.empty_rounded(model.get_submodule(place), entry)
        else:
            around = model.get_submodule(place.rpartition(".")[0])
            part = attached.empty_attached(model, entry, place, _widths(around))
        made += [] if part is None else [(place, part)]
    return made


def _widths(block: nn.Module) -> set[int]:
    """Sizes of the dimensions of the float tensors of a block, packed ones included."""
    found = {size for parameter in block.parameters() for size in parameter.shape}
    for module in packed_modules(block).values():
        found.update(size for slot in module.slots.values() for size in slot.weight_shape)
    return found


def _builder(
    name: str, module: nn.Module, entry: Mapping[str, Any], levels: times.NoiseLevels | None
) -> Callable[[], nn.Module]:
    """Check an entry against the module that it is about; a function that builds the empty packed layer."""
    if "levels" in entry and entry.get("kind") in _KINDS:
        follow = times.counted(entry["levels"], levels, name)
        build = _builder(name, module, {key: value for key, value in entry.items() if key != "levels"}, levels)
        return lambda: _with(build(), "follow", follow, name)
    if "groups" in entry and entry.get("kind") != "experts":
        banks = empty_banks(entry["groups"], levels, f"{name}.groups", module.weight.device, entry.get("in_features"))  # type: ignore[union-attr]
        build = _builder(name, module, {key: value for key, value in entry.items() if key != "groups"}, levels)
        return lambda: _with(build(), "group_inputs", banks, name)
    kind = entry.get("kind")
    if kind == "experts":
        return _experts_builder(name, module, entry)
    if kind not in _KINDS:
        raise CheckpointError(f"{name}: unknown kind {kind!r} of packed layer: the checkpoint needs a newer hfq")
    try:
        actual = kind_of(module)
    except QuantizationError as error:
        raise CheckpointError(f"{name}: {error}") from error
    if actual != kind:
        raise CheckpointError(f"{name}: the manifest says {kind}, the model has {type(module).__name__}")
    later = {"activation"} & set(entry)  # entries from before there were activation formats have none
    later |= {"coarse", *({"cut"} & set(entry))} if kind == "conv2d" else {"leading"} & set(entry)
    record.fields(name, entry, {"kind", "in_features", "out_features", "bias", "spec", "online", *later})
    rows, columns = matrix_of(module, kind).shape
    record.size(name, entry, "out_features", rows)
    record.size(name, entry, "in_features", columns)
    spec = record.spec_of(name, entry)
    bias, transform, device = entry["bias"], entry["online"], module.weight.device  # type: ignore[union-attr]
    if not isinstance(bias, bool) or (kind == "embedding" and (bias or transform is not None)):
        raise CheckpointError(f"{name}: bias={bias!r}, online={transform!r} in the manifest")
    online, activation = online_of(name, transform, columns, device), activation_of(name, entry)
    parts = {"leading": empty_leading(name, entry.get("leading"), columns, rows, device)} if kind != "conv2d" else {
        "coarse": _coarse(name, module, entry["coarse"], activation), "cut": _cut(name, module, entry.get("cut"))}
    if parts.get("cut") is not None and (parts["coarse"] is not None or online is not None):
        raise CheckpointError(f"{name}: a cut input and other parts besides in the manifest")
    if kind == "embedding" and (activation is not None or parts["leading"] is not None):
        raise CheckpointError(f"{name}: an embedding has no inputs to quantize; the manifest says {dict(entry)}")
    return lambda: empty(module, kind, spec, online, bias, device, activation, **parts)


def _with(layer: nn.Module, how: str, what: Any, name: str) -> nn.Module:
    """``layer`` after its method ``how`` took ``what``."""
    assert isinstance(layer, OneWeight)
    try:
        getattr(layer, how)(what)
    except QuantizationError as error:
        raise CheckpointError(f"{name}: {error}") from error
    return layer


def _coarse(name: str, module: nn.Module, entry: Any, activation: Any) -> tuple[tuple[int, int], Any] | None:
    """Taps and grid of the second part of a convolution's weight."""
    if activation is not None and activation.granularity != "tensor":
        raise CheckpointError(f"{name}: the inputs of a convolution share one scale, the manifest says {activation}")
    if entry is None:
        return None
    where = f"{name}.coarse"
    record.fields(where, entry, {"taps", "spec"})
    taps = entry["taps"]
    if not isinstance(taps, list) or len(taps) != 2 or any(type(t) is not int for t in taps):
        raise CheckpointError(f"{where}: taps={taps!r} in the manifest")
    try:
        geometry_of(module).centre((taps[0], taps[1]))
    except QuantizationError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return (taps[0], taps[1]), record.spec_of(where, entry)


def _cut(name: str, module: nn.Module, entry: Any) -> tuple[int, Any] | None:
    """Where the input of a convolution is cut, and the grid of the weight behind it."""
    if entry is None:
        return None
    where = f"{name}.cut"
    record.fields(where, entry, {"at", "spec"})
    if type(entry["at"]) is not int:
        raise CheckpointError(f"{where}: at={entry['at']!r} in the manifest")
    try:
        geometry_of(module).halves(entry["at"])
    except QuantizationError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return entry["at"], record.spec_of(where, entry)


def _experts_builder(name: str, module: nn.Module, entry: Mapping[str, Any]) -> Callable[[], nn.Module]:
    record.fields(name, entry, {"kind", "params", *({"activation"} & set(entry))})
    if not isinstance(entry["params"], Mapping) or not entry["params"]:
        raise CheckpointError(f"{name}: the manifest lists no expert weights")
    slots = {}
    for parameter, part in entry["params"].items():
        where = f"{name}.{parameter}"
        record.fields(where, part, {"experts", "out_features", "in_features", "transposed", "spec"})
        weight = module._parameters.get(parameter)
        if weight is None or weight.dim() != 3 or not isinstance(part["transposed"], bool):
            raise CheckpointError(f"{where} is packed in the checkpoint; {type(module).__name__} has no such experts")
        rows, columns = (weight.shape[2], weight.shape[1]) if part["transposed"] else weight.shape[1:]
        record.size(where, part, "experts", weight.shape[0])
        record.size(where, part, "out_features", rows)
        record.size(where, part, "in_features", columns)
        slots[parameter] = Slot(
            record.spec_of(where, part), rows, columns, weight.shape[0], f"{parameter}_", part["transposed"]
        )
    activation = activation_of(name, entry)
    return lambda: pack_experts(module, slots, activation=activation)
