"""`from_pretrained` in transformers' words."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Final

import torch

from rd_torch.huggingface.config import RDTransformersConfig
from rd_torch.model import RDModel
from rd_torch.weights import CONFIG, PublishedOptions, read_json

INDIFFERENT: Final = {
    "add_pooling_layer": (False, None),
    "attn_implementation": ("eager", "sdpa", None),
    "ignore_mismatched_sizes": (False, True, None),
    "low_cpu_mem_usage": (False, True, None),
    "output_loading_info": (False, None),
    "trust_remote_code": (False, True, None),
    "use_safetensors": (True, None),
}
"""Options of transformers' that change nothing here, and the values of which that is so."""

MAPS_OF_DEVICES: Final = ("auto", "balanced", "balanced_low_0", "sequential")


def is_ours_by_transformers(name: str | Path) -> bool:
    """Whether transformers has written the folder of a chain, as a trainer's checkpoint."""
    config = Path(name) / CONFIG
    return config.is_file() and read_json(config).get("model_type") == RDTransformersConfig.model_type


def chain_and_options(
    name: str | Path, level: str | None, options: dict[str, Any]
) -> tuple[RDModel, dict[str, Any]]:
    """The chain that is meant, and which of the options are the config's.

    Raises:
        FileNotFoundError: where no chain is.
        ValueError: for an option that is nobody's, or a value that cannot be.
    """
    known = RDTransformersConfig()
    ours = {*inspect.signature(RDModel.from_pretrained).parameters, *PublishedOptions.__annotations__}
    chosen: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in options.items():
        if key in INDIFFERENT:
            if value not in INDIFFERENT[key]:
                listed = ", ".join(map(repr, INDIFFERENT[key][:-1]))
                raise ValueError(f"expected {key} of {listed}, got {value!r}")
        elif key in ("dtype", "torch_dtype"):
            chosen["dtype"] = None if value in ("auto", None) else _dtype(value)
        elif key in ours - {"published", "name_or_folder", "level"}:
            chosen[key] = value
        elif hasattr(known, key):
            rest[key] = value
        else:
            raise ValueError(f"expected options of RDModel.from_pretrained or of a config, got {key!r}")
    return RDModel.from_pretrained(name, level, **chosen), rest


def _dtype(value: torch.dtype | str) -> torch.dtype:
    """The dtype, or that of a name; raises a ValueError for a name that is none's."""
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype):
        raise ValueError(f"expected a dtype, as torch.float32 or 'float32', got {value!r}")
    return found


def placed(
    model: Any,
    device_map: Any,
    max_memory: dict[Any, Any] | None = None,
    offload_folder: str | Path | None = None,
) -> Any:
    """The model on the devices of a map, as accelerate spreads it; on one device where one is named."""
    if isinstance(device_map, dict) and set(device_map) == {""} and device_map[""] != "disk":
        device_map = device_map[""]
    if device_map is None:
        return model
    if not isinstance(device_map, dict) and device_map not in MAPS_OF_DEVICES:
        return model.to(device_map)
    import accelerate  # which transformers, too, needs for a map

    if not isinstance(device_map, dict):
        if device_map != "sequential":
            max_memory = accelerate.utils.get_balanced_memory(
                model, max_memory, list(model._no_split_modules), low_zero=device_map == "balanced_low_0"
            )
        device_map = accelerate.infer_auto_device_map(model, max_memory, list(model._no_split_modules))
    model.hf_device_map = device_map
    return accelerate.dispatch_model(model, device_map, offload_dir=offload_folder)
