"""Small heads that predict labels from embeddings, for each residue or for the whole sequence.

They take embeddings, of a model or a file, and the residue mask. Positions without label count in no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from rd_torch.alphabet import Alphabet
from rd_torch.backbone import is_real
from rd_torch.choices import check_choice
from rd_torch.levels import ALPHABET
from rd_torch.modules import modules_of

Task = Literal["regression", "classification"]
Pooling = Literal["mean", "attention"]

UNLABELLED: Final = -100
"""The class of a position without a label, the same as in PyTorch's losses; in regression NaN is used."""


class Head(nn.Module):
    """The base class of sequence heads and residue heads: an output layer and a loss.

    Args:
        width: number of features that the head reads, which are the first ones of an embedding.
        outputs: number of classes, or of values to predict.
        task: `"classification"`, with cross-entropy as loss, or `"regression"`, with the mean squared error.
        hidden: number of features of a hidden layer with GELU; by default there is no hidden layer.
        dropout: share of the features that the output layer reads and that training sets to zero, 0 to 1.

    Raises:
        ValueError: for a number below one, fewer than two classes, or a task that does not exist.
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
        """Map `(..., width)` features to `(..., outputs)` predictions."""
        if self.hidden is not None:
            features = functional.gelu(self.hidden(features))
        return self.out(self.dropout(features))

    def cut(self, embeddings: Tensor) -> Tensor:
        """Take the features that the head reads, in the head's dtype.

        Args:
            embeddings: `(..., at least width)`.

        Returns:
            `(..., width)`.

        Raises:
            ValueError: for embeddings that have fewer features.
        """
        if embeddings.shape[-1] < self.width:
            raise ValueError(
                f"expected embeddings of at least the head's width, {self.width}, "
                f"got {embeddings.shape[-1]}: make the head with width={embeddings.shape[-1]}"
            )
        return embeddings[..., : self.width].to(self.out.weight.dtype)

    def labelled(self, labels: Tensor, residue_mask: Tensor) -> Tensor:
        """Return a mask that is True at labels that count."""
        return labels != UNLABELLED if self.task == "classification" else ~labels.isnan()

    def loss(self, predictions: Tensor, labels: Tensor, residue_mask: Tensor) -> Tensor:
        """Compute the mean loss over what is labelled.

        Args:
            predictions: `(batch, outputs)` or `(batch, time, outputs)` predictions of the head.
            labels: integer classes, shaped as the predictions without the last dimension, with -100 where
                there is no label; or, for regression, numbers, shaped as the predictions, with NaN where
                there is no label. For one output the last dimension may be left out.
            residue_mask: `(batch, time)`, True at residues.

        Returns:
            The loss, a scalar.

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
        """Raise where nothing is labelled, or a class is unknown; in eager mode only."""
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
    """A head that predicts labels of residues: `(batch, time, width)` to `(batch, time, outputs)`.

    Examples:
        >>> head = rd_torch.ResidueHead(128, 3, task="classification")
        >>> predictions = head(torch.randn(2, 10, 128), torch.ones(2, 10) > 0)  # (2, 10, 3)
    """

    def forward(self, embeddings: Tensor, residue_mask: Tensor) -> Tensor:
        """Predict at every token; predictions at tokens that are no residue mean nothing.

        Args:
            embeddings: `(batch, time, at least width)`.
            residue_mask: `(batch, time)`, True at residues.

        Returns:
            `(batch, time, outputs)`.

        Raises:
            ValueError: for embeddings narrower than the head.
        """
        return self.predict(self.cut(embeddings))

    def labelled(self, labels: Tensor, residue_mask: Tensor) -> Tensor:
        """Return a mask that is True at residues with labels."""
        extra = (1,) * (labels.ndim - residue_mask.ndim)
        return super().labelled(labels, residue_mask) & residue_mask.view(*residue_mask.shape, *extra)


