"""Integer products and producers compiled for sm_90 and sm_80 without a GPU: what the compiler made of them."""

import importlib.util
import os
from pathlib import Path

import pytest

from hfq.kernels.triton import config, integer, producers
from hfq.kernels.triton.config import Key
from hfq.kernels.triton.integer_layout import choose

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")

_spec = importlib.util.spec_from_file_location("_compile", Path(__file__).with_name("test_triton_compile.py"))
_compile = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_compile)
resources = _compile.resources
_compile.DIVISIBLE |= {"stride_q", "stride_x", "stride_u"}
build = _compile.build

GEMM = {"x_ptr": "*i8", "w_ptr": "*i8", "s_ptr": "*fp16", "sx_ptr": "*fp32", "zx_ptr": "*i32", "xs_ptr": "*i32",
        "b_ptr": "*bf16"}


def product(bits, group, m, zero, *, n=4096, k=4096, capability=90, asm=True):
    """The product with the configuration that the rule gives. ``zero``: None, "int" or "float"."""
    from hfq.kernels.triton import integer_jit as jit

    layout = choose(bits, k, group, zero == "int")
    step = integer.fixed_step(layout, group)
    chosen = config.heuristic(Key("wnan", layout.bits, group, n, k, m, "int8"), layout.padded // (step or 256))
    w_zero = 0 if zero is None else 1 if layout.signed else 2
    if group and w_zero == 1 and chosen.bm > 64:
        chosen = config.replace(chosen, bm=64)
    chosen = config.fits_integer(chosen, layout.bits, step, layout.padded, (223 if capability == 90 else 159) * 1024)
    constants = {
        "stride_sn": 1, "stride_sx": 1, "NIBBLES": layout.bits == 4, "BK": chosen.bk, "FOLD": layout.fold,
        "GROUP_SIZE": group, "BN": chosen.bn, "BM": chosen.bm, "W_ZERO": w_zero, "X_ZERO": True, "MIDDLE": 8,
        "PARTIAL": chosen.split > 1, "HAS_BIAS": False, "WIDE": False, "ASM": asm,
    }
    total = "*fp32" if group else "*i32"
    types = {**GEMM, "z_ptr": "*u8" if zero == "int" else "*fp16", "ws_ptr": total,
             "y_ptr": total if chosen.split > 1 else "*bf16"}
    compiled = build(jit.wnan_kernel, constants, types=types, warps=chosen.warps, stages=chosen.stages,
                     capability=capability)
    return compiled, chosen


CASES = [
    (8, 0, 16, None), (8, 0, 64, None), (8, 0, 128, None), (8, 0, 4096, None), (8, 128, 128, None),
    (8, 128, 4096, "int"), (4, 0, 16, None), (4, 0, 4096, None), (4, 0, 64, "int"), (4, 128, 16, None),
    (4, 128, 64, "int"), (4, 128, 512, "int"), (4, 128, 4096, None), (4, 64, 16, "int"), (4, 32, 64, None),
    (4, 128, 4096, "float"),
]


@pytest.mark.parametrize(("bits", "group", "m", "zero"), CASES, ids=str)
def test_products_use_the_int8_tensor_cores(bits, group, m, zero):
    compiled, chosen = product(bits, group, m, zero)
    ptx = compiled.asm["ptx"]
    if chosen.bn >= 64:
        assert ".s32.s8.s8" in ptx and "wgmma.mma_async" in ptx and "mma.sync" not in ptx
    else:  # a tile of 32 rows is too small for the instruction of a warp group
        assert "mma.sync.aligned.m16n8k32" in ptx and "wgmma" not in ptx
    assert "st.shared.b8" not in ptx and "ld.shared.b8" not in ptx, "bytes pass one by one through shared memory"
    assert ptx.count("cp.async.cg") + ptx.count("cp.async.ca") > 4, "the loads of the loop are not pipelined"
    loop = compiled.asm["ttgir"].split("scf.for", 1)[1].split("scf.yield", 1)[0]
    assert "local_alloc" not in loop, "the decoded weight passes through shared memory"
    assert "sitofp" not in loop or zero == "float" or bits == 8, "integers are converted in the loop"
    registers, stack = resources(compiled)
    assert stack == 0, "registers spill"
    assert registers <= 224
    assert compiled.metadata.shared <= 227 * 1024


def test_decoding_takes_three_instructions_for_two_registers():
    compiled, _ = product(4, 0, 64, None)
    assert compiled.asm["ptx"].count("0xf0f0f0f0") == 2 * compiled.asm["ptx"].count("shl.b32 t")
    compiled, _ = product(4, 128, 4096, "int")
    assert compiled.asm["ptx"].count("prmt") <= 8, "zero points are spread over a register for every code"


@pytest.mark.parametrize(("bits", "group", "m", "zero"), [(8, 0, 16, None), (4, 128, 64, "int"), (8, 0, 4096, None)])
def test_products_on_ampere(bits, group, m, zero):
    compiled, _ = product(bits, group, m, zero, capability=80)
    ptx = compiled.asm["ptx"]
    assert "mma.sync.aligned.m16n8k32" in ptx and "st.shared.b8" not in ptx and "cp.async.cg" in ptx
    assert resources(compiled)[1] == 0


def test_the_last_step_of_split_products():
    from hfq.kernels.triton import integer_jit as jit

    for grouped in (False, True):
        total = "*fp32" if grouped else "*i32"
        constants = {"SPLIT": 4, "GROUPED": grouped, "NIBBLES": True, "MIDDLE": 8, "W_ZERO": 2, "X_ZERO": True,
                     "HAS_BIAS": True, "WIDE": False, "BLOCK": 256, "stride_sn": 1, "stride_sx": 1}
        types = {**GEMM, "part_ptr": total, "ws_ptr": total, "z_ptr": "*u8"}
        assert resources(build(jit.finish_kernel, constants, types=types, warps=2))[1] == 0


ROWS = {"q_ptr": "*i8", "sx_ptr": "*fp32", "zx_ptr": "*i32", "xs_ptr": "*i32", "offset": "fp32", "eps": "fp32",
        "exponent": "fp32", "norm": "fp32", "core_ptr": "*fp16", "sign_ptr": "*i8"}
FLOATS = ("u_ptr", "g_ptr", "c_ptr", "mul_ptr", "add_ptr", "scale_ptr", "zero_ptr", "factor_ptr", "x_ptr")
PLAIN = {"FRONT": 0, "ACT": 0, "TIMES": False, "GAIN": False, "CENTRE": False, "MODULATE": 0, "STATIC": False,
         "SYMMETRIC": False, "STEPS": 255, "SHIFT": 128, "UNIT": 0, "SUMS": True, "FACTOR": False, "POWER": False}


def rows(k, **changes):
    from hfq.kernels.triton import producers_jit as jit

    columns = producers._power_of_2(producers.padded_of(k))
    types = {**ROWS, **dict.fromkeys(FLOATS, "*bf16")}
    if columns > producers.LONG:
        constants = {**PLAIN, **changes, "COLUMNS": producers.CHUNK}
        return build(jit.rows_long_kernel, constants, types=types, warps=8)
    tile, warps = producers.tile_of(columns, 4096)
    return build(jit.rows_kernel, {**PLAIN, **changes, "ROWS": tile, "COLUMNS": columns}, types=types, warps=warps)


@pytest.mark.parametrize(("k", "changes"), [
    (4096, {}), (4096, {"SYMMETRIC": True, "SHIFT": 0, "STEPS": 127}), (8192, {"FRONT": 1, "GAIN": True}), (576, {}),
    (4096, {"FRONT": 2, "GAIN": True, "CENTRE": True, "MODULATE": 2}), (28672, {"ACT": 1, "TIMES": True}),
    (8192, {"ACT": 3}), (4096, {"SYMMETRIC": True, "MODULATE": 3, "POWER": True}), (1536, {"STATIC": True}),
], ids=str)
def test_producers_move_sixteen_bytes(k, changes):
    compiled = rows(k, **changes)
    ptx = compiled.asm["ptx"]
    assert "ld.global.v4.b32" in ptx and ("st.global.v4.b32" in ptx or "st.global.v2.b32" in ptx)
    assert "st.global.b8" not in ptx and "st.shared.b8" not in ptx
    registers, stack = resources(compiled)
    assert stack == 0 and registers <= 168


@pytest.mark.parametrize(("k", "order", "codes"), [(4096, 4096, True), (4096, 64, True), (14336, 14336, True),
                                                   (576, 64, True), (11008, 11008, True), (1536, 1536, False)])
def test_hadamard(k, order, codes):
    from hfq.kernels import hadamard
    from hfq.kernels.triton import hadamard_jit as jit

    core, power = hadamard.decompose(order)
    blocks, core_pad, warps = producers.tile_of_mix(k // order, core, power)
    constants = {"BLOCKS": blocks, "POWER_OF_2": power, "LOG": power.bit_length() - 1, "CORE": core,
                 "CORE_PAD": core_pad, "ACT": 0, "TIMES": False, "SIGNS": True, "CODES": codes, "STATIC": False,
                 "SYMMETRIC": True, "STEPS": 7, "SHIFT": 0, "SUMS": True, "FACTOR": False}
    types = {**ROWS, **dict.fromkeys(FLOATS, "*bf16"), **({} if codes else {"q_ptr": "*bf16"})}
    compiled = build(jit.mix_kernel, constants, types=types, warps=warps)
    registers, stack = resources(compiled)
    assert stack == 0 and registers <= 255 and compiled.metadata.shared <= 227 * 1024
    if core > 1:
        assert "wgmma" in compiled.asm["ptx"] or "mma.sync" in compiled.asm["ptx"]
