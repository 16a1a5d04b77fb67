"""Where checkpoints come from; one file a format."""

from rd_torch.weights.backbone import Source, require_unchanged
from rd_torch.weights.folder import write_folder
from rd_torch.weights.hub import Hub, Upload, upload
from rd_torch.weights.known import PUBLISHED_MAPS
from rd_torch.weights.published import PublishedOptions
from rd_torch.weights.source import DEFAULT_MODEL, Checkpoint, read_checkpoint, shipped

__all__ = [
    "DEFAULT_MODEL",
    "PUBLISHED_MAPS",
    "Checkpoint",
    "Hub",
    "PublishedOptions",
    "Source",
    "Upload",
    "read_checkpoint",
    "require_unchanged",
    "shipped",
    "upload",
    "write_folder",
]
