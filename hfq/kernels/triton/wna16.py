"""Weight-only products on NVIDIA GPUs: 1- to 8-bit codes, 16-bit activations, one Triton kernel for small and medium M.

Entry points: :func:`available`, :func:`constraint`, :func:`prepare`, :func:`canonical`, :func:`linear`,
:func:`dequantize`. Nothing here waits for the GPU or reads from it, so that every call can be captured in a CUDA graph.
Tracing and gradients come with the operators of :mod:`hfq.kernels.ops`.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from hfq.errors import KernelError
from hfq.formats import bitpack
from hfq.kernels import reference
from hfq.kernels.packed import PackedWeight, Runtime
from hfq.kernels.triton import config as configs
from hfq.kernels.triton.config import Config, Key
from hfq.kernels.triton.layout import WordLayout, choose, pack_words, unpack_words

__all__ = [
    "available", "canonical", "config_of", "constraint", "dequantize", "fused", "linear", "multiply",
    "multiply_dequantized", "prepare", "run_dequant", "run_fused",
]

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


@functools.lru_cache(maxsize=64)
def available(device: torch.device | str) -> str:
    """Why these kernels cannot run on ``device``; empty if they can."""
    device = torch.device(device)
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'hfq[triton]'"
    if device.type == "cpu":
        return "" if _INTERPRETED else "Triton kernels need a GPU"
    if device.type != "cuda" or torch.version.hip:
        return f"the Triton kernels are written for NVIDIA GPUs, not {device.type}"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


def _group(spec_group: int, in_features: int) -> int:
    return 0 if spec_group <= 0 or spec_group >= in_features else spec_group


def _layout(packed: PackedWeight | Runtime) -> WordLayout:
    return choose(packed.spec.bits, packed.in_features, _group(packed.spec.group_size, packed.in_features))


def constraint(packed: PackedWeight | Runtime) -> str:
    """Why the matrix kernel cannot serve this format (the dequantizer then does); empty if it can."""
    if _layout(packed).fold:
        return ""
    return f"group_size {packed.spec.group_size} is not a multiple of 16: use one that is, or one scale per channel"


def prepare(packed: PackedWeight, dtype: torch.dtype) -> Runtime:
    """The runtime form: slice-planar words, scales and zero points with the rows contiguous.

    ``scale`` and ``zero_point`` keep their shape ``[out_features, groups]``; only their strides change.
    """
    codes = bitpack.unpack(packed.qweight, packed.spec.bits, packed.in_features)
    layout = _layout(packed)
    planes = pack_words(codes, layout)
    tensors = dict(zip(("words", "high"), planes, strict=False))
    tensors["scale"] = packed.scale.t().contiguous().t()
    if packed.zero_point is not None:
        tensors["zero_point"] = packed.zero_point.t().contiguous().t()
    stored = sum(p.nbytes for p in planes)
    note = (
        f"{layout.bits}-bit words, rows padded to {layout.padded}: {stored} bytes for {packed.qweight.nbytes} packed; "
        "scales and zero points in an order of their own"
    )
    return Runtime("triton", tensors, packed.spec, packed.in_features, packed.out_features, dtype, note, packed.name)


def canonical(runtime: Runtime) -> torch.Tensor:
    """The canonical ``qweight`` uint8 ``[out_features, bytes]``, bit for bit what :func:`prepare` was given."""
    planes = [runtime.tensors[name] for name in ("words", "high") if name in runtime.tensors]
    return bitpack.pack(unpack_words(planes, _layout(runtime), runtime.in_features), runtime.spec.bits)


def _weight_args(runtime: Runtime) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    t = runtime.tensors
    return t["words"], t.get("high"), t["scale"], t.get("zero_point")


def linear(x: torch.Tensor, runtime: Runtime, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ W.T + bias``: ``x`` ``[..., in_features]`` (16-bit or float32) to ``[..., out_features]``, same dtype.

    Capturable in a CUDA graph; gradients and tracing come with :func:`hfq.kernels.linear`.

    Raises:
        KernelError: another dtype, another number of features, or another device than the weight's.
    """
    shape, n = x.shape, runtime.out_features
    _check(x, runtime)
    rows = x.reshape(-1, shape[-1])
    if not rows.shape[0]:
        return x.new_empty(*shape[:-1], n)
    backend = config_of(runtime, rows.shape[0], x.dtype).backend
    y = multiply(rows, runtime, bias) if backend == "fused" else multiply_dequantized(rows, runtime, bias)
    return y.reshape(*shape[:-1], n)


