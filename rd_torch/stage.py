"""One frozen step: a stage widens an embedding by what the next backbone knows beyond it.

    p = source W + b            the prediction of the larger embedding
    z = (larger - p - m) V      what the prediction misses, along its leading directions
    output = [nested, z]        the first features ARE the nested embedding, to the bit

(Catrina, Bepler, Sledzieski and Singh, ICLR 2026, arXiv 2603.07710.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rd_torch.config import Explained
from rd_torch.esm2 import apply_outside_half


class Stage(nn.Module):
    """Widens a nested embedding of width p by `added` features from a larger one of width q.

    The maps are buffers: frozen, saved, moved, and differentiable through. They never pass through
    a half type, and the stage computes in their dtype whatever dtype comes in, because it subtracts
    nearly equal vectors.

    Args:
        W: `(source width, q)` regression of the larger embedding on the source.
        b: `(q,)` its intercept.
        m: `(q,)` mean of the residual.
        V: `(q, added)` orthonormal directions, the one of most residual variance first.
        explained: what the stage explained on the data it was fitted on, where that is known.

    Raises:
        ValueError: when the shapes do not fit together, or dtypes differ.
    """

    W: Tensor
    b: Tensor
    m: Tensor
    V: Tensor

    def __init__(
        self, W: Tensor, b: Tensor, m: Tensor, V: Tensor, explained: Explained | None = None
    ) -> None:
        super().__init__()
        shapes = [tuple(part.shape) for part in (W, b, m, V)]
        q = W.shape[-1]
        if W.ndim != 2 or shapes[1:3] != [(q,), (q,)] or V.ndim != 2 or V.shape[0] != q:
            raise ValueError(
                "expected W (source, q), b (q,), m (q,), V (q, added), got " + ", ".join(map(str, shapes))
            )
        if len({part.dtype for part in (W, b, m, V)}) > 1:
            raise ValueError(f"expected one dtype, got {W.dtype}, {b.dtype}, {m.dtype}, {V.dtype}")
        for name, part in (("W", W), ("b", b), ("m", m), ("V", V)):
            self.register_buffer(name, apply_outside_half(torch.Tensor.detach, part))
        self.explained = explained

    @property
    def added(self) -> int:
        """Number of features the stage adds."""
        return self.V.shape[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Stage:
        for name, part in self.named_buffers(recurse=False):
            setattr(self, name, apply_outside_half(fn, part))
        return self

    def forward(self, nested: Tensor, larger: Tensor, source: Tensor | None = None) -> Tensor:
        """`[nested, z]` in the maps' dtype.

        Args:
            nested: `(..., p)` the embedding to widen.
            larger: `(..., q)` the next backbone's embedding of the same tokens.
            source: `(..., source width)` what W acts on; by default `nested`.

        Returns:
            `(..., p + added)`.

        Raises:
            ValueError: when the widths are not the maps'.
        """
        source = nested if source is None else source
        if source.shape[-1] != self.W.shape[0] or larger.shape[-1] != self.W.shape[1]:
            raise ValueError(
                f"expected widths {self.W.shape[0]} and {self.W.shape[1]}, "
                f"got {source.shape[-1]} and {larger.shape[-1]}"
            )
        with torch.autocast(self.W.device.type, enabled=False):
            nested, larger, source = (part.to(self.W.dtype) for part in (nested, larger, source))
            residual = larger - torch.matmul(source, self.W) - (self.b + self.m)
            return torch.cat((nested, torch.matmul(residual, self.V)), dim=-1)

    def extra_repr(self) -> str:
        """Widths, for printing."""
        return f"source={self.W.shape[0]}, larger={self.W.shape[1]}, added={self.added}"
