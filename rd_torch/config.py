"""Everything that a checkpoint states, apart from its tensors: `RDConfig`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, groupby, pairwise
from numbers import Integral
from typing import Any, Final, get_args

from rd_torch.choices import Method, PredictFrom, Scale, SpecialRows, check_choice
from rd_torch.levels import Level, level_from_dict, level_to_dict

FORMAT_VERSION: Final = 1
"""The format of `config.json`; a config of another format is refused."""


@dataclass(frozen=True)
class Explained:
    """How much of the larger embedding a stage explains, on the data that it was fitted on.

    Attributes:
        r2: `1 - tr cov(r) / tr cov(y)`, the share of the larger embedding's variance that the regression
            predicts; None for maps that came without this number.
        kept: share of the residual's variance that the added directions keep, from 0 to 1.

    Examples:
        >>> stage = rd_torch.RDModel.from_pretrained("esm2-rd-mini").stages["90K"]
        >>> f"{stage.explained.r2:.2f} predicted, {stage.explained.kept:.2f} of the rest kept"
        '0.87 predicted, 0.77 of the rest kept'
    """

    r2: float | None
    kept: float


@dataclass(frozen=True)
class RDConfig:
    """Everything that a checkpoint states, apart from its tensors.

    Attributes:
        levels: names and shapes of the backbones, smallest first.
        added: number of directions that each stage adds, one stage fewer than levels.
        explained: how much each stage explains; None for a stage of which it is not known.
        predict_from: embedding that W acts on: `"nested"`, or the `"previous"` backbone's raw one.
        special_rows: embeddings of `<cls>`, `<eos>` and `<mask>` at the widest level: `"maps"` for those that
            the maps give, or `"larger"` for the raw ones of the largest backbone.
        provenance: where backbones and maps come from, in words and numbers.
        final_norm: whether the LayerNorm after a backbone's last layer acts on the hidden states of levels of
            other layers too; those that transformers gives are taken as they are.
        method: `"rd"` for reverse distillation, or `"naive"` for the baseline, principal components of
            concatenated embeddings, whose levels are no prefixes of each other.
        scale: what features are divided by: `"none"`; `"feature"` for each one's standard deviation, or
            `"block"` for the root mean variance of its block, the features that one level adds.
        centre: whether the mean of the first block was subtracted; added blocks have mean zero anyway.
        rotate_first: whether the first block's features are its principal components, largest first.

    Raises:
        ValueError: for tuples that do not fit together, or a choice that does not exist.

    Examples:
        >>> config = rd_torch.RDModel.from_pretrained("esm2-rd-mini").config
        >>> config.widths
        {'28K': 32, '90K': 48, '207K': 64, '1M': 128}
        >>> config.levels_for(40)
        ['28K', '90K']
    """

    levels: tuple[Level, ...]
    added: tuple[int, ...]
    explained: tuple[Explained | None, ...]
    predict_from: PredictFrom = "nested"
    special_rows: SpecialRows = "maps"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    method: Method = "rd"
    scale: Scale = "none"
    centre: bool = False
    rotate_first: bool = False
    final_norm: bool = True

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("expected at least one level, got none")
        names = [level.name for level in self.levels]
        if len(set(names)) < len(names):
            raise ValueError(f"expected levels of different names, got {', '.join(names)}")
        self._check_depths()
        if not len(self.added) == len(self.explained) == len(self.levels) - 1:
            raise ValueError(
                f"expected one stage fewer than the {len(self.levels)} levels, "
                f"got {len(self.added)} in added and {len(self.explained)} in explained"
            )
        check_choice("predict_from", self.predict_from, get_args(PredictFrom))
        check_choice("special_rows", self.special_rows, get_args(SpecialRows))
        check_choice("method", self.method, get_args(Method))
        check_choice("scale", self.scale, get_args(Scale))
        if self.has_basis and self.method == "naive":
            raise ValueError("expected the baseline as it is, got it scaled, centred or rotated")
        if self.has_basis and self.special_rows == "larger":
            raise ValueError(
                'expected special_rows="maps" where features are scaled, centred or rotated, got "larger": '
                "raw rows would stand beside rows in other coordinates"
            )
        self._check_special_rows()

    def _check_depths(self) -> None:
        """Raise a ValueError for levels of one backbone that do not go by depth, or not behind each other."""
        for _, members in groupby(self.levels, lambda level: level.backbone):
            for smaller, larger in pairwise(members):
                if smaller.layer is None or (larger.layer is not None and larger.layer <= smaller.layer):
                    raise ValueError(
                        f"expected levels of one backbone by depth, got {smaller.name} before {larger.name}"
                    )
        order = [name for name, _ in groupby(level.backbone for level in self.levels)]
        if len(set(order)) < len(order):
            raise ValueError(f"expected levels of one backbone next to each other, got {', '.join(order)}")

    def _check_special_rows(self) -> None:
        """Raise a ValueError for raw special rows that do not have the width of the nested ones."""
        shapes = zip(self.levels, self.widths.values(), strict=True)
        uneven = [level.name for level, width in shapes if level.width != width]
        if self.special_rows == "larger" and uneven:
            raise ValueError(
                'expected special_rows="maps", got "larger", though the nested width differs from the '
                f"backbone's at {', '.join(uneven)}: the backbone's raw embeddings do not fit there"
            )

    @property
    def is_nested(self) -> bool:
        """Whether narrower levels are prefixes of wider ones; only the baseline's are not."""
        return self.method != "naive"

    @property
    def hidden_norm(self) -> bool | None:
        """Whether the final LayerNorm acts on levels of hidden layers; None where there are none."""
        return None if all(level.is_last for level in self.levels) else self.final_norm

    @property
    def basis(self) -> dict[str, Any]:
        """What was done to the features: `scale`, `centre` and `rotate_first`."""
        return {name: getattr(self, name) for name in _USUAL}

    @property
    def has_basis(self) -> bool:
        """Whether features were scaled, centred or rotated. If not, the first ones are a backbone's own."""
        return self.basis != _USUAL

    @property
    def widths(self) -> dict[str, int]:
        """Width of each level's nested embedding, by level, smallest first."""
        totals = accumulate(self.added, initial=self.levels[0].width)
        return {level.name: width for level, width in zip(self.levels, totals, strict=True)}

    @property
    def layers(self) -> dict[int, str]:
        """The levels of the largest backbone, by the number of their layer where their names state it."""
        largest = self.levels[-1].backbone
        return {
            level.layer: level.name
            for level in self.levels
            if level.backbone == largest and level.layer is not None
        }

    def level(self, name: str) -> Level:
        """Return the level called `name`.

        Raises:
            ValueError: for any other name, with those of the levels.
        """
        self.require_level(name)
        return next(level for level in self.levels if level.name == name)

    def require_level(self, level: str) -> None:
        """Require that there is a level called `level`.

        Raises:
            ValueError: for any other name, with those of the levels.
        """
        check_choice("level", level, tuple(self.widths))

    def require_width(self, width: int | None) -> None:
        """Require that embeddings can be cut to `width` features; None stands for all of them.

        Raises:
            ValueError: for any other value, with the widths of the levels.
        """
        widest = self.widths[self.levels[-1].name]
        fits = width is None or (isinstance(width, Integral) and not isinstance(width, bool))
        if not fits or (width is not None and not 1 <= width <= widest):
            listed = ", ".join(f"{name} {size}" for name, size in self.widths.items())
            raise ValueError(f"expected a width from 1 to {widest} (levels: {listed}), got {width}")

    def levels_for(self, width: int | None) -> list[str]:
        """Return the names of the levels that `width` features need, smallest first; None needs all."""
        self.require_width(width)
        names = list(self.widths)
        narrower = [name for name, size in self.widths.items() if width is None or size < width]
        return names[: len(narrower) + 1]

    def first_levels(self, given: Collection[str], width: int | None = None) -> list[str]:
        """Select the levels that `width` features need, among those of which embeddings are at hand.

        Args:
            given: names of the levels at hand.
            width: number of features; by default all that these levels have.

        Returns:
            The names of the levels, smallest first.

        Raises:
            ValueError: for levels that are not the family's first, too few of them, or a width that no level
                has.
        """
        names = list(self.widths)
        needed = names[: len(given)] if width is None else self.levels_for(width)
        if not needed or not set(needed) <= set(given) <= set(names):
            least = "" if width is None else f", at least {', '.join(needed)} for {width} features"
            raise ValueError(
                f"expected the first levels of {', '.join(names)}{least}, got {', '.join(given) or 'none'}"
            )
        return needed

    def prefixes(self, width: int) -> dict[str, int]:
        """Return where each level's embedding ends within the first `width` features, by level.

        Levels of the baseline are no prefixes, so that for it only the last one that is needed is returned.
        """
        levels = self.levels_for(width)
        shown = levels if self.is_nested else levels[-1:]
        return {level: min(width, self.widths[level]) for level in shown}

    def until(self, level: str) -> RDConfig:
        """Return the config of the chain that ends at `level`."""
        self.require_level(level)
        stages = list(self.widths).index(level)
        return replace(
            self,
            levels=self.levels[: stages + 1],
            added=self.added[:stages],
            explained=self.explained[:stages],
        )

    def to_dict(self) -> dict[str, Any]:
        """Return this config as a dictionary of JSON values."""
        levels = [level_to_dict(level) for level in self.levels]
        values = {key: value for key, value in asdict(self).items() if self.has_basis or key not in _USUAL}
        if self.final_norm:  # left out, as what earlier versions knew alone
            del values["final_norm"]
        return {"format": FORMAT_VERSION, **values, "levels": levels}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RDConfig:
        """Return the config of which `to_dict` returned these values.

        Raises:
            ValueError: for another format, or for a key that is missing or unknown.
        """
        if values.get("format") != FORMAT_VERSION:
            raise ValueError(
                f"expected a config of format {FORMAT_VERSION}, got {values.get('format')!r}: "
                "a newer version of rd_torch may read it"
            )
        try:
            return cls(
                **{key: value for key, value in values.items() if key not in _CONVERTED},
                levels=tuple(level_from_dict(level) for level in values["levels"]),
                added=tuple(values["added"]),
                explained=tuple(item and Explained(**item) for item in values["explained"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"expected a config with the keys that rd_torch writes, got one with others: {error}"
            ) from error


# Facts that a config leaves out where none of them says anything, so that older versions read it.
_USUAL: Final[Mapping[str, Any]] = {"scale": "none", "centre": False, "rotate_first": False}

# Keys of a config that are not passed on as they are.
_CONVERTED = frozenset({"format", "levels", "added", "explained"})
