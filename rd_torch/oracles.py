"""Run other people's code on the tensors of our backbones: what `rd-torch verify` compares with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from rd_torch.backbone import ESM2, ESMC, Encoder

Answers: TypeAlias = Mapping[str, Tensor]


def require_fair_esm() -> None:
    """Require that the installed package `esm` is fair-esm, with whose code the files are compared.

    EvolutionaryScale's package has the same name. Where both are installed, their files mix, and neither
    works.

    Raises:
        ImportError: where it is not fair-esm.
    """
    spec = find_spec("esm")
    places = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    if not any((place / "model" / "esm2.py").is_file() for place in places):
        got = "the other package called esm" if spec else "none"
    elif any((place / "sdk").is_dir() for place in places):
        got = "it mixed with the other package called esm"
    else:
        return
    raise ImportError(
        f"expected fair-esm for the comparison, got {got}: run rd-torch verify in an environment of its own, "
        "with fair-esm and no other package called esm"
    )


def require_esmc() -> None:
    """Require a transformers that has ESM-C, with whose code the files are compared.

    Raises:
        ImportError: where transformers is missing or too old.
    """
    got = version_of("transformers")
    if got is None or find_spec("transformers.models.esmc") is None:
        raise ImportError(
            "expected transformers 5.16 or newer for the comparison of ESM-C, got "
            f"{got or 'none'}: pip install --upgrade transformers"
        )


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None where it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _run_fair_esm(backbone: Encoder, tokens: Tensor) -> Answers:
    """Return what fair-esm computes of tokens with the tensors of a backbone."""
    from esm.model.esm2 import ESM2 as FairESM2  # here, because it may be missing and nothing else needs it

    ours, tensors = cast(ESM2, backbone), backbone.tensors()
    layer, token_dropout = ours.depth, bool(ours.facts.get("token_dropout", True))
    with torch.device("meta"):
        theirs = FairESM2(layer, ours.embed_dim, ours.attention_heads, token_dropout=token_dropout)
    table = tensors["embed_tokens.weight" if ours.tied or not ours.has_lm_head else "lm_head.weight"]
    theirs.load_state_dict({**tensors, "lm_head.weight": table}, strict=False, assign=True)
    if not ours.has_lm_head:
        theirs.lm_head = nn.Identity()
    for each in theirs.layers:
        each.self_attn.rot_emb.inv_freq = tensors["layers.0.self_attn.rot_emb.inv_freq"]
    heads = "contact_head.regression.weight" in tensors
    out = theirs.eval()(tokens, repr_layers=[layer], return_contacts=heads)
    answers = {"embeddings": out["representations"][layer], "logits": out["logits"]}
    return answers | ({"contacts": out["contacts"]} if heads else {})


def _run_transformers(backbone: Encoder, tokens: Tensor) -> Answers:
    """Return what transformers computes of tokens with the tensors of a backbone."""
    from transformers import EsmcConfig, EsmcForMaskedLM  # here, for the same reason

    config = EsmcConfig(
        hidden_size=backbone.embed_dim,
        num_hidden_layers=backbone.num_layers,
        num_attention_heads=backbone.attention_heads,
        intermediate_size=backbone.hidden_dim,
        vocab_size=backbone.vocab_size,
    )
    with torch.device("meta"):
        theirs = EsmcForMaskedLM(config)
    theirs.esmc.layers = theirs.esmc.layers[: backbone.depth]
    if not backbone.has_lm_head:
        theirs.lm_head = nn.Identity()
    state = backbone.tensors().items()
    theirs.load_state_dict(
        {name if name.startswith("lm_head.") else f"esmc.{name}": tensor for name, tensor in state},
        assign=True,
    )
    angles = theirs.esmc.rotary_emb  # which no state dict has
    theirs.esmc.rotary_emb = type(angles)(config).to(tokens.device)
    taken: list[Tensor] = []
    theirs.esmc.norm.register_forward_hook(lambda *call: taken.append(call[-1]))
    mask = (tokens != backbone.alphabet.padding_idx).long()
    logits = theirs.eval()(tokens, attention_mask=mask).logits
    return {"embeddings": taken[-1], "logits": logits}


class Oracle(NamedTuple):
    """The code that backbones of a family are compared with.

    Attributes:
        package: name of the package.
        require: function that raises an ImportError where the package is missing.
        run: function of a backbone and `(batch, time)` tokens that returns embeddings and logits, and
            contacts where there are any.
    """

    package: str
    require: Callable[[], None]
    run: Callable[[Encoder, Tensor], Answers]


ORACLES: Final = {
    ESM2.family: Oracle("fair-esm", require_fair_esm, _run_fair_esm),
    ESMC.family: Oracle("transformers", require_esmc, _run_transformers),
}
"""The oracles by family."""


def oracle_of(level: str, family: str) -> Oracle:
    """Return the oracle for a level.

    Args:
        level: name of the level, for the message.
        family: name of its family.

    Raises:
        ValueError: for a family that has none.
    """
    if family not in ORACLES:
        raise ValueError(
            f"expected levels of ESM-2 or ESM-C, which other packages compute too, got level {level} of the "
            f"family {family}"
        )
    return ORACLES[family]
