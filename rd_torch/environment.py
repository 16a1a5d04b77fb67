"""Describe a machine for the report of a bug: versions, devices, memory, and which kernels run."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import torch

from rd_torch import hardware
from rd_torch.levels import ESM2_LEVELS

PACKAGES: Final = (
    *("torch", "numpy", "safetensors", "huggingface_hub", "h5py", "pyarrow"),
    *("fair-esm", "esm", "transformers", "peft", "accelerate", "lightning", "ray", "triton"),
    *("torchao", "onnx", "onnxscript", "onnxruntime"),
)
"""Packages whose versions change what rd_torch does; those that it can do without come last."""

VARIABLES: Final = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "ATEN_CPU_CAPABILITY"),
    *hardware.ISA_LIMITS,
    *("TORCH_COMPILE_DISABLE", "HF_HUB_OFFLINE"),
)
"""Environment variables that change which kernels run, or whether files can be downloaded."""

GIBI: Final = 2**30


def version_of(package: str) -> str | None:
    """Look up the version of a package.

    Args:
        package: name of the package on PyPI.

    Returns:
        The version; None where the package is not installed.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe_environment() -> dict[str, Any]:
    """Describe the machine and the installation, in plain JSON values.

    Returns:
        `"rd_torch"`, `"python"` and `"system"`: their versions. `"packages"`: the version of each package,
        None where it is not installed. `"variables"`: environment variables that are set and change
        something. `"threads"`: how many PyTorch uses on the CPU. `"compiler"`: whether there is a C compiler,
        which `prepare_inference` needs on a GPU. `"devices"`: name and memory, in GiB, of each device, and
        for each dtype the kernels of matrix products and attention, and whether the dtype is emulated.
    """
    return {
        "rd_torch": version_of("rd_torch"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {package: version_of(package) for package in PACKAGES} | {"torch": torch.__version__},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "threads": torch.get_num_threads(),
        "compiler": hardware.has_compiler("C"),
        "devices": [_describe_device(device) for device in hardware.devices()],
    }


def _describe_device(device: torch.device) -> dict[str, Any]:
    """Describe one device."""
    total, free = hardware.total_bytes(device), hardware.free_bytes(device)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return {
        "device": str(device),
        "name": hardware.device_name(device),
        "memory": total and round(total / GIBI, 1),
        "free": free and round(free / GIBI, 1),
        "dtypes": {str(dtype).removeprefix("torch."): _describe_kernels(device, dtype) for dtype in dtypes},
    }


def _describe_kernels(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Describe the kernels that run on a device in a dtype, for the head sizes of ESM-2."""
    sizes = {width // heads for _, width, heads in (level.shape for level in ESM2_LEVELS.values())}
    return {
        "products": hardware.product_kernel(device, dtype),
        "attention": sorted({hardware.attention_kernel(device, dtype, size) for size in sizes}),
        "emulated": hardware.is_emulated(device, dtype),
    }
