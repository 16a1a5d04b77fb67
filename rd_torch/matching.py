"""Refuse files that cannot hold raw embeddings, or not those of a level, by what they state of themselves."""

from __future__ import annotations

import re
from typing import Final

from rd_torch.levels import ESM2_LEVELS, ESMC_LEVELS, Level, split_level
from rd_torch.store import Store

_SIZE: Final = re.compile(r"(?:^|[^0-9A-Za-z])(\d+[MB])(?![0-9A-Za-z])", re.IGNORECASE)
"""The size in the name of a model, such as `esm2_t33_650M_UR50D` or `ESMC-600M`."""

_OTHER_FAMILIES: Final = {
    family: re.compile(
        rf"t5|bert|xlnet|esm[-_]?(?:{others}|msa)|ankh|seqvec|unirep|progen|word2vec|fasttext|glove",
        re.IGNORECASE,
    )
    for family, others in {"esm2": "1|3|c", "esmc": "1|2|3"}.items()
}
"""Parts of the names of models that are not of a family with published sizes."""

_NORMS: Final = {True: "after", False: "without"}
"""How hidden states lie to the final LayerNorm, in words, by whether it acted on them."""

_SIZES: Final = {"esm2": ESM2_LEVELS, "esmc": ESMC_LEVELS}


def require_raw(name: str, store: Store) -> None:
    """Require that a file can hold raw embeddings that maps nest.

    Args:
        name: name of the level that the file is of.
        store: the file.

    Raises:
        ValueError: for nested embeddings, a way to pool that does not commute with the maps, or another layer
            than the name states.
    """
    layer = split_level(name)[1]
    if layer is not None and store.layer not in (None, layer):
        raise ValueError(
            f"expected embeddings of layer {layer} at level {name}, got those of layer {store.layer} in "
            f"{store.path}: name each file by the level that made it"
        )
    if store.facts is not None and len(store.facts.levels) > 1:
        raise ValueError(
            f"expected raw embeddings of the {name} backbone in {store.path}, got nested ones of "
            f"levels {', '.join(store.facts.levels)}: embed with that backbone alone as the model"
        )
    if store.pool not in ("mean", "none"):
        raise ValueError(
            f"expected means, or a vector for each residue, in {store.path}, got pool {store.pool!r}, which "
            "does not commute with the maps: embed with --pool mean or none"
        )


def require_level(level: Level, store: Store, final_norm: bool = True) -> None:
    """Require that a file can hold a level's raw embeddings, by all that it states of itself.

    Args:
        level: the level. If it is only a name and a width, the file must state no other model than the file
            that the maps were fitted to.
        store: the file.
        final_norm: whether the maps were fitted to hidden layers after the backbone's final LayerNorm.

    Raises:
        ValueError: as `require_raw`, and for another width, layer or model than the level's, or a hidden
            layer after the final LayerNorm where the maps want it without, or the other way round.
    """
    require_raw(level.name, store)
    stated = store.facts and store.facts.final_norm
    if stated not in (None, final_norm):
        raise ValueError(
            f"expected hidden states {_NORMS[final_norm]} the final LayerNorm of the backbone at level "
            f"{level.name}, got them {_NORMS[bool(stated)]} it in {store.path}: embed with "
            f"final_norm={final_norm}, as the maps were fitted"
        )
    cure = "name each file by the level of the backbone that made it"
    if store.width != level.width:
        raise ValueError(
            f"expected width {level.width} at level {level.name}, got {store.width} in {store.path}: {cure}"
        )
    if level.depth is not None and store.layer not in (None, level.depth):
        which = f"the last layer, {level.depth}," if level.layer is None else f"layer {level.depth}"
        raise ValueError(
            f"expected embeddings of {which} at level {level.name}, got those of layer "
            f"{store.layer} in {store.path}: {cure}, and take that layer"
        )
    if level.num_layers is None:
        _require_origin(level, store)
        return
    if store.facts is not None or level.backbone not in _SIZES.get(level.family, {}):
        return
    model = store.model_name or ""
    size = _SIZE.search(model)
    if (size and size[1].upper() != level.backbone) or _OTHER_FAMILIES[level.family].search(model):
        raise ValueError(
            f"expected embeddings of {level.title} {level.name}, got those of {model} in {store.path}, as "
            f"the file says: {cure}"
        )


def origin_of(store: Store) -> dict[str, str]:
    """Return what a file states of the model that made it, by which another file can be told from it.

    Args:
        store: the file.

    Returns:
        Fingerprint and dtype of the model for a store of ours, the model's name for another program's file;
        empty where the file states none.
    """
    if store.facts is not None:
        return {"fingerprint": store.facts.fingerprint, "dtype": store.facts.backbone_dtype}
    return {"model": store.model_name} if store.model_name else {}


def _require_origin(level: Level, store: Store) -> None:
    """Require that a file states no other model than the one whose embeddings a level was fitted to."""
    stated = origin_of(store)
    alike = stated.get("dtype") == level.facts.get("dtype")  # in another dtype the fingerprint differs too
    for fact in ("fingerprint", "model"):
        known, got = level.facts.get(fact), stated.get(fact)
        if alike and known and got and known != got:
            raise ValueError(
                f"expected embeddings of {fact} {known} at level {level.name}, as the maps were fitted to, "
                f"got those of {got} in {store.path}: embed with the same model, up to the same level"
            )


def require_names(store: Store) -> None:
    """Require that another program's file has names of proteins, and not only the numbers of its records.

    Args:
        store: the file.

    Raises:
        ValueError: where all names are numbers.
    """
    if store.facts is None and len(store) > 1 and set(store.identifiers) == set(map(str, range(len(store)))):
        raise ValueError(
            f"expected the names of proteins in {store.path}, got the numbers 0 to {len(store) - 1:,}: "
            "numbers do not tell which protein is the same in another file; write names as the attribute "
            "original_id"
        )
