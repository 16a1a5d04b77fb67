"""Facts and choices as frozen dataclasses: the alphabet, the ESM-2 sizes, `Level`, `RDConfig`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from numbers import Integral
from typing import Any, Final, Literal, TypeAlias, get_args

from rd_torch.alphabet import Alphabet
from rd_torch.letters import RESIDUE_LETTERS

Regressor: TypeAlias = Literal["pcr", "ols", "ridge"]
PredictFrom: TypeAlias = Literal["nested", "previous"]
SpecialRows: TypeAlias = Literal["maps", "larger"]
Method: TypeAlias = Literal["rd", "naive"]
Storage: TypeAlias = Literal["included", "referenced"]

FloatType: TypeAlias = Literal["float32", "float16", "bfloat16"]
"""The types of number that backbones compute in and stores hold, as PyTorch names them."""

FormatName: TypeAlias = Literal["h5", "parquet", "pt"]
"""The formats of a store; `rd_torch.store` has what writes and reads each."""

# Which of the maps that the authors published.
PublishedRegressor: TypeAlias = Literal["pcr", "linear", "ridge"]
PCA: TypeAlias = Literal["incremental", "fbpca"]
SequenceCount: TypeAlias = Literal["0.5k", "1k", "5k", "10k"]

ALPHABET: Final = Alphabet()
"""The alphabet of every size of ESM-2."""

FIRST_RESIDUE: Final = ALPHABET.get_idx(RESIDUE_LETTERS[0])
LAST_RESIDUE: Final = ALPHABET.get_idx(RESIDUE_LETTERS[-1])

SPECIAL_TOKENS: Final = 2
"""`<cls>` in front of a sequence and `<eos>` behind it."""

FORMAT_VERSION: Final = 1


@dataclass(frozen=True)
class Reference:
    """Where a backbone lies on the Hub.

    Attributes:
        repo: the repository, `"facebook/esm2_t6_8M_UR50D"`.
        revision: commit, tag or branch; None for the main branch.
        sha256: checksums by file name, as far as they are known; checked after the download.

    Examples:
        >>> rd_torch.Reference("facebook/esm2_t6_8M_UR50D", revision="main").repo
        'facebook/esm2_t6_8M_UR50D'
    """

    repo: str
    revision: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Level:
    """One backbone of a family by name, with its shape.

    Attributes:
        name: how the level is called, `"650M"`; a module name, so without a dot.
        num_layers: transformer layers.
        width: features a token.
        attention_heads: heads a layer; their size is `width / attention_heads`.
        reference: where on the Hub the backbone came from; in a saved checkpoint, where it lies
            instead of in the checkpoint.

    Raises:
        ValueError: for a name that no module can have, or heads that do not divide the width evenly.

    Examples:
        >>> rd_torch.Level("tiny", num_layers=2, width=32, attention_heads=4).width
        32
    """

    name: str
    num_layers: int
    width: int
    attention_heads: int
    reference: Reference | None = None

    def __post_init__(self) -> None:
        if not self.name or "." in self.name:
            raise ValueError(f"expected a level name without a dot, got {self.name!r}")
        if self.width % (2 * self.attention_heads):
            raise ValueError(
                f"expected heads of an even size, got width {self.width} "
                f"over {self.attention_heads} heads in level {self.name}"
            )


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


@dataclass(frozen=True)
class Explained:
    """What a stage explains of the larger embedding, on the data it was fitted on.

    Attributes:
        r2: `1 - tr cov(r) / tr cov(y)`: the share of the larger embedding's variance that the
            regression predicts; None where the maps came without it.
        kept: share of the residual variance that the added directions keep.

    Examples:
        >>> stage = rd_torch.RDModel.from_pretrained("esm2-rd-mini").stages["90K"]
        >>> f"{stage.explained.r2:.2f} predicted, {stage.explained.kept:.2f} of the rest kept"
        '0.87 predicted, 0.77 of the rest kept'
    """

    r2: float | None
    kept: float


@dataclass(frozen=True)
class RDConfig:
    """What a checkpoint is, apart from its tensors.

    Attributes:
        levels: the backbones' shapes, smallest first.
        added: directions that each stage adds; one fewer than levels.
        explained: what each stage explains; None where it is not known.
        predict_from: what W acts on: the nested embedding, or the previous backbone's raw one.
        special_rows: what stands at `<cls>`, `<eos>`, `<mask>` of the widest level: the maps' rows
            or the larger backbone's raw vectors.
        provenance: where backbones and maps come from, in words and numbers.
        method: `"rd"` for reverse distillation; `"naive"` for the baseline that concatenates and
            takes principal components, whose levels are no prefixes of each other.

    Raises:
        ValueError: when the tuples do not fit together or a choice does not exist.

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
                f"got {len(self.added)} and {len(self.explained)} reports"
            )
        check_choice("predict_from", self.predict_from, get_args(PredictFrom))
        check_choice("special_rows", self.special_rows, get_args(SpecialRows))
        check_choice("method", self.method, get_args(Method))
        self._check_special_rows()

    def _check_special_rows(self) -> None:
        shapes = zip(self.levels, self.widths.values(), strict=True)
        uneven = [level.name for level, width in shapes if level.width != width]
        if self.special_rows == "larger" and uneven:
            raise ValueError(
                'expected special_rows="maps", got "larger", though the nested width differs from '
                f"the backbone's at {', '.join(uneven)}: its raw vectors do not fit there"
            )

    @property
    def is_nested(self) -> bool:
        """Whether narrower levels are prefixes of wider ones, as all but the baseline's are."""
        return self.method != "naive"

    @property
    def widths(self) -> dict[str, int]:
        """Nested width of each level, smallest first."""
        totals = accumulate(self.added, initial=self.levels[0].width)
        return {level.name: width for level, width in zip(self.levels, totals, strict=True)}

    def require_level(self, level: str) -> None:
        """Raises a ValueError that lists the levels unless `level` is one of them."""
        check_choice("level", level, tuple(self.widths))

    def require_width(self, width: int | None) -> None:
        """Raises a ValueError that lists the levels unless `width` is None or a number of features."""
        widest = self.widths[self.levels[-1].name]
        fits = width is None or (isinstance(width, Integral) and not isinstance(width, bool))
        if not fits or (width is not None and not 1 <= width <= widest):
            listed = ", ".join(f"{name} {size}" for name, size in self.widths.items())
            raise ValueError(f"expected a width from 1 to {widest} (levels: {listed}), got {width}")

    def levels_for(self, width: int | None) -> list[str]:
        """The levels up to the first that holds `width` features; all for None."""
        self.require_width(width)
        names = list(self.widths)
        narrower = [name for name, size in self.widths.items() if width is None or size < width]
        return names[: len(narrower) + 1]

    def first_levels(self, given: Collection[str], width: int | None = None) -> list[str]:
        """Those of the given levels that `width` features need, smallest first; all for None.

        Raises:
            ValueError: for levels that are not the family's first, too few of them, or a width that does
                not exist.
        """
        names = list(self.widths)
        needed = names[: len(given)] if width is None else self.levels_for(width)
        if not needed or not set(needed) <= set(given) <= set(names):
            some = "" if width is None else f", at least {', '.join(needed)} for {width} features"
            raise ValueError(
                f"expected the first levels of {', '.join(names)}{some}, got {', '.join(given) or 'none'}"
            )
        return needed

    def prefixes(self, width: int) -> dict[str, int]:
        """Where each level's embedding ends within the first `width` features, by level.

        The baseline's levels are no prefixes: of those the last stands alone.
        """
        levels = self.levels_for(width)
        shown = levels if self.is_nested else levels[-1:]
        return {level: min(width, self.widths[level]) for level in shown}

    def until(self, level: str) -> RDConfig:
        """The config of the chain that ends at `level`."""
        self.require_level(level)
        stages = list(self.widths).index(level)
        return replace(
            self,
            levels=self.levels[: stages + 1],
            added=self.added[:stages],
            explained=self.explained[:stages],
        )

    def to_dict(self) -> dict[str, Any]:
        """This config as plain JSON values."""
        return {"format": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RDConfig:
        """The config that `to_dict` wrote.

        Raises:
            ValueError: for another format or a missing or unknown key.
        """
        if values.get("format") != FORMAT_VERSION:
            raise ValueError(
                f"expected a config of format {FORMAT_VERSION}, got {values.get('format')!r}: "
                "a newer rd_torch may read it"
            )
        try:
            return cls(
                **{key: value for key, value in values.items() if key not in _PARSED},
                levels=tuple(_level_from_dict(level) for level in values["levels"]),
                added=tuple(values["added"]),
                explained=tuple(item and Explained(**item) for item in values["explained"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"expected a config as rd_torch writes it, got one that lacks or adds keys: {error}"
            ) from error


def _level_from_dict(values: Mapping[str, Any]) -> Level:
    """The level that `RDConfig.to_dict` wrote."""
    reference = values.get("reference")
    return Level(**{**values, "reference": reference and Reference(**reference)})


_PARSED = frozenset({"format", "levels", "added", "explained"})


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises a ValueError that lists the choices unless `value` is one of them."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"expected {name} to be one of {listed}, got {value!r}")
