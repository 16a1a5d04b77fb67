"""Facts of the families of models: alphabets, `Level`, published sizes, and where backbones lie."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from rd_torch.alphabet import Alphabet

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


TITLES: Final[Mapping[str, str]] = {ESM2_FAMILY: "ESM-2", "esmc": "ESM-C"}
"""What people call the families that have published sizes here."""


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


def split_level(name: str) -> tuple[str, int | None]:
    """Take the name of a level apart.

    Args:
        name: name of a backbone, such as `"650M"`, which stands for its last layer; or, with the number of a
            layer behind `@`, `"650M@25"`.

    Returns:
        The name of the backbone, and the number of the layer, None for the last.

    Raises:
        ValueError: for anything but a number behind `@`, or nothing before it.
    """
    backbone, mark, layer = name.partition("@")
    if not mark:
        return name, None
    if not backbone or not re.fullmatch("[1-9][0-9]*", layer):
        raise ValueError(f"expected a level with the number of a layer behind @, as 650M@25, got {name!r}")
    return backbone, int(layer)


@dataclass(frozen=True)
class Level:
    """The name and the shape of one backbone of a family, and the layer that its embedding is taken from.

    Attributes:
        name: name of the level, such as `"650M"` for the last layer of a backbone, or `"650M@25"` for layer
            25. It names modules, so it has no dot.
        num_layers: number of transformer layers that the backbone has in all; None where the level is only a
            name and a width.
        width: number of features of each token's embedding.
        attention_heads: number of attention heads in a layer; each has `width / attention_heads` features.
            None where the level is only a name and a width.
        reference: where on the Hub the backbone came from. In a saved checkpoint, where it is read from,
            instead of from the checkpoint.
        family: name of the family of models that the backbone belongs to.
        facts: further facts of its architecture, by the names that its family gives them.

    Raises:
        ValueError: for a name that no module can have, a layer that the backbone does not have, or heads that
            would not be of one even size.

    Examples:
        >>> level = rd_torch.Level("tiny@1", num_layers=2, width=32, attention_heads=4)
        >>> level.backbone, level.layer, level.depth, level.is_last
        ('tiny', 1, 1, False)
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
        layer = self.layer
        if layer is not None and self.num_layers is not None and layer > self.num_layers:
            raise ValueError(
                f"expected a layer from 1 to {self.num_layers}, which {self.backbone} has, got {self.name}"
            )
        heads = self.attention_heads
        if heads and self.family != TRANSFORMERS_FAMILY and self.width % (2 * heads):
            raise ValueError(
                f"expected heads of an even size, got width {self.width} "
                f"over {self.attention_heads} heads in level {self.name}"
            )

    @property
    def backbone(self) -> str:
        """Name of the backbone, which levels of several of its layers share."""
        return split_level(self.name)[0]

    @property
    def layer(self) -> int | None:
        """Number of the layer that the name states, from 1; None for the last layer."""
        return split_level(self.name)[1]

    @property
    def depth(self) -> int | None:
        """Number of layers that run; None where nobody described the backbone."""
        return self.num_layers if self.layer is None else self.layer

    @property
    def is_last(self) -> bool:
        """Whether all layers run, so that the embedding is the backbone's final one."""
        return self.depth == self.num_layers

    @property
    def title(self) -> str:
        """What people call the family; empty where the level is only a name and a width."""
        return "" if self.num_layers is None else TITLES.get(self.family, self.family)

    @property
    def architecture(self) -> Any:
        """What a digest must know besides tensors and widths: heads, layer, and what is not as in ESM-2."""
        layers = [] if self.is_last or self.num_layers is None else [self.depth, self.num_layers]
        if self.family == ESM2_FAMILY and not self.facts and not layers:
            return self.attention_heads
        return [self.attention_heads, self.family, dict(self.facts), *layers]

    @property
    def shape(self) -> tuple[int, int, int]:
        """All layers, width and heads of the backbone; a ValueError where the level is a name and a width."""
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


def level_to_dict(level: Level) -> dict[str, Any]:
    """Return a level as a dictionary of JSON values, in which usual facts are left out."""
    values = asdict(level)
    usual = {"family": ESM2_FAMILY, "facts": {}}
    return {key: value for key, value in values.items() if key not in usual or value != usual[key]}


def level_from_dict(values: Mapping[str, Any]) -> Level:
    """Return the level of which `RDConfig.to_dict` returned these values."""
    reference = values.get("reference")
    return Level(**{**values, "reference": reference and Reference(**reference)})
