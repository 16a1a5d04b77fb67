"""The card and the table of widths that are written beside a predictor."""

from __future__ import annotations

from rd_torch.learning.estimators import SETTING_NAMES
from rd_torch.learning.findings import Findings

_TEXT = """# {name}

This predicts {target} of {what} by {head} on the first {width:,} features of a nested
embedding, up to the level {level} of {model}. Backbones beyond that level do not run.

Cross-validated {score_name} of the whole procedure, with its choice of the width: **{score:.3f}** (95 %
interval {low:.3f} to {high:.3f}){spearman}. No label of what is predicted was seen, not even by a choice.

{table}

The {score_name} at each width is cross-validated too; its interval comes from drawing groups of
similar sequences anew. The chosen width is the narrowest that scores less than the best by at most
one standard error of the difference.

{spread}

## How to predict

```sh
rd-torch predict new.fasta --predictor {name} -o predictions.tsv
```

## How it was made

{facts}
"""

_HEADS = {
    "ridge": "ridge regression",
    "logistic": "logistic regression",
    "mlp": "a network with one hidden layer",
    "knn": "nearest neighbours",
    "gp": "a Gaussian process",
}


def card_of(findings: Findings, name: str) -> str:
    """Return the card of a predictor.

    Args:
        findings: what it is.
        name: name of its folder.
    """
    return _TEXT.format(
        name=name,
        target=findings.target,
        what="each residue of proteins" if findings.per_residue else "proteins",
        head=_HEADS[findings.head],
        width=findings.width,
        level=findings.level,
        model=findings.model or "a chain that was given as a module",
        score_name=findings.score_name,
        score=findings.score,
        low=findings.low,
        high=findings.high,
        spearman=spearman_of(findings),
        table=_markdown(findings),
        spread=spread_of(findings),
        facts="\n".join(f"- {key}: {value}" for key, value in _facts(findings)),
    )


def spearman_of(findings: Findings) -> str:
    """Return what stands behind a score of numbers: the rank correlation of the same predictions."""
    return "" if findings.spearman is None else f", Spearman's correlation {findings.spearman:.3f}"


def spread_of(findings: Findings) -> str:
    """Say in a sentence how far predictions may be off, and from what that is known."""
    if findings.spread is not None:
        return (
            f"Predictions have intervals of +- {findings.spread:.4g}, which held 90 % of the labels that "
            "were predicted in cross-validation. The interval is the same for every sequence. Expect larger "
            "errors for proteins unlike those of the table."
        )
    if findings.confidences:
        return (
            "A prediction comes with the share of predictions of about the same confidence that were right "
            "in cross-validation."
        )
    return "Probabilities are those of the head. They were not calibrated."


def table_of(findings: Findings) -> str:
    """Return the table of widths as text with tabs between columns."""
    return "".join("\t".join(row) + "\n" for row in _cells(findings))


def _cells(findings: Findings) -> list[list[str]]:
    """Return the cells of the table of widths, the header first."""
    setting, has_test = SETTING_NAMES[findings.head], findings.widths[0].test is not None
    header = ["level", "width", findings.score_name, "from", "to"]
    header += [setting] * bool(setting) + ["test set"] * has_test + ["chosen"]
    rows = [header]
    for row in findings.widths:
        cells = [row.level, str(row.width), f"{row.score:.3f}", f"{row.low:.3f}", f"{row.high:.3f}"]
        cells += [f"{row.setting:g}"] * bool(setting)
        cells += [f"{row.test:.3f}"] if row.test is not None else []
        rows.append([*cells, "yes" if row.width == findings.width else ""])
    return rows


def _markdown(findings: Findings) -> str:
    """Return the table of widths as Markdown."""
    header, *rows = _cells(findings)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def _facts(findings: Findings) -> list[tuple[str, object]]:
    """Return what the predictor was made of."""
    labels = "labels of residues" if findings.per_residue else "labels"
    return [
        ("task", findings.task),
        *([("classes", ", ".join(findings.classes))] if findings.classes else []),
        ("table", f"`{findings.source}`, SHA-256 of sequences and labels {findings.checksum}"),
        ("taught by", f"{findings.sequences:,} sequences with {findings.rows:,} {labels}"),
        ("split", findings.split),
        ("pooling", findings.pool),
        ("backbones computed in", findings.dtype),
        ("fingerprint of the chain", findings.fingerprint),
        ("rd_torch", findings.rd_torch_version),
    ]
