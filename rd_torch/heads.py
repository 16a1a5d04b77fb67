"""Small heads for what people predict from embeddings, of each residue or of the whole sequence.

Heads take embeddings and the residue mask, from a model here and now or from a file. Residues that have no
label and whatever is no residue count in no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from rd_torch.backbone import is_real
from rd_torch.config import SPECIAL_TOKENS, check_choice
from rd_torch.modules import modules_of

Task = Literal["regression", "classification"]
Pooling = Literal["mean", "attention"]

UNLABELLED: Final = -100
"""The class of what has no label, as PyTorch's losses have it; in regression it is NaN."""


class Head(nn.Module):
    """What sequence heads and residue heads share: an output layer and a loss.

    Args:
        width: features to read, the first ones of whatever embedding comes.
        outputs: classes, or numbers to predict.
        task: `"classification"` by cross-entropy, `"regression"` by mean squared error.
        hidden: features of a hidden layer with GELU; by default there is none, and the head is linear.
        dropout: share of the features, or of the hidden ones, that training blanks.

    Raises:
        ValueError: for numbers below one, a task that is none, or classes below two.
    """

    def __init__(
        self, width: int, outputs: int, *, task: Task, hidden: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_choice("task", task, get_args(Task))
        least = 2 if task == "classification" else 1
        if width < 1 or outputs < least or (hidden is not None and hidden < 1):
            raise ValueError(
                f"expected width and hidden of at least 1 and outputs of at least {least} for {task}, "
                f"got width {width}, hidden {hidden}, outputs {outputs}"
            )
        self.width = width
        self.outputs = outputs
        self.task = task
        self.dropout = nn.Dropout(dropout)
        self.hidden = None if hidden is None else nn.Linear(width, hidden)
        self.out = nn.Linear(hidden or width, outputs)

    def predict(self, features: Tensor) -> Tensor:
        """`(..., outputs)` of `(..., width)`."""
        if self.hidden is not None:
            features = functional.gelu(self.hidden(features))
        return self.out(self.dropout(features))

    def cut(self, embeddings: Tensor) -> Tensor:
        """The features that the head reads, in its dtype.

        Raises:
            ValueError: for embeddings that have fewer.
        """
        if embeddings.shape[-1] < self.width:
            raise ValueError(
                f"expected embeddings of at least the head's width, {self.width}, "
                f"got {embeddings.shape[-1]}: make the head with width={embeddings.shape[-1]}"
            )
        return embeddings[..., : self.width].to(self.out.weight.dtype)

    def labelled(self, labels: Tensor, residue_mask: Tensor) -> Tensor:
        """True at labels that count."""
        return labels != UNLABELLED if self.task == "classification" else ~labels.isnan()

    def loss(self, predictions: Tensor, labels: Tensor, residue_mask: Tensor) -> Tensor:
        """Mean over what is labelled.

        Args:
            predictions: what the head made of a batch.
            labels: shaped as the predictions without their last dimension: classes, -100 where there is none;
                in regression numbers, NaN where there is none, and with the last dimension where several
                are predicted.
            residue_mask: `(batch, time)` True at residues.

        Raises:
            ValueError: for labels of another shape or unknown classes, or where nothing is labelled.
        """
        classes = self.task == "classification"
        if self.outputs == 1:
            labels = labels[..., 0] if labels.shape == predictions.shape else labels
            predictions = predictions[..., 0]
        expected = predictions.shape[:-1] if classes else predictions.shape
        if labels.shape != expected or labels.is_floating_point() == classes:
            raise ValueError(
                f"expected {'integer' if classes else 'floating'} labels of shape {tuple(expected)}, "
                f"got {labels.dtype} {tuple(labels.shape)}"
            )
        labelled = self.labelled(labels, residue_mask)
        self._check_labels(labels, labelled)
        targets = labels.masked_fill(~labelled, 0)
        if classes:
            logits = predictions.flatten(0, -2).float()
            each = functional.cross_entropy(logits, targets.flatten().long(), reduction="none")
            each = each.view(labelled.shape)
        else:
            each = (predictions - targets.to(predictions.dtype)).square()
        return each.masked_fill(~labelled, 0).sum() / labelled.sum().clamp(min=1)

    def _check_labels(self, labels: Tensor, labelled: Tensor) -> None:
        """Raises where nothing is labelled, or a class is unknown; in eager mode only."""
        if torch.compiler.is_compiling():
            return
        if not labelled.any():
            raise ValueError("expected a label at one residue or sequence at least, got none in the batch")
        if self.task == "classification":
            lowest, highest = (int(bound) for bound in labels[labelled].aminmax())
            if lowest < 0 or highest >= self.outputs:
                raise ValueError(
                    f"expected classes from 0 to {self.outputs - 1} and {UNLABELLED} where there is none, "
                    f"got {lowest} to {highest}"
                )


class ResidueHead(Head):
    """Predicts something of every residue: `(batch, time, width)` to `(batch, time, outputs)`."""

    def forward(self, embeddings: Tensor, residue_mask: Tensor) -> Tensor:
        """Predictions at every token; those at no residue mean nothing.

        Args:
            embeddings: `(batch, time, at least width)`.
            residue_mask: `(batch, time)` True at residues.

        Raises:
            ValueError: for embeddings narrower than the head.
        """
        return self.predict(self.cut(embeddings))

    def labelled(self, labels: Tensor, residue_mask: Tensor) -> Tensor:
        """True at residues with labels."""
        extra = (1,) * (labels.ndim - residue_mask.ndim)
        return super().labelled(labels, residue_mask) & residue_mask.view(*residue_mask.shape, *extra)


class SequenceHead(Head):
    """Predicts something of the whole sequence: `(batch, time, width)` to `(batch, outputs)`.

    Args:
        width: features to read, the first ones of whatever embedding comes.
        outputs: classes, or numbers to predict.
        task: `"classification"` by cross-entropy, `"regression"` by mean squared error.
        pool: how residues become one vector: their mean, or their mean weighted by a softmax over a learnt
            linear score of each.
        hidden: features of a hidden layer with GELU; by default there is none.
        dropout: share of the pooled features, or of the hidden ones, that training blanks.

    Raises:
        ValueError: for numbers below one, a task or pool that is none, or classes below two.
    """

    def __init__(
        self,
        width: int,
        outputs: int,
        *,
        task: Task,
        pool: Pooling = "mean",
        hidden: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(width, outputs, task=task, hidden=hidden, dropout=dropout)
        check_choice("pool", pool, get_args(Pooling))
        self.score = nn.Linear(width, 1, bias=False) if pool == "attention" else None
        if self.score is not None:
            nn.init.zeros_(self.score.weight)  # begins as the mean

    def forward(self, embeddings: Tensor, residue_mask: Tensor) -> Tensor:
        """Predictions of each sequence; of one without residues, those of a vector of zeros.

        Args:
            embeddings: `(batch, time, at least width)`.
            residue_mask: `(batch, time)` True at residues: what is averaged over.

        Raises:
            ValueError: for embeddings narrower than the head.
        """
        features = self.cut(embeddings)
        weights = residue_mask.to(features.dtype)
        if self.score is not None:
            scores = self.score(features)[..., 0].masked_fill(~residue_mask, -torch.inf)
            highest = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
            weights = (scores - highest).exp()
        total = weights.sum(-1, keepdim=True)
        weights = weights / total.masked_fill(total == 0, 1)
        return self.predict(torch.einsum("bt,btw->bw", weights, features))


class MatryoshkaHead(nn.Module):
    """Heads of several widths trained at once, so that every prefix is good for the task by itself.

    The loss is the mean of theirs (Kusupati et al., NeurIPS 2022, arXiv 2205.13147).

    Args:
        heads: of different widths.

    Raises:
        ValueError: for no heads, or two of one width.
    """

    def __init__(self, heads: Sequence[Head]) -> None:
        super().__init__()
        widths = [head.width for head in heads]
        if not heads or len(set(widths)) < len(widths):
            raise ValueError(f"expected heads of different widths, got widths {widths}")
        self.heads = modules_of({str(head.width): head for head in sorted(heads, key=lambda h: h.width)})

    @property
    def width(self) -> int:
        """Features that the widest head reads."""
        return max(map(int, self.heads))

    def forward(self, embeddings: Tensor, residue_mask: Tensor) -> dict[int, Tensor]:
        """Each head's predictions by its width; arguments as a head's."""
        return {int(width): head(embeddings, residue_mask) for width, head in self.heads.items()}

    def loss(self, predictions: dict[int, Tensor], labels: Tensor, residue_mask: Tensor) -> Tensor:
        """The mean of the heads' losses; arguments as theirs."""
        losses = [
            self.heads[str(width)].loss(each, labels, residue_mask) for width, each in predictions.items()
        ]
        return torch.stack(losses).mean()


def align_labels(labels: Sequence[Sequence[float] | Tensor], tokens: Tensor) -> Tensor:
    """Labels of residues where their tokens stand, `(batch, time)`.

    `<cls>`, `<eos>` and padding have none: -100 beside classes, NaN beside floating numbers.

    Args:
        labels: one sequence of labels a protein, one label a residue.
        tokens: `(batch, time)` what the batch converter made of the same proteins.

    Raises:
        ValueError: where a protein has another number of labels than residues.
    """
    rows = [torch.as_tensor(row) for row in labels]
    lengths = (is_real(tokens).sum(1) - SPECIAL_TOKENS).tolist()
    got = [len(row) for row in rows]
    if got != lengths:
        raise ValueError(f"expected a label for each residue, {lengths}, got {got}")
    soft = any(row.is_floating_point() for row in rows)
    filling = torch.nan if soft else UNLABELLED
    dtype = torch.get_default_dtype() if soft else torch.int64
    aligned = torch.full(tokens.shape[:2], filling, dtype=dtype, device=tokens.device)
    for place, row in zip(aligned, rows, strict=True):
        place[1 : len(row) + 1] = row
    return aligned
