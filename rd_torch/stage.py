"""One frozen step: a stage widens an embedding by what the next backbone knows beyond it.

    p = source W + b            the prediction of the larger embedding
    z = (larger - p - m) V      what the prediction misses, along its leading directions
    output = [nested, z]        the first features ARE the nested embedding, to the bit

(Catrina, Bepler, Sledzieski and Singh, ICLR 2026, arXiv 2603.07710.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import ClassVar, Final

import torch
from torch import Tensor, nn

from rd_torch.backbone import apply_outside_half, at_least_float32
from rd_torch.choices import Method, PredictFrom
from rd_torch.config import Explained, RDConfig
from rd_torch.modules import Modules


class Maps(nn.Module):
    """Frozen tensors: buffers that are saved, moved and differentiated through, never in a half type.

    Args:
        explained: what the maps explained on the data they were fitted on, where that is known.
        **parts: the tensors, all of one dtype.

    Attributes:
        method: the method of a chain of such stages.

    Raises:
        ValueError: when dtypes differ.
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
        """The tensors' dtype, which is the output's."""
        return next(self.buffers()).dtype

    def width_after(self, width: int) -> int:
        """Width of what comes out for an embedding of the given width."""
        raise NotImplementedError

    @classmethod
    def shapes(cls, nested: int, larger: int, source: int, added: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors, by name, of a step from `nested` to `nested + added` features.

        Args:
            nested: features of the embedding that comes in.
            larger: features of the next backbone's embedding.
            source: features that W acts on.
            added: features that come out more than come in.
        """
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Maps:
        for name, part in self.named_buffers(recurse=False):
            setattr(self, name, apply_outside_half(fn, part))
        return self


class Stage(Maps):
    """Widens a nested embedding of width p by `added` features from a larger one of width q.

    It computes in the maps' dtype whatever dtype comes in, because it subtracts nearly equal vectors.

    Args:
        W: `(source width, q)` regression of the larger embedding on the source.
        b: `(q,)` its intercept.
        m: `(q,)` mean of the residual.
        V: `(q, added)` orthonormal directions, the one of most residual variance first.
        explained: what the stage explained on the data it was fitted on, where that is known.

    Raises:
        ValueError: when the shapes do not fit together, or dtypes differ.

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
        """Shapes of W, b, m and V."""
        return {"W": (source, larger), "b": (larger,), "m": (larger,), "V": (larger, added)}

    @property
    def added(self) -> int:
        """Number of features the stage adds."""
        return self.V.shape[1]

    def width_after(self, width: int) -> int:
        """Width of what comes out for a nested embedding of the given width."""
        return width + self.added

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


class ConcatPCA(Maps):
    """The baseline: principal components of two embeddings side by side.

    The output is `([nested, larger] - mean) components`, of which no part is a shorter chain's
    embedding. The call is a stage's.

    Args:
        mean: `(p + q,)` mean of the two side by side.
        components: `(p + q, width)` orthonormal directions, the one of most variance first.
        explained: its `kept` is the share of the variance that the directions keep.

    Raises:
        ValueError: when the shapes do not fit together, or dtypes differ.

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
        """Shapes of the mean and the components; the baseline has no use for `source`."""
        return {"mean": (nested + larger,), "components": (nested + larger, nested + added)}

    def width_after(self, width: int) -> int:
        """Width of what comes out, whatever comes in."""
        return self.components.shape[1]

    def forward(self, nested: Tensor, larger: Tensor, source: Tensor | None = None) -> Tensor:
        """The components in the maps' dtype.

        Args:
            nested: `(..., p)` the output of the level before.
            larger: `(..., q)` the next backbone's embedding of the same tokens.
            source: of no use here.

        Returns:
            `(..., width)`.

        Raises:
            ValueError: when the widths are not the maps'.
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
        """Widths, for printing."""
        return f"both={self.components.shape[0]}, width={self.components.shape[1]}"


STAGES: Final[Mapping[Method, type[Stage] | type[ConcatPCA]]] = {
    kind.method: kind for kind in (Stage, ConcatPCA)
}
"""The class of a chain's stages by its method."""


def map_shapes(config: RDConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of each stage's tensors, by name, by the level that the stage leads to."""
    shapes = {}
    for (smaller, larger), added in zip(pairwise(config.levels), config.added, strict=True):
        nested = config.widths[smaller.name]
        source = nested if config.predict_from == "nested" else smaller.width
        shapes[larger.name] = STAGES[config.method].shapes(nested, larger.width, source, added)
    return shapes


def stages_of(config: RDConfig, maps: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Maps]:
    """Makes the stages of a config from their tensors, by the level that each leads to."""
    return {
        level.name: STAGES[config.method](**maps[level.name], explained=explained)
        for level, explained in zip(config.levels[1:], config.explained, strict=True)
    }


def nest(raw: Mapping[str, Tensor], stages: Modules[Maps], predict_from: PredictFrom) -> dict[str, Tensor]:
    """Runs a chain's stages over raw embeddings.

    Args:
        raw: `(..., width)` by level, smallest first.
        stages: by the level that they lead to.
        predict_from: what W acts on.

    Returns:
        `(..., nested width)`: what comes out at each level.
    """
    (name, previous), *rest = raw.items()
    nested = previous.to(at_least_float32(previous.dtype))
    levels = {name: nested}
    for name, larger in rest:
        source = previous if predict_from == "previous" else None
        levels[name] = nested = stages[name](nested, larger, source)
        previous = larger
    return levels
