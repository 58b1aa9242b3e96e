"""Peak anonymous memory above the level at entry."""

from __future__ import annotations

import mmap

import pytest
import torch
from safetensors.torch import load_file, save_file

from hfq.memory import PeakMemory, anonymous_bytes, page_out

MIB = 1 << 20

pytestmark = pytest.mark.skipif(anonymous_bytes() is None, reason="the system does not tell")


def test_a_peak_that_is_gone_at_the_end_is_seen():
    import time

    with PeakMemory(interval=0.005) as memory:
        block = torch.ones(64 * MIB, dtype=torch.uint8)
        limit = time.monotonic() + 20  # on a busy machine the sampling thread has to wait for its turn
        while (memory.peak or 0) < 60 * MIB and time.monotonic() < limit:
            time.sleep(0.01)
        del block
    assert 60 * MIB < memory.peak < 80 * MIB


def test_mapped_files_do_not_count(tmp_path):
    path = tmp_path / "big"
    path.write_bytes(b"x" * (64 * MIB))
    with PeakMemory() as memory, path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        assert sum(view[i] for i in range(0, len(view), 4096)) > 0
    assert memory.peak < 8 * MIB


def resident_of_files() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssFile"))


def test_pages_of_a_file_are_let_go_and_read_again(tmp_path):
    stored = torch.arange(64 * MIB // 8)
    save_file({"codes": stored, "other": torch.ones(3)}, tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    assert torch.equal(found["codes"], stored)
    before = resident_of_files()
    if not page_out(found["codes"]):
        pytest.skip("the system takes no advice")
    assert before - resident_of_files() > 60 * MIB
    assert torch.equal(found["codes"], stored)


def test_memory_of_no_file_is_left_alone():
    assert page_out(torch.ones(1 << 20)) == 0
