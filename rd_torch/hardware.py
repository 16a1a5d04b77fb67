"""Answer what this machine and this PyTorch can do, so that no other file has to ask them.

Every answer is a function of a device, a dtype or a shape, so that a test can put another answer in its
place and walk the path that another machine takes. What is younger than the oldest PyTorch that is supported,
or private to PyTorch, is looked up here too; where it is missing, the caller takes a public way.
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

# The dtypes that a backbone can have.
HALF: Final = (torch.float16, torch.bfloat16)
FULL: Final = (torch.float32, torch.float64)

AMPERE: Final = (8, 0)
"""The lowest compute capability of GPUs that multiply in bfloat16 and have `varlen_attn`."""

VARLEN_SIZES: Final = range(16, 129, 8)
"""Head sizes that `varlen_attn` is used for; ESM-2's lie between 16 (8M) and 128 (15B)."""

VARLEN_TOLERANCE: Final = {torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest error that counts as rounding, for heads of unit variance: a choice, eight to ten steps of the
dtype at 1. A kernel whose sequences see each other is further off (`tests/test_hardware.py`)."""

ISA_LIMITS: Final = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables that hold oneDNN to older vector units than the CPU has."""

AttentionKernel: TypeAlias = Literal["varlen", "blocks", "buckets"]
ProductKernel: TypeAlias = Literal["oneDNN", "PyTorch"]


def is_older(version: str, oldest: tuple[int, int]) -> bool:
    """Return whether a version of PyTorch, such as `"2.7.1+cpu"`, is older than `oldest`."""
    return tuple(map(int, re.findall(r"\d+", version)[:2])) < oldest


def require_torch(version: str) -> None:
    """Raise an ImportError for a version of PyTorch that is older than the package supports."""
    if is_older(version, OLDEST_TORCH):
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(
            f"expected torch {oldest} or newer, got torch {version}: pip install --upgrade 'torch>={oldest}'"
        )


require_torch(torch.__version__)


@cache
def cpu_capability() -> str:
    """Return which vector units PyTorch's own kernels use here: `"AVX512"`, `"AVX2"`, `"DEFAULT"`, ...

    The environment variable `ATEN_CPU_CAPABILITY` can hold them to older units than the CPU has.
    """
    return torch.backends.cpu.get_cpu_capability()


def is_x86() -> bool:
    """Return whether the CPU is of the family that may have AVX2 and AVX512."""
    return platform.machine().lower() in ("x86_64", "amd64")


def lacks_avx512() -> bool:
    """Return whether an x86 CPU has no AVX512, or PyTorch or oneDNN is held to older vector units."""
    limits = [os.environ[name].upper() for name in ISA_LIMITS if name in os.environ]
    held = any(limit.startswith(("SSE", "AVX2")) or limit == "AVX" for limit in limits)
    return is_x86() and (held or cpu_capability() != "AVX512")


@cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the device is a CPU with AVX512-BF16, whose vector units multiply in bfloat16.

    PyTorch has a public function for this from 2.11 on, and a private one before.
    """
    if device.type != "cpu" or lacks_avx512():
        return False
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if get_capabilities is not None:
        return bool(get_capabilities().get("avx512_bf16", False))
    return _ask(torch.cpu, "_is_avx512_bf16_supported")


@cache
def onednn_has(dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies in the dtype on this CPU, and PyTorch lets us call it by name.

    The operator that calls it by name is private to PyTorch.
    """
    onednn = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(onednn, "_linear_pointwise"):
        return False
    if dtype in HALF:
        name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
        return not lacks_avx512() and _ask(onednn, name)
    return dtype == torch.float32


def _ask(holder: Any, name: str) -> bool:
    """Return what a private function of PyTorch answers, and false where the function does not exist."""
    function = getattr(holder, name, None)
    return function is not None and bool(function())


def product_kernel(device: torch.device, dtype: torch.dtype) -> ProductKernel:
    """Return whose matrix products a linear layer takes: on a CPU oneDNN's, where it has any."""
    return "oneDNN" if device.type == "cpu" and onednn_has(dtype) else "PyTorch"


def attention_kernel(device: torch.device, dtype: torch.dtype, head_size: int) -> AttentionKernel:
    """Return which kernel of `backbone/attention.py` is the fastest where no gradients are recorded."""
    if has_varlen(device, dtype, head_size):
        return "varlen"
    return "blocks" if dtype == torch.bfloat16 and multiplies_bfloat16(device) else "buckets"


@cache
def has_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Return whether `varlen_attn` takes heads of this size on the device, and is right there.

    It needs half precision and an NVIDIA GPU, Ampere or newer. Where it fails there, or differs from the
    formula, the answer is no, and one warning says why.
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
    """Return whether a kernel like `varlen_attn` gives the formula's numbers; warn where it does not."""
    edges = (0, 1, 8, 48, 177)
    longest = max(stop - start for start, stop in pairwise(edges))
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(3, edges[-1], 2, head_size, generator=generator).to(device, dtype)
    edge_tensor = torch.tensor(edges, dtype=torch.int32, device=device)
    try:
        got = kernel(*heads, edge_tensor, edge_tensor, longest, longest).float()
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
    """Return PyTorch's attention over packed tokens, which is public from 2.10 on; None before."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    return cast(Callable[..., Tensor], varlen.varlen_attn)


def may_replace_saved_tensors() -> bool:
    """Return whether our own hooks may replace what autograd saves: nobody else has hooks or forbids them.

    Only private functions tell. Without them nothing is replaced, and training takes more memory.
    """
    graph: Any = torch._C._autograd
    enabled = getattr(graph, "_saved_tensors_hooks_is_enabled", None)
    others = getattr(graph, "_top_saved_tensors_default_hooks", None)
    if enabled is None or others is None:
        return False
    return bool(enabled()) and others(False) is None


def is_emulated(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the device only emulates a half type, which makes it slower than another dtype.

    Without AVX512-BF16 an x86 CPU emulates bfloat16, although oneDNN has products of it for AVX512.
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
    """Warn where the device only emulates the dtype, and say which dtype is faster."""
    if is_emulated(device, dtype):
        faster = "float16" if device.type == "cuda" else "float32"
        warnings.warn(
            f"{device} computes {str(dtype).removeprefix('torch.')} in emulation: results are right, but "
            f"{faster} is faster",
            stacklevel=3,
        )


def free_bytes(device: torch.device) -> int | None:
    """Return how many bytes of memory the device has left; None where that cannot be told."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # and unused
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available if device.type == "cpu" else None


def float64_device(device: torch.device) -> torch.device:
    """Return the device itself, or the CPU where the device has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def has_engine(device: torch.device) -> bool:
    """Return whether `RDModel.prepare_inference` makes the device faster, which it does for CUDA alone."""
    return device.type == "cuda"


def has_compiler(language: Literal["C", "C++"]) -> bool:
    """Return whether a compiler is there, of C (for GPUs) or C++ (for CPUs); `CC` or `CXX` may name it."""
    names = ("cc", "gcc", "clang", "cl") if language == "C" else ("g++", "clang++", "c++")
    named = os.environ.get("CC" if language == "C" else "CXX") or names[0]
    return any(map(shutil.which, (named, *names)))


def has_exact_float32(device: torch.device) -> bool:
    """Return whether float32 products keep all their bits; on a GPU they lose some where TF32 is allowed."""
    return device.type != "cuda" or torch.get_float32_matmul_precision() == "highest"


def best_device() -> torch.device:
    """Return a CUDA GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def devices() -> list[torch.device]:
    """Return the CPU, and every GPU that PyTorch can use."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    mps = [torch.device("mps")] if torch.backends.mps.is_available() else []
    return [torch.device("cpu"), *gpus, *mps]


def device_name(device: torch.device) -> str:
    """Return the name of the device; for a CPU, with the vector units that PyTorch uses."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    if device.type == "mps":
        return "Apple's GPU"
    return f"{cpu_name()}, {cpu_capability()}"


def cpu_name() -> str:
    """Return the name of the CPU, as far as the system tells it."""
    facts = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    named = re.search(r"model name\s*: (.*)", facts)
    return named[1] if named else platform.processor() or platform.machine()


def total_bytes(device: torch.device) -> int | None:
    """Return how many bytes of memory the device has; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return psutil.virtual_memory().total if device.type == "cpu" else None
