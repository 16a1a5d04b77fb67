"""`Reconstructor`: from a nested embedding of any width back to a level's raw embedding.

With mean mu and Cholesky factor L of the covariance of the nested features n, the whitened features
`w = L^-1 (n - mu)` are uncorrelated, and the first k of them depend on the first k features alone. With
`B = L^-1 cov(n, y)` the best linear estimate of y from the first k features, and its R^2, are therefore

    estimate = mean + w[:k] B[:k]
    R^2 = sum of the squares of B[:k] / tr cov(y)

for every k at once, those inside a level's block included.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property, partial
from typing import Final, NamedTuple

import torch
from torch import Tensor

from rd_torch import hardware
from rd_torch.backbone import at_least_float32
from rd_torch.basis import blocks_of
from rd_torch.choices import PredictFrom
from rd_torch.config import RDConfig
from rd_torch.joint import join_levels
from rd_torch.maps import Basis, Maps
from rd_torch.modules import Modules
from rd_torch.moments import RunningMoments
from rd_torch.stage import Stage

JITTER: Final = 1e-10
"""Share of each feature's variance that is added to it, so that the factor exists where features depend on
each other. About 1e-14 of a feature's variance is rounding in float32, which is thus not blown up."""


class Reconstruction(NamedTuple):
    """A raw embedding that was estimated from a nested one.

    Attributes:
        embedding: `(..., width of the backbone)` best linear estimate.
        r2: share of the raw embedding's variance that the estimate explains on the data that the chain was
            fitted on, from 0 to 1; None where the checkpoint does not hold what it follows from.

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
        >>> found = model.reconstruct(torch.zeros(1, 32), "90K")  # what 90K says, from the features of 28K
        >>> found.embedding.shape, f"{found.r2:.2f}"
        (torch.Size([1, 48]), '0.90')
    """

    embedding: Tensor
    r2: float | None


class Reconstructor:
    """What the best estimates of a chain's raw embeddings follow from; it is read when it is first asked for.

    It is no module: nothing moves, converts or broadcasts its tensors, which no forward pass needs.

    Args:
        read: function that returns the tensors by name, as `reconstruction_shapes` lists them, or None where
            the checkpoint has none.
    """

    def __init__(self, read: Callable[[], Mapping[str, Tensor] | None]) -> None:
        self._read = read

    def __deepcopy__(self, _: object) -> Reconstructor:
        """Return this same object, which nothing changes."""
        return self

    @property
    def is_known(self) -> bool:
        """Whether there are tensors; a checkpoint on the Hub is asked for them at the first call."""
        return self._found is not None

    @cached_property
    def _found(self) -> Mapping[str, Tensor] | None:
        return self._read()

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by name."""
        assert self._found is not None, "whoever asks has seen that they are known"
        return self._found

    @property
    def spread(self) -> tuple[Tensor, Tensor]:
        """The `(n,)` means and standard deviations of the nested features, in float64."""
        return self.tensors["mean"].double(), self.tensors["factor"].double().square().sum(1).sqrt()

    def tensors_of(self, config: RDConfig) -> dict[str, Tensor] | None:
        """Return the tensors of the chain of a config, which is this one or begins it, to save them."""
        if not self.is_known:
            return None
        width = list(config.widths.values())[-1]
        tensors = {"mean": self.tensors["mean"][:width], "factor": self.tensors["factor"][:width, :width]}
        for level in config.widths:
            mean, coefficients, variance = self._level(level)
            tensors |= {f"{level}.mean": mean, f"{level}.coefficients": coefficients[:width]}
            tensors[f"{level}.variance"] = variance
        return tensors

    def estimate(self, nested: Tensor, level: str) -> Reconstruction:
        """Estimate a level's raw embedding.

        Args:
            nested: `(..., k)` first features of the nested embedding.
            level: the level.

        Returns:
            The estimate, computed in float64, in float32 or the dtype of `nested`, and its expected R^2.
        """
        k = nested.shape[-1]
        place = hardware.float64_device(nested.device)
        parts = (*self._level(level), self.tensors["factor"][:k, :k], self.tensors["mean"][:k])
        mean, coefficients, variance, factor, centre = (part.to(place, torch.float64) for part in parts)
        B = coefficients[:k]
        rows = (nested.to(place, torch.float64) - centre).reshape(-1, k)
        whitened = torch.linalg.solve_triangular(factor, rows.T, upper=False).T
        estimate = (mean + whitened @ B).reshape(*nested.shape[:-1], len(mean))
        total = float(variance)
        r2 = min(1.0, float(B.square().sum()) / total) if total > 0 else 1.0
        return Reconstruction(estimate.to(nested.device, at_least_float32(nested.dtype)), r2)

    def _level(self, level: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean, the coefficients and the variance of a level."""
        mean, coefficients, variance = (
            self.tensors[f"{level}.{name}"] for name in ("mean", "coefficients", "variance")
        )
        return mean, coefficients, variance


