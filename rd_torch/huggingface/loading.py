"""Load a chain by the options that transformers' `from_pretrained` takes, and place it on devices."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Final

import torch

from rd_torch.huggingface.config import RDTransformersConfig
from rd_torch.model import RDModel
from rd_torch.weights import CONFIG, PublishedOptions, read_json

IGNORED_OPTIONS: Final = {
    "add_pooling_layer": (False, None),
    "attn_implementation": ("eager", "sdpa", None),
    "ignore_mismatched_sizes": (False, True, None),
    "low_cpu_mem_usage": (False, True, None),
    "output_loading_info": (False, None),
    "trust_remote_code": (False, True, None),
    "use_safetensors": (True, None),
}
"""Options of transformers' that change nothing here, with the values for which that is so."""

MAPS_OF_DEVICES: Final = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of `device_map` for which accelerate decides which part of a model goes where."""


def was_saved_by_transformers(name: str | Path) -> bool:
    """Tell whether transformers has written a chain's folder, as its Trainer writes checkpoints."""
    config = Path(name) / CONFIG
    return config.is_file() and read_json(config).get("model_type") == RDTransformersConfig.model_type


def load_chain(
    name: str | Path, level: str | None, options: dict[str, Any]
) -> tuple[RDModel, dict[str, Any]]:
    """Load a chain by options of which some are for the chain and some for the config.

    Args:
        name: the chain, as for `RDModel.from_pretrained`.
        level: the level to end at.
        options: options of both kinds, and options of transformers' that change nothing here.

    Returns:
        The chain, and the options that are for the config.

    Raises:
        FileNotFoundError: where there is no chain.
        ValueError: for an option that nothing here takes, or a value that is not possible.
    """
    known = RDTransformersConfig()
    ours = {*inspect.signature(RDModel.from_pretrained).parameters, *PublishedOptions.__annotations__}
    chosen: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in options.items():
        if key in IGNORED_OPTIONS:
            if value not in IGNORED_OPTIONS[key]:
                listed = " or ".join(map(repr, IGNORED_OPTIONS[key][:-1]))
                raise ValueError(f"expected {key} to be {listed}, got {value!r}")
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
    """Return a dtype, or the dtype of a name; raise a ValueError for a name that no dtype has."""
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype):
        raise ValueError(f"expected a dtype, as torch.float32 or 'float32', got {value!r}")
    return found


def place_on_devices(
    model: Any,
    device_map: Any,
    max_memory: dict[Any, Any] | None = None,
    offload_folder: str | Path | None = None,
) -> Any:
    """Move a model to the device that is named, or have accelerate spread it over several.

    Args:
        model: the model.
        device_map: a device; a dictionary of devices by module; or the name of a way to make one.
        max_memory: the memory that accelerate may use, by device.
        offload_folder: folder for the parts that accelerate puts on the disk.

    Returns:
        The model.
    """
    if isinstance(device_map, dict) and set(device_map) == {""} and device_map[""] != "disk":
        device_map = device_map[""]
    if device_map is None:
        return model
    if not isinstance(device_map, dict) and device_map not in MAPS_OF_DEVICES:
        return model.to(device_map)
    import accelerate  # here, because nothing else needs it; transformers needs it for a map, too

    if not isinstance(device_map, dict):
        if device_map != "sequential":
            max_memory = accelerate.utils.get_balanced_memory(
                model, max_memory, list(model._no_split_modules), low_zero=device_map == "balanced_low_0"
            )
        device_map = accelerate.infer_auto_device_map(model, max_memory, list(model._no_split_modules))
    model.hf_device_map = device_map
    return accelerate.dispatch_model(model, device_map, offload_dir=offload_folder)
