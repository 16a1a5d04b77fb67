"""Read checkpoints, wherever they lie and whoever wrote them, and write our own."""

from rd_torch.weights.backbone import read_backbone, read_level, require_unchanged
from rd_torch.weights.files import (
    CONVENTIONS,
    Files,
    Source,
    find_backbone,
    is_native,
    shipped_checkpoints,
)
from rd_torch.weights.folder import BACKBONES, CONFIG, require_no_backbones, write_folder
from rd_torch.weights.hub import Hub, Upload, upload
from rd_torch.weights.known import FAIR_ESM_NAMES, FAIR_ESM_SHA256, ON_HUB, PUBLISHED_MAPS
from rd_torch.weights.published import PublishedOptions
from rd_torch.weights.source import DEFAULT_MODEL, Checkpoint, at_layers, read_checkpoint
from rd_torch.weights.tensors import read_json, sha256_of

__all__ = [
    "BACKBONES",
    "CONFIG",
    "CONVENTIONS",
    "DEFAULT_MODEL",
    "FAIR_ESM_NAMES",
    "FAIR_ESM_SHA256",
    "ON_HUB",
    "PUBLISHED_MAPS",
    "Checkpoint",
    "Files",
    "Hub",
    "PublishedOptions",
    "Source",
    "Upload",
    "at_layers",
    "find_backbone",
    "is_native",
    "read_backbone",
    "read_checkpoint",
    "read_json",
    "read_level",
    "require_no_backbones",
    "require_unchanged",
    "sha256_of",
    "shipped_checkpoints",
    "upload",
    "write_folder",
]
