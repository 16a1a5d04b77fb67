"""`Finder`: from a window of queries to what is near them, in two stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from rd_torch.batching import plan_batches
from rd_torch.embedding import window_embedder
from rd_torch.model import RDModel
from rd_torch.searching.building import require_model
from rd_torch.searching.hits import Hit
from rd_torch.searching.index import Index, to_units
from rd_torch.store import Compute, Window


class Near(NamedTuple):
    """The proteins near one vector, most similar first.

    Attributes:
        places: places of the proteins in the index.
        similarities: similarities that they are sorted by.
        first: similarities by the first features.
    """

    places: np.ndarray
    similarities: np.ndarray
    first: np.ndarray


class Finder:
    """Finds the proteins of an index that are near queries.

    The first stage finds `candidates` proteins by the first features. The second reads their whole vectors
    from the stores, and keeps the `k` most similar.

    Args:
        model: the model that made the stores.
        index: the index.
        k: number of proteins to find for each query.
        candidates: number of proteins that the first stage hands on; at least `k`.
        first_stage_only: whether there is no second stage; then backbones beyond the first features do not
            run, and the model may lack them.
        tokens_per_batch: number of tokens, padding included, that a batch holds at most; by default as many
            as half of the free memory takes.

    Raises:
        ValueError: for another model than that of the index, and numbers below 1 or `candidates` below `k`.
    """

    def __init__(
        self,
        model: RDModel,
        index: Index,
        *,
        k: int = 10,
        candidates: int = 300,
        first_stage_only: bool = False,
        tokens_per_batch: int | None = None,
    ) -> None:
        if k < 1 or candidates < k:
            raise ValueError(
                f"expected k of at least 1 and candidates of at least k, got {k} and {candidates}"
            )
        require_model(model, index.config, first_alone=first_stage_only)
        self.index, self.k, self.candidates = index, k, candidates
        self.first_stage_only = first_stage_only
        facts = index.config.facts
        if first_stage_only:
            facts = replace(facts, levels=(index.config.first_level,), widths=(index.config.first_width,))
        budget, _ = plan_batches(model.family(facts.width).values(), tokens_per_batch)
        self._width = facts.width
        self._embed = window_embedder(model, replace(facts, tokens_per_batch=budget))

    def hits(self, window: Window[str], failures: dict[int, str]) -> Iterator[Hit]:
        """Find what is near the queries of a window.

        Args:
            window: records of queries.
            failures: to which the places and reasons of queries that cannot be embedded are added.

        Yields:
            The hits, query by query in order, most similar first.
        """
        queries, vectors = self.embed(window, failures)
        for query, near in zip(queries, self.near(vectors), strict=True):
            for rank, (place, similarity, first) in enumerate(zip(*near, strict=True), start=1):
                name, length = window.names[query], window.lengths[query] or 0
                yield Hit(name, self.index.identifiers[place], rank, float(similarity), float(first), length)

    def embed(self, window: Window[str], failures: dict[int, str]) -> tuple[list[int], np.ndarray]:
        """Return the places in a window of the queries that could be embedded, and their vectors."""
        return embed_window(self._embed, window, failures, self._width)

    def near(self, vectors: np.ndarray, places: np.ndarray | None = None, k: int | None = None) -> list[Near]:
        """Find the proteins near vectors.

        Args:
            vectors: `(queries, width)` vectors of the index's model.
            places: places of the proteins that may be found; by default all.
            k: number of proteins to find for each; by default that of the finder.
        """
        if not len(vectors):
            return []
        k = k or self.k
        first_width = self.index.config.first_width
        wanted = k if self.first_stage_only else max(k, self.candidates)
        prefix = vectors[:, :first_width]
        first, found = (
            self.index.first(prefix, wanted)
            if places is None
            else self.index.first_among(prefix, wanted, places)
        )
        similarities = first if self.first_stage_only else self._second(vectors, found)
        similarities = np.where(found < 0, -np.inf, similarities)
        order = np.lexsort((found, -similarities), axis=1)[:, :k]
        rows = (np.take_along_axis(each, order, 1) for each in (found, similarities, first))
        return [Near(*(each[near[0] >= 0] for each in near)) for near in zip(*rows, strict=True)]

    def _second(self, vectors: np.ndarray, found: np.ndarray) -> np.ndarray:
        """Return `(queries, candidates)` similarities by all features."""
        units = to_units(vectors, self.index.mean)
        similarities = np.zeros(found.shape, np.float32)
        wanted = np.unique(found)
        for places, rows in self.index.rows(wanted[wanted >= 0]):
            by_row = units @ to_units(rows, self.index.mean).T
            slots = np.searchsorted(places, found).clip(max=len(places) - 1)
            queries, columns = np.nonzero(places[slots] == found)
            similarities[queries, columns] = by_row[queries, slots[queries, columns]]
        return similarities


def embed_window(
    embed: Compute[str], window: Window[str], failures: dict[int, str], width: int
) -> tuple[list[int], np.ndarray]:
    """Embed the records of a window in their order.

    Args:
        embed: embeds a window batch by batch.
        window: the records.
        failures: to which the places and reasons of records that cannot be embedded are added.
        width: number of features.

    Returns:
        The places of the others, and their `(records, width)` vectors.
    """
    failures |= window.faults
    rows = {place: row.float().numpy() for batch in embed(window, failures) for place, row in batch}
    places = sorted(rows)
    return places, np.stack([rows[place] for place in places]) if places else np.zeros((0, width), np.float32)
