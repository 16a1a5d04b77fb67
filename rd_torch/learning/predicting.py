"""`predict_to_table`: predictions of a proteome, in bounded memory, which outlive a kill."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from rd_torch.disk import require_folder, write_whole
from rd_torch.embedding import embed_to_store
from rd_torch.learning.findings import Findings
from rd_torch.learning.learned import RECORDS_AT_ONCE, Learned, work_folder
from rd_torch.learning.prediction import Prediction
from rd_torch.model import RDModel
from rd_torch.store import Failure, ProgressCallback, Store, failure_list, open_store, write_failures


def predict_to_table(
    learned: Learned,
    model: RDModel,
    proteins: Iterable[Any],
    output: str | Path,
    *,
    tokens_per_batch: int | None = None,
    progress: ProgressCallback = lambda residues, before: None,
) -> dict[str, Failure]:
    """Predict proteins into a table with tabs between columns.

    Embeddings go to a store in `<output>.part` first, so that the same call after a kill goes on where it
    was. The table appears when it is whole. Records that cannot be read or embedded are listed in
    `<output>.failed.tsv`.

    Args:
        learned: the predictor.
        model: the chain that it was learnt on, up to its level at least.
        proteins: records, as `rd_torch.embed_to_store` takes them.
        output: the table.
        tokens_per_batch: number of tokens that a batch holds at most, as in `rd_torch.embed`.
        progress: function that is called as in `rd_torch.embed_to_store`.

    Returns:
        The records that could not be predicted, by name.

    Raises:
        FileNotFoundError: if the folder of `output` is not there.
        ValueError: for another chain, and as `rd_torch.embed_to_store` does.
    """
    output, findings = Path(output), learned.findings
    require_folder(output)
    needed = learned.require_model(model)
    folder = work_folder(output)
    path = folder / ("embeddings.h5" if findings.per_residue else "embeddings.parquet")
    failures = embed_to_store(
        needed,
        proteins,
        path,
        pool=findings.pool,
        width=findings.width,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
    )
    with open_store(path) as store:
        predictions = _predictions(learned, store)
        write_whole(output, lambda part: write_table(predictions, findings, part))
    write_failures(failure_list(output), failures.items())
    shutil.rmtree(folder)
    return failures


def _predictions(learned: Learned, store: Store) -> Iterator[Prediction]:
    """Predict from a store, part by part."""
    for start in range(0, len(store), RECORDS_AT_ONCE):
        part = slice(start, start + RECORDS_AT_ONCE)
        vectors = cast(np.ndarray, store.read(part))
        yield from learned.of_vectors(store.identifiers[part], vectors)


def write_table(predictions: Iterable[Prediction], findings: Findings, path: Path) -> None:
    """Write predictions as a table with tabs between columns, the first row naming them.

    Args:
        predictions: the predictions.
        findings: what the predictor is.
        path: the table.
    """
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(columns_of(findings))
        writer.writerows(_cells(each, findings) for each in predictions)


def columns_of(findings: Findings) -> list[str]:
    """Return the names of a table's columns.

    Args:
        findings: what the predictor is.
    """
    first = ["identifier", *["position"] * findings.per_residue, findings.target]
    if findings.task == "regression":
        return [*first, "low", "high"]
    return [*first, *["right"] * bool(findings.right), *(f"p({name})" for name in findings.classes)]


def _cells(prediction: Prediction, findings: Findings) -> Sequence[Any]:
    """Return the cells of a row."""
    first = [prediction.identifier, *[prediction.position] * findings.per_residue]
    if findings.task == "regression":
        return [*first, *(f"{each:.6g}" for each in (prediction.value, prediction.low, prediction.high))]
    value = ";".join(prediction.value) if findings.task == "multilabel" else prediction.value
    right = [f"{prediction.right:.3f}"] if prediction.right is not None else []
    return [*first, value, *right, *(f"{each:.4f}" for each in prediction.probabilities.values())]
