"""`change_basis`: scale, centre and rotate a chain's features after its stages are solved.

A chain is one affine map, so that a change of coordinates can be folded into it: `Basis` gives the first
block in the new coordinates, each later stage takes them back in its W and scales what it adds in its V. No
choice of a regression is made anew, and what a chain explains stays what it was.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from rd_torch.choices import PredictFrom, Scale
from rd_torch.joint import Joint, join_levels
from rd_torch.maps import Basis, Maps, basis_in
from rd_torch.moments import RunningMoments
from rd_torch.solve import (
    SOLVE_DEFAULTS,
    BasisOptions,
    SolveOptions,
    check_basis,
    principal_directions,
    solve_stages,
    split_options,
)
from rd_torch.stage import Stage

ROUNDING_CUTOFF = 1e-5
"""Features whose standard deviation is at most this share of the largest root mean square among the features
of their backbone's embedding count as constant: a stage subtracts in float32, which leaves rounding of nearly
that size."""


class Block(NamedTuple):
    """The features that one level adds to a nested embedding, as an affine map of the raw embeddings.

    Attributes:
        map: `(sum of raw widths, features)` map from the raw embeddings side by side.
        offset: `(features,)` what is added to that.
        reference: largest root mean square among the features of the backbone's raw embedding.
    """

    map: Tensor
    offset: Tensor
    reference: float

    def varies(self, variances: Tensor) -> Tensor:
        """Return which of the block's features vary by more than rounding."""
        return variances.sqrt() > ROUNDING_CUTOFF * self.reference


def solve_chain(
    moments: RunningMoments,
    widths: Mapping[str, int] | Sequence[int],
    *,
    levels: Sequence[Hashable] | None = None,
    **options: Unpack[SolveOptions],
) -> list[Maps]:
    """Solve the stages of a chain, and express them in the basis that is asked for.

    Args:
        moments: joint moments of the raw embeddings, as in `solve_stages`.
        widths: widths of the raw embeddings, as in `solve_stages`.
        levels: names of the levels of the sub-chain to solve, in order; by default all.
        **options: those of `solve_stages` and of `change_basis`.

    Returns:
        Float64 stages in order, behind a `Basis` if `scale`, `centre` or `rotate_first` asks for one.
    """
    solving, basis = split_options(options)
    stages = solve_stages(moments, widths, levels=levels, **solving)  # type: ignore[misc]  # a part of the options
    predict_from = options.get("predict_from", SOLVE_DEFAULTS["predict_from"])
    return change_basis(stages, moments, widths, levels=levels, predict_from=predict_from, **basis)


