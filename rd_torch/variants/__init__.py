"""Variants of a protein: how people write them, scores without labels, embeddings, heat maps.

Names load on first use, as those of `rd_torch` do.

Examples:
    >>> variant = rd_torch.variants.read_variant("p.[Lys6Arg;Thr7Trp]", "MQIFVKTLTG")
    >>> variant.sites, variant.mutate("MQIFVKTLTG")
    ((5, 6), 'MQIFVRWLTG')
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rd_torch.variants.embedding import Target, embed_table, embed_variants, variant_pool_name
    from rd_torch.variants.filing import Request, score_table
    from rd_torch.variants.heatmap import plot_variants, require_picture
    from rd_torch.variants.notation import read_notation
    from rd_torch.variants.scoring import SCORINGS, score_variants
    from rd_torch.variants.tables import AllSingle, VariantTable
    from rd_torch.variants.variant import (
        AMINO_ACIDS,
        Substitution,
        Variant,
        all_single,
        compare_sequence,
        read_variant,
        read_wild_type,
    )
    from rd_torch.variants.view import view_of

_HOMES = {
    "AMINO_ACIDS": "variant",
    "SCORINGS": "scoring",
    "AllSingle": "tables",
    "Request": "filing",
    "Substitution": "variant",
    "Target": "embedding",
    "Variant": "variant",
    "VariantTable": "tables",
    "all_single": "variant",
    "compare_sequence": "variant",
    "embed_table": "embedding",
    "embed_variants": "embedding",
    "plot_variants": "heatmap",
    "read_notation": "notation",
    "read_variant": "variant",
    "read_wild_type": "variant",
    "require_picture": "heatmap",
    "score_table": "filing",
    "score_variants": "scoring",
    "variant_pool_name": "embedding",
    "view_of": "view",
}

__all__ = [
    "AMINO_ACIDS",
    "SCORINGS",
    "AllSingle",
    "Request",
    "Substitution",
    "Target",
    "Variant",
    "VariantTable",
    "all_single",
    "compare_sequence",
    "embed_table",
    "embed_variants",
    "plot_variants",
    "read_notation",
    "read_variant",
    "read_wild_type",
    "require_picture",
    "score_table",
    "score_variants",
    "variant_pool_name",
    "view_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
