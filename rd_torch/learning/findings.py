"""`Findings`: what a predictor is and how it was found, as its config states it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple

from rd_torch.choices import HeadName, LearningTask

FORMAT: Final = 1
KIND: Final = "rd_torch predictor"


class WidthRow(NamedTuple):
    """What was found at one width.

    Attributes:
        level: name of the last level that the width needs.
        width: number of features, for each way to pool.
        setting: penalty or number of neighbours that was chosen there.
        score: cross-validated score.
        low: lower end of the score's interval of 95 %.
        high: upper end of it.
        test: score on the test set of the split column; None where there is none.
    """

    level: str
    width: int
    setting: float
    score: float
    low: float
    high: float
    test: float | None = None


@dataclass(frozen=True)
class Findings:
    """What a predictor is and how it was found; its `config.json`.

    Attributes:
        task: what is predicted.
        target: name of the column that it was learnt from.
        classes: names of the classes or labels; empty for numbers.
        per_residue: whether each residue is predicted.
        head: which head it has.
        model: name of the chain, for `RDModel.from_pretrained`; empty where it was given as a module.
        loading: which of the authors' maps the chain has, for `RDModel.from_pretrained`.
        dtype: type of number in which the backbones computed.
        level: name of the last level that runs.
        width: number of features that the head reads, for each way to pool.
        pool: how residues become one vector, as stores name it.
        fingerprint: fingerprint of the chain up to that level.
        score_name: what the scores are.
        score: cross-validated score of the whole procedure, with the choice of the width.
        low: lower end of its interval of 95 %.
        high: upper end of it.
        widths: what was found at each width, narrowest first.
        split: how sequences were split.
        sequences: number of sequences that taught.
        rows: number of labels that taught.
        source: name of the table.
        checksum: SHA-256 of its sequences, labels and split.
        spearman: for numbers, Spearman's rank correlation of the predictions that `score` is of.
        spread: for numbers, half of the width of intervals that have 90 % of the labels of held-out groups.
        confidences: for classes, confidences in rising order, from each of which on the share at the same
            place in `right` of held-out predictions was right.
        right: these shares.
        rd_torch_version: version of the program that wrote it.
    """

    task: LearningTask
    target: str
    classes: list[str]
    per_residue: bool
    head: HeadName
    model: str
    loading: dict[str, Any]
    dtype: str
    level: str
    width: int
    pool: str
    fingerprint: str
    score_name: str
    score: float
    low: float
    high: float
    widths: list[WidthRow]
    split: str
    sequences: int
    rows: int
    source: str
    checksum: str
    spearman: float | None = None
    spread: float | None = None
    confidences: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)
    rd_torch_version: str = version("rd_torch")

    @property
    def chosen(self) -> WidthRow:
        """What was found at the width that was chosen."""
        return next(row for row in self.widths if row.width == self.width)

    def to_json(self) -> str:
        """Return the findings as JSON."""
        values = asdict(self) | {"widths": [row._asdict() for row in self.widths]}
        return json.dumps({"kind": KIND, "format": FORMAT, **values}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> Findings:
        """Read the findings from JSON.

        Args:
            text: the JSON.
            path: its file, which errors name.

        Raises:
            ValueError: for anything that `to_json` has not written.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            if values.get("kind") != KIND or values.get("format") != FORMAT:
                raise ValueError(f"kind {values.get('kind')!r}, format {values.get('format')!r}")
            known = {each.name for each in fields(cls)}
            rows = [WidthRow(**row) for row in values["widths"]]
            return cls(**{name: value for name, value in values.items() if name in known} | {"widths": rows})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"expected a predictor of format {FORMAT} that rd-torch learn wrote at {path}, got {error}"
            ) from error
