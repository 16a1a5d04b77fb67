"""What a forward pass returns: tensors by attribute, and by fair-esm's keys."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, KeysView, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor
from torch.utils._pytree import register_pytree_node


@dataclass(frozen=True)
class RDOutput:
    """What a forward pass returns; also read as `out["logits"]`, as fair-esm's dictionary is.

    Attributes:
        embeddings: `(batch, time, width)` nested embeddings, zeros at padding.
        logits: `(batch, time, 33)` of the largest backbone that ran, zeros at padding; None where its
            checkpoint has no language-model head.
        residue_mask: `(batch, time)` True at amino acids: what to average over.
        nested: `(batch, time, width)` what narrower levels are views of: the embeddings themselves,
            unless the checkpoint's `special_rows` are the larger backbone's.
        widths: the levels that ran and their nested widths.
        num_layers: the key under which `representations` holds the whole returned tensor.
        separate: embeddings of the levels by name where they are no prefixes (`method="naive"`).
        repr_layers: the integers `representations` iterates over; None for all its keys.
        attentions: `(batch, layers, heads, time, time)` of the largest backbone that ran, if asked for.
        contacts: `(batch, residues, residues)` contact probabilities of it, if asked for.

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
        >>> _, _, tokens = model.alphabet.get_batch_converter()([("one", "MQIFVK"), ("two", "MKV")])
        >>> out = model(tokens)
        >>> out.embeddings.shape, out["representations"]["90K"].shape
        (torch.Size([2, 8, 128]), torch.Size([2, 8, 48]))
        >>> out.residue_mask.sum(1)
        tensor([6, 3])
    """

    embeddings: Tensor
    logits: Tensor | None
    residue_mask: Tensor
    nested: Tensor
    widths: tuple[tuple[str, int], ...]
    num_layers: int
    separate: dict[str, Tensor] = field(default_factory=dict)
    repr_layers: tuple[int, ...] | None = None
    attentions: Tensor | None = None
    contacts: Tensor | None = None

    @property
    def representations(self) -> Representations:
        """Views of the embeddings: by level name, and by `num_layers` the whole."""
        width = self.embeddings.shape[-1]
        views: dict[str | int, Tensor] = {
            name: self.separate.get(name, self.nested)[..., :size]
            for name, size in self.widths
            if size <= width
        }
        widest, size = self.widths[-1]
        if size == width:
            views[widest] = self.embeddings
        views[self.num_layers] = self.embeddings
        return Representations(views, self.repr_layers)

    def _answers(self) -> dict[str, Any]:
        names = ("embeddings", "logits", "residue_mask", "representations", "attentions", "contacts")
        answers = {name: getattr(self, name) for name in names}
        return {name: answer for name, answer in answers.items() if answer is not None}

    def keys(self) -> KeysView[str]:
        """The names that `out[...]` answers to."""
        return self._answers().keys()

    def __contains__(self, key: object) -> bool:
        return key in self._answers()

    def __iter__(self) -> Iterator[str]:
        return iter(self._answers())

    def __getitem__(self, key: str) -> Any:
        answers = self._answers()
        if key not in answers:
            raise KeyError(f"expected one of {', '.join(answers)}, got {key!r}")
        return answers[key]


class Representations(Mapping[str | int, Tensor]):
    """Embeddings by level name or layer number; iterates over the numbers asked for, if any were."""

    def __init__(self, views: dict[str | int, Tensor], repr_layers: tuple[int, ...] | None) -> None:
        self._views = views
        self._listed = tuple(views) if repr_layers is None else repr_layers

    def __getitem__(self, key: str | int) -> Tensor:
        if key not in self._views:
            listed = ", ".join(repr(name) for name in self._views)
            raise KeyError(f"expected one of {listed}, got {key!r}")
        return self._views[key]

    def __iter__(self) -> Iterator[str | int]:
        return iter(self._listed)

    def __len__(self) -> int:
        return len(self._listed)


_TENSORS: Final = ("embeddings", "logits", "residue_mask", "nested", "attentions", "contacts")


def _parted(out: RDOutput) -> tuple[list[Any], list[Any]]:
    """An output's tensors, each once, and the facts beside them, which a traced graph keeps as constants."""
    tensors = {name: tensor for name in _TENSORS if (tensor := getattr(out, name)) is not None}
    if out.nested is out.embeddings:
        del tensors["nested"]
    return [tensors, out.separate], [out.widths, out.num_layers, out.repr_layers]


def _joined(parts: Iterable[Any], facts: list[Any]) -> RDOutput:
    """The output of what `_parted` gives."""
    tensors, separate = parts
    widths, num_layers, repr_layers = facts
    given = {"logits": None, "nested": tensors["embeddings"], **tensors}
    return RDOutput(**given, widths=widths, num_layers=num_layers, separate=separate, repr_layers=repr_layers)


def _facts_of(text: str) -> list[Any]:
    """The facts as they were before they were JSON, which knows no tuples."""
    widths, num_layers, repr_layers = json.loads(text)
    layers = None if repr_layers is None else tuple(repr_layers)
    return [tuple((name, size) for name, size in widths), num_layers, layers]


# With constants or one tensor twice among a graph's outputs no ONNX file runs.
register_pytree_node(
    RDOutput,
    _parted,
    _joined,
    serialized_type_name="rd_torch.RDOutput",
    to_dumpable_context=json.dumps,
    from_dumpable_context=_facts_of,
)
