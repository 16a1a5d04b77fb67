"""What this machine and this PyTorch can do: asked here, and nowhere else.

Every answer is a function of a device, a dtype or a shape, so that a test can put another answer in its
place and walk the path that another machine takes. What is younger than the oldest PyTorch that the package
supports, or private to PyTorch, is looked up here too; where it is missing, the answer says so, and whoever
asked takes the public way.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, cast

import psutil
import torch
from torch import Tensor
from torch.nn import functional

OLDEST_TORCH: Final = (2, 6)
"""The oldest PyTorch that the tests are run on."""

HALF: Final = (torch.float16, torch.bfloat16)
FULL: Final = (torch.float32, torch.float64)

AMPERE: Final = (8, 0)
"""Compute capability from which GPUs multiply in bfloat16 and have `varlen_attn`."""

VARLEN_SIZES: Final = range(16, 129, 8)
"""Head sizes that `varlen_attn` is used for."""

VARLEN_TOLERANCE: Final = {torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest error of its output for heads of unit variance that rounding explains."""

ISA_LIMITS: Final = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables that hold oneDNN to older vector units than the CPU has."""

AttentionKernel: TypeAlias = Literal["varlen", "blocks", "buckets"]
ProductKernel: TypeAlias = Literal["oneDNN", "PyTorch"]


def is_older(version: str, oldest: tuple[int, int]) -> bool:
    """Whether a version of PyTorch, such as `"2.7.1+cpu"`, is older than that."""
    return tuple(map(int, re.findall(r"\d+", version)[:2])) < oldest


def require_torch(version: str) -> None:
    """Raises an ImportError for a PyTorch that is older than the package supports."""
    if is_older(version, OLDEST_TORCH):
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(
            f"expected torch {oldest} or newer, got torch {version}: pip install --upgrade 'torch>={oldest}'"
        )


require_torch(torch.__version__)


@cache
def cpu_capability() -> str:
    """The vector units that PyTorch's own kernels use here: `"AVX512"`, `"AVX2"`, `"DEFAULT"`, ...

    `ATEN_CPU_CAPABILITY` holds them to older ones than the CPU has.
    """
    return torch.backends.cpu.get_cpu_capability()


def is_x86() -> bool:
    """Whether the CPU is of the family that may have AVX2 and AVX512."""
    return platform.machine().lower() in ("x86_64", "amd64")


def lacks_avx512() -> bool:
    """Whether this is an x86 CPU without AVX512, or PyTorch or oneDNN is held to older vector units."""
    limits = [os.environ[name].upper() for name in ISA_LIMITS if name in os.environ]
    held = any(limit.startswith(("SSE", "AVX2")) or limit == "AVX" for limit in limits)
    return is_x86() and (held or cpu_capability() != "AVX512")


@cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether this is a CPU with AVX512-BF16, whose vector units multiply in bfloat16.

    PyTorch has a public function for it from 2.11 on, and a private one before.
    """
    if device.type != "cpu" or lacks_avx512():
        return False
    told = getattr(torch.cpu, "get_capabilities", None)
    if told is not None:
        return bool(told().get("avx512_bf16", False))
    return _answer(torch.cpu, "_is_avx512_bf16_supported")


@cache
def onednn_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of the dtype on this CPU, and PyTorch lets us ask it for them.

    The operator that asks for them by name is private to PyTorch.
    """
    onednn = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(onednn, "_linear_pointwise"):
        return False
    if dtype in HALF:
        name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
        return not lacks_avx512() and _answer(onednn, name)
    return dtype == torch.float32


def _answer(holder: Any, name: str) -> bool:
    """What a private question of PyTorch's answers; no, where it does not exist."""
    ask = getattr(holder, name, None)
    return ask is not None and bool(ask())


def product_kernel(device: torch.device, dtype: torch.dtype) -> ProductKernel:
    """Whose matrix products a linear layer takes: on a CPU oneDNN's where it has them."""
    return "oneDNN" if device.type == "cpu" and onednn_has(dtype) else "PyTorch"


def attention_kernel(device: torch.device, dtype: torch.dtype, head_size: int) -> AttentionKernel:
    """The fastest kernel for attention without gradients over packed tokens; `attention.py` has all three."""
    if has_varlen(device, dtype, head_size):
        return "varlen"
    return "blocks" if dtype == torch.bfloat16 and multiplies_bfloat16(device) else "buckets"


