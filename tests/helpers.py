"""What several test files build: random ESM-2 models of any shape, token batches, a small family."""

import math

import torch
from esm.model.esm2 import ESM2 as FairESM2

from rd_torch import RDModel, RunningMoments, embed_to_store, hardware, solve_stages
from rd_torch.letters import RESIDUE_LETTERS
from rd_torch.levels import ALPHABET

SHAPES = {"a": (2, 32, 4), "b": (2, 48, 4), "c": (3, 64, 4)}
WIDTHS = {name: width for name, (_, width, _) in SHAPES.items()}


def random_esm2(num_layers, width, attention_heads, seed=0):
    """fair-esm's model with weights that keep attention selective and activations of unit size."""
    with torch.device("meta"):
        module = FairESM2(num_layers, width, attention_heads)
    module.to_empty(device="cpu").eval()
    module.lm_head.weight = module.embed_tokens.weight
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        bound = 0.3
        if parameter.ndim == 2:
            gain = 1.4 if "q_proj" in name or "k_proj" in name else 1.0
            bound = gain * math.sqrt(3 / parameter.shape[1])
        if name in ("embed_tokens.weight", "contact_head.regression.weight"):
            bound = math.sqrt(3)
        parameter.data.uniform_(-bound, bound, generator=generator)
        if name.endswith("norm.weight"):
            parameter.data.add_(1)
    size = width // attention_heads
    inv_freq = 10_000.0 ** -(torch.arange(0, size, 2) / size)
    for layer in module.layers:
        layer.self_attn.rot_emb.inv_freq = inv_freq.half().float()  # as the published weights have it
    return module


def random_sequence(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return "".join(RESIDUE_LETTERS[k] for k in torch.randint(20, (length,), generator=generator))


def tokens_of(*sequences):
    """fair-esm's own token batch; `<mask>` may stand in a sequence."""
    return ALPHABET.get_batch_converter()([("", sequence) for sequence in sequences])[2]


def random_stages(predict_from="nested", widths=WIDTHS, seed=0, **options):
    """Stages solved on random moments of full rank, their residual mean moved away from zero."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(widths.values())
    moments = RunningMoments(total)
    mixing = torch.randn(total, total, dtype=torch.float64, generator=generator) / math.sqrt(total)
    moments.update(torch.randn(600, total, dtype=torch.float64, generator=generator) @ mixing + 1)
    stages = solve_stages(moments, widths, predict_from=predict_from, **options)
    for stage in stages:
        stage.m = torch.randn(stage.m.shape, dtype=torch.float64, generator=generator)
    return stages


def tiny_model():
    """A random chain of two levels of one layer, 16 and 24 features wide, in `eval` mode."""
    backbones = {"a": random_esm2(1, 16, 4), "b": random_esm2(1, 24, 4, seed=1)}
    return RDModel(backbones, random_stages(widths={"a": 16, "b": 24})).eval()


def small_model(predict_from="nested", special_rows="maps"):
    """A random family of three levels, the same at every call."""
    backbones = {name: random_esm2(*shape, seed=k) for k, (name, shape) in enumerate(SHAPES.items())}
    stages = random_stages(predict_from)
    return RDModel(backbones, stages, predict_from=predict_from, special_rows=special_rows).eval()


def embed_alone(model, folder, suffix="h5", pool="mean", *, proteins, **options):
    """A file of each backbone's own embeddings, as its users hold them, by level."""
    folder.mkdir(exist_ok=True)
    paths = {level: folder / f"{level}.{suffix}" for level in model.backbones}
    for level, path in paths.items():
        embed_to_store(RDModel({level: model.backbones[level]}, []), proteins, path, pool=pool, **options)
    return paths


def any_size(name):
    """A dimension of any size for `torch.export`, whose older versions want to know the largest."""
    return torch.export.Dim(name, max=4096 if hardware.is_older(torch.__version__, (2, 8)) else None)
