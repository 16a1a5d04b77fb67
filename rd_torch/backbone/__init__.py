"""One backbone: everything between a batch of token ids and its raw embeddings, the final hidden states."""

from rd_torch.backbone.attention import inverse_frequencies
from rd_torch.backbone.esm2 import EMBEDDING, ESM2, MEAN_SHARE_KEPT, MissingHead
from rd_torch.backbone.layer import AttentionSink, TransformerLayer
from rd_torch.backbone.packing import Packing
from rd_torch.backbone.precision import apply_outside_half, at_least_float32
from rd_torch.backbone.preparing import PROBES, Prepared, obstacle
from rd_torch.backbone.tokens import check_tokens, is_real, is_residue, token_ids, tokenize

__all__ = [
    "EMBEDDING",
    "ESM2",
    "MEAN_SHARE_KEPT",
    "PROBES",
    "AttentionSink",
    "MissingHead",
    "Packing",
    "Prepared",
    "TransformerLayer",
    "apply_outside_half",
    "at_least_float32",
    "check_tokens",
    "inverse_frequencies",
    "is_real",
    "is_residue",
    "obstacle",
    "token_ids",
    "tokenize",
]
