"""`Candidates`: the levels that a chain may be fitted of, from which a fit takes what it was told to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Unpack

import torch
from torch import Tensor, nn

from rd_torch import hardware
from rd_torch.alphabet import Alphabet
from rd_torch.backbone import (
    Backbone,
    Packing,
    as_backbone,
    as_family,
    is_real,
    is_residue,
    one_alphabet,
    run_backbones,
)
from rd_torch.batching import plan_batches, run_batches
from rd_torch.choices import Criterion, check_names
from rd_torch.choosing import Chosen, Layers, candidates_of, choose, unlabelled
from rd_torch.labelled import Labelled, by_labels, require_labelled
from rd_torch.letters import Kind
from rd_torch.levels import split_level
from rd_torch.modules import digest_of, evaluating
from rd_torch.moments import Alternatives, RunningMoments, count_products
from rd_torch.sequences import normalize_sequences
from rd_torch.solve import SOLVE_DEFAULTS, SolveOptions, check_options
from rd_torch.store import ProgressCallback
from rd_torch.sums import Summands, Sums

CRITERION: Final[Criterion] = "rank"
"""The criterion by which layers are chosen unless another one is named."""


class FitOptions(SolveOptions, total=False):
    """The options of `fit` besides where it reads and writes; their meanings and defaults stand there."""

    layers: Layers | None
    choose_layers: Criterion
    labelled: Labelled | None
    final_norm: bool


def solve_options(options: FitOptions) -> SolveOptions:
    """Return those options of a fit that `solve_stages` takes."""
    return {name: value for name, value in options.items() if name in SOLVE_DEFAULTS}  # type: ignore[return-value]  # names are the options'


def summing_options(options: FitOptions) -> FitOptions:
    """Return those options of a fit on which its sums depend, and no table of labels."""
    names = ("layers", "final_norm")
    return {name: value for name, value in options.items() if name in names}  # type: ignore[return-value]  # names are the options'


@dataclass(frozen=True)
class Candidates:
    """The levels that a chain may be fitted of.

    Attributes:
        family: the backbone of each candidate, by its name.
        groups: for each level of the chain the names of its candidates, smallest level first.
        final_norm: whether a backbone's last LayerNorm acts on layers before the last.
    """

    family: Mapping[str, Backbone]
    groups: Sequence[Sequence[str]]
    final_norm: bool = True

    @classmethod
    def of(cls, backbones: Mapping[str, nn.Module], **options: Unpack[FitOptions]) -> Candidates:
        """Make backbones of our own that share the tensors of the given ones, and check the options of a fit.

        Args:
            backbones: the family by level, smallest first, as in `fit`.
            **options: options of `fit`.

        Raises:
            ValueError: for an option that does not exist or does not fit the backbones.
            TypeError: for a backbone of another kind.
        """
        check_names(options, FitOptions.__annotations__)
        modules: dict[int, Backbone] = {}
        shared = {name: modules.setdefault(id(each), as_backbone(each)) for name, each in backbones.items()}
        depths = {name: each.num_layers for name, each in shared.items()}
        groups = candidates_of(depths, options.get("layers"))
        named = {name: each for group, each in zip(groups, shared.values(), strict=True) for name in group}
        family = as_family(named)
        if family:
            one_alphabet(family)
        widths = [family[group[0]].embed_dim for group in groups]
        check_options(widths, **solve_options(options))
        if options.get("choose_layers") == "labels":
            require_labelled(options.get("labelled"))
        return cls(family, groups, options.get("final_norm", True))

    @property
    def kind(self) -> Kind:
        """What the sequences are of, as the alphabet of the backbones says."""
        return next(iter(self.family.values())).alphabet.kind

    @property
    def widths(self) -> dict[str, int]:
        """Width of each candidate's raw embedding, by its name."""
        return {name: backbone.embed_dim for name, backbone in self.family.items()}

    def plan(self, tokens_per_batch: int | None) -> tuple[int, torch.device]:
        """Settle how large batches are and where they go, as `plan_batches` does."""
        return plan_batches(self.family.values(), tokens_per_batch)

    def summands(self) -> Summands:
        """Return what the moments of the candidates' raw embeddings are of.

        Raises:
            MemoryError: for so many candidates that there is no memory for their moments.
        """
        levels = [backbone.level(name) for name, backbone in self.family.items()]
        shapes: list[Any] = [level.architecture for level in levels]
        if not self.final_norm and not all(level.is_last for level in levels):
            shapes.append("without final norm")
        once = {split_level(name)[0]: backbone for name, backbone in self.family.items()}
        alternatives = self._alternatives
        if alternatives is not None:
            self._require_memory()
        return Summands(
            self.widths,
            lambda: digest_of(shapes, {f"{name}.": each.embedding_tensors() for name, each in once.items()}),
            alternatives=alternatives,
        )

    @property
    def moments_bytes(self) -> int:
        """Number of bytes that the moments of all candidates take."""
        return 8 * count_products(self._alternatives or [[sum(self.widths.values())]])

    @property
    def _alternatives(self) -> Alternatives | None:
        """Widths of the candidates by group; None where there is nothing to choose."""
        if all(len(group) == 1 for group in self.groups):
            return None
        return [[self.widths[name] for name in group] for group in self.groups]

    def _require_memory(self) -> None:
        """Raise a MemoryError where the moments of candidates would take more memory than is free."""
        needed, free = self.moments_bytes, hardware.free_bytes(torch.device("cpu"))
        if free is not None and needed > free:
            raise MemoryError(
                f"expected memory for the moments of {len(self.family):,} candidate layers, "
                f"{needed / 2**30:.1f} GiB, got {free / 2**30:.1f} GiB free: name fewer layers"
            )

    def add_moments(
        self,
        moments: RunningMoments,
        sequences: Iterable[str],
        tokens_per_batch: int,
        progress: ProgressCallback = lambda residues, before: None,
    ) -> int:
        """Add the residues of sequences to the joint moments of the candidates.

        Args:
            moments: the moments to add to.
            sequences: residues alone, one letter each; they are read as they are needed.
            tokens_per_batch: number of tokens, padding included, that a batch holds at most.
            progress: function that is called with a number of residues that are done, and False.

        Returns:
            The number of sequences that were added.
        """
        count = 0
        for indices, rows, _ in self.embed(sequences, tokens_per_batch):
            moments.update(rows)
            progress(len(rows), False)
            count += len(indices)
        return count

    def means(self, sequences: Iterable[str], tokens_per_batch: int) -> dict[str, Tensor]:
        """Return `(sequences, width)` means of raw embeddings over residues, by candidate, on the CPU."""
        found: dict[int, Tensor] = {}
        for indices, rows, owners in self.embed(sequences, tokens_per_batch):
            exact, places = rows.cpu().double(), owners.cpu()
            sums = exact.new_zeros(len(indices), rows.shape[1]).index_add(0, places, exact)
            found |= zip(indices, sums / places.bincount(minlength=len(indices))[:, None], strict=True)
        table = torch.stack([found[number] for number in range(len(found))])
        return dict(zip(self.family, table.split(list(self.widths.values()), dim=1), strict=True))

    def choose(self, sums: Sums, **options: Unpack[FitOptions]) -> Chosen:
        """Choose a candidate for each level.

        Args:
            sums: the moments of all residues.
            **options: options of `fit`.

        Returns:
            The levels, and what each candidate was worth.
        """
        criterion, solving = options.get("choose_layers", CRITERION), solve_options(options)
        if criterion != "labels":
            return choose(self.groups, unlabelled(sums.moments, sums.widths, criterion, **solving))
        labelled = require_labelled(options.get("labelled"))
        sequences = normalize_sequences(labelled.sequences, self.kind)
        raw = self.means(sequences, sums.tokens_per_batch)
        return choose(self.groups, by_labels(raw, labelled.labels, sums.moments, sums.widths, **solving))

    def embed(
        self, sequences: Iterable[str], tokens_per_batch: int
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield batches: numbers of sequences, raw embeddings of residues, and the row of each residue."""
        first = next(iter(self.family.values()))
        compute = partial(_embed_residues, self, first.alphabet)
        with evaluating(*self.family.values()):
            for batch in run_batches(compute, sequences, first.alphabet, tokens_per_batch, first.device):
                yield batch.indices, *batch.result


@torch.no_grad()
def _embed_residues(candidates: Candidates, alphabet: Alphabet, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(residues, sum of widths)` raw embeddings of a batch's residues, and the row of each."""
    packing = Packing.of(is_real(tokens, alphabet))
    residues = packing.pack(is_residue(tokens, alphabet))
    raw = run_backbones(candidates.family, tokens, packing, final_norm=candidates.final_norm)
    return torch.cat([each[residues] for each in raw.values()], dim=1), packing.sequence[residues]
