"""Facts of ESM-2 and of a checkpoint: the alphabet, the sizes, `Level` and `RDConfig`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from numbers import Integral
from typing import Any, Final, get_args

from rd_torch.alphabet import Alphabet
from rd_torch.choices import Method, PredictFrom, SpecialRows, check_choice

ALPHABET: Final = Alphabet()
"""The alphabet that all sizes of ESM-2 share."""

ESMC_ALPHABET: Final = Alphabet(chain_break=True)
"""The alphabet that all sizes of ESM-C share."""

SPECIAL_TOKENS: Final = 2
"""Number of tokens around a sequence: `<cls>` before it and `<eos>` after it."""

ESM2_FAMILY: Final = "esm2"
"""The family of a level that states none, as those of earlier versions."""

TRANSFORMERS_FAMILY: Final = "transformers"
"""The family of a level whose backbone is any model that transformers loads."""

FORMAT_VERSION: Final = 1
"""The format of `config.json`; a config of another format is refused."""


@dataclass(frozen=True)
class Reference:
    """Where a backbone lies on the Hub.

    Attributes:
        repo: name of the repository, such as `"facebook/esm2_t6_8M_UR50D"`.
        revision: commit, tag or branch; None stands for the main branch.
        sha256: known checksums by file name; each is checked when the file has been downloaded.

    Examples:
        >>> rd_torch.Reference("facebook/esm2_t6_8M_UR50D", revision="main").repo
        'facebook/esm2_t6_8M_UR50D'
    """

    repo: str
    revision: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Level:
    """The name and the shape of one backbone of a family.

    Attributes:
        name: name of the level, such as `"650M"`. It names a module, so it has no dot.
        num_layers: number of transformer layers; None where the level is only a name and a width.
        width: number of features of each token's embedding.
        attention_heads: number of attention heads in a layer; each has `width / attention_heads` features.
            None where the level is only a name and a width.
        reference: where on the Hub the backbone came from. In a saved checkpoint, where it is read from,
            instead of from the checkpoint.
        family: name of the family of models that the backbone belongs to.
        facts: further facts of its architecture, by the names that its family gives them.

    Raises:
        ValueError: for a name that no module can have, or heads that would not be of one even size.

    Examples:
        >>> rd_torch.Level("tiny", num_layers=2, width=32, attention_heads=4).width
        32
    """

    name: str
    num_layers: int | None
    width: int
    attention_heads: int | None
    reference: Reference | None = None
    family: str = ESM2_FAMILY
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name or "." in self.name:
            raise ValueError(f"expected a level name without a dot, got {self.name!r}")
        heads = self.attention_heads
        if heads and self.family != TRANSFORMERS_FAMILY and self.width % (2 * heads):
            raise ValueError(
                f"expected heads of an even size, got width {self.width} "
                f"over {self.attention_heads} heads in level {self.name}"
            )

    @property
    def architecture(self) -> Any:
        """What a digest must know besides tensors and widths: heads, and what is not as in ESM-2."""
        if self.family == ESM2_FAMILY and not self.facts:
            return self.attention_heads
        return [self.attention_heads, self.family, dict(self.facts)]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, width and heads of the backbone; a ValueError where the level is a name and a width."""
        if self.num_layers is None or self.attention_heads is None:
            raise ValueError(f"expected a level with layers and heads, got {self.name}, a name and a width")
        return self.num_layers, self.width, self.attention_heads


ESM2_LEVELS: Final[Mapping[str, Level]] = {
    name: Level(name, num_layers, width, attention_heads)
    for name, num_layers, width, attention_heads in (
        ("8M", 6, 320, 20),
        ("35M", 12, 480, 20),
        ("150M", 30, 640, 20),
        ("650M", 33, 1280, 20),
        ("3B", 36, 2560, 40),
        ("15B", 48, 5120, 40),
    )
}
"""The published sizes of ESM-2 (Lin et al., Science 2023, doi:10.1126/science.ade2574).

Examples:
    >>> {name: level.width for name, level in rd_torch.ESM2_LEVELS.items()}
    {'8M': 320, '35M': 480, '150M': 640, '650M': 1280, '3B': 2560, '15B': 5120}
"""


ESMC_LEVELS: Final[Mapping[str, Level]] = {
    name: Level(name, num_layers, width, attention_heads, family="esmc")
    for name, num_layers, width, attention_heads in (
        ("300M", 30, 960, 15),
        ("600M", 36, 1152, 18),
        ("6B", 80, 2560, 40),
    )
}
"""The published sizes of ESM-C (biohub/ESMC-300M, -600M and -6B).

Examples:
    >>> {name: level.width for name, level in rd_torch.ESMC_LEVELS.items()}
    {'300M': 960, '600M': 1152, '6B': 2560}
"""


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
        method: `"rd"` for reverse distillation, or `"naive"` for the baseline, principal components of
            concatenated embeddings, whose levels are no prefixes of each other.

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

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("expected at least one level, got none")
        names = [level.name for level in self.levels]
        if len(set(names)) < len(names):
            raise ValueError(f"expected levels of different names, got {', '.join(names)}")
        if not len(self.added) == len(self.explained) == len(self.levels) - 1:
            raise ValueError(
                f"expected one stage fewer than the {len(self.levels)} levels, "
                f"got {len(self.added)} in added and {len(self.explained)} in explained"
            )
        check_choice("predict_from", self.predict_from, get_args(PredictFrom))
        check_choice("special_rows", self.special_rows, get_args(SpecialRows))
        check_choice("method", self.method, get_args(Method))
        self._check_special_rows()

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
    def widths(self) -> dict[str, int]:
        """Width of each level's nested embedding, by level, smallest first."""
        totals = accumulate(self.added, initial=self.levels[0].width)
        return {level.name: width for level, width in zip(self.levels, totals, strict=True)}

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
        levels = [_level_to_dict(level) for level in self.levels]
        return {"format": FORMAT_VERSION, **asdict(self), "levels": levels}

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
                levels=tuple(_level_from_dict(level) for level in values["levels"]),
                added=tuple(values["added"]),
                explained=tuple(item and Explained(**item) for item in values["explained"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"expected a config with the keys that rd_torch writes, got one with others: {error}"
            ) from error


def _level_to_dict(level: Level) -> dict[str, Any]:
    """Return a level as a dictionary of JSON values, in which usual facts are left out."""
    values = asdict(level)
    usual = {"family": ESM2_FAMILY, "facts": {}}
    return {key: value for key, value in values.items() if key not in usual or value != usual[key]}


def _level_from_dict(values: Mapping[str, Any]) -> Level:
    """Return the level of which `RDConfig.to_dict` returned these values."""
    reference = values.get("reference")
    return Level(**{**values, "reference": reference and Reference(**reference)})


# Keys of a config that are not passed on as they are.
_CONVERTED = frozenset({"format", "levels", "added", "explained"})
