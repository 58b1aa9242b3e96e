"""Attention over packed keys and values in Triton without a GPU: numerics in a child process, and compiled code."""

import importlib.util
import os
from pathlib import Path

import pytest

from hfq.formats.kv import SideSpec
from hfq.kernels.triton import cache


def _sibling(name):
    spec = importlib.util.spec_from_file_location(f"_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_numerics_in_the_interpreter():
    _sibling("test_triton_integer").interpret("triton_cache_interpreter.py", 25)


def test_runs_of_tokens():
    assert [cache.steps(k, v) for k, v in ((4, 4), (2, 4), (3, 4), (8, 8), (1, 8))] == [2, 4, 8, 1, 8]


compiled = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
TYPES = {"q_ptr": "*fp32", "k_ptr": "*u8", "v_ptr": "*u8", "ks_ptr": "*fp16", "ko_ptr": "*fp16", "vs_ptr": "*fp16",
         "vo_ptr": "*fp16", "ki_ptr": "*i16", "vi_ptr": "*i16", "kv_ptr": "*fp16", "vv_ptr": "*fp16", "kt_ptr": "*fp16",
         "vt_ptr": "*fp16", "cos_ptr": "*bf16", "sin_ptr": "*bf16", "mask_ptr": "*u8", "skip_ptr": "*i32",
         "first_ptr": "*i32", "acc_ptr": "*fp32", "m_ptr": "*fp32", "l_ptr": "*fp32", "scaling": "fp32",
         "softcap": "fp32"}
PLAIN = {"K_INT": False, "V_INT": False, "MASK": 1, "SOFTCAP": False, "QP": 16, "SKIP": True}
TABLE = {"axis": "channel", "table": True}
CASES = {  # bits of both sides, head_dim, what differs in the keys, in the values, rotary embedding when read
    "4 bits": (4, 128, {}, {}, False),
    "3 bits": (3, 128, {}, {}, False),
    "8 bits": (8, 128, {}, {}, False),
    "64 wide": (4, 64, {"zero_point": "int"}, {"zero_point": "int"}, False),
    "channels": (4, 128, {"axis": "channel"}, {}, False),
    "windows": (2, 128, {"axis": "window", "group_size": 32}, {"group_size": 32}, False),
    "before rotary, 3 bits": (3, 128, TABLE, {"group_size": 0, "table": True}, True),
    "outliers": (4, 128, {**TABLE, "outliers": 0.01}, {"group_size": 0, "table": True, "outliers": 0.01}, True),
}


@compiled
@pytest.mark.parametrize("name", CASES)
def test_decode_compiles_without_spills(name):
    pytest.importorskip("triton")
    from triton import language as tl

    from hfq.kernels.triton import cache_jit as jit

    bits, width, of_keys, of_values, rotary = CASES[name]
    key, value = SideSpec(bits, **of_keys), SideSpec(bits, **of_values)
    tile = cache.tile_of(key, value, rotary)
    slots = 12 if key.outliers else 0
    constants = {
        **PLAIN, "KB": bits, "VB": bits, "K_AXIS": jit.AXES[cache.axis_of(key)[0]],
        "V_AXIS": jit.AXES[cache.axis_of(value)[0]], "K_INT": key.zero_point == "int",
        "V_INT": value.zero_point == "int",
        "K_TABLE": key.table, "V_TABLE": value.table, "K_SLOTS": slots, "V_SLOTS": slots, "ROTARY": rotary,
        "HALF": width // 2, "DVP": width, "D": width, "DV": width, "BT": tile["BT"], "DTYPE": tl.float16,
    }
    tools = _sibling("test_triton_compile")
    types = {**TYPES, **({"ks_ptr": "*fp32", "ko_ptr": "*fp32"} if key.axis == "channel" else {})}
    made = tools.build(jit.decode_kernel, constants, types=types, warps=tile["num_warps"], stages=tile["num_stages"])
    ptx = made.asm["ptx"]
    assert "mma.sync" in ptx, "no tensor cores"
    assert "st.shared.b8" not in ptx, "bytes pass one by one through shared memory"
    if not rotary:
        assert "cp.async" in ptx, "the loads of the codes are not pipelined"
    assert tools.resources(made)[1] == 0, "registers spill"


@compiled
@pytest.mark.parametrize(("bits", "axis", "tokens"), [(4, "token", 1), (3, "channel", 1), (2, "window", 32)])
def test_append_compiles(bits, axis, tokens):
    pytest.importorskip("triton")
    from hfq.kernels.triton import cache_jit as jit

    tools = _sibling("test_triton_compile")
    constants = {"BITS": bits, "AXIS": jit.AXES[axis], "TABLE": axis == "channel", "INT_ZERO": False,
                 "SMALLEST": 2.0**-14, "T": tokens, "DP": 128}
    types = {"x_ptr": "*bf16", "low_ptr": "*fp32", "edges_ptr": "*fp32", "c_ptr": "*u8", "s_ptr": "*fp16",
             "o_ptr": "*fp16"}
    made = tools.build(jit.append_kernel, constants, types=types, warps=1 if tokens == 1 else 4)
    assert tools.resources(made)[1] == 0


@compiled
def test_the_other_kernels_compile():
    pytest.importorskip("triton")
    from triton import language as tl

    from hfq.kernels.triton import cache_jit as jit

    tools = _sibling("test_triton_compile")
    constants = {"FIRST": True, "MASK": 2, "SOFTCAP": True, "SKIP": True, "DTYPE": tl.float16, "QP": 16, "HALF": 64,
                 "DVP": 128, "BT": cache.ROWS}
    floats = {**TYPES, "k_ptr": "*bf16", "v_ptr": "*bf16", "mask_ptr": "*fp32"}
    assert tools.resources(tools.build(jit.floats_kernel, constants, types=floats))[1] == 0
    combine = {"acc_ptr": "*fp32", "m_ptr": "*fp32", "l_ptr": "*fp32", "y_ptr": "*fp32"}
    assert tools.resources(tools.build(jit.combine_kernel, {"DVP": 128}, types=combine, warps=1))[1] == 0
