"""One frozen step: a stage widens an embedding by what the next backbone knows beyond it.

    p = source W + b            the prediction of the larger embedding
    z = (larger - p - m) V      what the prediction misses, along its leading directions
    output = [nested, z]        the first features ARE the nested embedding, to the bit

(Catrina, Bepler, Sledzieski and Singh, ICLR 2026, arXiv 2603.07710.)
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from rd_torch.backbone import at_least_float32
from rd_torch.choices import Method, PredictFrom
from rd_torch.config import Explained, RDConfig
from rd_torch.maps import Basis, Maps
from rd_torch.modules import Modules


class Stage(Maps):
    """A step that widens a nested embedding of width p by `added` features from a larger one of width q.

    It subtracts nearly equal vectors, and therefore computes in the dtype of its tensors whatever comes in.

    Args:
        W: `(source width, q)` coefficients of the regression of the larger embedding on the source.
        b: `(q,)` intercept of the regression.
        m: `(q,)` mean of the residual.
        V: `(q, added)` orthonormal directions, that of the largest residual variance first; in a chain that
            is scaled, each divided by what its feature is scaled by.
        explained: what the stage explained of the data it was fitted on; None where that is not known.

    Raises:
        ValueError: for shapes that do not fit together, or tensors of different dtypes.

    Examples:
        >>> p, q, added = 2, 3, 1
        >>> W, b, m = torch.zeros(p, q), torch.zeros(q), torch.zeros(q)
        >>> stage = rd_torch.Stage(W, b, m, V=torch.eye(q, added))  # adds the first feature of the larger
        >>> stage(torch.tensor([[1.0, 2.0]]), torch.tensor([[7.0, 8.0, 9.0]]))
        tensor([[1., 2., 7.]])
    """

    method = "rd"
    W: Tensor
    b: Tensor
    m: Tensor
    V: Tensor

    def __init__(
        self, W: Tensor, b: Tensor, m: Tensor, V: Tensor, explained: Explained | None = None
    ) -> None:
        shapes = [tuple(part.shape) for part in (W, b, m, V)]
        q = W.shape[-1]
        if W.ndim != 2 or shapes[1:3] != [(q,), (q,)] or V.ndim != 2 or V.shape[0] != q:
            raise ValueError(
                "expected W (source, q), b (q,), m (q,), V (q, added), got " + ", ".join(map(str, shapes))
            )
        super().__init__(explained, W=W, b=b, m=m, V=V)

    @classmethod
    def shapes(cls, nested: int, larger: int, source: int, added: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of W, b, m and V."""
        return {"W": (source, larger), "b": (larger,), "m": (larger,), "V": (larger, added)}

    @property
    def added(self) -> int:
        """Number of features that the stage adds."""
        return self.V.shape[1]

    def width_after(self, width: int) -> int:
        """Return the width of the embedding that comes out where a nested one of this width comes in."""
        return width + self.added

    def forward(self, nested: Tensor, larger: Tensor, source: Tensor | None = None) -> Tensor:
        """Widen a nested embedding.

        Args:
            nested: `(..., p)` embedding to widen.
            larger: `(..., q)` embedding of the same tokens by the next backbone.
            source: `(..., source width)` embedding that W acts on; by default `nested`.

        Returns:
            `[nested, z]`, `(..., p + added)`, in the dtype of the stage's tensors.

        Raises:
            ValueError: for widths other than those of the stage's tensors.
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
        """Return the widths, for printing."""
        return f"source={self.W.shape[0]}, larger={self.W.shape[1]}, added={self.added}"


class ConcatPCA(Maps):
    """A step of the baseline, which takes principal components of two embeddings side by side.

    The output is `([nested, larger] - mean) components`. No part of it is the embedding of a shorter chain.
    It is called as a `Stage` is.

    Args:
        mean: `(p + q,)` mean of the two embeddings side by side.
        components: `(p + q, width)` orthonormal directions, that of the largest variance first.
        explained: `kept` is the share of the variance that the directions keep; None where it is not known.

    Raises:
        ValueError: for shapes that do not fit together, or tensors of different dtypes.

    Examples:
        >>> stage = rd_torch.ConcatPCA(mean=torch.zeros(3), components=torch.eye(3)[:, 1:])
        >>> stage(torch.tensor([[1.0]]), torch.tensor([[7.0, 8.0]]))
        tensor([[7., 8.]])
    """

    method = "naive"
    mean: Tensor
    components: Tensor

    def __init__(self, mean: Tensor, components: Tensor, explained: Explained | None = None) -> None:
        if mean.ndim != 1 or components.ndim != 2 or components.shape[0] != mean.shape[0]:
            raise ValueError(
                "expected mean (p + q,) and components (p + q, width), "
                f"got {tuple(mean.shape)}, {tuple(components.shape)}"
            )
        super().__init__(explained, mean=mean, components=components)

    @classmethod
    def shapes(cls, nested: int, larger: int, source: int, added: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the mean and the components, which do not depend on `source`."""
        return {"mean": (nested + larger,), "components": (nested + larger, nested + added)}

    def width_after(self, width: int) -> int:
        """Return the width of the embedding that comes out, which does not depend on what comes in."""
        return self.components.shape[1]

    def forward(self, nested: Tensor, larger: Tensor, source: Tensor | None = None) -> Tensor:
        """Take the principal components of two embeddings side by side.

        Args:
            nested: `(..., p)` output of the level before.
            larger: `(..., q)` embedding of the same tokens by the next backbone.
            source: ignored; it is here so that both kinds of stages are called alike.

        Returns:
            `(..., width)` in the dtype of the stage's tensors.

        Raises:
            ValueError: for widths whose sum is not that of the mean.
        """
        if nested.shape[-1] + larger.shape[-1] != self.mean.shape[0]:
            raise ValueError(
                f"expected widths that sum to {self.mean.shape[0]}, "
                f"got {nested.shape[-1]} and {larger.shape[-1]}"
            )
        with torch.autocast(self.mean.device.type, enabled=False):
            both = torch.cat([part.to(self.mean.dtype) for part in (nested, larger)], dim=-1)
            return torch.matmul(both - self.mean, self.components)

    def extra_repr(self) -> str:
        """Return the widths, for printing."""
        return f"both={self.components.shape[0]}, width={self.components.shape[1]}"


