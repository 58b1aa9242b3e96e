"""Integer products and producers without a GPU: layout, unpacking code, configurations; numerics in a child process."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from hfq.kernels.triton import config, integer_layout
from hfq.kernels.triton.config import Key
from hfq.kernels.triton.integer_layout import choose, pack, unpack


def interpret(name: str, least: int) -> None:
    triton = pytest.importorskip("triton")
    versions = [tuple(int(part) for part in module.__version__.split(".")[:2]) for module in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 cannot loop to a runtime bound with NumPy 2.4: use numpy<2.4")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    file = str(Path(__file__).with_name(name))
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= least


def test_numerics_in_the_interpreter():
    interpret("triton_integer_interpreter.py", 35)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("k", [16, 72, 100, 576, 1152])
def test_codes_come_back(bits, k):
    codes = torch.randint(0, 2**bits, (5, k), dtype=torch.uint8)
    for group, integer_zero in itertools.product((0, 32, 64, 48, 128), (False, True)):
        layout = choose(bits, k, group, integer_zero)
        assert k <= layout.padded <= -(-k // 128) * 128 and (not layout.fold or layout.padded % 32 == 0)
        packed = pack(codes, 1 << (bits - 1), layout)
        assert packed.dtype == torch.int8 and packed.shape == (5, layout.row_bytes)
        assert torch.equal(unpack(packed, 1 << (bits - 1), layout, k), codes)


def test_halves_of_a_byte_follow_their_definition():
    codes = torch.arange(512).remainder(16).to(torch.uint8)[None]
    for signed in (True, False):
        layout = choose(4, 512, 128, not signed)
        assert (layout.signed, layout.block) == (signed, 128)
        packed = pack(codes, 8, layout)[0].int()
        for k in range(512):
            byte = int(packed[k // 128 * 64 + k % 64]) & 255
            nibble = byte >> (4 if k % 128 >= 64 else 0) & 15
            assert nibble == (int(codes[0, k]) - (8 if signed else 0)) & 15


def test_layout_choice():
    assert (choose(4, 4096, 128).block, choose(4, 4096, 128).fold) == (128, 128)
    assert (choose(4, 576, 64).padded, choose(4, 576, 64).fold) == (576, 64)
    assert choose(4, 4096, 32).fold == 32 and choose(4, 4096, 96).fold == 32
    assert choose(3, 4096, 0).bits == 4 and choose(5, 4096, 0).bits == 8
    assert choose(8, 4096, 48).fold == 0 and choose(4, 4096, 16).fold == 0  # int8 tensor cores take 32 at least
    for bits, k, group in itertools.product((4, 8), (100, 576, 4096), (32, 64, 96, 128, 256, 0)):
        layout = choose(bits, k, group)
        assert layout.fold >= integer_layout.LEAST and layout.padded % layout.fold == 0
        assert not 0 < group < k or (group % layout.fold == 0 and layout.fold * 128 * 128 < 2**22)


def _emulate(asm: str, registers: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run the PTX that the kernels inline on int64 tensors of 32-bit registers."""
    word = 0xFFFFFFFF
    for text in filter(None, (part.strip() for part in asm.strip("{} ").split(";"))):
        name, *arguments = text.replace(",", " ").split()
        if name == ".reg":
            continue
        target, *sources = arguments
        a, b, *rest = (int(s, 0) if s[0].isdigit() else registers[s] for s in sources)
        if name == "lop3.b32":
            assert rest[1] == 0xEA
            result = (a & b) | rest[0]
        else:
            result = {"and.b32": lambda a, b: a & b, "xor.b32": lambda a, b: a ^ b, "shl.b32": lambda a, b: a << b,
                      "shr.b32": lambda a, b: a >> b, "sub.u32": lambda a, b: a - b}[name](a, b)
        registers[target] = result & word
    return registers["$0"]


def test_inline_assembly_decodes_every_byte():
    jit = pytest.importorskip("hfq.kernels.triton.integer_jit")
    byte = torch.arange(256)
    words = byte | (byte.flip(0) << 8) | ((byte ^ 0x5A) << 16) | (byte.roll(77) << 24)  # neighbours must not leak
    lanes = [words >> shift & 255 for shift in (0, 8, 16, 24)]

    def signed(register):
        return [(register >> shift & 255).to(torch.int8).int() for shift in (0, 8, 16, 24)]

    for high in (False, True):
        codes = [(lane >> 4 if high else lane) & 15 for lane in lanes]
        got = signed(_emulate(jit._nibble_asm(high), {"$1": words}))
        assert all(torch.equal(g, 16 * (c - 16 * (c > 7).int()).int()) for g, c in zip(got, codes, strict=True))
        for zero in range(16):
            z = torch.tensor(8 * zero * 0x01010101)
            got = signed(_emulate(jit._nibble_less_asm(high), {"$1": words, "$2": z}))
            assert all(torch.equal(g, (8 * (c - zero)).int()) for g, c in zip(got, codes, strict=True))


def test_rules_fit_the_device_and_fill_it():
    sizes = config.BUCKETS, (48, 4096, 28672), (576, 14336), (4, 8), (0, 64, 128)
    for m, n, k, bits, group in itertools.product(*sizes):
        layout = choose(bits, k, group)
        step = layout.block if bits == 4 else layout.fold if group else 0
        found = config.heuristic(Key("wnan", bits, group, n, layout.padded, m, "int8"), layout.padded // (step or 256))
        for limit in (95 * 1024, 223 * 1024):
            fitted = config.fits_integer(found, bits, step, layout.padded, limit)
            assert config.integer_shared_bytes(fitted, bits) <= limit
            assert layout.padded % fitted.bk == 0 and fitted.bk >= 32
            assert 1 <= fitted.split <= layout.padded // fitted.bk
            assert fitted.mode == "int" and "x" in fitted.label()
    small = config.heuristic(Key("wnan", 8, 0, 4096, 4096, 16, "int8"), 16)
    assert small.split == 1 and 4096 // small.bn >= 128  # no second kernel where tiles alone fill the device
