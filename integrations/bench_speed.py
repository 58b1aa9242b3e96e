"""``hfq bench speed``: whole models against their own float form, in turns in one process.

What a model was calibrated on does not change its speed, so the rows are quantized with a few random tokens; weights
may be random too (``random:2048x2``: a decoder of two blocks of width 2048). Quality is measured elsewhere.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hfq.errors import ConfigError
from hfq.evaluation.latency import decode_speeds, speeds
from hfq.integrations import measure

__all__ = ["ROWS", "Forms", "check_rows", "forms", "measured", "model_of", "row_of"]

# Round to nearest where the way to the codes does not matter; the same layers serve every method.
_CACHE = {"datatype": "int", "outliers": 0.0, "sink": 0, "pre_rope": False, "key_axis": "token"}
ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "w4": ("weights of 4 bits, groups of 64", "rtn", {"bits": 4, "group_size": 64, "symmetric": False}),
    "w8": ("weights of 8 bits", "rtn", {"bits": 8, "group_size": -1}),
    "w8a8": ("weights and inputs of 8 bits", "crossquant", {"bits": 8, "activation_bits": 8, "alpha": 1.0}),
    "w4a8": ("weights of 4, inputs of 8 bits, groups of 64, two-level scales", "crossquant",
             {"bits": 4, "activation_bits": 8, "alpha": 1.0, "group_size": 64, "group_scale": "int"}),
    "kv4": ("cache of 4 bits, a range a token", "kvquant", {"kv_bits": 4, **_CACHE}),
    "kv4-codebook": ("cache of 4 bits, codebook, keys before RoPE", "kvquant", {"kv_bits": 4}),
}  # fmt: skip
# By key: title, method, options.
Forms = Mapping[str, tuple[str, str, dict[str, Any]]]
_RANDOM = re.compile(r"random:(\d+)x(\d+)")
_SAMPLES, _SEQLEN = 2, 128


def model_of(name: str) -> Any:
    """A model by folder or Hub id, ``"demo"``, or ``"random:WIDTHxBLOCKS"`` (Llama form, heads of 64, float32).

    Raises:
        ConfigError: a width that heads of 64 do not divide.
    """
    shape = _RANDOM.fullmatch(name)
    if shape is None:
        return measure.load_model(name, dtype=torch.float32)
    from transformers import LlamaConfig, LlamaForCausalLM

    width, blocks = int(shape[1]), int(shape[2])
    if width % 256 or not width or not blocks:
        raise ConfigError(f"{name}: the width must be a multiple of 256 (heads of 64, a quarter as many for keys)")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=width // 64, vocab_size=1024,
        num_key_value_heads=width // 256, intermediate_size=width * 11 // 4, max_position_embeddings=1 << 15,
    )
    return LlamaForCausalLM(config).eval()


def check_rows(rows: Sequence[str], table: Forms) -> None:
    """Raise :class:`ConfigError` unless all ``rows`` are in the table."""
    unknown = [row for row in rows if row not in table]
    if unknown:
        raise ConfigError(f"--rows {unknown[0]!r}: {', '.join(table)} are the rows of such models")


def forms(
    model: Any, rows: Sequence[str], table: Forms, data: Any, calibration: Mapping[str, int], say: Callable[[str], Any],
) -> dict[str, Any]:
    """``model`` as "float" and a quantized copy of it for every row, by title.

    Args:
        data: for the methods that want some, with the options ``calibration``.
    """
    import hfq

    made = {"float": model}
    for title, method, options in (table[row] for row in rows):
        say(f"quantize: {title}")
        wants = hfq.HfqConfig(method=method, **options).wants_data
        config = hfq.HfqConfig(method=method, **options, **(calibration if wants else {}))
        made[title] = copy.deepcopy(model)
        hfq.quantize(made[title], config, data if wants else None)
    return made


def row_of(title: str, model: Any, tokens: int = 1) -> dict[str, Any]:
    """What a row says about the model itself: kernels for so many tokens, bits."""
    row = {"name": title, "kernel": measure.kernels_used(model, tokens) or None}
    report = getattr(model, "hfq_report", None)
    return row if report is None else row | {"bits_per_weight": report.bits_per_weight()}


def measured(
    name: str, rows: Sequence[str], *, prompt: int = 512, context: int = 0, new_tokens: int = 32, rounds: int = 5,
    say: Callable[[str], Any] = lambda text: None,
) -> list[dict[str, Any]]:
    """Prefill of ``prompt`` tokens and decoding of the float model and of every row.

    Args:
        rows: keys of :data:`ROWS`.
        context: tokens in the cache before decoding; 0 decodes after 8.

    Returns:
        Rows with the keys of :data:`hfq.integrations.results.COLUMNS`; ratios are to the float model.
    """
    check_rows(rows, ROWS)
    model = model_of(name)
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    longest = max(prompt, context, _SEQLEN)
    ids = torch.randint(vocabulary, (1, longest), generator=generator)
    data = [{"input_ids": torch.randint(vocabulary, (1, _SEQLEN), generator=generator)} for _ in range(_SAMPLES)]
    calibration = {"calibration_samples": _SAMPLES, "calibration_seqlen": _SEQLEN}
    models = forms(model, rows, ROWS, data, calibration, say)
    say("measure")
    found = speeds(models, ids[:, :prompt], new_tokens=new_tokens, rounds=rounds)
    later = decode_speeds(models, ids[:, :context], new_tokens=new_tokens, rounds=rounds) if context else None
    return [_row(title, models[title], speed, later) for title, speed in found.items()]


def _row(title: str, model: Any, speed: Any, later: Mapping[str, tuple[float, float]] | None) -> dict[str, Any]:
    row = row_of(title, model) | {"prefill_ratio": speed.prefill_ratio, "decode": speed.decode,
                                  "decode_ratio": speed.decode_ratio}  # fmt: skip
    report = getattr(model, "hfq_report", None)
    if report is not None:
        row["cache_bits"] = next((line.bits for line in report.packed if line.kind == "cache"), None)
    if later is not None:
        row["decode"], row["decode_ratio"] = later[title]
    return row
