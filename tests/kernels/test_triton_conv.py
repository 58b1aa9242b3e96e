"""Integer convolutions without a GPU: numerics in a child process, what the compiler makes of the kernel, the table."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from hfq.formats import ActivationSpec
from hfq.kernels import dispatch
from hfq.kernels.dispatch import Case
from hfq.kernels.geometry import Geometry
from hfq.kernels.triton import conv

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")

_spec = importlib.util.spec_from_file_location("_compile", Path(__file__).with_name("test_triton_compile.py"))
_compile = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_compile)

TYPES = {"x_ptr": "*i8", "w_ptr": "*i8", "wc_ptr": "*i8", "s_ptr": "*fp32", "sc_ptr": "*fp32", "ws_ptr": "*i32",
         "wsc_ptr": "*i32", "sx_ptr": "*fp32", "zx_ptr": "*i32", "b_ptr": "*fp32", "y_ptr": "*bf16"}


def test_numerics_in_the_interpreter():
    versions = [tuple(int(part) for part in module.__version__.split(".")[:2]) for module in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 cannot loop to a runtime bound with NumPy 2.4: use numpy<2.4")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    file = str(Path(__file__).with_name("triton_conv_interpreter.py"))
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 15


def compiled(positions, channels, *, dual=False, kernel=3, stride=1, capability=90):
    from hfq.kernels.triton import conv_jit as jit

    tile = conv.tile_of(positions, channels, channels, dual)
    constants = {
        "KH": kernel, "KW": kernel, "SH": stride, "SW": stride, "DH": 1, "DW": 1, "CH": int(dual), "CW": int(dual),
        "BK": tile.bk, "BN": tile.bn, "BM": tile.bm, "HAS_BIAS": True,
    }
    _compile.DIVISIBLE |= {"C"}
    return _compile.build(jit.conv_kernel, constants, types=TYPES, warps=tile.warps, stages=tile.stages,
                          capability=capability)  # fmt: skip


@pytest.mark.parametrize(("positions", "channels", "more"), [
    (50176, 64, {}), (3136, 320, {}), (784, 512, {"stride": 2}), (50176, 64, {"dual": True}),
    (3136, 512, {"kernel": 1}),
], ids=str)
def test_convolutions_use_the_int8_tensor_cores(positions, channels, more):
    result = compiled(positions, channels, **more)
    ptx = result.asm["ptx"]
    assert "wgmma.mma_async" in ptx and ".s32.s8.s8" in ptx and "mma.sync" not in ptx
    assert "st.shared.b8" not in ptx and "ld.shared.b8" not in ptx, "bytes pass one by one through shared memory"
    registers, stack = _compile.resources(result)
    assert stack == 0 and registers <= 255, (registers, stack)


def test_on_ampere():
    result = compiled(3136, 128, capability=80)
    assert "mma.sync.aligned.m16n8k32" in result.asm["ptx"] and _compile.resources(result)[1] == 0


def test_the_table_chooses_it_on_a_gpu(monkeypatch):
    from hfq.kernels.triton import wna16

    monkeypatch.setattr(wna16, "available", lambda device: "")
    monkeypatch.setattr(dispatch, "_warned", set())

    def choose(geometry, spec=ActivationSpec(8, True, "tensor"), **more):  # noqa: B008
        dispatch._choose.cache_clear()
        case = Case("qconv2d", "cuda", torch.float16, 8, 64, geometry.out_channels, geometry.columns,
                    geometry.columns, activation=spec, geometry=geometry, **more)  # fmt: skip
        return dispatch.choose(case).backend

    plain = Geometry(64, 64, (3, 3))
    assert choose(plain) == "triton" and choose(plain, spec=None) == "dequant"
    with pytest.warns(RuntimeWarning, match="one group of channels"):
        assert choose(Geometry(64, 64, (3, 3), groups=2)) == "float_sums"
    dispatch._choose.cache_clear()
