"""Choose the layer that each level of a chain is taken from, by joint moments of all candidates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias, Unpack, get_args

import torch

from rd_torch.choices import Criterion, check_choice
from rd_torch.levels import split_level
from rd_torch.moments import RunningMoments
from rd_torch.solve import SolveOptions, solve_stages, split_options
from rd_torch.stage import Stage

Layers: TypeAlias = Mapping[str, "int | Sequence[int] | Literal['all']"] | Sequence[int] | Literal["all"]
"""Layers that levels may be taken from: by backbone, or for every backbone."""

Score: TypeAlias = Callable[[Sequence[str]], float]
"""What a chain of levels is worth by its last one, of which the candidate with the highest is chosen."""


class Chosen(NamedTuple):
    """The levels of a chain, and why they were chosen.

    Attributes:
        levels: names of the levels, smallest first.
        scores: by name, what each candidate was worth; empty where there was nothing to choose.
    """

    levels: list[str]
    scores: dict[str, float]


def candidates_of(depths: Mapping[str, int], layers: Layers | None) -> list[list[str]]:
    """Return the levels that may be chosen for each level of a chain.

    Args:
        depths: number of layers of the backbone of each level, by the level's name.
        layers: layers that levels may be taken from; None for the one that the level's name states.

    Returns:
        For each level the names of its candidates, such as `["650M@32", "650M"]`, the last of 33 layers.

    Raises:
        ValueError: for a backbone or a layer that is not there, or a level whose name states a layer already.
    """
    if isinstance(layers, Mapping):
        for name in layers:
            check_choice("a backbone in layers", name, tuple(depths))
    return [_candidates(name, depth, layers) for name, depth in depths.items()]


def _candidates(name: str, depth: int, layers: Layers | None) -> list[str]:
    """Return the candidates for one level."""
    wanted = layers.get(name) if isinstance(layers, Mapping) else layers
    if wanted is None:
        return [name]
    if split_level(name)[1] is not None:
        raise ValueError(f"expected layers of levels whose names state none, got them for {name}")
    if isinstance(wanted, str):
        check_choice("layers", wanted, ("all",))
        return [*(f"{name}@{layer}" for layer in range(1, depth)), name]
    numbers = [wanted] if isinstance(wanted, int) else list(wanted)
    there = [layer for layer in numbers if 1 <= layer <= depth]
    if not there or (isinstance(layers, Mapping) and len(there) < len(numbers)):
        raise ValueError(f"expected layers from 1 to {depth}, which {name} has, got {numbers}")
    return [name if layer == depth else f"{name}@{layer}" for layer in sorted(set(there))]


def choose_layers(
    moments: RunningMoments,
    widths: Mapping[str, int],
    *,
    criterion: Criterion = "rank",
    **options: Unpack[SolveOptions],
) -> list[str]:
    """Choose a layer of each backbone from joint moments of several layers of each, without labels.

    Levels are chosen one after the other, smallest first, each behind those that were chosen before.

    - `"rank"`: the layer whose covariance has the highest effective rank, the exponential of the entropy of
      its normalised eigenvalues (Roy and Vetterli 2007);
    - `"added"`: the layer of whose variance the added features hold the largest share; for the first level,
      as `"rank"`.

    Of equal layers the first is taken, which costs least.

    Args:
        moments: joint moments of the raw embeddings of all candidates, concatenated in the order of `widths`.
        widths: width of each candidate by its name, `{"8M@5": 320, "8M@6": 320, "35M@10": 480, ...}`.
        criterion: what makes a layer better than another, see above.
        **options: options of `solve_stages`, by which stages are solved for the comparison.

    Returns:
        The names of the levels, which `solve_stages` takes as `levels`.

    Raises:
        ValueError: for a criterion that does not exist or needs labels, and as `solve_stages`.

    Examples:
        >>> widths = {"small": 2, "large@1": 3, "large": 3}
        >>> moments = rd_torch.RunningMoments(8)
        >>> rows = torch.randn(1_000, 8)
        >>> rows[:, 3:5] = 0  # layer 1 knows one direction alone
        >>> moments.update(rows)
        >>> rd_torch.choose_layers(moments, widths)
        ['small', 'large']
    """
    groups: dict[str, list[str]] = {}
    for name in widths:
        groups.setdefault(split_level(name)[0], []).append(name)
    score = unlabelled(moments, widths, criterion, **options)
    return choose(list(groups.values()), score).levels


def choose(groups: Sequence[Sequence[str]], score: Score) -> Chosen:
    """Choose one level of each group, one after the other.

    Args:
        groups: names of the candidates for each level.
        score: what a chain is worth by its last level.

    Returns:
        The levels, and what each candidate was worth.
    """
    levels: list[str] = []
    scores: dict[str, float] = {}
    for group in groups:
        worth = {name: score([*levels, name]) for name in group} if len(group) > 1 else {group[0]: 0.0}
        levels.append(max(worth, key=lambda name: worth[name]))
        scores |= worth if len(group) > 1 else {}
    return Chosen(levels, scores)


def unlabelled(
    moments: RunningMoments, widths: Mapping[str, int], criterion: Criterion, **options: Unpack[SolveOptions]
) -> Score:
    """Return the score of a criterion that needs no labels.

    Args:
        moments: joint moments of all candidates.
        widths: width of each candidate, by its name.
        criterion: name of the criterion.
        **options: options of `solve_stages`.

    Raises:
        ValueError: for a criterion that does not exist or needs labels.
    """
    check_choice("criterion", criterion, get_args(Criterion)[:-1])
    blocks = dict(
        zip(
            widths,
            torch.arange(moments.width, device=moments.mean.device).split(list(widths.values())),
            strict=True,
        )
    )

    def rank(levels: Sequence[str]) -> float:
        """Return the effective rank of the last level's covariance."""
        eigenvalues = torch.linalg.eigvalsh(moments.covariance(blocks[levels[-1]])).clamp(min=0)
        shares = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
        return float((-shares * shares.log()).sum().exp())

    def score(levels: Sequence[str]) -> float:
        """Return what the chain is worth."""
        if criterion == "rank" or len(levels) == 1:
            return rank(levels)
        explained = solve_first(moments, widths, levels, **options)[-1].explained
        assert explained is not None, "solved stages know what they explain"
        return (1 - (explained.r2 or 0.0)) * explained.kept

    return score


def solve_first(
    moments: RunningMoments, widths: Mapping[str, int], levels: Sequence[str], **options: Unpack[SolveOptions]
) -> list[Stage]:
    """Solve the stages of the first levels of a chain, where `added` may have a number for more of them.

    Args:
        moments: joint moments of all candidates.
        widths: width of each candidate, by its name.
        levels: names of the first levels.
        **options: options of `solve_stages`, for the whole chain.
    """
    added = options.get("added")
    if isinstance(added, Sequence) and not isinstance(added, str):
        options["added"] = added[: len(levels) - 1]
    solving, _ = split_options(options)  # features are compared as they are, without another basis
    return solve_stages(moments, widths, levels=levels, **solving)  # type: ignore[misc]  # a part of the options
