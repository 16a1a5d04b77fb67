"""`Maps`, what all frozen maps of a chain have alike, and `Basis`, in which the first block is given.

The first block of a nested embedding is the first backbone's to the bit, unless the chain has a basis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from rd_torch.backbone import apply_outside_half
from rd_torch.choices import Method, Scale, check_choice
from rd_torch.config import Explained


class Maps(nn.Module):
    """The base class of stages: it holds their tensors as buffers, which no conversion puts into a half type.

    Buffers are frozen, but saved, moved and differentiated through.

    Args:
        explained: what the stage explained of the data it was fitted on; None where that is not known.
        **parts: the tensors by name, all of one dtype.

    Attributes:
        method: name, in a config, of the method that such stages belong to.

    Raises:
        ValueError: for tensors of different dtypes.
    """

    method: ClassVar[Method]

    def __init__(self, explained: Explained | None, **parts: Tensor) -> None:
        super().__init__()
        if len({part.dtype for part in parts.values()}) > 1:
            dtypes = ", ".join(f"{name} {part.dtype}" for name, part in parts.items())
            raise ValueError(f"expected one dtype, got {dtypes}")
        for name, part in parts.items():
            self.register_buffer(name, apply_outside_half(torch.Tensor.detach, part).contiguous())
        self.explained = explained

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensors, and of the embedding that comes out."""
        return next(self.buffers()).dtype

    def width_after(self, width: int) -> int:
        """Return the width of the embedding that comes out where one of this width comes in."""
        raise NotImplementedError

    @classmethod
    def shapes(cls, nested: int, larger: int, source: int, added: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes that the tensors of a stage must have.

        Args:
            nested: width of the embedding that comes in.
            larger: width of the next backbone's embedding.
            source: width of the embedding that W acts on.
            added: number of features by which the embedding that comes out is wider.

        Returns:
            The shapes by name of the tensor.
        """
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Maps:
        for name, part in self.named_buffers(recurse=False):
            setattr(self, name, apply_outside_half(fn, part))
        return self


class Basis(Maps):
    """The coordinates in which a chain gives its first block.

        output = (raw - mean) matrix

    It is the first of a chain's list of stages, because the stages that follow were expressed in the same
    coordinates: `change_basis` makes both together. The first features of the nested embedding are then the
    first backbone's in new coordinates, and no longer its own to the bit. Prefixes stay prefixes.

    Args:
        mean: `(p,)` mean that is subtracted from the first backbone's embedding; zeros without `centre`.
        matrix: `(p, p)` invertible matrix: the directions, each divided by what it is scaled by.
        scale: what the features of the whole chain are divided by, as in `change_basis`.
        centre: whether the first block has mean zero.
        rotate_first: whether the features of the first block are its principal components.

    Raises:
        ValueError: for shapes that do not fit together, tensors of different dtypes, or facts by which
            nothing would change.

    Examples:
        >>> basis = rd_torch.Basis(torch.ones(2), torch.diag(torch.tensor([2.0, 4.0])), scale="feature")
        >>> basis(torch.tensor([[1.5, 2.0]]))
        tensor([[1., 4.]])
    """

    method = "rd"
    mean: Tensor
    matrix: Tensor

    def __init__(
        self,
        mean: Tensor,
        matrix: Tensor,
        *,
        scale: Scale = "none",
        centre: bool = False,
        rotate_first: bool = False,
    ) -> None:
        check_choice("scale", scale, get_args(Scale))
        if mean.ndim != 1 or matrix.shape != (*mean.shape, *mean.shape):
            raise ValueError(
                f"expected mean (p,) and matrix (p, p), got {tuple(mean.shape)}, {tuple(matrix.shape)}"
            )
        if scale == "none" and not centre and not rotate_first:
            raise ValueError(
                "expected a basis with a scale, centred or rotated, got one that changes nothing"
            )
        super().__init__(None, mean=mean, matrix=matrix)
        self.scale, self.centre, self.rotate_first = scale, centre, rotate_first

    @property
    def facts(self) -> dict[str, Any]:
        """What a config states of the basis: `scale`, `centre` and `rotate_first`."""
        return {"scale": self.scale, "centre": self.centre, "rotate_first": self.rotate_first}

    @classmethod
    def shapes(cls, nested: int, larger: int, source: int, added: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the mean and the matrix, which depend on `larger`, the first width, alone."""
        return {"mean": (larger,), "matrix": (larger, larger)}

    def width_after(self, width: int) -> int:
        """Return the width itself, which a basis does not change."""
        return width

    def forward(self, raw: Tensor) -> Tensor:
        """Express the first backbone's embedding in this basis.

        Args:
            raw: `(..., p)` embedding by the first backbone.

        Returns:
            `(..., p)` in the dtype of the basis' tensors.

        Raises:
            ValueError: for another width.
        """
        if raw.shape[-1] != self.mean.shape[0]:
            raise ValueError(f"expected width {self.mean.shape[0]}, got {raw.shape[-1]}")
        with torch.autocast(self.matrix.device.type, enabled=False):
            return torch.matmul(raw.to(self.matrix.dtype) - self.mean, self.matrix)

    def extra_repr(self) -> str:
        """Return the width and the facts, for printing."""
        return (
            f"width={self.mean.shape[0]}, scale={self.scale!r}, centre={self.centre}, "
            f"rotate_first={self.rotate_first}"
        )


def basis_in(stages: Sequence[Maps]) -> Basis | None:
    """Return the basis that stands before a chain's stages, or None where there is none."""
    return stages[0] if stages and isinstance(stages[0], Basis) else None
