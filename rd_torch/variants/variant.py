"""`Variant`: substitutions in a wild type, read from their notation or from a whole mutated sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from rd_torch.letters import Corrections, read_residues
from rd_torch.variants.notation import Change, Written, read_notation

AMINO_ACIDS: Final = "ACDEFGHIKLMNPQRSTVWY"
"""The twenty amino acids, to which `all_single` mutates."""

KNOWN: Final = frozenset(f"{AMINO_ACIDS}UO")
"""Letters that stand for one amino acid; selenocysteine and pyrrolysine are rare, but no guess."""


class Substitution(NamedTuple):
    """One residue of the wild type that another takes the place of.

    Attributes:
        site: index of the residue in the wild type, from 0.
        wild: letter of the wild type there.
        mutant: letter in its place, which is another one.
    """

    site: int
    wild: str
    mutant: str


class Variant(NamedTuple):
    """A protein that differs from the wild type by substitutions.

    Attributes:
        name: the variant as it was written.
        substitutions: its substitutions, by site; none for the wild type.
    """

    name: str
    substitutions: tuple[Substitution, ...]

    @property
    def sites(self) -> tuple[int, ...]:
        """Indices of the residues that differ, from 0, rising."""
        return tuple(each.site for each in self.substitutions)

    def mutate(self, wild_type: str) -> str:
        """Return the sequence of the variant."""
        letters = list(wild_type)
        for each in self.substitutions:
            letters[each.site] = each.mutant
        return "".join(letters)


def read_wild_type(sequence: str) -> str:
    """Read the sequence of a wild type: residues alone, because a letter that is none has no place in it.

    Args:
        sequence: the sequence as it is written; lower case and blanks are as in `rd_torch.embed`.

    Returns:
        The residues, one upper-case letter each.

    Raises:
        ValueError: for a text that is no sequence, and letters that are no residue.
    """
    corrections = Corrections()
    residues = read_residues(sequence, corrections, strict=True)
    corrections.warn()
    return residues


def read_variant(text: str, wild_type: str, first: int = 1) -> Variant:
    """Read a variant, and hold it against the wild type.

    Args:
        text: the variant, in a notation that `read_notation` describes.
        wild_type: residues of the wild type.
        first: the number that the text has for the first residue of the wild type.

    Returns:
        The variant. Substitutions of a letter by itself are checked, and left out.

    Raises:
        ValueError: for a text that cannot be read, a position that the wild type does not have, a letter that
            it does not have there or that is no amino acid, and two substitutions at one position.
    """
    return place_variant(text, read_notation(text), wild_type, first)


def place_variant(text: str, written: Written, wild_type: str, first: int = 1) -> Variant:
    """Hold what was read against the wild type; arguments and errors are those of `read_variant`."""
    found: dict[int, Substitution] = {}
    for wild, number, mutant in written.changes:
        site = number - first
        if not 0 <= site < len(wild_type):
            raise ValueError(
                f"expected a position from {first} to {first + len(wild_type) - 1}, which the wild type has, "
                f"got {number}: {text!r}"
            )
        if wild_type[site] != wild:
            raise ValueError(
                f"expected {wild_type[site]} at position {number}, where the wild type has it, got {wild}: "
                f"{text!r}"
            )
        if site in found:
            raise ValueError(f"expected each position once, got {number} twice: {text!r}")
        if mutant != wild:
            _require_known(wild, number)
        found[site] = Substitution(site, wild, mutant)
    changed = (found[site] for site in sorted(found))
    return Variant(text, tuple(each for each in changed if each.mutant != each.wild))


def _require_known(wild: str, number: int) -> None:
    """Raise a ValueError where the wild type has no amino acid that a new one could be compared with."""
    if wild not in KNOWN:
        raise ValueError(f"expected an amino acid of the wild type at position {number}, got {wild}")


def read_variants(variants: Iterable[str | Variant], wild_type: str, first: int = 1) -> list[Variant]:
    """Read variants that are given in Python, and hold all of them against the wild type.

    Args:
        variants: texts, or variants that were read before.
        wild_type: residues of the wild type.
        first: the number that the texts have for its first residue.

    Raises:
        TypeError: for one string in place of several variants, and for an item that is no text.
        ValueError: for a variant that cannot be read or does not fit the wild type.
    """
    if isinstance(variants, str):
        raise TypeError(f"expected several variants, got one string: put it in a list, [{variants!r}]")
    found = []
    for number, each in enumerate(variants, start=1):
        if isinstance(each, Variant):
            changes = (Change(wild, site + first, mutant) for site, wild, mutant in each.substitutions)
            found.append(place_variant(each.name, Written(tuple(changes)), wild_type, first))
        elif isinstance(each, str):
            found.append(read_variant(each, wild_type, first))
        else:
            raise TypeError(f"expected variants as text, got {type(each).__name__} as item number {number:,}")
    return found


def compare_sequence(sequence: str, wild_type: str, name: str, first: int = 1) -> Variant:
    """Read a variant from its whole sequence.

    Args:
        sequence: the mutated sequence as it is written.
        wild_type: residues of the wild type.
        name: name of the variant.
        first: number of the first residue of the wild type in messages.

    Returns:
        The variant.

    Raises:
        ValueError: for a text that is no sequence, a sequence of another length, which has lost or gained
            residues, and a new letter that is no amino acid.
    """
    residues = read_residues(sequence, Corrections(), strict=True)
    if len(residues) != len(wild_type):
        change = "deletions" if len(residues) < len(wild_type) else "insertions"
        raise ValueError(
            f"expected {len(wild_type):,} residues, as the wild type has, got {len(residues):,}: {change} "
            "have no score here"
        )
    pairs = enumerate(zip(wild_type, residues, strict=True))
    substitutions = tuple(Substitution(site, *letters) for site, letters in pairs if letters[0] != letters[1])
    for site, wild, mutant in substitutions:
        if mutant not in KNOWN:
            raise ValueError(f"expected an amino acid at position {site + first}, got {mutant}")
        _require_known(wild, site + first)
    return Variant(name, substitutions)


def name_of(substitutions: Sequence[Substitution], first: int = 1) -> str:
    """Return the usual name of substitutions, such as `A24G:L30V`; `WT` where there are none."""
    names = (f"{wild}{site + first}{mutant}" for site, wild, mutant in substitutions)
    return ":".join(names) or "WT"


def all_single(wild_type: str, first: int = 1) -> Iterator[Variant]:
    """Make every variant that has one substitution by one of the twenty amino acids.

    Args:
        wild_type: residues of the wild type.
        first: number of its first residue.

    Yields:
        The variants, site after site; sites of X and the like are left out.

    Examples:
        >>> [variant.name for variant in rd_torch.variants.all_single("MK")][:3]
        ['M1A', 'M1C', 'M1D']
    """
    for site, wild in enumerate(wild_type):
        for mutant in AMINO_ACIDS if wild in KNOWN else "":
            if mutant != wild:
                change = (Substitution(site, wild, mutant),)
                yield Variant(name_of(change, first), change)


def find_numbering(written: Sequence[Sequence[Change]], wild_type: str, first: int) -> int | None:
    """Find the number of the first residue by which substitutions fit, if it is not the given one.

    With a wrong number, one letter in twenty fits by chance. So letters that fit do not say that the number
    is right, and those that do not fit do not say that it is wrong.

    Args:
        written: substitutions of several variants.
        wild_type: residues of the wild type.
        first: the number that was given.

    Returns:
        The only number by which nine letters in ten fit, where fewer than half fit by the given one; else
        None.
    """
    letters = {(each.number, each.wild) for changes in written for each in changes}
    sites: dict[str, list[int]] = {}
    for site, wild in enumerate(wild_type):
        sites.setdefault(wild, []).append(site)
    fits = Counter(number - site for number, wild in letters for site in sites.get(wild, ()))
    (best, most), (_, second) = [*fits.most_common(2), (0, 0), (0, 0)][:2]
    if most < 0.9 * len(letters) or most == second or fits[first] >= 0.5 * len(letters):
        return None
    return best
