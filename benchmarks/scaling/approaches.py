"""The approaches that are compared: kinds of embeddings, of which layers, and which heads judge them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from benchmarks.scaling.criteria import CRITERIA, Chosen
from benchmarks.scaling.layers import last_layers, level_of
from benchmarks.scaling.maps import (
    ALL,
    BY_BLOCK,
    BY_FEATURE,
    CENTRED,
    CONCAT,
    NESTED,
    PCA,
    PLAIN,
    Recipe,
    Solver,
)
from benchmarks.scaling.probes import LINEAR, MLP, NEAREST

LAST, LABELS = "last", "labels"
"""Choices of layers: the last of each backbone, and the best by labels of training rows."""

ROTATED = "rotated"
"""The kind of a backbone's embedding in the coordinates of all its principal components: nothing is lost."""

EACH = "each"
"""The choice of every layer alone."""


@dataclass(frozen=True)
class Approach:
    """A way to make embeddings, at every level of a family.

    Attributes:
        name: Name in tables.
        kind: Kind of its recipes, or `ROTATED`.
        choice: `LAST`, `LABELS`, `EACH`, or the name of a criterion.
        heads: Heads that judge it.
        scale: Scale of its recipes.
    """

    name: str
    kind: str
    choice: str = LAST
    heads: tuple[str, ...] = (LINEAR,)
    scale: str = ""

    @property
    def greedy(self) -> bool:
        """Whether a layer is chosen beside those of smaller backbones, and not alone."""
        return self.kind not in (PLAIN, ROTATED, PCA)

    def recipes(self, solver: Solver, chosen: Chosen) -> dict[str, Recipe]:
        """Return a recipe by level, or by layer where each layer stands alone.

        Args:
            solver: What knows the widths.
            chosen: A layer of each backbone, smallest backbone first.
        """
        if self.choice == EACH:
            return {layer: solver.recipe(self.kind, [layer], self.scale) for layer in solver.widths}
        made = {}
        for count, layer in enumerate(chosen, start=1):
            used = chosen[:count] if self.greedy else (layer,)
            kind = PLAIN if len(used) == 1 and self.greedy else self.kind
            recipe = solver.recipe(kind, used, self.scale)
            if self.kind in (ROTATED, PCA):
                own = chosen[-1:] if self.kind == PCA else used
                recipe = Recipe(PCA, own, recipe.width, self.scale)
            made[level_of(layer)] = recipe
        return made


PLAIN_LAST, PLAIN_BEST = "plain, last layer", "plain, best layer"
PLAIN_ROTATED = "plain, rotated, last layer"
PCA_LAST, PCA_BEST = "PCA of the largest, last layer", "PCA of the largest, best layer"
CONCAT_LAST = "concat + PCA, last layers"
NESTED_LAST, NESTED_CHOSEN = "nested, last layers", "nested, chosen layers"
ALL_LAST, ALL_CHOSEN = "all directions, last layers", "all directions, chosen layers"

RIVALS = (
    Approach(PLAIN_LAST, PLAIN, heads=(LINEAR, MLP)),
    Approach(PLAIN_BEST, PLAIN, LABELS),
    Approach(PLAIN_ROTATED, ROTATED, heads=(LINEAR, MLP)),
    Approach(PCA_LAST, PCA, heads=(LINEAR, MLP)),
    Approach(PCA_BEST, PCA, LABELS),
    Approach(CONCAT_LAST, CONCAT),
    Approach(NESTED_LAST, NESTED, heads=(LINEAR, MLP)),
    Approach(NESTED_CHOSEN, NESTED, LABELS, heads=(LINEAR, MLP)),
    Approach(ALL_LAST, ALL, heads=(LINEAR, MLP)),
    Approach(ALL_CHOSEN, ALL, LABELS),
)
"""The embeddings that one would choose between. The MLP, which is slow, judges a few of them."""

SCALED = tuple(
    Approach(f"{kind}, {scale or 'as it is'}", kind, heads=(NEAREST,), scale=scale)
    for kind in (PLAIN, NESTED, ALL)
    for scale in ("", CENTRED, BY_FEATURE, BY_BLOCK)
    if (kind, scale) != (PLAIN, BY_BLOCK)  # it has one block
)
"""Scales, for the head that sees them: all others standardise features."""

SWEEP = (Approach("each layer", PLAIN, EACH),)
"""Every layer of every backbone alone."""

BY_CRITERION = tuple(Approach(name, NESTED, name) for name in CRITERIA)
"""Nested embeddings of layers that were chosen without labels."""

OF_MIDDLE = tuple(each for each in RIVALS if each.choice == LABELS)
"""The rivals that take middle layers."""


@cache  # every data set and split asks for the same
def choose_without_labels(choice: str, solver: Solver) -> Chosen:
    """Return the layers of a choice that sees no labels."""
    if choice in CRITERIA:
        return tuple(CRITERIA[choice](solver.moments, solver.widths))
    return tuple(last_layers(solver.widths))
