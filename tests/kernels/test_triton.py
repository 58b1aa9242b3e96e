"""Triton products without a GPU: word layout, unpacking code, choice of configuration; numerics in a child process."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from hfq import kernels
from hfq.errors import KernelError
from hfq.formats import QuantSpec, affine, bitpack
from hfq.kernels.packed import PackedWeight
from hfq.kernels.triton import config, tune, wna16
from hfq.kernels.triton.config import Config, Key
from hfq.kernels.triton.layout import choose, pack_words, unpack_words


def _version(module):
    return tuple(int(part) for part in module.__version__.split(".")[:2])


def test_numerics_in_the_interpreter():
    triton = pytest.importorskip("triton")
    if _version(triton) < (3, 7) and _version(numpy) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 cannot loop to a runtime bound with NumPy 2.4: use numpy<2.4")
    file = Path(__file__).with_name("triton_interpreter.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 40


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("k", [16, 72, 100, 576, 1152])
def test_words_give_the_codes_back(bits, k):
    codes = torch.randint(0, 2**bits, (5, k), dtype=torch.uint8)
    for group in (0, 32, 64, 48, 20):
        layout = choose(bits, k, group if group < k else 0)
        assert layout.padded % layout.block == 0 and k <= layout.padded
        assert torch.equal(unpack_words(pack_words(codes, layout), layout, k), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_words_follow_their_definition(bits):
    layout = choose(bits, 1024, 64)
    codes = torch.randint(0, 2**bits, (2, layout.padded), dtype=torch.uint8)
    shift = 0
    for words, width in zip(pack_words(codes, layout), layout.widths, strict=True):
        fields = 16 // width
        block = fields * layout.slice
        plane = words.to(torch.int64) & 0xFFFF
        for row, k in itertools.product(range(2), range(0, layout.padded, 7)):
            word = int(plane[row, k // block * layout.slice + k % layout.slice])
            j = k % block // layout.slice
            assert (word >> (width * j)) & (2**width - 1) == (int(codes[row, k]) >> shift) & (2**width - 1)
        shift += width


def test_layout_choice():
    assert (choose(4, 4096, 128).slice, choose(4, 4096, 128).fold) == (32, 128)
    assert (choose(4, 576, 64).block, choose(4, 576, 64).padded) == (64, 576)
    assert choose(3, 4096, 128).bits == 3 and choose(3, 576, 64).bits == 4  # padding would take the fourth bit
    assert choose(6, 512, 0).bits == 8
    assert choose(4, 100, 20).fold == 0
    for bits, k, group in itertools.product(range(1, 9), (64, 100, 576, 4096), (16, 32, 48, 64, 96, 128, 0)):
        layout = choose(bits, k, group if group < k else 0)
        assert layout.fold and layout.fold % layout.slice == 0 and layout.block % layout.fold == 0
        assert group == 0 or group >= k or group % layout.fold == 0


def _emulate(asm: str, operands: list[torch.Tensor], mantissa: int) -> torch.Tensor:
    """Run the PTX that the kernels inline on int64 tensors of 32-bit registers; bf16x2 arithmetic in float64."""
    registers = {f"${i + 1}": value for i, value in enumerate(operands)}

    def value(name: str) -> torch.Tensor | int:
        return int(name, 16) if name.startswith("0x") else int(name) if name.isdigit() else registers[name]

    def halves(bits: torch.Tensor | int) -> list[torch.Tensor]:
        bits = torch.as_tensor(bits)
        words = (bits & 0xFFFF, bits >> 16)
        return [(h << 16).to(torch.int64).to(torch.int32).view(torch.float32).double() for h in words]

    for text in filter(None, (part.strip() for part in asm.strip("{} ").split(";"))):
        name, *arguments = text.replace(",", " ").split()
        if name == ".reg":
            continue
        target, *sources = arguments
        read = [value(s) for s in sources]
        if name == "shr.b32":
            result = read[0] >> read[1]
        elif name == "shl.b32":
            result = (read[0] << read[1]) & 0xFFFFFFFF
        elif name == "mov.b32":
            result = read[0]
        elif name == "lop3.b32":
            assert read[3] == 0xEA
            result = (read[0] & read[1]) | read[2]
        else:
            assert name == "fma.rn.bf16x2" and mantissa == 7
            exact = [a * b + c for a, b, c in zip(*(halves(r) for r in read), strict=True)]
            low, high = (e.float().bfloat16().view(torch.int16).to(torch.int64) & 0xFFFF for e in exact)
            result = low | (high << 16)
        registers[target] = result
    return registers["$0"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_inline_assembly_decodes_every_word(bits, dtype):
    jit = pytest.importorskip("hfq.kernels.triton.jit")
    from triton import language as tl

    name, mantissa = (tl.float16, 10) if dtype == torch.float16 else (tl.bfloat16, 7)
    offset = jit._offset(bits, name)
    words = torch.arange(2**16)
    pair = words | (words.flip(0) << 16)  # the neighbour in the upper half must not leak
    high = torch.randint(0, 2**16, (2**16,)) if bits == 3 else None
    for field in range(16 if bits == 3 else 16 // bits):
        if bits == 3:
            asm, operands = jit._unpack_asm(field, 2, 3, name), [pair, high | (high.flip(0) << 16)]
            want = ((words >> (2 * (field % 8))) & 3) | (((high >> field) & 1) << 2)
        else:
            asm = jit._unpack8_asm(8 * field) if offset == 0 else jit._unpack_asm(bits * field, bits, bits, name)
            operands, want = [pair], (words >> (bits * field)) & (2**bits - 1)
        got = torch.as_tensor(_emulate(asm, operands, mantissa))
        low, up = ((h & 0xFFFF).to(torch.int32).to(torch.int16).view(dtype).double() for h in (got, got >> 16))
        assert torch.equal(low, want.double() + offset)
        assert torch.equal(up, want.flip(0).double() + offset)


@pytest.fixture
def empty_tables(monkeypatch, tmp_path):
    monkeypatch.setenv("HFQ_CACHE", str(tmp_path))
    for cached in (config._tables, config.pick_config, wna16._config):
        cached.cache_clear()
    yield tmp_path
    for cached in (config._tables, config.pick_config, wna16._config):
        cached.cache_clear()


def _key(m, n=4096, k=4096, **changes):
    return Key(**{"op": "wna16", "bits": 4, "group": 128, "n": n, "k": k, "m": m, "dtype": "bfloat16", **changes})


def test_measured_entries_come_first_then_the_nearest_then_the_rule(empty_tables):
    assert [config.bucket(m) for m in (1, 2, 9, 64, 65, 5000)] == [1, 8, 16, 64, 128, 4096]
    rule = config.pick_config("wna16", _key(16), "NVIDIA H100 80GB HBM3", 32)
    assert rule == config.heuristic(_key(16), 32) and rule.backend == "fused"
    assert config.pick_config("wna16", _key(4096), "NVIDIA H100 80GB HBM3", 32).backend == "dequant"
    best = Config(bm=16, bn=128, split=8, warps=8)
    table = {"devices": ["H100"], "triton": "3.6.0", "entries": [config.entry(_key(16), best, 7.0)]}
    (empty_tables / "wna16.json").write_text(json.dumps(table))
    config._tables.cache_clear()
    config.pick_config.cache_clear()
    assert config.pick_config("wna16", _key(16), "NVIDIA H100 80GB HBM3", 32) == best
    near = config.pick_config("wna16", _key(16, n=8192), "NVIDIA H100 80GB HBM3", 32)
    assert (near.bn, near.split) == (128, 4)  # twice the rows, half the splits
    assert config.pick_config("wna16", _key(16, n=2**19), "NVIDIA H100 80GB HBM3", 32) != near
    assert config.pick_config("wna16", _key(16), "NVIDIA A100", 32) == config.heuristic(_key(16), 32)


def test_every_rule_and_candidate_fits_the_device():
    for m, n, k, bits in itertools.product(config.BUCKETS, (48, 4096, 28672), (576, 14336), (1, 2, 3, 4, 8)):
        layout = choose(bits, k, 64)
        key = _key(m, n, k, bits=layout.bits, group=64)
        found = tune.candidates(key, layout)
        assert len(found) == len(set(found)) <= 12
        for limit in (95 * 1024, 223 * 1024):
            fitted = config.fits(found[0], layout.block, layout.slice, layout.bits, layout.blocks, limit)
            assert config.shared_bytes(fitted, layout.block, layout.slice, layout.bits) <= limit
            assert 1 <= fitted.split <= layout.blocks


def test_reasons_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "GPU" in wna16.available("cpu") and "CUDA" in wna16.available("cuda")
    with pytest.raises(KernelError, match="cannot tune"):
        tune.tune([(64, 64)])
    codes = affine.quantize(torch.randn(32, 128), QuantSpec(4, 32))
    packed = PackedWeight(bitpack.pack(codes.codes, 4), codes.scale, codes.zero_point, codes.spec, 128, 32)
    rows = {c.backend: c.reason for c in kernels.explain(packed, 1, torch.bfloat16, "cuda")}
    assert "compute capability 8.0" in rows["triton"] and "triton_dequant" in rows


def test_layout_is_registered_and_exact():
    from hfq.kernels.packed import LAYOUTS

    codes = affine.quantize(torch.randn(32, 100), QuantSpec(5, 32, zero_point="float"))
    packed = PackedWeight(bitpack.pack(codes.codes, 5), codes.scale, codes.zero_point, codes.spec, 100, 32)
    runtime = LAYOUTS["triton"].make(packed, torch.bfloat16)
    again = runtime.packed()
    for name in ("qweight", "scale", "zero_point"):
        assert torch.equal(getattr(again, name), getattr(packed, name))
    again.check()


def test_wrong_activations_are_refused():
    codes = affine.quantize(torch.randn(32, 64), QuantSpec(4, 32))
    packed = PackedWeight(bitpack.pack(codes.codes, 4), codes.scale, codes.zero_point, codes.spec, 64, 32, "model.fc")
    runtime = wna16.prepare(packed, torch.float16)
    with pytest.raises(KernelError, match=r"63 features, the weight of model\.fc has 64"):
        wna16.linear(torch.randn(2, 63).half(), runtime)
    with pytest.raises(KernelError, match="float64"):
        wna16.linear(torch.randn(2, 64).double(), runtime)
