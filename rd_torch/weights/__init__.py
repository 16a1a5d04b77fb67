"""Where checkpoints come from; one file a format."""

from rd_torch.weights.source import DEFAULT_MODEL, locate, shipped

__all__ = ["DEFAULT_MODEL", "locate", "shipped"]
