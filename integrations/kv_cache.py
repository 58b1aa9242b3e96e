"""transformers' caches that store quantized keys and values.

A cache is a list of layers. Where an attention module has a quantized part, the layer that a fresh cache has for it is
replaced by one of :class:`QuantizedLayer`, whoever made the cache: ``generate``, the model, or the user.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from hfq.errors import ConfigError, QuantizationError
from hfq.layers import attention
from hfq.layers.attention import AttentionQuant
from hfq.layers.exact import exact_inputs
from hfq.layers.kv_store import KVStore

__all__ = ["QuantizedLayer", "adopt", "can_cache", "check", "make", "nbytes"]

_AGREE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class QuantizedLayer(CacheLayerMixin):
    """One attention module's share of a cache. Masks are over all tokens: a sliding window is theirs to cut."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, part: AttentionQuant, max_length: int | None = None, positions: Any = None) -> None:
        super().__init__()
        assert part.cache is not None
        self.part, self.store = part, KVStore(part.cache, max_length, positions)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedLayer:
        """The tokens are copied; the part, which belongs to the model, is shared."""
        clone = object.__new__(type(self))
        memo |= {id(self): clone, id(self.part): self.part}
        vars(clone).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return clone

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Announces the new tokens to the attention function, which stores and reads them; returns them alone."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        attention.stored(self.store, key_states)
        return key_states, value_states

    def get_seq_length(self, *args: Any) -> int:
        return self.store.length

    def get_mask_sizes(self, query_length: Any, *args: Any) -> tuple[int, int]:
        # Versions differ in what they pass: a number of tokens, or their places.
        count = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.store.length + count, 0

    def get_max_length(self) -> int:
        return -1 if self.store.max_tokens is None else self.store.max_tokens

    get_max_cache_shape = get_max_length

    @property
    def batch_size(self) -> int:
        return self.store.batch

    def offload(self) -> None:
        raise QuantizationError("a quantized cache stays where the model computes: use another cache to offload")

    prefetch = offload

    def reset(self) -> None:
        self.store.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; a positive number is the length that stays."""
        length = tokens_to_remove if tokens_to_remove > 0 else self.store.length + tokens_to_remove
        self.store.crop(max(length, 0))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.store.change_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.store.change_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.store.change_rows(lambda t: t[indices.to(t.device)])


_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


def adopt(cache: Any, module: Any, part: AttentionQuant) -> None:
    """Make ``cache`` store the tokens of ``module`` by ``part``; a cache that holds tokens must do so already.

    Raises:
        ConfigError: the cache holds tokens that were stored otherwise, or is of a kind that cannot be replaced.
    """
    cache = getattr(cache, "self_attention_cache", cache)
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise ConfigError(f"{part.label}: {type(module).__name__} does not say which layer of the cache is its own")
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, QuantizedLayer):
        assert part.cache is not None
        if not layer.store.quant.same_as(part.cache):
            raise ConfigError(f"{part.label}: the cache was made with another quantization config: start a new one")
        return
    if type(layer) not in _PLAIN:
        raise ConfigError(f"{part.label}: a {type(layer).__name__} cannot hold quantized keys and values: "
                          "leave the choice of the cache to the model")
    if getattr(cache, "offloading", False):
        raise ConfigError(f"{part.label}: a quantized cache stays where the model computes: offload no cache")
    if layer.get_seq_length() > 0:
        raise ConfigError(f"{part.label}: the cache holds tokens that are not quantized: start a new one")
    longest = layer.max_cache_len if isinstance(layer, StaticLayer) else None
    if isinstance(layer, StaticSlidingWindowLayer):  # its length is the window's; the run may be longer
        longest = None
    if not hasattr(cache, "hfq_positions"):
        cache.hfq_positions = []
    cache.layers[index] = QuantizedLayer(part, longest, cache.hfq_positions)


def make(model: Any, max_length: int | None = None) -> Cache:
    """A fresh cache for ``model``, quantized where its attention is; ``max_length`` allocates it at once.

    Raises:
        ConfigError: the model's attention has no quantized cache.
    """
    parts = {name: part for name, part in attention.parts(model).items() if part.cache is not None}
    if not parts:
        raise ConfigError(f"{type(model).__name__} has no quantized cache: quantize it with kv_bits or kv_cache")
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for name, part in parts.items():
        module = model.get_submodule(name)
        adopt(cache, module, part)
        cache.layers[module.layer_idx].store.max_tokens = max_length
    return cache


def nbytes(cache: Any) -> int:
    """Bytes of all tensors that hold tokens in ``cache``, positions counted once."""
    cache = getattr(cache, "self_attention_cache", cache)
    tensors: list[torch.Tensor] = []
    for layer in cache.layers:
        if isinstance(layer, QuantizedLayer):
            tensors += layer.store.tensors()
        elif layer.is_initialized:
            tensors += [layer.keys, layer.values]
    tensors += [t for p in getattr(cache, "hfq_positions", []) for block in p.blocks for t in block]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def can_cache(model: Any) -> None:
    """Raise :class:`ConfigError` unless ``model`` is a decoder with a key-value cache."""
    config = getattr(model, "config", None)
    if config is None or "past_key_values" not in inspect.signature(model.forward).parameters:
        raise ConfigError(f"{type(model).__name__} has no key-value cache: kv_bits=16 and kv_cache=None are needed")
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{type(model).__name__} is an encoder-decoder: its cache cannot be quantized")


@torch.no_grad()
def check(model: Any, inputs: dict[str, Any], steps: int = 3) -> None:
    """Decode some tokens with the model's own cache, and with that of its parts holding floats.

    Raises:
        QuantizationError: the two do not agree: the model does something with its cache that the parts do not know.
    """
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    ids = inputs["input_ids"].to(device)
    training = model.training
    model.eval()
    try:
        with exact_inputs(model):
            with attention.without(model):
                wanted = _decode(model, ids, steps)
            with attention.exact(model):
                found = _decode(model, ids, steps)
    finally:
        model.train(training)
    wrong = (found - wanted).float().norm() / wanted.float().norm()
    if not wrong <= _AGREE.get(wanted.dtype, 1e-3):
        raise QuantizationError(
            f"{type(model).__name__} does not decode with a quantized cache as with its own, even in floats (logits "
            f"differ by {float(wrong):.1e}): layers that share keys or sinks inside the attention are not supported"
        )


def _decode(model: Any, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """Logits of the last ``steps`` tokens of ``ids``, one at a time after a prompt of the others."""
    cache, start, logits = None, 0, []
    for stop in range(ids.shape[1] - steps, ids.shape[1] + 1):
        result = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache, start = result.past_key_values, stop
        logits.append(result.logits[:, -1] if hasattr(result, "logits") else result.last_hidden_state[:, -1])
        if cache is None:
            raise ConfigError(f"{type(model).__name__} gives back no key-value cache")
    return torch.stack(logits[1:])
