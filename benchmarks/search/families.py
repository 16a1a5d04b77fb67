"""Are neighbours right: is the nearest protein of the same family?

    rd-torch embed natural50_train.fasta.xz -o train.parquet
    python -m benchmarks.search.families --store train.parquet --output FILE

The families are those that headers of `natural50_train.fasta.xz` in the data folder tell: superfamilies and
folds of SCOPe domains, and names of Swiss-Prot entries (`DNAA_ECOLI` is DNAA). All proteins of one kind are
indexed. Each whose family has another member is asked for, itself left out. A row has the share whose nearest
protein is of its family: by the first features alone, at each width, and in two stages, by `Finder.near`.
Beside it stands the share by the cosine of the amino acids' composition, which needs no model, and that of a
protein drawn by chance. Intervals are 95 % of a bootstrap over families.

No two of these proteins have more than about half of their residues in common, so that relatives are remote.
Related proteins of Swiss-Prot may have different names, and a name may be of unrelated proteins in two
species, so that names are a rough truth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

import rd_torch
from benchmarks.options import add_data_option, add_model_option, data_folder, new_parser
from benchmarks.result import Row, environment, report_progress, write_result
from benchmarks.search.exact import directions
from benchmarks.search.labelled import Labelled, read_labelled, share_with_interval
from benchmarks.search.parts import index_of
from rd_torch.searching import Finder
from rd_torch.store import Store


def nearest_others(finder: Finder, queries: Sequence[str], store: Store) -> list[str]:
    """Return the nearest protein of an index to each of some of its proteins, itself left out.

    Args:
        finder: What searches the index, for two proteins or more.
        queries: Identifiers of the proteins.
        store: A store that has them.
    """
    names, found = finder.index.identifiers, []
    for query, near in zip(queries, finder.near(np.asarray(store.read(queries))), strict=True):
        found.append(next(names[place] for place in near.places if names[place] != query))
    return found


def nearest_by_cosine(rows: np.ndarray, names: Sequence[str], queries: Sequence[str]) -> list[str]:
    """Return the nearest other protein to each of some, by the cosine of centred rows.

    Args:
        rows: `(proteins, features)`.
        names: Identifiers of the proteins.
        queries: Identifiers of those that are asked for.
    """
    units = directions(rows, rows.mean(0))
    places = {name: place for place, name in enumerate(names)}
    cosines = units[[places[query] for query in queries]] @ units.T
    cosines[np.arange(len(queries)), [places[query] for query in queries]] = -np.inf
    return [names[place] for place in cosines.argmax(1)]


def chance(labels: Mapping[str, str], queries: Sequence[str]) -> float:
    """Return the expected share of queries of which another protein, drawn by chance, has the label."""
    counts = Counter(labels.values())
    return float(np.mean([counts[labels[query]] - 1 for query in queries])) / (len(labels) - 1)


def found_by_ways(
    model: rd_torch.RDModel, store: Store, names: Sequence[str], queries: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each way to search, and the nearest protein that it finds for each query."""
    widths = list(model.config.widths.values())
    for width in widths:
        with index_of(store, names, width) as index:
            alone = Finder(model, index, k=2, first_stage_only=True)
            yield f"the first {width}", nearest_others(alone, queries, store)
            if width == widths[0]:
                finder = Finder(model, index, k=2)
                way = f"the first {width}, then all of {finder.candidates} candidates"
                yield way, nearest_others(finder, queries, store)


def rows_of(
    model: rd_torch.RDModel, store: Store, labelled: Labelled, composition: Mapping[str, np.ndarray]
) -> Iterator[Row]:
    """Yield the rows of one kind of families."""
    names, queries = list(labelled.labels), labelled.with_relatives()
    by_chance = chance(labelled.labels, queries)
    shares = np.stack([composition[name] for name in names])
    ways = [
        ("the composition", nearest_by_cosine(shares, names, queries)),
        *found_by_ways(model, store, names, queries),
    ]
    for way, found in ways:
        right = [
            labelled.labels[query] == labelled.labels[near]
            for query, near in zip(queries, found, strict=True)
        ]
        yield {
            "families": labelled.name,
            "proteins": len(names),
            "queries": len(queries),
            "compared by": way,
            "nearest is right": share_with_interval([labelled.labels[query] for query in queries], right),
            "by chance": f"{by_chance:.4f}",
        }


def main() -> None:
    """Find the nearest protein of every one that has a relative."""
    parser = new_parser(__doc__)
    add_data_option(parser)
    add_model_option(parser)
    parser.add_argument("--store", required=True, type=Path, help="Embeddings of natural50_train.fasta.xz.")
    arguments = parser.parse_args()
    model = rd_torch.RDModel.from_pretrained(arguments.model)
    rows: list[Row] = []
    with rd_torch.open_store(arguments.store) as store:
        sets, composition = read_labelled(data_folder(arguments), store)
        for labelled in sets:
            rows += rows_of(model, store, labelled, composition)
            report_progress(f"{labelled.name}: done")
    title = f"Families of nearest proteins, {arguments.model}"
    write_result(title, rows, environment(), arguments.output)


if __name__ == "__main__":
    main()
