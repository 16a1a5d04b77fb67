"""Reverse-distilled embeddings of protein language models as a PyTorch module.

`RDModel` runs a family of models, as ESM-2 or ESM-C, in one forward pass and returns nested embeddings: the
first features of the large model's embedding are the small models' embeddings (Catrina, Bepler, Sledzieski
and Singh, ICLR 2026, arXiv 2603.07710).

A name is loaded when it is first used, so that `rd-torch --help` need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rd_torch import cluster, pretrained, searching, sklearn, variants
    from rd_torch.backbone import ESM2, ESMC, Backbone, TransformersBackbone
    from rd_torch.basis import change_basis
    from rd_torch.choosing import choose_layers
    from rd_torch.combining import combine_stores
    from rd_torch.comparing import similarity
    from rd_torch.config import Explained, RDConfig
    from rd_torch.embedding import embed, embed_to_store
    from rd_torch.exporting import export
    from rd_torch.fitting import fit
    from rd_torch.fitting_stores import fit_stores
    from rd_torch.heads import MatryoshkaHead, ResidueHead, SequenceHead, align_labels
    from rd_torch.huggingface import (
        TransformersEncoder,
        TransformersForMaskedLM,
        TransformersForSequenceClassification,
        TransformersForTokenClassification,
    )
    from rd_torch.labelled import Labelled
    from rd_torch.learning import Learned, learn
    from rd_torch.levels import ESM2_LEVELS, ESMC_LEVELS, Level, Reference
    from rd_torch.maps import Basis
    from rd_torch.model import RDModel
    from rd_torch.moments import RunningMoments
    from rd_torch.nesting import Nesting
    from rd_torch.output import RDOutput
    from rd_torch.plotting import plot_store
    from rd_torch.predictor import Predictor
    from rd_torch.reading import Fasta, Proteins
    from rd_torch.reconstruct import Reconstruction
    from rd_torch.searching import build_index, open_index, search, transfer_labels
    from rd_torch.solve import concat_pca, solve_stages
    from rd_torch.stage import ConcatPCA, Stage
    from rd_torch.store import open_store
    from rd_torch.variants import embed_variants, plot_variants, score_variants

# The module in which each public name lives.
_HOMES = {
    "Backbone": "backbone",
    "Basis": "maps",
    "ConcatPCA": "stage",
    "ESM2": "backbone",
    "ESM2_LEVELS": "levels",
    "ESMC": "backbone",
    "ESMC_LEVELS": "levels",
    "Explained": "config",
    "Fasta": "reading",
    "Labelled": "labelled",
    "Learned": "learning",
    "Level": "levels",
    "MatryoshkaHead": "heads",
    "Nesting": "nesting",
    "Predictor": "predictor",
    "Proteins": "reading",
    "RDConfig": "config",
    "RDModel": "model",
    "RDOutput": "output",
    "Reconstruction": "reconstruct",
    "Reference": "levels",
    "ResidueHead": "heads",
    "RunningMoments": "moments",
    "SequenceHead": "heads",
    "Stage": "stage",
    "TransformersBackbone": "backbone",
    "TransformersEncoder": "huggingface",
    "TransformersForMaskedLM": "huggingface",
    "TransformersForSequenceClassification": "huggingface",
    "TransformersForTokenClassification": "huggingface",
    "align_labels": "heads",
    "build_index": "searching",
    "change_basis": "basis",
    "choose_layers": "choosing",
    "cluster": "cluster",
    "combine_stores": "combining",
    "concat_pca": "solve",
    "embed": "embedding",
    "embed_to_store": "embedding",
    "embed_variants": "variants",
    "export": "exporting",
    "fit": "fitting",
    "fit_stores": "fitting_stores",
    "learn": "learning",
    "open_index": "searching",
    "open_store": "store",
    "plot_store": "plotting",
    "plot_variants": "variants",
    "pretrained": "pretrained",
    "score_variants": "variants",
    "search": "searching",
    "searching": "searching",
    "similarity": "comparing",
    "sklearn": "sklearn",
    "solve_stages": "solve",
    "transfer_labels": "searching",
    "variants": "variants",
}

__all__ = [
    "ESM2",
    "ESM2_LEVELS",
    "ESMC",
    "ESMC_LEVELS",
    "Backbone",
    "Basis",
    "ConcatPCA",
    "Explained",
    "Fasta",
    "Labelled",
    "Learned",
    "Level",
    "MatryoshkaHead",
    "Nesting",
    "Predictor",
    "Proteins",
    "RDConfig",
    "RDModel",
    "RDOutput",
    "Reconstruction",
    "Reference",
    "ResidueHead",
    "RunningMoments",
    "SequenceHead",
    "Stage",
    "TransformersBackbone",
    "TransformersEncoder",
    "TransformersForMaskedLM",
    "TransformersForSequenceClassification",
    "TransformersForTokenClassification",
    "align_labels",
    "build_index",
    "change_basis",
    "choose_layers",
    "cluster",
    "combine_stores",
    "concat_pca",
    "embed",
    "embed_to_store",
    "embed_variants",
    "export",
    "fit",
    "fit_stores",
    "learn",
    "open_index",
    "open_store",
    "plot_store",
    "plot_variants",
    "pretrained",
    "score_variants",
    "search",
    "searching",
    "similarity",
    "sklearn",
    "solve_stages",
    "transfer_labels",
    "variants",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    return module if name == _HOMES[name] else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