def _check(x: torch.Tensor, runtime: Runtime) -> None:
    where = f" of {runtime.name}" if runtime.name else ""
    if x.dtype not in _DTYPES:
        raise KernelError(f"activations are {x.dtype}: float16, bfloat16 or float32 is needed")
    if x.shape[-1] != runtime.in_features:
        raise KernelError(f"x has {x.shape[-1]} features, the weight{where} has {runtime.in_features}")
    if x.device != runtime.tensors["words"].device:
        raise KernelError(f"x is on {x.device}, the weight{where} on {runtime.tensors['words'].device}: move one")


def multiply(x: torch.Tensor, runtime: Runtime, bias: torch.Tensor | None) -> torch.Tensor:
    """The matrix kernel: ``x`` ``[M, in_features]``, 16-bit, to ``[M, out_features]``."""
    layout, group = _layout(runtime), _group(runtime.spec.group_size, runtime.in_features)
    config = config_of(runtime, x.shape[0], x.dtype)
    with torch.cuda.device_of(x):
        return run_fused(x.contiguous(), *_weight_args(runtime), bias, layout, group, runtime.spec.middle, config)


def multiply_dequantized(x: torch.Tensor, runtime: Runtime, bias: torch.Tensor | None) -> torch.Tensor:
    """The weight into a scratch buffer, then ``F.linear``: ``x`` ``[M, in_features]`` to ``[M, out_features]``."""
    return torch.nn.functional.linear(x, dequantize(runtime, x.dtype), None if bias is None else bias.to(x.dtype))


