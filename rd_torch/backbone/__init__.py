"""One backbone: everything between a batch of token ids and its raw embeddings, the final hidden states."""

from rd_torch.backbone.attention import RotaryEmbedding, inverse_frequencies
from rd_torch.backbone.automodel import TransformersBackbone
from rd_torch.backbone.backbone import Backbone, MissingHead, Taken, TooManyTokensError
from rd_torch.backbone.encoder import EMBEDDING, Encoder
from rd_torch.backbone.esm2 import ESM2, MEAN_SHARE_KEPT, TransformerLayer
from rd_torch.backbone.esmc import ESMC, hidden_width
from rd_torch.backbone.families import FAMILIES, as_backbone, as_family, class_of, one_alphabet
from rd_torch.backbone.layer import AttentionSink, Layer
from rd_torch.backbone.packing import Packing
from rd_torch.backbone.precision import apply_outside_half, at_least_float32
from rd_torch.backbone.preparing import PROBES, Prepared, obstacle
from rd_torch.backbone.running import run_backbones
from rd_torch.backbone.tokenizers import TokenizerAlphabet
from rd_torch.backbone.tokens import UBIQUITIN, check_tokens, is_real, is_residue, token_ids, tokenize

__all__ = [
    "EMBEDDING",
    "ESM2",
    "ESMC",
    "FAMILIES",
    "MEAN_SHARE_KEPT",
    "PROBES",
    "UBIQUITIN",
    "AttentionSink",
    "Backbone",
    "Encoder",
    "Layer",
    "MissingHead",
    "Packing",
    "Prepared",
    "RotaryEmbedding",
    "Taken",
    "TokenizerAlphabet",
    "TooManyTokensError",
    "TransformerLayer",
    "TransformersBackbone",
    "apply_outside_half",
    "as_backbone",
    "as_family",
    "at_least_float32",
    "check_tokens",
    "class_of",
    "hidden_width",
    "inverse_frequencies",
    "is_real",
    "is_residue",
    "obstacle",
    "one_alphabet",
    "run_backbones",
    "token_ids",
    "tokenize",
]
