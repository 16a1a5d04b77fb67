"""Try a model of transformers' before a chain relies on it; find what it uses, and its attention maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from rd_torch import hardware
from rd_torch.backbone.layer import AttentionSink
from rd_torch.backbone.tokenizers import PROBES, TokenizerAlphabet
from rd_torch.backbone.tokens import is_real, tokenize
from rd_torch.hardware import FULL
from rd_torch.modules import device_of, evaluating

Run: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Makes `(batch, time, width)` hidden states of `(batch, time)` ids and the mask of what is no padding."""

LIMITS: Final = {True: 1e-3, False: 0.1}
"""Mean distance, in standard deviations, that padding may make: in exact float32 or better, and otherwise.

A choice, well above rounding and below what a model does that attends to padding.
"""

POSITIONS: Final = ("position_embeddings", "position_embedding", "embed_positions", "positions_embed", "wpe")
"""What models call tables of positions, which have a row for each position that was trained."""


def count_positions(model: Any) -> int | None:
    """Return for how many tokens a model has learned positions; None where it counts them otherwise."""
    tables = [
        len(part.weight)
        - (0 if part.padding_idx is None else part.padding_idx + 1)
        - getattr(part, "offset", 0)  # rows before the first position, as in OPT
        for name, part in model.named_modules()
        if name.endswith(POSITIONS) and hasattr(part, "weight") and hasattr(part, "padding_idx")
    ]
    return min(tables, default=None)


def find_idle(model: Any, alphabet: TokenizerAlphabet, width: int, run: Run) -> frozenset[str]:
    """Try a model on two sequences, and find the parameters that its hidden states do not depend on.

    Args:
        model: the model.
        alphabet: its tokenizer.
        width: number of features that its hidden states must have.
        run: calls the model.

    Returns:
        Names of the parameters.

    Raises:
        ValueError: for a model that fails, that has no embedding for some of the ids, whose attention depends
            on the batch's length, whose hidden states are not one finite vector for each token, or differ
            where a sequence is padded.
    """  # noqa: DOC501  # out of memory is let pass
    probe, device = PROBES[alphabet.kind], device_of(model)
    short = probe[: len(probe) // 2]
    tokens, alone = (tokenize(each, alphabet).to(device) for each in ([probe + probe, short], [short]))
    real = is_real(tokens, alphabet)
    _require_rows(model, alphabet)
    _require_one_attention(model)
    try:
        with evaluating(model), torch.enable_grad(), _recording_all(model):
            hidden = run(tokens, real)
            used = _parameters_behind(hidden)
            again = run(alone, torch.ones_like(alone, dtype=torch.bool)).detach()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the code of models fails in ways of its own
        first = next(iter(str(error).splitlines()), "")
        raise ValueError(
            "expected a model that takes ids and a mask, and answers with hidden states, got "
            f"{type(model).__name__}, which fails with {type(error).__name__}: {first}"
        ) from error
    _check(type(model).__name__, hidden.detach(), again, real, width)
    parameters = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, parameter in parameters if id(parameter) not in used)


def _require_rows(model: Any, alphabet: TokenizerAlphabet) -> None:
    """Raise a ValueError for a tokenizer with ids that the model has no embedding for."""
    table = None
    with suppress(NotImplementedError):  # the code of some models does not tell it
        table = model.get_input_embeddings()
    most = max(alphabet.padding_idx, *alphabet.ids_of(alphabet.kind.letters))
    if isinstance(table, nn.Embedding) and most >= table.num_embeddings:
        raise ValueError(
            f"expected a tokenizer with ids below {table.num_embeddings}, for which {type(model).__name__} "
            f"has embeddings, got {most}: resize the model's embeddings, or take its own tokenizer"
        )


def _require_one_attention(model: Any) -> None:
    """Raise a ValueError for a model that attends in another way to longer batches, as BigBird does."""
    if getattr(model.config, "attention_type", None) == "block_sparse":
        raise ValueError(
            f"expected a model that attends in one way, got {type(model).__name__}, whose sparse attention "
            "becomes full at short batches: set attention_type to 'original_full' in its config"
        )


def _check(name: str, hidden: Tensor, alone: Tensor, real: Tensor, width: int) -> None:
    """Raise a ValueError unless hidden states are as a chain needs them."""
    if hidden.shape != (*real.shape, width):
        raise ValueError(
            f"expected hidden states of shape {(*real.shape, width)}, one for each token, got "
            f"{tuple(hidden.shape)} from {name}"
        )
    if not hidden[real].isfinite().all():
        dtype = str(hidden.dtype).removeprefix("torch.")
        raise ValueError(f"expected finite numbers, got others from {name} in {dtype}: load it in float32")
    exact = hidden.dtype in FULL and hardware.has_exact_float32(hidden.device)
    padded, scale = hidden[1, : alone.shape[1]].double(), hidden[real].double().std()
    error = float((padded - alone[0].double()).abs().mean() / scale)
    if not error <= LIMITS[exact]:
        raise ValueError(
            f"expected a model that leaves out padding where its mask says so, got {name}, whose numbers "
            f"differ by {error:.2g} standard deviations where a sequence is padded"
        )


@contextmanager
def _recording_all(model: nn.Module) -> Iterator[None]:
    """Let autograd record what becomes of every parameter, frozen ones too."""
    frozen = [each for each in model.parameters() if each.is_floating_point() and not each.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _parameters_behind(result: Tensor) -> set[int]:
    """Return the identities of the parameters that a result depends on, by the graph that was recorded."""
    waiting, seen, found = [result.grad_fn], set[Any](), set[int]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.add(id(getattr(node, "variable", None)))
        waiting += [each for each, _ in getattr(node, "next_functions", ())]
    return found


@contextmanager
def giving_maps(model: Any) -> Iterator[None]:
    """Let a model compute attention in the way that gives maps, where it has several."""
    before = getattr(model.config, "_attn_implementation", "eager")
    switch = getattr(model, "set_attn_implementation", None)
    if before == "eager" or switch is None:
        yield
        return
    switch("eager")
    try:
        yield
    finally:
        switch(before)


def pass_on(attentions: tuple[Tensor, ...] | None, real: Tensor, sink: AttentionSink) -> None:
    """Give the attention maps of each layer to a function, with zeros at padding.

    Args:
        attentions: `(batch, heads, time, time)` maps of each layer, as a model of transformers' returns them.
        real: `(batch, time)` mask of what is no padding.
        sink: the function.

    Raises:
        ValueError: where the model returns none.
    """
    if not attentions or attentions[0] is None:
        raise ValueError(
            "expected a model that returns attention maps, got one that does not: load it with "
            'attn_implementation="eager"'
        )
    both = (real[:, None, :, None] & real[:, None, None, :]).to(attentions[0].dtype)
    for maps in attentions:
        sink(maps * both)
