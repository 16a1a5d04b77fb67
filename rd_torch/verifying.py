"""Check real files against fair-esm and against what the project promises."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Unpack

import torch
from torch import Tensor, nn

from rd_torch.backbone import ESM2
from rd_torch.levels import ALPHABET, ESM2_LEVELS
from rd_torch.model import RDModel
from rd_torch.weights import (
    FAIR_ESM_NAMES,
    FAIR_ESM_SHA256,
    Hub,
    PublishedOptions,
    Source,
    find_backbone,
    read_backbone,
    read_level,
    sha256_of,
)

SEQUENCES: Final = (
    "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG",
    "MKV<mask>LAGXBUZO<mask>ACDEFGHIKLMNPQRSTVWY",
    "M",
)
"""Ubiquitin, a sequence with rare residues and masks, and a sequence of one residue."""

TOLERANCE: Final = 2e-5
"""Largest difference of embeddings and logits from fair-esm's in float32, in standard deviations."""

CONTACT_TOLERANCE: Final = 1e-4
"""Largest difference of contact probabilities from fair-esm's."""


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was checked.
        passed: whether the check passed.
        detail: what was found.
    """

    name: str
    passed: bool
    detail: str


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


def environment() -> str:
    """Return the versions that a report depends on.

    Returns:
        One line of text.

    Raises:
        ImportError: where fair-esm is not installed.
    """
    require_fair_esm()
    packages = ("rd_torch", "torch", "fair-esm", "safetensors", "huggingface_hub")
    return ", ".join(
        [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]
    )


@torch.no_grad()
def verify_chain(
    name_or_folder: str | Path,
    level: str,
    *,
    fair_esm: Path | None = None,
    backbones: Mapping[str, Source] | None = None,
    cache_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
    **published: Unpack[PublishedOptions],
) -> Iterator[Check]:
    """Load a chain in float32 and check it.

    Each backbone's embeddings, logits and contacts are compared with those of fair-esm's own code, which gets
    the same tensors. With `fair_esm`, each backbone's tensors are compared with fair-esm's own file, too,
    which shows whether names were understood. Every prefix is compared to the bit.

    Args:
        name_or_folder: the chain, as for `RDModel.from_pretrained`.
        level: the level to end at.
        fair_esm: folder with fair-esm's `.pt` files.
        backbones: files, folders or Hub ids of backbones that come from elsewhere, by level.
        cache_dir: folder of the Hub's cache.
        device: the device that the model runs on.
        **published: options that choose among the authors' maps.

    Yields:
        Each check, as soon as it is done.

    Raises:
        FileNotFoundError: for a file that is not there.
        ImportError: where fair-esm is not installed.
        ValueError: for a file that cannot be read, has another checksum, or does not fit the others.
    """
    require_fair_esm()
    model = RDModel.from_pretrained(
        name_or_folder, level, torch.float32, device, backbones, cache_dir=cache_dir, **published
    )
    model.eval()
    tokens = ALPHABET.get_batch_converter()([("", sequence) for sequence in SEQUENCES])[2].to(device)
    for each in model.config.levels:
        backbone = model.backbones[each.name]
        assert isinstance(backbone, ESM2)
        home = (
            f"{each.reference.repo} at {each.reference.revision}"
            if each.reference
            else "the checkpoint's own"
        )
        yield Check(f"files of {each.name}", True, home)
        yield _compare_with_fair_esm(each.name, backbone, tokens)
        if fair_esm and each.name in ESM2_LEVELS:
            path = fair_esm / FAIR_ESM_NAMES[each.name]
            yield _compare_with_file(each.name, backbone, path)
            yield _compare_checksum(path)
    yield from _compare_prefixes(model, tokens)
    fitted, applied = model.config.provenance.get("fitted_on"), model.config.predict_from
    if "fit" in model.config.provenance:
        fitted = applied  # maps that this package has fitted are applied as they were fitted
    detail = f"fitted on {fitted or 'what cannot be told'}, applied to {applied}"
    yield Check("maps", fitted in (None, applied), detail)


def _oracle(backbone: ESM2) -> nn.Module:
    """Return fair-esm's module with the tensors of one of ours."""
    from esm.model.esm2 import ESM2 as FairESM2  # here, because it may be missing and nothing else needs it

    with torch.device("meta"):
        oracle = FairESM2(backbone.num_layers, backbone.embed_dim, backbone.attention_heads)
    tensors = backbone.tensors()
    oracle.load_state_dict(
        {**tensors, "lm_head.weight": tensors["embed_tokens.weight"]}, strict=False, assign=True
    )
    for each in oracle.layers:
        each.self_attn.rot_emb.inv_freq = tensors["layers.0.self_attn.rot_emb.inv_freq"]
    return oracle.eval()


