"""`learn`: a table of labelled sequences to a predictor on the narrowest embedding that is not worse."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypedDict, Unpack

import numpy as np

from rd_torch.choices import HeadName, LearningTask, check_choice, check_names
from rd_torch.embedder import require_prefixes
from rd_torch.embedding import embed, embed_to_store
from rd_torch.labelled import require_sklearn
from rd_torch.learning.estimators import HEADS_OF, SETTINGS
from rd_torch.learning.examples import Examples, Table, read_examples
from rd_torch.learning.findings import Findings, WidthRow
from rd_torch.learning.learned import Learned, require_free, work_folder
from rd_torch.learning.scoring import NAMES, Judge, chance
from rd_torch.learning.selecting import LEAST_FOLDS, Found, Rows, fit_final, select
from rd_torch.learning.splitting import Split, split_sequences
from rd_torch.model import RDModel
from rd_torch.pooling import Pools, cut_ways, pool_name
from rd_torch.store import ProgressCallback, open_store

DEFAULT_MODEL: Final = "esm2-rd-mini"

MOST_ROWS: Final = 50_000
"""Number of residues that teach at the most, and that judge; of more a part is drawn."""

COVERED: Final = 0.9
"""Share of held-out labels that the intervals of predictions have."""

BINS: Final = 10
"""Number of parts, by confidence, in which held-out predictions of classes are counted."""

LEAST_IN_BIN: Final = 20


class LearnOptions(TypedDict, total=False):
    """Options of `learn`, where they are described."""

    task: LearningTask | None
    head: HeadName | None
    per_residue: bool
    sequence_column: str | None
    split_column: str | None
    pool: Pools
    widths: Sequence[int] | None
    tokens_per_batch: int | None
    name: str
    loading: Mapping[str, Any]
    progress: ProgressCallback


def learn(
    table: Table,
    target: str,
    output: str | Path | None = None,
    *,
    model: RDModel | str = DEFAULT_MODEL,
    **options: Unpack[LearnOptions],
) -> Learned:
    """Learn to predict a column of a table from nested embeddings, at the narrowest width that is not worse.

    Sequences are embedded once, at the widest width, and cut. A head is fitted at every width. Its penalty,
    and the width, are chosen by cross-validation in which similar sequences lie in one fold. What is
    predicted in a fold has seen no label of it, not even by a choice, so that the scores are honest
    (`rd_torch.learning.select`). The width is the narrowest whose score is less than the best by at most one
    standard error of the difference.

    With `output`, embeddings go to a store in `<output>.part` first, so that the same call after a kill goes
    on where it was.

    Args:
        table: a file with a header row, as `rd_torch.Proteins` reads it, or columns by name, such as a
            DataFrame.
        target: name of the column with the labels. That is a number or a class for each sequence; several
            labels joined by `;` for the task `"multilabel"`; or per residue a letter for each, or numbers
            with blanks or commas between them.
        output: folder of the predictor to write; nothing may be there. By default none is written.
        model: the chain, or its name for `RDModel.from_pretrained`.
        **options: `task` is `"regression"`, `"classification"` or `"multilabel"`; by default numbers are
            regression and everything else classes. `head` is `"ridge"` or `"logistic"`, the default, `"mlp"`,
            `"knn"`, or for at most 1,000 numbers `"gp"`. `per_residue` says that each residue has a label of
            its own, with `-` for none. `sequence_column` names the column of sequences, by default the only
            one that can be meant. `split_column` names a column that says `train`, `valid` or `test`, or a
            fold, as those of ProteinGym do; rows of `test` do not teach, they judge, and `valid` teaches as
            `train` does. `pool` is as in `rd_torch.embed`. `widths` are the widths to choose from, by default
            those of the levels. `tokens_per_batch` is as in `rd_torch.embed`. `name` and `loading` are what
            `RDModel.from_pretrained` loads a chain by that is given as a module. `progress` is as in
            `rd_torch.embed_to_store`, with `output`.

    Returns:
        The predictor.

    Raises:
        FileNotFoundError: where there is no table, or no folder for the output.
        FileExistsError: where something is at `output`.
        ModuleNotFoundError: where scikit-learn is not installed.
        ValueError: for a table, column, label or split that does not serve, with what was expected; for a
            chain whose levels are no prefixes; and for an option that does not exist.

    Examples:
        >>> letters = "ACDEFGHIKLMNPQRSTVWY"
        >>> sequences = [letters[k:] + letters[: k % 7] + letters[::-1][: 3 * k % 11] for k in range(20)]
        >>> table = {"sequence": sequences, "lysines": [float(len(each)) for each in sequences]}
        >>> learned = rd_torch.learn(table, "lysines")
        >>> learned.findings.score_name
        'R^2'
    """
    check_names(options, LearnOptions.__annotations__)
    require_sklearn("to learn a predictor")
    if output is not None:
        require_free(Path(output))
    source = _Source.of(model, options)
    examples = read_examples(
        table,
        target,
        task=options.get("task"),
        per_residue=source.pool == "none",
        sequence_column=options.get("sequence_column"),
        split_column=options.get("split_column"),
        kind=source.model.alphabet.kind,
    )
    kind = options.get("head") or HEADS_OF[examples.task][0]
    check_choice(f"the head for {examples.task}", kind, HEADS_OF[examples.task])
    classes = np.array(examples.labels) if examples.task == "classification" else None
    split = split_sequences(examples.sequences, examples.split, None if examples.per_residue else classes)
    require_classes(examples, split)
    vectors = _embed(source, examples.sequences, output, options)
    learned = _learn(source, examples, split, vectors, kind, target)
    _warn_of_nothing(learned.findings)
    if output is not None:
        learned.save(output)
        shutil.rmtree(work_folder(Path(output)))
    return learned


class _Source(NamedTuple):
    """What embeddings come from, and how they are cut."""

    model: RDModel
    name: str
    loading: dict[str, Any]
    pool: str
    widths: list[int]

    @classmethod
    def of(cls, model: RDModel | str, options: LearnOptions) -> _Source:
        """Load the chain, and check the pooling and the widths."""
        name = options.get("name", model if isinstance(model, str) else "")
        pool = "none" if options.get("per_residue") else pool_name(options.get("pool", "mean"))
        if pool == "none" and not options.get("per_residue"):
            raise ValueError(
                "expected a pool that gives a vector a sequence, got 'none': or give per_residue"
            )
        chain = RDModel.from_pretrained(model) if isinstance(model, str) else model
        require_prefixes(chain.config, pool)
        widths = sorted(set(options.get("widths") or chain.config.widths.values()))
        for width in widths:
            chain.config.require_width(width)
        return cls(chain, name, dict(options.get("loading", {})), pool, widths)

    def level(self, width: int) -> str:
        """Return the name of the last level that a width needs."""
        return self.model.config.levels_for(width)[-1]


def _embed(
    source: _Source, sequences: Sequence[str], output: str | Path | None, options: LearnOptions
) -> Sequence[np.ndarray]:
    """Embed each different sequence once, at the widest width, and return the embedding of every one."""
    distinct = list(dict.fromkeys(sequences))
    width, budget = source.widths[-1], options.get("tokens_per_batch")
    if output is None:
        rows = embed(source.model, distinct, pool=source.pool, width=width, tokens_per_batch=budget)
        places = {each: place for place, each in enumerate(distinct)}
        return [rows[places[each]] for each in sequences]
    path = work_folder(Path(output)) / ("embeddings.h5" if source.pool == "none" else "embeddings.parquet")
    records = [(f"s{number}", each) for number, each in enumerate(distinct)]
    names = {each: identifier for identifier, each in records}
    progress = options.get("progress", lambda residues, before: None)
    failures = embed_to_store(
        source.model, records, path, pool=source.pool, width=width, tokens_per_batch=budget, progress=progress
    )
    for failure in failures.values():
        raise ValueError(f"expected sequences that can be embedded, got one that cannot: {failure.reason}")
    with open_store(path) as store:
        found = store.read([names[each] for each in dict.fromkeys(sequences)])
        rows_of = dict(zip(distinct, found, strict=True))
    return [rows_of[each] for each in sequences]


class _Taught(NamedTuple):
    """Rows of labels, and the fold of each."""

    rows: Rows
    folds: np.ndarray
    sequences: int


def _rows(
    source: _Source, examples: Examples, split: Split, vectors: Sequence[np.ndarray], chosen: np.ndarray
) -> _Taught:
    """Return the labelled rows of the chosen sequences: one for each, or for each of their residues."""
    places = np.flatnonzero(chosen)
    labels = [examples.labels[place] for place in places]
    if examples.per_residue:
        owners = np.repeat(places, [len(each) for each in labels])
        flat = np.concatenate(labels)
        known = np.flatnonzero(~np.isnan(flat) if examples.task == "regression" else flat >= 0)
        if len(known) > MOST_ROWS:
            known = np.sort(np.random.default_rng(0).choice(known, MOST_ROWS, replace=False))
        ends = np.cumsum([0, *(len(each) for each in labels)])
        parts = [
            vectors[place][known[(known >= start) & (known < end)] - start]
            for place, start, end in zip(places, ends, ends[1:], strict=False)
        ]
        matrix, values, owners = np.concatenate(parts), flat[known], owners[known]
    else:
        matrix, values, owners = np.stack([vectors[place] for place in places]), np.array(labels), places
    rows = Rows(
        examples.task,
        values,
        max(1, len(examples.classes)),
        np.unique(split.groups[owners], return_inverse=True)[1],
        lambda width: cut_ways(matrix, width, source.pool),
    )
    return _Taught(rows, split.folds[owners], len(places))


def _learn(
    source: _Source,
    examples: Examples,
    split: Split,
    vectors: Sequence[np.ndarray],
    kind: HeadName,
    target: str,
) -> Learned:
    """Choose the width and the setting, fit the head, and say what was found."""
    taught = _rows(source, examples, split, vectors, split.folds >= 0)
    found = select(taught.rows, taught.folds, kind, source.widths)
    heads = [fit_final(taught.rows, kind, each) for each in found.widths]
    tests: list[float | None] = [None] * len(heads)
    if (split.folds < 0).any():
        judging = _rows(source, examples, split, vectors, split.folds < 0).rows
        judge, every = Judge(judging.task, judging.labels, judging.groups), np.arange(len(judging.labels))
        tests = [
            judge.value(head(judging.cut(each.width)), every)
            for head, each in zip(heads, found.widths, strict=True)
        ]
    rows = [
        WidthRow(
            source.level(each.width),
            each.width,
            SETTINGS[kind][each.setting],
            each.score.value,
            *each.score.interval,
            test,
        )
        for each, test in zip(found.widths, tests, strict=True)
    ]
    chosen = rows[found.chosen]
    low, high = found.score.interval
    findings = Findings(
        task=examples.task,
        target=target,
        classes=examples.classes,
        per_residue=examples.per_residue,
        head=kind,
        model=source.name,
        loading=source.loading,
        dtype=str(source.model.dtype).removeprefix("torch."),
        level=chosen.level,
        width=chosen.width,
        pool=source.pool,
        fingerprint=source.model.truncate(chosen.level).fingerprint(),
        score_name=NAMES[examples.task],
        score=found.score.value,
        low=low,
        high=high,
        widths=rows,
        split=split.how,
        sequences=taught.sequences,
        rows=len(taught.folds),
        source=examples.source,
        checksum=examples.checksum,
        **_spread(found, taught.rows),
    )
    return Learned(findings, heads[found.chosen])


def _spread(found: Found, rows: Rows) -> dict[str, Any]:
    """Return how far predictions were off that were made without the labels of their fold."""
    if rows.task == "regression":
        errors = np.sort(np.abs(rows.labels - found.predictions[:, 0]))
        place = min(math.ceil((len(errors) + 1) * COVERED), len(errors)) - 1
        return {"spread": float(errors[place])}
    if rows.task == "multilabel":
        return {}
    confidence = found.predictions.max(1)
    right = found.predictions.argmax(1) == rows.labels
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, max(1, min(BINS, len(order) // LEAST_IN_BIN)))
    return {
        "confidences": [float(confidence[part[0]]) for part in parts],
        "right": [float(right[part].mean()) for part in parts],
    }


def require_classes(examples: Examples, split: Split) -> None:
    """Require that every class is taught whichever two folds are left out.

    Args:
        examples: the examples.
        split: their folds.

    Raises:
        ValueError: for a class that lies in fewer than three folds.
    """
    if examples.task != "classification":
        return
    for number, name in enumerate(examples.classes):
        there = {
            fold
            for fold, labels in zip(split.folds.tolist(), examples.labels, strict=True)
            if fold >= 0 and np.any(np.asarray(labels) == number)
        }
        if len(there) < LEAST_FOLDS:
            raise ValueError(
                f"expected each class in {LEAST_FOLDS} folds or more, got {name!r} in {len(there)}: its sequences "
                "are similar to each other, or few; leave the class out, or give more of it"
            )


def _warn_of_nothing(findings: Findings) -> None:
    """Warn where the score is no better than that of predictions that know nothing."""
    nothing = chance(findings.task, len(findings.classes))
    if findings.low <= nothing:
        warnings.warn(
            f"the embeddings predict little of {findings.target}, or nothing: a {findings.score_name} of "
            f"{nothing:.2f} is that of guessing, and {findings.score:.3f} was found, with an interval from "
            f"{findings.low:.3f} to {findings.high:.3f}",
            stacklevel=3,
        )