STAGES: Final[Mapping[Method, type[Stage] | type[ConcatPCA]]] = {
    kind.method: kind for kind in (Stage, ConcatPCA)
}
"""The class of a chain's stages, by the chain's method."""


def map_shapes(config: RDConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of each stage's tensors, by the level that the stage leads to, then by name.

    Those of the basis, where the chain has one, come first, by the first level.
    """
    first = config.levels[0]
    shapes = {first.name: Basis.shapes(0, first.width, 0, 0)} if config.has_basis else {}
    for (smaller, larger), added in zip(pairwise(config.levels), config.added, strict=True):
        nested = config.widths[smaller.name]
        source = nested if config.predict_from == "nested" else smaller.width
        shapes[larger.name] = STAGES[config.method].shapes(nested, larger.width, source, added)
    return shapes


def stages_of(config: RDConfig, maps: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Maps]:
    """Return the stages of a config, made from their tensors, by the level that each leads to.

    The basis, where the chain has one, comes first, by the first level.
    """
    first = config.levels[0].name
    basis: dict[str, Maps] = (
        {first: Basis(maps[first]["mean"], maps[first]["matrix"], **config.basis)} if config.has_basis else {}
    )
    return basis | {
        level.name: STAGES[config.method](**maps[level.name], explained=explained)
        for level, explained in zip(config.levels[1:], config.explained, strict=True)
    }


def nest(raw: Mapping[str, Tensor], stages: Modules[Maps], predict_from: PredictFrom) -> dict[str, Tensor]:
    """Run the stages of a chain over raw embeddings.

    Args:
        raw: `(..., width)` raw embeddings by level, smallest first.
        stages: stages by the level that each leads to; the basis by the first level, if there is one.
        predict_from: whether W acts on the nested embedding or on the previous backbone's raw one.

    Returns:
        `(..., nested width)` embeddings by level.
    """
    (name, previous), *rest = raw.items()
    nested = stages[name](previous) if name in stages else previous.to(at_least_float32(previous.dtype))
    levels = {name: nested}
    for name, larger in rest:
        source = previous if predict_from == "previous" else None
        levels[name] = nested = stages[name](nested, larger, source)
        previous = larger
    return levels