def change_basis(
    stages: Sequence[Stage],
    moments: RunningMoments,
    widths: Mapping[str, int] | Sequence[int],
    *,
    levels: Sequence[Hashable] | None = None,
    predict_from: PredictFrom = "nested",
    **options: Unpack[BasisOptions],
) -> list[Maps]:
    """Express the stages of a chain in other coordinates: scaled, centred, or with the first block rotated.

    The nested embedding becomes `(n - mean) R S`: R turns the first block, S divides each feature by a number
    of its own. Prefixes stay prefixes to the bit. The first features are the first backbone's in these
    coordinates, and no longer its own to the bit.

    Features that vary by no more than rounding in float32 are not scaled, so that no noise is blown up.

    Args:
        stages: stages from `solve_stages`, from the same moments, widths and levels.
        moments: joint moments of the raw embeddings.
        widths: widths of the raw embeddings, as in `solve_stages`.
        levels: names of the levels of the sub-chain, in order; by default all.
        predict_from: what the stages predict from, as in `solve_stages`.
        **options: `scale`: `"none"`; `"feature"` divides each feature by its standard deviation; `"block"`
            divides the features that one level adds by the root of their mean variance. `centre`: if true,
            subtract the first block's mean; added blocks have mean zero. `rotate_first`: if true, the
            features of the first block become its principal components, largest first, so that its first k
            features are the best k; they are centred only if `centre` is true too.

    Returns:
        A `Basis` and float64 stages; or the given stages, if no option asks for anything.

    Raises:
        ValueError: for an option that cannot be, or moments or stages that do not fit.

    Examples:
        >>> widths = {"small": 2, "large": 3}
        >>> moments = rd_torch.RunningMoments(5)
        >>> moments.update(torch.randn(1_000, 5))
        >>> stages = rd_torch.solve_stages(moments, widths)
        >>> basis, stage = rd_torch.change_basis(stages, moments, widths, scale="feature", centre=True)
    """
    chosen = check_basis(**options)
    if chosen == check_basis():
        return list(stages)
    joint = join_levels(moments, widths, levels)
    first, *added = blocks_of(stages, joint, predict_from)
    turned = torch.eye(first.map.shape[1], dtype=torch.float64, device=first.map.device)
    covariance = first.map.T @ joint.covariance @ first.map
    if chosen["rotate_first"]:
        _, turned = principal_directions(covariance, len(turned))
    variances = (turned.T @ covariance @ turned).diagonal()
    matrix = turned * find_scales(first, variances, chosen["scale"])
    mean = joint.means[0] if chosen["centre"] else torch.zeros_like(joint.means[0])
    # What brings the new coordinates back: nested = new @ back + shift.
    back, shift = torch.linalg.inv(matrix), mean
    folded: list[Maps] = [Basis(mean, matrix, **chosen)]
    for stage, block in zip(stages, added, strict=True):
        W, b = stage.W, stage.b
        if predict_from == "nested":
            W, b = back @ stage.W, stage.b + shift @ stage.W
        scales = find_scales(block, (block.map.T @ joint.covariance @ block.map).diagonal(), chosen["scale"])
        folded.append(Stage(W, b, stage.m, stage.V * scales, stage.explained))
        back, shift = (
            torch.block_diag(back, (1 / scales).diag()),
            torch.cat((shift, torch.zeros_like(scales))),
        )
    return folded


def find_scales(block: Block, variances: Tensor, scale: Scale) -> Tensor:
    """Find what the features of a block are multiplied by.

    Args:
        block: the block.
        variances: `(features,)` variances of its features.
        scale: what they are divided by.

    Returns:
        `(features,)` positive factors; 1 where nothing varies.
    """
    variances = variances.clamp(min=0)
    if scale == "block" and len(variances):
        variances = variances.mean().expand_as(variances)
    varies = block.varies(variances) if scale != "none" else torch.zeros_like(variances, dtype=torch.bool)
    return torch.where(varies, variances, torch.ones_like(variances)).rsqrt()


def blocks_of(stages: Sequence[Maps], joint: Joint, predict_from: PredictFrom) -> list[Block]:
    """Return the blocks of a nested embedding, smallest level first, as maps of the raw embeddings.

    Args:
        stages: stages of reverse distillation, behind a basis or not.
        joint: the moments of the chain's raw embeddings.
        predict_from: what the stages predict from.
    """
    second = [mean.square() + variance for mean, variance in zip(joint.means, joint.variances, strict=True)]
    references = [float(values.max().sqrt()) for values in second]
    nested, offset = joint.raw[0], torch.zeros_like(joint.means[0])
    steps = list(stages)
    if basis := basis_in(steps):
        steps = steps[1:]
        nested, offset = nested @ basis.matrix.double(), -basis.mean.double() @ basis.matrix.double()
    blocks = [Block(nested, offset, references[0])]
    for k, stage in enumerate(steps, start=1):
        assert isinstance(stage, Stage), "stages of the baseline have no blocks"
        W, V = stage.W.double(), stage.V.double()
        source, constant = (nested, offset) if predict_from == "nested" else (joint.raw[k - 1], None)
        added = (joint.raw[k] - source @ W) @ V
        shift = -(stage.b.double() + stage.m.double() + (0 if constant is None else constant @ W)) @ V
        blocks.append(Block(added, shift, references[k]))
        nested, offset = torch.cat((nested, added), dim=1), torch.cat((offset, shift))
    return blocks