def tensors_to_save(reconstructor: Reconstructor | None, config: RDConfig) -> dict[str, Tensor] | None:
    """Return the tensors to write beside the maps of a config; None where they are not known."""
    return None if reconstructor is None else reconstructor.tensors_of(config)


def reconstruction_shapes(config: RDConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a reconstructor's tensors, by name.

    They are mu and L above, and for each level its mean, B above, and the trace of its covariance.
    """
    n = list(config.widths.values())[-1]
    shapes: dict[str, tuple[int, ...]] = {"mean": (n,), "factor": (n, n)}
    for level in config.levels:
        shapes |= {f"{level.name}.mean": (level.width,), f"{level.name}.coefficients": (n, level.width)}
        shapes[f"{level.name}.variance"] = ()
    return shapes


def solve_reconstruction(
    stages: Sequence[Maps],
    moments: RunningMoments,
    widths: Mapping[str, int],
    *,
    levels: Sequence[Hashable] | None = None,
    predict_from: PredictFrom = "nested",
) -> Reconstructor:
    """Solve for the best estimates of a chain's raw embeddings, from the moments that its stages are of.

    Args:
        stages: stages of reverse distillation, behind a basis or not.
        moments: joint moments of the raw embeddings.
        widths: width of each raw embedding by level name.
        levels: names of the levels of the sub-chain, in order; by default all.
        predict_from: what the stages predict from.

    Returns:
        The reconstructor, whose tensors are float32.
    """
    joint = join_levels(moments, widths, levels)
    blocks = blocks_of(stages, joint, predict_from)
    nested = torch.cat([block.map for block in blocks], dim=1)
    mean = torch.cat(list(joint.means)) @ nested + torch.cat([block.offset for block in blocks])
    cross = nested.T @ joint.covariance
    covariance = cross @ nested
    variances = covariance.diagonal().clamp(min=0)
    varies = torch.cat(
        [
            block.varies(part)
            for block, part in zip(
                blocks, variances.split([len(block.offset) for block in blocks]), strict=True
            )
        ]
    )
    inverse = torch.where(varies, variances, 1).rsqrt() * varies
    correlation = inverse[:, None] * covariance * inverse
    correlation.diagonal()[:] = 1 + JITTER
    factor = torch.linalg.cholesky(correlation)
    B = torch.linalg.solve_triangular(factor, inverse[:, None] * cross, upper=False)
    scales = torch.where(varies, variances.sqrt(), 1)
    tensors = {"mean": mean, "factor": scales[:, None] * factor}
    names = list(widths) if levels is None else levels
    for name, each, part, variance in zip(
        names, joint.means, B.split(joint.sizes, 1), joint.variances, strict=True
    ):
        tensors |= {f"{name}.mean": each, f"{name}.coefficients": part, f"{name}.variance": variance.sum()}
    return Reconstructor(partial(dict, {name: part.float().cpu() for name, part in tensors.items()}))


def reconstruct_by_maps(
    nested: Tensor, level: str, config: RDConfig, stages: Modules[Maps]
) -> Reconstruction:
    """Estimate a level's raw embedding by the chain's own maps, where no moments are known.

    Added features that the embedding lacks stand at their mean, zero, because the stages made them
    uncorrelated with those before; features of later levels say nothing that the maps know of, and are left
    out.

    Args:
        nested: `(..., k)` first features of the nested embedding.
        level: the level.
        config: the chain's config.
        stages: the chain's stages.

    Returns:
        The estimate, without an expected R^2.

    Raises:
        ValueError: where the maps alone do not give the estimate.
    """
    first, *_ = config.levels
    if config.method != "rd" or config.predict_from != "nested":
        which = "of the baseline" if config.method != "rd" else "that predict from previous raw embeddings"
        raise ValueError(
            f"expected a chain that holds what a reconstruction follows from, got maps {which} alone, from "
            "which it does not follow: fit the chain with rd_torch"
        )
    if nested.shape[-1] < first.width:
        raise ValueError(
            f"expected at least the {first.width} features of level {first.name}, because this chain holds "
            f"maps alone, got {nested.shape[-1]}: a chain that rd_torch fits reconstructs from any number"
        )
    end = config.widths[level]
    kind = next(iter(stages.values())).dtype if len(stages) else nested.dtype
    known = nested[..., :end].to(kind)
    whole = torch.nn.functional.pad(known, (0, end - known.shape[-1]))
    stage = dict(stages.items()).get(level)
    if isinstance(stage, Stage):
        x, z = whole.split([end - stage.added, stage.added], dim=-1)
        back = stage.V / stage.V.square().sum(0)  # V is orthonormal but for the features' scales
        return Reconstruction(x @ stage.W + (stage.b + stage.m) + z @ back.T, None)
    if isinstance(stage, Basis):
        inverse = torch.linalg.inv(stage.matrix.double()).to(kind)
        return Reconstruction(whole @ inverse + stage.mean, None)
    return Reconstruction(whole, None)