@cache
def has_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether `varlen_attn` takes such heads on the device, and is right there.

    It is for half precision on an Ampere GPU of NVIDIA's or a newer one. Where it fails there, or differs
    from the formula, it is not used, and one warning says so.
    """
    kernel = varlen_attn() if device.type == "cuda" and torch.version.hip is None else None
    if kernel is None or torch.cuda.get_device_capability(device) < AMPERE:
        return False
    fits = dtype in HALF and head_size in VARLEN_SIZES
    return fits and attends_rightly(kernel, device, dtype, head_size)


@torch.no_grad()
def attends_rightly(
    kernel: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, head_size: int
) -> bool:
    """Whether a kernel like `varlen_attn` gives the formula's numbers; warns where it does not."""
    edges = (0, 1, 8, 48, 177)
    longest = max(stop - start for start, stop in pairwise(edges))
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(3, edges[-1], 2, head_size, generator=generator).to(device, dtype)
    bounds = torch.tensor(edges, dtype=torch.int32, device=device)
    try:
        got = kernel(*heads, bounds, bounds, longest, longest).float()
    except RuntimeError as error:
        _warn_of_attention(device, dtype, str(error).strip().split("\n", maxsplit=1)[0])
        return False
    exact = heads.float().transpose(1, 2)  # (3, heads, tokens, size)
    expected = torch.cat(
        [
            functional.scaled_dot_product_attention(*exact[:, :, start:stop]).transpose(0, 1)
            for start, stop in pairwise(edges)
        ]
    )
    difference = float((got - expected).abs().max())
    if not difference <= VARLEN_TOLERANCE[dtype]:
        _warn_of_attention(device, dtype, f"it is off by {difference:.2g}")
        return False
    return True


def _warn_of_attention(device: torch.device, dtype: torch.dtype, reason: str) -> None:
    warnings.warn(
        f"varlen_attn is not used on {device} in {str(dtype).removeprefix('torch.')}: {reason}; "
        "scaled dot-product attention runs in its place",
        stacklevel=4,
    )


@cache
def varlen_attn() -> Callable[..., Tensor] | None:
    """PyTorch's attention over packed tokens, public from 2.10 on; None before."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    return cast(Callable[..., Tensor], varlen.varlen_attn)


def may_replace_saved_tensors() -> bool:
    """Whether what autograd keeps may be replaced by our own hooks: nobody else has any, nor forbids them.

    Only private functions tell. Without them nothing is replaced, and training takes more memory.
    """
    graph: Any = torch._C._autograd
    enabled = getattr(graph, "_saved_tensors_hooks_is_enabled", None)
    others = getattr(graph, "_top_saved_tensors_default_hooks", None)
    if enabled is None or others is None:
        return False
    return bool(enabled()) and others(False) is None


def is_emulated(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device has a half type only in emulation, slower than another dtype.

    x86 CPUs with AVX512 but without AVX512-BF16 are among them: oneDNN converts to float32 there.
    """
    if dtype not in HALF:
        return False
    if device.type == "cuda":
        return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < AMPERE
    if device.type != "cpu":
        return False
    native = multiplies_bfloat16(device) if is_x86() and dtype == torch.bfloat16 else onednn_has(dtype)
    return not native


def warn_if_emulated(device: torch.device, dtype: torch.dtype) -> None:
    """Warns where the device has the dtype only in emulation, and says which is faster."""
    if is_emulated(device, dtype):
        faster = "float16" if device.type == "cuda" else "float32"
        warnings.warn(
            f"{device} computes {str(dtype).removeprefix('torch.')} in emulation: results are right, but "
            f"{faster} is faster",
            stacklevel=3,
        )


def free_bytes(device: torch.device) -> int | None:
    """Memory that the device could still give; None where it cannot be told."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return psutil.virtual_memory().available if device.type == "cpu" else None


def float64_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU where it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def has_engine(device: torch.device) -> bool:
    """Whether `RDModel.prepare_inference` makes anything faster there: fused parts and graphs are CUDA's."""
    return device.type == "cuda"


def has_compiler(language: Literal["C", "C++"]) -> bool:
    """Whether there is a compiler, which `CC` or `CXX` may name: of C for GPUs' code, of C++ for a CPU's."""
    names = ("cc", "gcc", "clang", "cl") if language == "C" else ("g++", "clang++", "c++")
    named = os.environ.get("CC" if language == "C" else "CXX") or names[0]
    return any(map(shutil.which, (named, *names)))


def has_exact_float32(device: torch.device) -> bool:
    """Whether float32 products keep all of their bits: on a GPU, unless somebody allowed TF32."""
    return device.type != "cuda" or torch.get_float32_matmul_precision() == "highest"


def best_device() -> torch.device:
    """A GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def devices() -> list[torch.device]:
    """The CPU, and every GPU that PyTorch can use."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    mps = [torch.device("mps")] if torch.backends.mps.is_available() else []
    return [torch.device("cpu"), *gpus, *mps]


def device_name(device: torch.device) -> str:
    """What the device calls itself; a CPU with the vector units that PyTorch uses."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    if device.type == "mps":
        return "Apple's GPU"
    return f"{cpu_name()}, {cpu_capability()}"


def cpu_name() -> str:
    """What the CPU calls itself, as far as the system tells."""
    facts = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    named = re.search(r"model name\s*: (.*)", facts)
    return named[1] if named else platform.processor() or platform.machine()


def total_bytes(device: torch.device) -> int | None:
    """Memory that the device has; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return psutil.virtual_memory().total if device.type == "cpu" else None