def _compare_with_fair_esm(name: str, backbone: ESM2, tokens: Tensor) -> Check:
    """Compare one backbone with fair-esm's code on the same tensors."""
    if not backbone.has_lm_head:
        return Check(f"{name} against fair-esm", False, "its checkpoint has no language-model head")
    layer, heads = backbone.num_layers, "contact_head.regression.weight" in backbone.tensors()
    expected = _oracle(backbone)(tokens, repr_layers=[layer], return_contacts=heads)
    out = RDModel({name: backbone}, [])(tokens, return_contacts=heads)
    real = tokens != ALPHABET.padding_idx
    pairs = {
        "embeddings": (out.embeddings[real], expected["representations"][layer][real]),
        "logits": (out["logits"][real], expected["logits"][real]),
    }
    worst = {key: float((ours - other).abs().max() / other.std()) for key, (ours, other) in pairs.items()}
    passed = max(worst.values()) <= TOLERANCE
    detail = "largest difference " + ", ".join(f"{key} {value:.1e} SD" for key, value in worst.items())
    if heads:
        # NaN stands where a protein has no pair of residues; as 2, it differs from every probability.
        ours, other = (answer["contacts"].nan_to_num(2) for answer in (out, expected))
        difference = (ours - other).abs().max()
        passed &= float(difference) <= CONTACT_TOLERANCE
        detail += f", contacts {float(difference):.1e}"
    return Check(f"{name} against fair-esm", passed, detail)


def _compare_with_file(name: str, backbone: ESM2, path: Path) -> Check:
    """Compare one backbone's tensors with fair-esm's own file, which may have them in half precision."""
    files = find_backbone(path, Hub())
    stored = read_backbone(files, read_level(files, name))
    different = [
        key
        for key, tensor in backbone.tensors().items()
        if key in stored and not torch.equal(tensor.cpu().to(stored[key].dtype), stored[key])
    ]
    missing = sorted(backbone.tensors().keys() - stored.keys())
    detail = f"{len(stored)} tensors equal to {path.name}"
    if different or missing:
        detail = f"different from {path.name}: {', '.join((different + missing)[:3])}"
    return Check(f"{name} against fair-esm's file", not different and not missing, detail)


def _compare_checksum(path: Path) -> Check:
    """Compare the checksum of fair-esm's file with the known one, where one is known."""
    got = sha256_of(path)
    known = FAIR_ESM_SHA256.get(path.name)
    detail = f"sha256 {got}" + ("" if known == got else f", known {known or 'none'}")
    return Check(f"checksum of {path.name}", known in (None, got), detail)


def _compare_prefixes(model: RDModel, tokens: Tensor) -> Iterator[Check]:
    """Compare the embedding of every shorter chain with the first features of the whole, to the bit."""
    if not model.config.is_nested:
        return
    whole = model(tokens).representations
    for name, width in list(model.config.widths.items())[:-1]:
        same = torch.equal(model(tokens, width=width).embeddings, whole[name])
        yield Check(f"prefix of {name}", same, f"{width} features, to the bit at every token")
