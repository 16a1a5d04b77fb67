"""Check real files against their families' own code and against what the project promises."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Unpack, cast

import torch
from torch import Tensor

from rd_torch.backbone import Encoder
from rd_torch.levels import ESM2_FAMILY, ESM2_LEVELS
from rd_torch.model import RDModel
from rd_torch.oracles import Oracle, oracle_of, version_of
from rd_torch.weights import (
    FAIR_ESM_NAMES,
    FAIR_ESM_SHA256,
    Hub,
    PublishedOptions,
    Source,
    find_backbone,
    read_backbone,
    read_checkpoint,
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
"""Largest difference of embeddings and logits from the oracle's in float32, in standard deviations."""

CONTACT_TOLERANCE: Final = 1e-4
"""Largest difference of contact probabilities from fair-esm's."""

PACKAGES: Final = ("rd_torch", "torch", "fair-esm", "transformers", "safetensors", "huggingface_hub")
"""The packages that a report depends on."""


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


def environment() -> str:
    """Return the versions that a report depends on, in one line; packages that are missing are left out."""
    versions = {name: version_of(name) for name in PACKAGES}
    found = [f"{name} {number}" for name, number in versions.items() if number]
    return ", ".join([f"Python {platform.python_version()}", *found])


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

    What each backbone computes is compared with what its family's own code computes from the same tensors:
    embeddings, logits and contacts of ESM-2 with those of fair-esm, embeddings and logits of ESM-C with those
    of transformers. With `fair_esm`, tensors of ESM-2 are compared with fair-esm's own file, too, which shows
    whether names were understood. Every prefix is compared to the bit.

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
        ImportError: where the package to compare with is not installed.
        ValueError: for a file that cannot be read, has another checksum, or does not fit the others, or for a
            level of another family.
    """
    config = read_checkpoint(name_or_folder, level, Hub(cache_dir), **published).config
    for each in config.levels:  # before anything large is read
        oracle_of(each.name, each.family).require()
    model = RDModel.from_pretrained(
        name_or_folder, level, torch.float32, device, backbones, cache_dir=cache_dir, **published
    )
    model.eval()
    tokens = model.alphabet.get_batch_converter()([("", sequence) for sequence in SEQUENCES])[2].to(device)
    for each in model.config.levels:
        whole, oracle = cast(Encoder, model.backbones[each.backbone]), oracle_of(each.name, each.family)
        backbone = whole if each.layer is None else whole.until(each.layer)
        home = (
            f"{each.reference.repo} at {each.reference.revision}"
            if each.reference
            else "the checkpoint's own"
        )
        yield Check(f"files of {each.name}", True, home)
        yield _compare_with_oracle(each.name, backbone, oracle, tokens)
        if fair_esm and each.family == ESM2_FAMILY and each.backbone in ESM2_LEVELS:
            path = fair_esm / FAIR_ESM_NAMES[each.backbone]
            yield _compare_with_file(each.name, backbone, path)
            yield _compare_checksum(path)
    yield from _compare_prefixes(model, tokens)
    fitted, applied = model.config.provenance.get("fitted_on"), model.config.predict_from
    if "fit" in model.config.provenance:
        fitted = applied  # maps that this package has fitted are applied as they were fitted
    detail = f"fitted on {fitted or 'what cannot be told'}, applied to {applied}"
    yield Check("maps", fitted in (None, applied), detail)


def _compare_with_oracle(name: str, backbone: Encoder, oracle: Oracle, tokens: Tensor) -> Check:
    """Compare one backbone with the code of its family on the same tensors; one that was cut has no heads."""
    title = f"{name} against {oracle.package}"
    is_whole = backbone.depth == backbone.num_layers
    if is_whole and not backbone.has_lm_head:
        return Check(title, False, "its checkpoint has no language-model head")
    expected = oracle.run(backbone, tokens)
    heads = "contacts" in expected
    out = RDModel({name: backbone}, [])(tokens, return_contacts=heads)
    real = tokens != backbone.alphabet.padding_idx
    compared = ("embeddings", "logits") if is_whole else ("embeddings",)
    pairs = {key: (out[key][real], expected[key][real]) for key in compared}
    worst = {key: float((ours - other).abs().max() / other.std()) for key, (ours, other) in pairs.items()}
    passed = max(worst.values()) <= TOLERANCE
    detail = "largest difference " + ", ".join(f"{key} {value:.1e} SD" for key, value in worst.items())
    if heads:
        # NaN stands where a protein has no pair of residues; as 2, it differs from every probability.
        ours, other = (answer["contacts"].nan_to_num(2) for answer in (out, expected))
        difference = (ours - other).abs().max()
        passed &= float(difference) <= CONTACT_TOLERANCE
        detail += f", contacts {float(difference):.1e}"
    return Check(title, passed, detail)


def _compare_with_file(name: str, backbone: Encoder, path: Path) -> Check:
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
