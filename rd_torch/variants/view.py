"""`View`: the part of a long sequence that a model sees, around what it is asked about."""

from __future__ import annotations

from typing import Final, NamedTuple, TypeAlias

from rd_torch.variants.asking import hide

Sites: TypeAlias = tuple[int, ...]
"""Indices of residues that are asked about together, from 0, rising."""

STEPS_OF_A_WINDOW: Final = 4
"""Steps into which a window is cut where one pass of it serves several sites."""


class View(NamedTuple):
    """The part of a sequence that the model sees.

    Attributes:
        length: number of residues that it sees at once; None for all.
    """

    length: int | None = None

    def start(self, sites: Sites, residues: int, step: int = 1) -> int:
        """Return where the window around some sites begins.

        Args:
            sites: indices of the sites, rising.
            residues: number of residues of the sequence.
            step: the window begins at a multiple of this, or at the end of the sequence.

        Raises:
            ValueError: for sites that lie further apart than a window is long.
        """
        if self.length is None or residues <= self.length:
            return 0
        if sites[-1] - sites[0] >= self.length:
            raise ValueError(
                f"expected sites within a window of {self.length} residues, which masks them together, got "
                f"some that lie {sites[-1] - sites[0]} apart"
            )
        start = (sites[0] + sites[-1] + 1 - self.length) // 2 // step * step
        return min(max(start, 0), residues - self.length)

    def cut(self, sequence: str, start: int) -> str:
        """Return the window of a sequence that begins at an index."""
        return sequence if self.length is None else sequence[start : start + self.length]

    def question(self, sequence: str, sites: Sites) -> str:
        """Return the window around some sites, with these hidden."""
        start = self.start(sites, len(sequence))
        return hide(self.cut(sequence, start), [site - start for site in sites])


def view_of(window: int | None) -> View:
    """Return the view of a window's length; raise a ValueError for one of no residues."""
    if window is not None and window < 1:
        raise ValueError(f"expected a window of at least 1 residue, got {window}")
    return View(window)
