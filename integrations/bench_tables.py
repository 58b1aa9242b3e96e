"""Rows of the tables by family of methods; :mod:`hfq.integrations.bench_methods` measures them.

Every family has a function that gives its cases, and one entry a table below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["TABLES", "Case", "case"]

CALIBRATION = {"calibration_samples": 64, "calibration_seqlen": 512}
GRID = {"group_size": 64, "symmetric": False}


@dataclass(frozen=True)
class Case:
    """One row: ``method`` empty is the float model; ``model`` names it where a table has several.

    The option "order" of layer-wise rows is not the method's: it replaces the importance of the blocks by a random one
    or by the reverse of the method's own, the controls that its paper compares with.
    """

    name: str
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    rescaled: bool = False
    model: str = ""


def case(name: str, method: str, *, rescaled: bool = False, **options: Any) -> Case:
    return Case(name, method, {**GRID, **(CALIBRATION if method != "rtn" else {}), **options}, rescaled)


# Rows that take hours on all blocks of a small machine quantize the first 8 and leave the others float.
EIGHT = {"modules_to_not_convert": ["re:.*layers\\.(8|9|\\d\\d)\\..*"]}


def affine() -> list[Case]:
    """Affine transforms against the same loop with scales only and against rounding to nearest: 8 blocks, 32 rows."""
    rows = []
    for label, grid in (
        ("W4A4", {"bits": 4, "activation_bits": 4, "group_size": -1}), ("W3A16", {"bits": 3}),
    ):
        few = {**grid, **EIGHT, "calibration_samples": 32, "mixed_precision": True}
        rows += [
            case(f"round to nearest, 8 blocks, {label}", "affinequant", **few, maps="none", clipping=False, epochs=0),
            case(f"scales and ranges only, 8 blocks, {label}", "affinequant", **few, maps="diagonal", epochs=20),
            case(f"AffineQuant, 8 blocks, {label}", "affinequant", **few, epochs=20),
        ]
    # Full matrices after the norms run online and are stored: with small hidden sizes that is as much as the weights.
    rows.append(case("AffineQuant without online matrices, 8 blocks, W3A16", "affinequant", bits=3, ln_matrix=False,
                     **EIGHT, calibration_samples=32, mixed_precision=True, epochs=20))
    return rows


def cross() -> list[Case]:
    """Steps from token and channel against steps from the token alone, at three widths; weights to nearest."""
    rows = []
    for label, grid in (
        ("W8A8", {"bits": 8, "activation_bits": 8, "group_size": -1}),
        ("W4A8", {"bits": 4, "activation_bits": 8, "clip": "mse"}),
        ("W4A4", {"bits": 4, "activation_bits": 4, "clip": "mse"}),
    ):
        grid = {"symmetric": True, **grid}
        rows += [
            case(f"per token, {label}", "crossquant", **grid, alpha=1.0),
            case(f"CrossQuant, {label}", "crossquant", **grid),
            case(f"CrossQuant, exponent searched, {label}", "crossquant", **grid, alpha_search=True),
            case(f"CrossQuant over GPTQ, {label}", "crossquant", **grid, solver="gptq"),
        ]
    rows.append(case("CrossQuant in its dynamic mode (analysis only), W4A4", "crossquant", symmetric=True, bits=4,
                     activation_bits=4, clip="mse", mode="dynamic"))
    return rows


# Few steps from round to nearest; the published learning rates are for hundreds of steps a window and a soft rounding.
LEARNED = {
    "steps": 50, "batch_size": 4, "straight": True, "rounding": "full", "lr": 3e-2, "scale_lr": 1e-3,
    "mixed_precision": True,
}
# The paper compares at as many steps a window. Blocks that windows hold twice are then optimised twice, so single
# blocks with twice the steps, which take the same time, are another row.
SINGLE = {**LEARNED, "window": 1, "overlap": 0}


def windows() -> list[Case]:
    """Windows of blocks against single blocks with as many optimiser steps a block, and against nearest; 8 blocks."""
    rows = []
    for label, grid in (
        ("W4A16", {"bits": 4}), ("W2A16", {"bits": 2}), ("W4A4", {"bits": 4, "activation_bits": 4, "group_size": -1}),
    ):
        start = {"steps": 0, "truncate": False, "smooth": False, "rounding": "nearest"}
        grid = {**grid, **EIGHT}
        rows += [
            case(f"nearest rounding, 8 blocks, {label}", "cbq", **grid, **start),
            case(f"single blocks, as many steps a window, 8 blocks, {label}", "cbq", **grid, **SINGLE),
            case(f"single blocks, 8 blocks, {label}", "cbq", **grid, **{**SINGLE, "steps": 100}),
            case(f"CBQ, 8 blocks, {label}", "cbq", **grid, **LEARNED),
        ]
    rows.append(case("CBQ with rank 5, 8 blocks, W2A16", "cbq", bits=2, **EIGHT, **{**LEARNED, "rounding": "lowrank"}))
    return rows


def integer() -> list[Case]:
    """Integer-only models, embedding and head included: three widths, and what each part of the arithmetic costs."""
    grid = {"group_size": -1, "symmetric": True}
    start, learned = {**grid, "epochs": 0}, {**grid, "epochs": 20}
    rows = [
        case("I-LLM from analytic scales, W8A8, integer only", "i_llm", **start),
        case("the same without smoothing", "i_llm", **start, alpha=0.0, qk_alpha=1.0),
        case("the same, 16-bit inputs of softmax and gated unit", "i_llm", **start, nonlinear_bits=16),
        case("the same, 8-bit probabilities", "i_llm", **start, probability_bits=8),
        case("I-LLM, W8A8, integer only", "i_llm", **learned),
    ]
    for bits in (6, 4):
        width = {"bits": bits, "activation_bits": bits, "weight_clip": "mse"}
        rows.append(case(f"I-LLM from analytic scales, W{bits}A{bits}, integer only", "i_llm", **start, **width))
        rows.append(case(f"I-LLM, W{bits}A{bits}, integer only", "i_llm", **learned, **width))
    return rows


# The column solver at its best, the same for every row of a table.
SOLVER = {
    "clip_norm": 2.0, "clip_grid": 40, "weigh_clip": True, "act_order": True, "static_groups": True, "refine": 4,
}
# A step of 4 windows of 512 tokens through SmolLM2 takes about 40 seconds of one core: 24 of them 16 minutes. With a
# sixth of the published steps, learning rates are three times the published ones. Every row starts from a random
# Hadamard matrix: the divergence from the float model is 0.57 there, and 0.73 from eigenvectors of the weights.
TRAINED = {
    "steps": 24, "batch_size": 4, "rotate_lr": 0.05, "scale_lr": 0.005, "mixed_precision": True, "start": "hadamard",
}
PLAIN: dict[str, Any] = {
    "rotate": False, "rotate_heads": False, "scale_norms": False, "scale_values": False, "scale_hidden": False,
    "scale_queries": "none", "online": "none", "steps": 0,
}


def whole_model() -> list[Case]:
    """Rotations and scales of the whole model with 4-bit weights, activations and cache: step by step, then trained."""
    grid = {"group_size": -1, "symmetric": True, **SOLVER}
    low = {**grid, "bits": 4, "activation_bits": 4, "kv_bits": 4}
    scales = {"scale_norms": True, "scale_values": True, "scale_hidden": True, "smooth": 0.5}
    turned = {**PLAIN, "rotate": True, "rotate_heads": True, "start": "hadamard"}
    hadamard = {**turned, "online": "down"}
    stepwise = {**turned, **scales, "online": "down"}
    rows = [
        case("no transforms, W4A4 KV4", "ostquant", **{**low, **PLAIN}),
        case("smoothing only, W4A4 KV4", "ostquant", **{**low, **PLAIN, **scales}),
        case("random Hadamard and GPTQ (as QuaRot), W4A4 KV4", "ostquant", **{**low, **hadamard}),
        case("rotation, W4A4 KV4", "ostquant", **{**low, **turned}),
        case("rotation and scales, W4A4 KV4", "ostquant", **{**low, **turned, **scales}),
        case("rotation, scales, online Hadamard, W4A4 KV4", "ostquant", **{**low, **stepwise}),
        case("OSTQuant, W4A4 KV4", "ostquant", **{**low, **TRAINED}),
        case("OSTQuant from eigenvectors, W4A4 KV4", "ostquant", **{**low, **TRAINED, "start": "womi"}),
    ]
    short = {**TRAINED, "steps": 8}
    rows += [
        case("OSTQuant, W8A8", "ostquant", **grid, bits=8, activation_bits=8, **short),
        case("OSTQuant, W4A8", "ostquant", **grid, bits=4, activation_bits=8, **short),
        case("OSTQuant, W4A8, groups of 64", "ostquant", **SOLVER, bits=4, activation_bits=8, **short),
    ]
    rows += [
        case(f"{name}, rescaled", "ostquant", rescaled=True, **{**low, **options})
        for name, options in (
            ("smoothing only, W4A4 KV4", {**PLAIN, **scales}),
            ("random Hadamard and GPTQ (as QuaRot), W4A4 KV4", hadamard), ("OSTQuant, W4A4 KV4", TRAINED),
        )
    ]
    return rows


def whole_model_trained() -> list[Case]:
    """The ablation of the paper, every step trained; hours on a CPU."""
    low = {"group_size": -1, "symmetric": True, **SOLVER, "bits": 4, "activation_bits": 4, "kv_bits": 4}
    stream = {**PLAIN, **TRAINED, "rotate": True}
    steps = (
        ("rotation of the stream", {}), ("+ scales after norms", {"scale_norms": True}),
        ("+ online Hadamard", {"scale_norms": True, "online": "down"}),
    )
    return [case(f"{name}, trained, W4A4 KV4", "ostquant", **{**low, **stream, **more}) for name, more in steps]


def caches() -> list[Case]:
    """Quantized keys and values of every scored token: KVQuant, a range a token, windows of 32 tokens a channel; and
    what each part of KVQuant adds to a range a token, at 3 bits."""
    def cache(name: str, **options: Any) -> Case:
        return case(name, "kvquant", bits=16, group_size=-1, **options)

    plain = {"datatype": "int", "outliers": 0.0, "sink": 0, "pre_rope": False}
    token = {**plain, "key_axis": "token"}
    windows = {**plain, "key_axis": "window", "value_group": 32}
    rows = [Case("float")]
    for bits in (4, 3, 2):
        rows += [
            cache(f"KVQuant, cache of {bits} bits", kv_bits=bits),
            cache(f"range a token, cache of {bits} bits", kv_bits=bits, **token),
            cache(f"windows of 32 tokens, cache of {bits} bits", kv_bits=bits, **windows),
        ]
    steps: list[tuple[str, dict[str, Any]]] = [
        ("range a channel for keys", plain), ("+ keys before RoPE", {**plain, "pre_rope": True}),
        ("+ codebook", {"outliers": 0.0, "sink": 0}), ("+ outliers", {"sink": 0}),
    ]
    rows += [cache(f"{name}, 3 bits", kv_bits=3, **options) for name, options in steps]
    # With few heads 1 % is a slot or none; the paper keeps 5 first tokens for long contexts.
    rows += [
        cache(f"KVQuant, {share} % outliers, 5 first tokens, cache of {bits} bits", kv_bits=bits, outliers=share / 100,
              sink=5, fit_tokens=tokens)
        for share, bits, tokens in ((2, 3, 32768), (4, 3, 16384), (2, 2, 16384))
    ]
    rows.append(case("GPTQ of 4 bits, KVQuant cache of 4 bits", "gptq", bits=4, kv_cache={"kv_bits": 4},
                     clip="mse", act_order=True, static_groups=True))
    return rows


def _headline() -> list[Case]:
    """The rows that say most about quantized activations and caches."""
    wanted = (
        "float", "per token, W8A8", "CrossQuant, W8A8", "OSTQuant, W8A8",
        "I-LLM from analytic scales, W8A8, integer only",
        "CrossQuant over GPTQ, W4A8", "OSTQuant, W4A8, groups of 64", "no transforms, W4A4 KV4",
        "smoothing only, W4A4 KV4", "random Hadamard and GPTQ (as QuaRot), W4A4 KV4", "OSTQuant, W4A4 KV4",
        "range a token, cache of 4 bits", "windows of 32 tokens, cache of 4 bits", "KVQuant, cache of 4 bits",
        "range a token, cache of 3 bits", "windows of 32 tokens, cache of 3 bits", "KVQuant, cache of 3 bits",
        "KVQuant, 2 % outliers, 5 first tokens, cache of 3 bits",
        "KVQuant, 4 % outliers, 5 first tokens, cache of 3 bits",
    )
    known = {case.name: case for table in (cross(), integer(), whole_model(), caches()) for case in table}
    return [known[name] for name in wanted]


TABLES: dict[str, list[Case]] = {
    "activations": _headline(),
    "affine": affine(),
    "cache": caches(),
    "cross": cross(),
    "integer": integer(),
    "whole_model": whole_model(),
    "whole_model_trained": whole_model_trained(),
    "windows": windows(),
}
