from __future__ import annotations

import gc
import json
import time
from types import SimpleNamespace

import pytest
import torch

from hfq.errors import CheckpointError, DataError
from hfq.evaluation import latency
from hfq.evaluation.latency import call_speeds, decode_seconds, decode_speeds, speeds
from hfq.evaluation.memory import PeakMemory, anonymous_bytes, disk_bytes, stored_bits, tensor_bytes


class Clock:
    """Time that passes when the test says so: the same on a machine that does other work."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    thread_time = perf_counter


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    Sleeper.clock = Clock()
    monkeypatch.setattr(latency, "time", Sleeper.clock)
    return Sleeper.clock


class Sleeper(torch.nn.Module):
    """Takes ``delay`` seconds a forward, whatever the input."""

    clock = Clock()

    def __init__(self, delay: float):
        super().__init__()
        self.delay, self.weight, self.calls = delay, torch.nn.Parameter(torch.zeros(3)), []

    def forward(self, input_ids, past_key_values=None, use_cache=False):
        self.calls.append(input_ids.shape[1])
        self.clock.now += self.delay
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 3), past_key_values=(past_key_values or 0) + 1)


def test_ratios_refer_to_the_baseline():
    slow, fast = Sleeper(0.02), Sleeper(0.005)
    found = speeds({"slow": slow, "fast": fast}, torch.zeros(1, 16, dtype=torch.long), new_tokens=3, rounds=2)
    assert found["slow"].decode_ratio == found["slow"].prefill_ratio == 1
    assert found["fast"].decode_ratio == pytest.approx(4) and found["fast"].prefill_ratio == pytest.approx(4)
    assert found["slow"].decode == pytest.approx(1 / 0.02) and found["slow"].prefill == pytest.approx(16 / 0.02)
    assert speeds({"a": slow, "b": fast}, torch.zeros(1, 2, dtype=torch.long), new_tokens=1, rounds=1,
                  baseline="b")["b"].decode_ratio == 1


def test_decoding_is_one_token_at_a_time_and_excludes_the_prompt():
    model = Sleeper(0.01)
    seconds = decode_seconds(model, torch.zeros(1, 9, dtype=torch.long), 4)
    assert model.calls == [9, 1, 1, 1, 1] and seconds == pytest.approx(0.04)


def test_a_long_prompt_is_read_once():
    slow, fast = Sleeper(0.02), Sleeper(0.005)
    found = decode_speeds({"slow": slow, "fast": fast}, torch.zeros(1, 9, dtype=torch.long), new_tokens=3, rounds=2)
    assert slow.calls == [9] + [1] * 8
    assert found["slow"][1] == 1 and found["fast"][1] == pytest.approx(4)
    assert found["slow"][0] == pytest.approx(1 / 0.02)


def test_any_calls_take_turns():
    slow, fast = Sleeper(0.02), Sleeper(0.005)
    ids = torch.zeros(1, 3, dtype=torch.long)
    found = call_speeds({"slow": lambda: slow(ids), "fast": lambda: fast(ids)}, rounds=2)
    assert found["slow"] == (pytest.approx(0.02), 1) and found["fast"] == (pytest.approx(0.005), pytest.approx(4))
    assert len(slow.calls) == len(fast.calls) == 3  # one of them is not measured
    with pytest.raises(DataError, match="nothing to time"):
        call_speeds({})


def test_bad_requests():
    with pytest.raises(DataError, match="none of the models"):
        speeds({"a": Sleeper(0)}, torch.zeros(1, 1), baseline="b")
    with pytest.raises(DataError, match="none of the models"):
        speeds({}, torch.zeros(1, 1))
    with pytest.raises(DataError, match="prompt has shape"):
        speeds({"a": Sleeper(0)}, torch.zeros(4))


def test_peak_sees_what_was_freed_again():
    if anonymous_bytes() is None:
        pytest.skip("this system does not tell the anonymous memory of a process")
    gc.collect()
    with PeakMemory() as memory:
        big = torch.ones(64 << 20, dtype=torch.uint8)
        time.sleep(0.1)
        del big
    assert 50 << 20 < memory.peak < 100 << 20


def test_tensor_bytes_counts_shared_storage_once():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    assert tensor_bytes(model) == 2 * 8 * 8 * 4
    model[1].weight = model[0].weight
    assert tensor_bytes(model) == 8 * 8 * 4


def test_disk_bytes_and_stored_bits(tmp_path):
    with pytest.raises(CheckpointError, match="no weight file"):
        disk_bytes(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 1000)
    assert disk_bytes(tmp_path) == 100 and stored_bits(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"summary": {"bits_per_weight": 4.375}}}))
    assert stored_bits(tmp_path) == 4.375