def dequantize(runtime: Runtime, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``[out_features, in_features]``, computed in float32 and rounded once."""
    layout, group = _layout(runtime), _group(runtime.spec.group_size, runtime.in_features)
    args = _weight_args(runtime)
    if dtype == torch.float64:  # codes and scales are exact in float64, the kernel's float32 product is not
        return reference.dequantize(runtime.packed(), dtype)
    with torch.cuda.device_of(args[0]):
        return run_dequant(*args, layout, group, runtime.spec.middle, runtime.in_features, dtype)


def config_of(runtime: Runtime, m: int, dtype: torch.dtype) -> Config:
    """The configuration that ``m`` tokens of ``dtype`` run with: the first measured or the rule's."""
    group = _group(runtime.spec.group_size, runtime.in_features)
    shape = (configs.bucket(m), runtime.out_features, runtime.in_features)
    return _config(runtime.tensors["words"].device, shape, _layout(runtime), group, dtype)


def fused(bits: int, group: int, m: int, n: int, k: int, dtype: torch.dtype) -> bool:
    """Whether ``m`` tokens go through the matrix kernel on the current GPU (else: dequantize, then ``F.linear``)."""
    group = _group(group, k)
    device = torch.device("cuda", torch.cuda.current_device())
    return _config(device, (configs.bucket(m), n, k), choose(bits, k, group), group, dtype).backend == "fused"


@functools.lru_cache(maxsize=64)
def _device(device: torch.device) -> tuple[str, int, int]:
    """Name, number of multiprocessors, usable shared memory of a block."""
    if device.type != "cuda":
        return "interpreter", 4, 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    limit = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    return properties.name, properties.multi_processor_count, limit - 4096  # what the scales and reductions take


@functools.lru_cache(maxsize=8192)
def _config(
    device: torch.device, shape: tuple[int, int, int], layout: WordLayout, group: int, dtype: torch.dtype
) -> Config:
    m, n, k = shape  # m: a bucket
    if dtype == torch.float32 or not layout.fold:
        return Config(backend="dequant")
    name, processors, limit = _device(device)
    key = Key("wna16", layout.bits, group, n, k, m, _DTYPES[dtype])
    found = configs.pick_config("wna16", key, name, layout.blocks, processors)
    return configs.fits(found, layout.block, layout.slice, layout.bits, layout.blocks, limit)


def _strides(parameter: torch.Tensor, rows: int) -> tuple[int, int]:
    expanded = parameter.expand(rows, -1)
    return expanded.stride(0), expanded.stride(1)


def _same_strides(scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor | None:
    """The zero points with the strides of the scales: the kernels use one pair of strides for both."""
    if zero is None or zero.stride() == scale.stride():
        return zero
    return torch.empty_strided(scale.shape, scale.stride(), dtype=zero.dtype, device=zero.device).copy_(zero)


def run_fused(
    x: torch.Tensor, words: torch.Tensor, high: torch.Tensor | None, scale: torch.Tensor, zero: torch.Tensor | None,
    bias: torch.Tensor | None, layout: WordLayout, group: int, middle: int, config: Config, asm: bool | None = None,
) -> torch.Tensor:
    """One product with the configuration given: ``x`` ``[M, K]``, contiguous, float16 or bfloat16; ``[M, N]``."""
    from hfq.kernels.triton import jit

    (m, k), n = x.shape, words.shape[0]
    float_zero = zero is not None and zero.is_floating_point()
    mode = configs.MODES["group+xsum" if float_zero and config.mode == "group" else config.mode]
    zero = _same_strides(scale, zero)
    stride_sn, stride_sg = _strides(scale, n)
    sums, units = x, layout.padded // layout.fold
    if mode == configs.MODES["group+xsum"]:
        sums = torch.empty(m, units, dtype=torch.float32, device=x.device)
        per_program = max(1, 2048 // layout.fold)
        grid = (m, -(-units // per_program))
        jit.xsum_kernel[grid](x, sums, k, units, FOLD=layout.fold, ROWS=per_program, num_warps=4)
    per_split = -(-layout.blocks // config.split)
    split = -(-layout.blocks // per_split)  # no empty split
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    target = y if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=x.device)
    grid = (-(-n // config.bn) * -(-m // config.bm), split)
    jit.wna16_kernel[grid](
        x, words, words if high is None else high, scale, scale if zero is None else zero, sums,
        x if bias is None else bias, target,
        m, n, k, words.shape[1], scale.shape[1], stride_sn, stride_sg, layout.blocks, per_split, units,
        BITS=layout.bits, SL=layout.slice, FIELDS=layout.fields, FOLD=layout.fold, GROUP_SIZE=group,
        BN=config.bn, BM=config.bm, MODE=mode, HAS_ZERO=zero is not None, MIDDLE=middle, PARTIAL=split > 1,
        EVEN_K=k == layout.padded, HAS_BIAS=bias is not None, ASM=(not _INTERPRETED) if asm is None else asm,
        num_warps=config.warps, num_stages=config.stages,
    )
    if split > 1:
        block = 256 if m * n < 2**17 else 1024
        jit.reduce_kernel[(-(-m * n // block),)](
            target, x if bias is None else bias, y, n, m * n, SPLIT=split, HAS_BIAS=bias is not None, BLOCK=block,
            num_warps=block // 128,
        )
    return y


def run_dequant(
    words: torch.Tensor, high: torch.Tensor | None, scale: torch.Tensor, zero: torch.Tensor | None,
    layout: WordLayout, group: int, middle: int, in_features: int, dtype: torch.dtype,
) -> torch.Tensor:
    """The matrix ``[N, in_features]`` in ``dtype``."""
    from hfq.kernels.triton import jit

    n = words.shape[0]
    out = torch.empty(n, in_features, dtype=dtype, device=words.device)
    zero = _same_strides(scale, zero)
    stride_sn, stride_sg = _strides(scale, n)
    block_n = 32
    jit.dequant_kernel[(-(-n // block_n), layout.blocks)](
        words, words if high is None else high, scale, scale if zero is None else zero, out,
        n, in_features, words.shape[1], scale.shape[1], stride_sn, stride_sg,
        BITS=layout.bits, SL=layout.slice, FIELDS=layout.fields, GROUP_SIZE=group, BN=block_n,
        HAS_ZERO=zero is not None, MIDDLE=middle, EVEN_K=in_features == layout.padded, num_warps=4,
    )
    return out
