"""Where checkpoints come from; one file a format."""

from rd_torch.weights.source import locate, shipped

__all__ = ["locate", "shipped"]
