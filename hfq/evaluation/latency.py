"""Prefill, decode and forward speed, as a ratio to a baseline measured in the same process at the same time.

Tokens per second on their own say more about the machine than about the model. The models take turns, so that a
busy machine slows all of them, and each keeps its best round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfq.errors import DataError

__all__ = ["Speed", "call_speeds", "decode_seconds", "decode_speeds", "op_shares", "prefill_seconds", "speeds"]


@dataclass(frozen=True)
class Speed:
    """Tokens per second, and the ratios to the baseline's (1 for the baseline itself)."""

    prefill: float
    decode: float
    prefill_ratio: float
    decode_ratio: float
    prompt_tokens: int
    new_tokens: int


def speeds(models: Mapping[str, nn.Module], prompt: Tensor, *, new_tokens: int = 32, rounds: int = 3,
           baseline: str | None = None) -> dict[str, Speed]:
    """Measure every model, in turns.

    Args:
        models: name to causal language model with a key-value cache.
        prompt: ``input_ids [B, T]``; prefill runs on all of it, decoding continues from its last 8 tokens.
        new_tokens: decode steps a round.
        rounds: how often each model has its turn, after one unmeasured warm-up; the best round counts.
        baseline: name of the model that ratios refer to; the first by default.

    Raises:
        DataError: no model, an unknown baseline, or an empty prompt.
    """
    names = list(models)
    baseline = names[0] if baseline is None and names else baseline
    if baseline not in models:
        raise DataError(f"baseline {baseline!r} is none of the models {names}")
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise DataError(f"the prompt has shape {tuple(prompt.shape)}, [batch, tokens] is needed")
    start = prompt[:, -8:]
    prefill: dict[str, float] = dict.fromkeys(names, float("inf"))
    decode: dict[str, float] = dict.fromkeys(names, float("inf"))
    for turn in range(rounds + 1):
        for name, model in models.items():
            p, d = prefill_seconds(model, prompt), decode_seconds(model, start, new_tokens if turn else 2)
            if turn:
                prefill[name], decode[name] = min(prefill[name], p), min(decode[name], d)
    batch, length = prompt.shape
    return {
        name: Speed(
            prefill=batch * length / prefill[name], decode=batch * new_tokens / decode[name],
            prefill_ratio=prefill[baseline] / prefill[name], decode_ratio=decode[baseline] / decode[name],
            prompt_tokens=length, new_tokens=new_tokens,
        )
        for name in names
    }


@torch.no_grad()
def decode_speeds(models: Mapping[str, nn.Module], prompt: Tensor, *, new_tokens: int = 32,
                  rounds: int = 3) -> dict[str, tuple[float, float]]:
    """Decoding after a long prompt, which every model reads once: tokens per second, and ratio to the first model's.

    Args:
        models: name to causal language model with a key-value cache.
        prompt: ``input_ids [B, T]``.
        new_tokens: decode steps a round; the cache grows by them each time.
        rounds: turns of each model after an unmeasured one; the best counts.
    """
    ahead = {name: _after(model, prompt) for name, model in models.items()}
    best: dict[str, float] = dict.fromkeys(models, float("inf"))
    for turn in range(rounds + 1):
        for name, model in models.items():
            cache, token = ahead[name]
            _synchronize(token)
            started = time.perf_counter()
            for _ in range(new_tokens if turn else 2):
                result: Any = model(input_ids=token, past_key_values=cache, use_cache=True)
                cache, token = result.past_key_values, result.logits[:, -1:].argmax(-1)
            _synchronize(token)
            ahead[name] = cache, token
            if turn:
                best[name] = min(best[name], time.perf_counter() - started)
    first = next(iter(best.values()), 0.0)
    return {name: (len(prompt) * new_tokens / seconds, first / seconds) for name, seconds in best.items()}


def _after(model: nn.Module, prompt: Tensor) -> tuple[Any, Tensor]:
    """The cache after ``prompt``, and the next token ``[B, 1]``."""
    result: Any = model(input_ids=prompt.to(next(model.parameters()).device), use_cache=True)
    return result.past_key_values, result.logits[:, -1:].argmax(-1)


@torch.no_grad()
def call_speeds(calls: Mapping[str, Callable[[], Any]], *, rounds: int = 5) -> dict[str, tuple[float, float]]:
    """Any calls in turns: seconds of the best of ``rounds`` after an unmeasured one, and how many times as fast as the
    first it is. With one thread and no GPU the thread's own time counts: other work on the machine hardly changes it.

    Args:
        calls: name to a function that computes and waits for nothing else; results on a GPU are waited for here.

    Raises:
        DataError: there is no call.
    """
    if not calls:
        raise DataError("there is nothing to time")
    clock = time.thread_time if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter
    best: dict[str, float] = dict.fromkeys(calls, float("inf"))
    for turn in range(rounds + 1):
        for name, call in calls.items():
            _settle()
            started = clock()
            call()
            _settle()
            if turn:
                best[name] = min(best[name], clock() - started)
    first = next(iter(best.values()))
    return {name: (seconds, first / seconds) for name, seconds in best.items()}


@torch.no_grad()
def op_shares(call: Callable[[], Any], most: int = 5) -> dict[str, float]:
    """Where the time of one call goes: the operators that take most of it, and their share, the largest first."""
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=kinds) as profiler:
        call()
    spent = {event.key: float(event.self_device_time_total if cuda else event.self_cpu_time_total)
             for event in profiler.key_averages()}  # fmt: skip
    total = sum(spent.values()) or 1.0
    return {key: spent[key] / total for key in sorted(spent, key=spent.__getitem__, reverse=True)[:most]}


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.no_grad()
def prefill_seconds(model: nn.Module, prompt: Tensor) -> float:
    """Seconds of one forward over ``prompt [B, T]``."""
    prompt = prompt.to(next(model.parameters()).device)
    _synchronize(prompt)
    started = time.perf_counter()
    model(input_ids=prompt, use_cache=True)
    _synchronize(prompt)
    return time.perf_counter() - started


@torch.no_grad()
def decode_seconds(model: nn.Module, prompt: Tensor, new_tokens: int) -> float:
    """Seconds of ``new_tokens`` greedy steps after ``prompt [B, T]``; the prompt itself is not timed."""
    prompt = prompt.to(next(model.parameters()).device)
    cache, token = _after(model, prompt)
    _synchronize(prompt)
    started = time.perf_counter()
    for _ in range(new_tokens):
        result: Any = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache, token = result.past_key_values, result.logits[:, -1:].argmax(-1)
    _synchronize(prompt)
    return time.perf_counter() - started


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