class SequenceHead(Head):
    """A head that predicts labels of sequences: `(batch, time, width)` to `(batch, outputs)`.

    Args:
        width: number of features that the head reads, which are the first ones of an embedding.
        outputs: number of classes, or of values to predict.
        task: `"classification"`, with cross-entropy as loss, or `"regression"`, with the mean squared error.
        pool: how residues become one vector: `"mean"`, or `"attention"` for a mean whose weights are a
            softmax over a learnt linear score of each residue.
        hidden: number of features of a hidden layer with GELU; by default there is no hidden layer.
        dropout: share of the features that the output layer reads and that training sets to zero, 0 to 1.

    Raises:
        ValueError: for a number below one, fewer than two classes, or a task or pool that does not exist.

    Examples:
        >>> head = rd_torch.SequenceHead(48, 1, task="regression", pool="attention")
        >>> predictions = head(torch.randn(2, 10, 128), torch.ones(2, 10) > 0)  # (2, 1), of 48 features
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
            nn.init.zeros_(self.score.weight)  # with equal scores, training begins at the mean

    def forward(self, embeddings: Tensor, residue_mask: Tensor) -> Tensor:
        """Pool the residues of each sequence and predict; a sequence without residues counts as zeros.

        Args:
            embeddings: `(batch, time, at least width)`.
            residue_mask: `(batch, time)`, True at residues.

        Returns:
            `(batch, outputs)`.

        Raises:
            ValueError: for embeddings narrower than the head.
        """
        features = self.cut(embeddings)
        weights = residue_mask.to(features.dtype)
        if self.score is not None:
            scores = self.score(features)[..., 0].masked_fill(~residue_mask, -torch.inf)
            # Subtracted so that `exp` does not overflow. Without residues it is -inf, and -inf - -inf
            # would be NaN.
            highest = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
            weights = (scores - highest).exp()
        total = weights.sum(-1, keepdim=True)
        return self.predict(torch.einsum("bt,btw->bw", weights / total.masked_fill(total == 0, 1), features))


class MatryoshkaHead(nn.Module):
    """Several heads that are trained at once, so that each prefix serves the task by itself.

    The loss is the mean of the heads' losses (Kusupati et al., NeurIPS 2022, arXiv 2205.13147).

    Args:
        heads: heads of different widths.

    Raises:
        ValueError: for no heads, or two heads of the same width.

    Examples:
        >>> head = rd_torch.MatryoshkaHead([rd_torch.ResidueHead(w, 1, task="regression") for w in (32, 128)])
    """

    def __init__(self, heads: Sequence[Head]) -> None:
        super().__init__()
        widths = [head.width for head in heads]
        if not heads or len(set(widths)) < len(widths):
            raise ValueError(f"expected heads of different widths, got widths {widths}")
        self.heads = modules_of({str(head.width): head for head in sorted(heads, key=lambda h: h.width)})

    @property
    def width(self) -> int:
        """The number of features that the widest head reads."""
        return max(map(int, self.heads))

    def forward(self, embeddings: Tensor, residue_mask: Tensor) -> dict[int, Tensor]:
        """Return each head's predictions, by its width; the arguments are those of a head."""
        return {int(width): head(embeddings, residue_mask) for width, head in self.heads.items()}

    def loss(self, predictions: dict[int, Tensor], labels: Tensor, residue_mask: Tensor) -> Tensor:
        """Return the mean of the heads' losses; the arguments are those of a head."""
        losses = [
            self.heads[str(width)].loss(each, labels, residue_mask) for width, each in predictions.items()
        ]
        return torch.stack(losses).mean()


def align_labels(
    labels: Sequence[Sequence[float] | Tensor], tokens: Tensor, alphabet: Alphabet = ALPHABET
) -> Tensor:
    """Put the labels of residues where their tokens stand.

    Args:
        labels: for each protein, one label for each residue.
        tokens: `(batch, time)` token ids that the batch converter made of the same proteins.
        alphabet: alphabet of the ids, `model.alphabet`; by default ESM-2's, which serves ESM-C too.

    Returns:
        `(batch, time)` labels; -100, or NaN for floating ones, at `<cls>`, `<eos>` and padding.

    Raises:
        ValueError: where a protein does not have as many labels as residues.

    Examples:
        >>> rd_torch.align_labels([[0, 1, 2]], torch.tensor([[0, 20, 15, 7, 2]]))  # <cls> M K V <eos>
        tensor([[-100,    0,    1,    2, -100]])
    """
    rows = [torch.as_tensor(row) for row in labels]
    before = int(alphabet.prepend_bos)
    lengths = (is_real(tokens, alphabet).sum(1) - before - int(alphabet.append_eos)).tolist()
    if (got := [len(row) for row in rows]) != lengths:
        raise ValueError(f"expected one label for each residue, so {lengths} labels, got {got}")
    floating = any(row.is_floating_point() for row in rows)
    filling, dtype = (torch.nan, torch.get_default_dtype()) if floating else (UNLABELLED, torch.int64)
    aligned = torch.full(tokens.shape[:2], filling, dtype=dtype, device=tokens.device)
    for place, row in zip(aligned, rows, strict=True):
        place[before : len(row) + before] = row
    return aligned
