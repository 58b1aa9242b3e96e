"""The Triton kernels compiled for sm_90 and sm_80 without a GPU: what the compiler made of them."""

import os
import re
import subprocess
import tempfile

import pytest

from hfq.kernels.triton import config
from hfq.kernels.triton.config import Key
from hfq.kernels.triton.layout import choose

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")

TYPES = {
    "x_ptr": "*{d}", "w_ptr": "*i16", "h_ptr": "*i16", "s_ptr": "*fp16", "z_ptr": "*u8", "xs_ptr": "*fp32",
    "b_ptr": "*{d}", "y_ptr": "*{d}", "part_ptr": "*fp32",
}
DIVISIBLE = {"N", "K", "W", "stride_sg", "G"}


def build(kernel, constants, *, dtype="bf16", capability=90, warps=4, stages=3, types=None):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {**TYPES, **(types or {})}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32").format(d=dtype) for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
               if n not in constants and (n.endswith("ptr") or n in DIVISIBLE)}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled):
    """Registers and bytes of stack of a thread."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return tuple(int(v) for v in re.search(r"REG:(\d+) STACK:(\d+)", done.stdout).groups())


def product(bits, m, *, group=128, mode=None, dtype="bf16", capability=90, zero=True, asm=True, k=4096):
    from hfq.kernels.triton import jit

    layout = choose(bits, k, group)
    key = Key("wna16", layout.bits, group, 4096, k, m, "bfloat16")
    limit = (223 if capability == 90 else 159) * 1024
    chosen = config.heuristic(key, layout.blocks)
    chosen = config.fits(chosen, layout.block, layout.slice, layout.bits, layout.blocks, limit)
    constants = {
        "stride_sn": 1, "BITS": layout.bits, "SL": layout.slice, "FIELDS": layout.fields, "FOLD": layout.fold,
        "GROUP_SIZE": group, "BN": chosen.bn, "BM": chosen.bm, "MODE": config.MODES[mode or chosen.mode],
        "HAS_ZERO": zero, "MIDDLE": 8, "PARTIAL": chosen.split > 1, "EVEN_K": k == layout.padded, "HAS_BIAS": False,
        "ASM": asm,
    }
    types = {"z_ptr": "*u8" if zero else "*fp16", "y_ptr": "*fp32" if chosen.split > 1 else "*{d}"}
    compiled = build(
        jit.wna16_kernel, constants, dtype=dtype, capability=capability, warps=chosen.warps, stages=chosen.stages,
        types=types,
    )
    return compiled, limit


CASES = [(4, 1, {}), (4, 16, {"mode": "group+xsum"}), (4, 32, {}), (4, 64, {}), (4, 256, {}), (4, 1, {"dtype": "fp16"}),
         (4, 16, {"group": 0}), (4, 16, {"zero": False}), (4, 16, {"k": 4000, "group": 32}), (2, 16, {"group": 64}),
         (2, 128, {}), (8, 1, {}), (8, 128, {}), (8, 1, {"dtype": "fp16"}), (3, 16, {}), (1, 16, {}),
         (4, 16, {"asm": False})]


@pytest.mark.parametrize(("bits", "m", "changes"), CASES, ids=str)
def test_products_use_the_tensor_cores_from_registers(bits, m, changes):
    compiled, limit = product(bits, m, **changes)
    ptx = compiled.asm["ptx"]
    assert "wgmma.mma_async" in ptx and "mma.sync" not in ptx
    assert "st.shared.b8" not in ptx, "bytes pass one by one through shared memory"
    assert ptx.count("cp.async.cg") + ptx.count("cp.async.ca") > 4, "the loads of the loop are not pipelined"
    loop = compiled.asm["ttgir"].split("scf.for", 1)[1].split("scf.yield", 1)[0]
    assert "local_alloc" not in loop, "the decoded weight passes through shared memory"
    registers, stack = resources(compiled)
    assert stack == 0, "registers spill"
    assert registers <= 160
    assert compiled.metadata.shared <= limit + 4096


@pytest.mark.parametrize(("bits", "m"), [(4, 1), (4, 256), (2, 16), (8, 16)])
def test_products_on_ampere(bits, m):
    compiled, limit = product(bits, m, capability=80)
    ptx = compiled.asm["ptx"]
    assert "mma.sync" in ptx and "wgmma" not in ptx and "st.shared.b8" not in ptx and "cp.async.cg" in ptx
    assert resources(compiled)[1] <= 8  # the 2-bit one keeps a single value on the stack
    assert compiled.metadata.shared <= limit + 4096


def test_the_other_kernels():
    from hfq.kernels.triton import jit

    for bits in (2, 4, 8):
        layout = choose(bits, 4096, 128)
        constants = {"stride_sn": 1, "BITS": bits, "SL": layout.slice, "FIELDS": layout.fields, "GROUP_SIZE": 128,
                     "BN": 32, "HAS_ZERO": True, "MIDDLE": 8, "EVEN_K": True}
        compiled = build(jit.dequant_kernel, constants)
        assert resources(compiled)[1] == 0
        assert "st.global.v4.b32" in compiled.asm["ptx"], "stores are not 16 bytes wide"
    reduce = build(jit.reduce_kernel, {"SPLIT": 8, "HAS_BIAS": True, "BLOCK": 256}, warps=2)
    assert "ld.global" in reduce.asm["ptx"] and resources(reduce)[1] == 0
    sums = build(jit.xsum_kernel, {"FOLD": 128, "ROWS": 16}, types={"xs_ptr": "*fp32"})
    assert resources(sums)[1] == 0
