"""`RDOutput`: what a forward pass returns, as attributes and under fair-esm's keys."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, KeysView, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor
from torch.utils._pytree import register_pytree_node


@dataclass(frozen=True)
class RDOutput:
    """The result of a forward pass; `out["logits"]` works too, as with fair-esm's dictionary.

    Attributes:
        embeddings: `(batch, time, width)` nested embeddings, with zeros at padding.
        logits: `(batch, time, 33)` logits of the largest backbone that ran, with zeros at padding (64 of
            ESM-C, the last 31 of which stand for no token); None where it has no language-model head.
        residue_mask: `(batch, time)`, True at amino acids, which are the positions to average over.
        nested: `(batch, time, width)` tensor that narrower levels are views of. It is `embeddings`, unless
            the checkpoint takes special rows from the larger backbone.
        widths: name and nested width of each level that ran, smallest first.
        num_layers: key under which `representations` holds the whole `embeddings`.
        layers: numbers of further layers of the largest backbone that are keys of `representations`, each
            with the level that its embeddings are of.
        separate: `(batch, time, width)` embeddings of the levels, by name, where they are no prefixes of
            each other (`method="naive"`); otherwise empty.
        repr_layers: integers that `representations` iterates over; None for all its keys.
        attentions: `(batch, layers, heads, time, time)` attention maps of the largest backbone that ran;
            None unless asked for.
        contacts: `(batch, residues, residues)` contact probabilities from that backbone; None unless asked
            for.

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
    layers: tuple[tuple[int, str], ...] = ()
    separate: dict[str, Tensor] = field(default_factory=dict)
    repr_layers: tuple[int, ...] | None = None
    attentions: Tensor | None = None
    contacts: Tensor | None = None

    @property
    def representations(self) -> Representations:
        """Views of the embeddings by level name and layer, and the whole embeddings under `num_layers`."""
        width = self.embeddings.shape[-1]
        views: dict[str | int, Tensor] = {
            name: self.separate.get(name, self.nested)[..., :size]
            for name, size in self.widths
            if size <= width
        }
        widest, size = self.widths[-1]
        if size == width:
            views[widest] = self.embeddings
        views |= {layer: views[level] for layer, level in self.layers if level in views}
        views[self.num_layers] = self.embeddings
        return Representations(views, self.repr_layers)

    def _as_dict(self) -> dict[str, Any]:
        names = ("embeddings", "logits", "residue_mask", "representations", "attentions", "contacts")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def keys(self) -> KeysView[str]:
        """Return the keys that `out[...]` takes."""
        return self._as_dict().keys()

    def __contains__(self, key: object) -> bool:
        return key in self._as_dict()

    def __iter__(self) -> Iterator[str]:
        return iter(self._as_dict())

    def __getitem__(self, key: str) -> Any:
        values = self._as_dict()
        if key not in values:
            raise KeyError(f"expected one of {', '.join(values)}, got {key!r}")
        return values[key]


class Representations(Mapping[str | int, Tensor]):
    """Embeddings by level name or layer number.

    Args:
        views: `(batch, time, width)` embeddings by level name and layer number.
        repr_layers: layer numbers to iterate over; None to iterate over all keys. Other keys can be read
            all the same.
    """

    def __init__(self, views: dict[str | int, Tensor], repr_layers: tuple[int, ...] | None) -> None:
        self._views = views
        self._shown = tuple(views) if repr_layers is None else repr_layers

    def __getitem__(self, key: str | int) -> Tensor:
        if key not in self._views:
            listed = ", ".join(repr(name) for name in self._views)
            raise KeyError(f"expected one of {listed}, got {key!r}")
        return self._views[key]

    def __iter__(self) -> Iterator[str | int]:
        return iter(self._shown)

    def __len__(self) -> int:
        return len(self._shown)


def check_layers(
    repr_layers: Iterable[int] | None, num_layers: int, others: Iterable[int] = ()
) -> tuple[int, ...] | None:
    """Return the layers asked for, each once.

    Args:
        repr_layers: numbers of layers; None where none is asked for.
        num_layers: number of the last layer.
        others: numbers of hidden layers that are levels of the chain.

    Raises:
        ValueError: for layers that are neither.
    """
    if repr_layers is None:
        return None
    layers = tuple(dict.fromkeys(map(int, repr_layers)))
    known = sorted({num_layers, *others})
    if set(layers) - set(known):
        raise ValueError(
            f"expected repr_layers among {known} or none, got {list(layers)}: other layers are no levels of "
            "this chain, and have no reverse-distilled form; rd_torch.fit(layers=...) makes levels of them"
        )
    return layers


_TENSORS: Final = ("embeddings", "logits", "residue_mask", "nested", "attentions", "contacts")


def _flatten(out: RDOutput) -> tuple[list[Any], list[Any]]:
    """Return the tensors of an output, each once, and the facts beside them, kept in graphs as constants."""
    tensors = {name: tensor for name in _TENSORS if (tensor := getattr(out, name)) is not None}
    if out.nested is out.embeddings:
        del tensors["nested"]
    return [tensors, out.separate], [out.widths, out.num_layers, out.layers, out.repr_layers]


def _unflatten(parts: Iterable[Any], facts: list[Any]) -> RDOutput:
    """Return the output that `_flatten` took apart."""
    tensors, separate = parts
    widths, num_layers, hidden, repr_layers = facts
    held = {"logits": None, "nested": tensors["embeddings"], **tensors}
    held |= {"widths": widths, "num_layers": num_layers, "layers": hidden, "repr_layers": repr_layers}
    return RDOutput(**held, separate=separate)


def _parse_facts(text: str) -> list[Any]:
    """Return the facts that `json.dumps` wrote, as tuples again, which JSON turns into lists."""
    widths, num_layers, hidden, repr_layers = json.loads(text)
    pairs = [tuple((one, other) for one, other in each) for each in (widths, hidden)]
    return [pairs[0], num_layers, pairs[1], None if repr_layers is None else tuple(repr_layers)]


# `torch.export.register_dataclass` would make outputs of a graph of the facts too, and two of a tensor that
# stands twice in the dataclass. An ONNX file with such outputs does not run.
register_pytree_node(
    RDOutput,
    _flatten,
    _unflatten,
    serialized_type_name="rd_torch.RDOutput",
    to_dumpable_context=json.dumps,
    from_dumpable_context=_parse_facts,
)
