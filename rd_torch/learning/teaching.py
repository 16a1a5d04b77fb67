"""`learn`: a table of labelled sequences to a predictor on the narrowest embedding that is not worse."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Unpack

import numpy as np

from rd_torch.choices import HeadName, check_choice, check_names
from rd_torch.labelled import require_sklearn
from rd_torch.learning.estimators import HEADS_OF, SETTINGS
from rd_torch.learning.examples import Examples, Table, read_examples
from rd_torch.learning.findings import Findings, WidthRow
from rd_torch.learning.learned import Learned, require_free, work_folder
from rd_torch.learning.scoring import NAMES, Judge, chance
from rd_torch.learning.selecting import LEAST_FOLDS, Found, Rows, fit_final, select
from rd_torch.learning.splitting import Split, split_sequences
from rd_torch.learning.vectors import LearnOptions, Source, embed_examples, labels_of
from rd_torch.model import RDModel

DEFAULT_MODEL: Final = "esm2-rd-mini"

COVERED: Final = 0.9
"""Share of held-out labels that the intervals of predictions have."""

BINS: Final = 10
"""Number of parts, by confidence, in which held-out predictions of classes are counted."""

LEAST_IN_BIN: Final = 20


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
        >>> import random
        >>> draw = random.Random(0)
        >>> sequences = ["".join(draw.choices("ACDEFGHIKLMNPQRSTVWY", k=30)) for _ in range(60)]
        >>> table = {"sequence": sequences, "lysines": [each.count("K") for each in sequences]}
        >>> findings = rd_torch.learn(table, "lysines").findings
        >>> findings.score_name, findings.width in (32, 48, 64, 128)
        ('R^2', True)
    """
    check_names(options, LearnOptions.__annotations__)
    require_sklearn("to learn a predictor")
    if output is not None:
        require_free(Path(output))
    source = Source.of(model, options)
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
    whole = examples.task == "classification" and not examples.per_residue
    classes = np.array(examples.labels) if whole else None
    split = split_sequences(examples.sequences, examples.split, classes)
    require_classes(examples, split)
    vectors = embed_examples(source, examples.sequences, output, options)
    learned = _learn(source, examples, split, vectors, kind, target)
    _warn_of_nothing(learned.findings)
    if output is not None:
        learned.save(output)
        shutil.rmtree(work_folder(Path(output)))
    return learned


def _learn(
    source: Source,
    examples: Examples,
    split: Split,
    vectors: Sequence[np.ndarray],
    kind: HeadName,
    target: str,
) -> Learned:
    """Choose the width and the setting, fit the head, and say what was found."""
    taught = labels_of(source, examples, split, vectors, split.folds >= 0)
    found = select(taught.rows, taught.folds, kind, source.widths)
    is_judged = bool((split.folds < 0).any())
    fitted = found.widths if is_judged else [found.widths[found.chosen]]
    heads = {each.width: fit_final(taught.rows, kind, each) for each in fitted}
    tests: list[float | None] = [None] * len(found.widths)
    if is_judged:
        judging = labels_of(source, examples, split, vectors, split.folds < 0).rows
        judge, every = Judge(judging.task, judging.labels, judging.groups), np.arange(len(judging.labels))
        tests = [judge.value(head(judging.cut(width)), every) for width, head in heads.items()]
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
    low, high = found.score.interval
    findings = Findings(
        **_origin(source, examples, rows[found.chosen]),
        **_spread(found, taught.rows),
        target=target,
        head=kind,
        score=found.score.value,
        low=low,
        high=high,
        widths=rows,
        split=split.how,
        sequences=taught.sequences,
        rows=len(taught.folds),
    )
    return Learned(findings, heads[findings.width])


def _origin(source: Source, examples: Examples, chosen: WidthRow) -> dict[str, Any]:
    """Return what the findings say of the table and of the chain."""
    return {
        "task": examples.task,
        "classes": examples.classes,
        "per_residue": examples.per_residue,
        "model": source.name,
        "loading": source.loading,
        "dtype": str(source.model.dtype).removeprefix("torch."),
        "level": chosen.level,
        "width": chosen.width,
        "pool": source.pool,
        "fingerprint": source.model.fingerprint(chosen.level),
        "score_name": NAMES[examples.task],
        "source": examples.source,
        "checksum": examples.checksum,
    }


def _spread(found: Found, rows: Rows) -> dict[str, Any]:
    """Return how far predictions were off that were made without the labels of their fold."""
    from scipy.stats import spearmanr  # comes with scikit-learn

    if rows.task == "regression":
        errors = np.sort(np.abs(rows.labels - found.predictions[:, 0]))
        place = min(math.ceil((len(errors) + 1) * COVERED), len(errors)) - 1
        correlation = spearmanr(rows.labels, found.predictions[:, 0]).statistic
        return {"spread": float(errors[place]), "spearman": float(correlation)}
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
                f"expected each class in {LEAST_FOLDS} folds or more, got {name!r} in {len(there)}: its "
                "sequences are similar to each other, or few; leave the class out, or give more of it"
            )


def _warn_of_nothing(findings: Findings) -> None:
    """Warn where the score is no better than that of predictions that know nothing."""
    nothing = chance(findings.task, len(findings.classes))
    if findings.low <= nothing:
        warnings.warn(
            f"the embeddings predict little of {findings.target}, or nothing: the {findings.score_name} is "
            f"{findings.score:.3f}, with an interval from {findings.low:.3f} to {findings.high:.3f}, and "
            f"that of guessing is {nothing:.2f}",
            stacklevel=3,
        )
