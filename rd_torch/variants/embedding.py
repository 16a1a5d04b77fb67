"""Embed variants into a store: as means, at the mutated sites, and as differences from the wild type."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from rd_torch.batching import plan_batches
from rd_torch.embedder import Embedder, prepare_where_possible
from rd_torch.embedding import facts_of, warn_of_renamed
from rd_torch.levels import SPECIAL_TOKENS
from rd_torch.model import RDModel
from rd_torch.modules import evaluating
from rd_torch.pooling import VARIANT_POOLS, Pools, pools_of
from rd_torch.sequences import WINDOW_BATCHES, Entry
from rd_torch.store import (
    Compute,
    Facts,
    Failure,
    Names,
    ProgressCallback,
    Record,
    Row,
    SaveDtype,
    Window,
    Work,
    format_of,
    gather,
)
from rd_torch.variants.tables import AllSingle, VariantTable, variants_in
from rd_torch.variants.variant import Variant, read_variants, read_wild_type

DIFFERENCE: Final = "-difference"


def embed_variants(  # noqa: PLR0913
    model: RDModel,
    wild_type: str,
    variants: Iterable[str | Variant],
    path: str | Path,
    *,
    pool: Pools = "mean",
    width: int | None = None,
    first: int = 1,
    form: str | None = None,
    save_dtype: SaveDtype = "float32",
    name: str = "",
    tokens_per_batch: int | None = None,
    progress: ProgressCallback = lambda residues, before: None,
) -> dict[str, Failure]:
    """Embed variants of a protein into a store, by the names of the variants.

    The embeddings are nested, so that the store can be cut to any width. The same call after a kill goes on
    where it was, as `embed_to_store` does. The wild type is embedded once, and equal variants of one batch
    are embedded once.

    Args:
        model: the chain.
        wild_type: sequence of the wild type.
        variants: variants, in a notation that `rd_torch.variants.read_notation` describes, or as
            `rd_torch.variants.Variant`s.
        path: the store; its suffix, `.h5` or `.parquet`, names the format.
        pool: one way to make a vector of a variant, or several, whose vectors are joined: `"mean"` of all
            residues; `"sites"` for the mean of the mutated residues alone; `"mean-difference"` and
            `"sites-difference"` for the same less that of the wild type, at the same sites.
        width: number of features to keep for each way; by default all.
        first: the number that the variants have for the first residue of the wild type.
        form: `"h5"` or `"parquet"`, in place of the suffix.
        save_dtype: type of the numbers in the store.
        name: name of the model, for the store.
        tokens_per_batch: number of tokens, padding included, that a batch holds at most; by default as many
            as half of the free memory takes.
        progress: function that is called with a number of residues that are done, and with True if an earlier
            run did them, else False.

    Returns:
        The variants that could not be embedded, by name: the wild type has no mutated sites.

    Raises:
        ValueError: for a variant that cannot be read or does not fit the wild type, a way to pool or a width
            that does not exist, and a store that was begun with something else.

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
        >>> variants = ["K6R", "K6R:T7W"]
        >>> pool = ["mean", "sites-difference"]
        >>> _ = rd_torch.embed_variants(model, "MQIFVKTLTG", variants, "variants.h5", pool=pool)
        >>> rd_torch.open_store("variants.h5").shape
        (2, 256)
    """
    residues = read_wild_type(wild_type)
    read = read_variants(variants, residues, first)
    entries = (Entry(each.name, each.mutate(residues), "", number) for number, each in enumerate(read, 1))
    store = Target(Path(path), form, save_dtype, name, tokens_per_batch)
    return embed_entries(model, residues, entries, store, pool=pool, width=width, progress=progress)


class Target(NamedTuple):
    """The store that variants are embedded into; `embed_variants` describes its parts."""

    path: Path
    form: str | None = None
    save_dtype: SaveDtype = "float32"
    name: str = ""
    tokens_per_batch: int | None = None


def embed_entries(
    model: RDModel,
    wild_type: str,
    entries: Iterable[Entry],
    target: Target,
    *,
    pool: Pools,
    width: int | None = None,
    progress: ProgressCallback = lambda residues, before: None,
) -> dict[str, Failure]:
    """Embed records of mutated sequences, which are read as they are needed; see `embed_variants`.

    Args:
        model: the chain.
        wild_type: residues of the wild type.
        entries: records of sequences as long as the wild type; those with a fault are left out.
        target: the store.
        pool: ways to make a vector of a variant.
        width: number of features to keep for each way; by default all.
        progress: function that is called with residues that are done.

    Returns:
        The records that could not be embedded, by name.
    """
    way = variant_pool_name(pool)
    form = format_of(target.path, target.form)
    budget, _ = plan_batches(model.family(width).values(), target.tokens_per_batch)
    facts = replace(facts_of(model, target.name, target.save_dtype, budget, width=width), pool=way)
    fixed = target.tokens_per_batch is not None
    with Work(target.path, form, facts, fixed_budget=fixed) as work:
        names = Names(work.format.key)
        records = (_record_of(entry, wild_type) for entry in entries)
        windows = gather(records, WINDOW_BATCHES * work.facts.tokens_per_batch, names)
        failures = work.fill(windows, _window_embedder(model, wild_type, work.facts), progress)
    warn_of_renamed(names.renamed)
    return failures


def embed_table(
    model: RDModel,
    table: VariantTable | AllSingle,
    target: Target,
    *,
    pool: Pools,
    width: int | None = None,
    progress: ProgressCallback = lambda residues, before: None,
) -> dict[str, Failure]:
    """Embed the variants of a table, row by row; see `embed_entries`.

    Raises:
        ValueError: for a table without a variant that can be read, or whose rows fit another numbering.
    """
    variant_pool_name(pool)
    for _ in variants_in(table, table):
        pass

    def entries() -> Iterator[Entry]:
        """Yield the mutated sequence of each row."""
        for row in table:
            sequence = "" if row.variant is None else row.variant.mutate(table.wild_type)
            yield Entry(row.name, sequence, str(table.path or ""), row.line, row.fault)

    return embed_entries(model, table.wild_type, entries(), target, pool=pool, width=width, progress=progress)


def variant_pool_name(pool: Pools) -> str:
    """Join ways to make a vector of a variant to the name that stores have for them.

    Args:
        pool: one way, several, or such a name.

    Raises:
        ValueError: for a way that does not exist, no way, or one that comes twice.
    """
    chosen = pool.split("+") if isinstance(pool, str) else list(pool)
    known = ("mean", *VARIANT_POOLS)
    if not chosen or not set(chosen) <= set(known) or len(set(chosen)) < len(chosen):
        listed = ", ".join(map(repr, known))
        raise ValueError(f"expected pool to be one or several of {listed}, each once, got {pool!r}")
    return "+".join(chosen)


def _record_of(entry: Entry, wild_type: str) -> Record[str]:
    """Return a record whose checksum is of the wild type too, on which differences depend."""
    name, letters, fault = entry.identifier, entry.sequence, entry.fault
    digested = f"{wild_type}\n{name}\n{letters}\n{'left out' if fault else ''}".encode(errors="surrogatepass")
    size = len(letters) + SPECIAL_TOKENS
    return Record(name, letters, len(letters), size, [digested], (entry.source, entry.line), fault)


def _window_embedder(model: RDModel, wild_type: str, facts: Facts) -> Compute[str]:
    """Make a function that embeds a window of mutated sequences; see `rd_torch.store.Compute`."""
    prepare_where_possible(model)
    embedder = Embedder(model, "none", facts.width, None, facts.tokens_per_batch, model.device)
    dtype, ways = getattr(torch, facts.save_dtype), pools_of(facts.pool)
    needs_wild = any(way.endswith(DIFFERENCE) for way in ways)
    wild: list[Tensor] = []  # the rows of the wild type, which is embedded when the first window is

    def embed_window(window: Window[str], failures: dict[int, str]) -> Iterator[list[Row]]:
        """Embed the records of a window that have no fault, equal ones once."""
        places: dict[str, list[int]] = {}
        for place, letters in enumerate(window.contents):
            if letters == wild_type and any(way.startswith("sites") for way in ways):
                failures[place] = "expected a variant with mutated sites, got the wild type, which has none"
            elif place not in window.faults:
                places.setdefault(letters, []).append(place)
        with evaluating(model):
            if needs_wild and not wild:
                wild.append(next(embedder({0: wild_type}))[0][1])
            failed: dict[int, str] = {}
            sequences = list(places)
            for rows in embedder(dict(enumerate(sequences)), failed):
                yield [
                    (place, _pool_variant(row, wild, _sites(sequences[number], wild_type), ways).to(dtype))
                    for number, row in rows
                    for place in places[sequences[number]]
                ]
        failures |= {place: why for number, why in failed.items() for place in places[sequences[number]]}

    return embed_window


def _sites(sequence: str, wild_type: str) -> list[int]:
    """Return the indices at which a sequence differs from the wild type."""
    pairs = enumerate(zip(sequence, wild_type, strict=True))
    return [site for site, (letter, wild) in pairs if letter != wild]


def _pool_variant(rows: Tensor, wild: list[Tensor], sites: list[int], ways: Iterable[str]) -> Tensor:
    """Return the vector of a variant, of means in float64.

    Args:
        rows: `(residues, width)` embedding of the variant.
        wild: that of the wild type alone; empty where no way needs it.
        sites: indices of the mutated residues.
        ways: ways to make a vector.
    """
    parts = []
    for way in ways:
        chosen = sites if way.startswith("sites") else slice(None)
        part = rows[chosen].double().mean(0)
        if way.endswith(DIFFERENCE):
            part -= wild[0][chosen].double().mean(0)
        parts.append(part)
    return torch.cat(parts).to(rows)
