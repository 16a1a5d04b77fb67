"""`Finder`: from a window of queries to what is near them, in two stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final, NamedTuple

import numpy as np

from rd_torch.batching import plan_batches
from rd_torch.embedding import window_embedder
from rd_torch.model import RDModel
from rd_torch.nesting import Nesting
from rd_torch.searching.config import IndexConfig
from rd_torch.searching.hits import Hit
from rd_torch.searching.index import Index, to_units
from rd_torch.searching.recall import CANDIDATES
from rd_torch.store import Compute, Window

NUMBERS_AT_ONCE: Final = 2**23
"""Number of features that the second stage multiplies at once."""


NOT_FINITE: Final = "expected a finite embedding, got NaN or infinity"


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

    Attributes:
        tokens_per_batch: number of tokens that a batch of queries holds at most.
        fingerprint: fingerprint of the model.

    Raises:
        ValueError: for another model than that of the index, and numbers below 1 or `candidates` below `k`.
    """

    def __init__(
        self,
        model: RDModel,
        index: Index,
        *,
        k: int = 10,
        candidates: int = CANDIDATES,
        first_stage_only: bool = False,
        tokens_per_batch: int | None = None,
    ) -> None:
        if k < 1:
            raise ValueError(f"expected k of at least 1, got {k}")
        if candidates < k and not first_stage_only:
            raise ValueError(f"expected candidates to be k, which is {k:,}, or more, got {candidates:,}")
        self.fingerprint = require_model(model, index.config, first_alone=first_stage_only)
        self.index, self.k, self.candidates = index, k, candidates
        self.first_stage_only = first_stage_only
        facts = index.config.facts
        if first_stage_only:
            facts = replace(facts, levels=(index.config.first_level,), widths=(index.config.first_width,))
        self.tokens_per_batch, _ = plan_batches(model.family(facts.width).values(), tokens_per_batch)
        self._width = facts.width
        # Queries are not stored, so nothing is gained by a half type.
        facts = replace(facts, tokens_per_batch=self.tokens_per_batch, save_dtype="float32")
        self._embed = window_embedder(model, facts)

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
                yield Hit(
                    query=window.names[query],
                    target=self.index.identifier(place),
                    rank=rank,
                    similarity=float(similarity),
                    first_similarity=float(first),
                    query_length=window.lengths[query] or 0,
                    target_length=self.index.length(place) or 0,
                )

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
        first, found = self.index.first(vectors[:, :first_width], wanted, places)
        similarities = first if self.first_stage_only else self._second(vectors, found)
        first, similarities = first.clip(-1, 1), np.where(found < 0, -np.inf, similarities.clip(-1, 1))
        order = np.lexsort((found, -similarities), axis=1)[:, :k]
        rows = (np.take_along_axis(each, order, 1) for each in (found, similarities, first))
        return [Near(*(each[near[0] >= 0] for each in near)) for near in zip(*rows, strict=True)]

    def _second(self, vectors: np.ndarray, found: np.ndarray) -> np.ndarray:
        """Return `(queries, candidates)` similarities by all features, in float64."""
        units, flat = to_units(vectors, self.index.mean), found.ravel()
        similarities = np.zeros(len(flat))
        pairs = np.argsort(flat, kind="stable")  # pairs of a query and a candidate, by the candidate's place
        wanted = np.unique(flat)
        for places, rows in self.index.rows(wanted[wanted >= 0]):
            others = to_units(rows, self.index.mean)
            start, end = np.searchsorted(flat, (places[0], places[-1] + 1), sorter=pairs)
            step = max(1, NUMBERS_AT_ONCE // units.shape[1])
            for part in (pairs[each : min(each + step, end)] for each in range(start, end, step)):
                slots = np.searchsorted(places, flat[part])
                queries = units[part // found.shape[1]]
                similarities[part] = np.einsum("pw,pw->p", queries, others[slots])
        return similarities.reshape(found.shape)


def require_model(model: RDModel, config: IndexConfig, *, first_alone: bool = False) -> str:
    """Require the model that made the stores of an index.

    Args:
        model: the model.
        config: what the index is of.
        first_alone: whether a part of it that suffices for the first stage will do.

    Returns:
        The model's fingerprint.

    Raises:
        ValueError: for another model.
    """
    facts = config.facts
    needed = config.first_width if first_alone else facts.width
    pairs = zip(facts.level_fingerprints, facts.widths, strict=False)
    known = {facts.fingerprint, *(each for each, width in pairs if width >= needed)}
    # Stores that were combined from raw embeddings know the maps alone.
    found = model.fingerprint()
    if known.isdisjoint((found, Nesting(model.config, model.stages).fingerprint())):
        raise ValueError(
            f"expected the model that made the stores, {facts.model or 'of unknown name'}, with levels "
            f"{', '.join(facts.levels)} in {facts.backbone_dtype}, got another one, or a part of it"
        )
    return found


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
    failures |= {place: NOT_FINITE for place, row in rows.items() if not np.isfinite(row).all()}
    places = sorted(rows.keys() - failures.keys())
    return places, np.stack([rows[place] for place in places]) if places else np.zeros((0, width), np.float32)
