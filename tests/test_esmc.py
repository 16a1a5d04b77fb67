"""The oracle is transformers' `EsmcModel` in float32 with random weights, the same tensors on both sides."""

import pytest
import torch
from esmc import ours_of, random_esmc
from helpers import random_sequence

from rd_torch import ESMC_LEVELS
from rd_torch.backbone.packing import Packing
from rd_torch.levels import ESMC_ALPHABET

TOLERANCE = 2e-5
PAD, MASK = ESMC_ALPHABET.padding_idx, ESMC_ALPHABET.mask_idx
SHAPES = {name: (level.num_layers, level.width, level.attention_heads) for name, level in ESMC_LEVELS.items()}
SHAPES |= {"300M, three layers": (3, *SHAPES["300M"][1:]), "6B, four layers": (4, *SHAPES["6B"][1:])}
SHAPES |= {"6B's 80 layers, narrow": (80, 64, 4), "tiny": (3, 32, 2)}

BATCHES = {
    "one residue": ["M"],
    "unequal lengths": [random_sequence(length, length) for length in (23, 41, 1, 40, 7)],
    "several masks": ["MK<mask>AY<mask><mask>A", "<mask>" + random_sequence(30), "MKTAYIAK"],
    "only masks": ["<mask>" * 9, "MKV"],
    "rare residues and chains": ["MXBUZOXXA", "OUZ|MKV", "B.-"],
}
LONG = {"long and short": [random_sequence(1500, 1), "MKTAYIA"]}


def tokens_of(*sequences):
    return ESMC_ALPHABET.get_batch_converter()([("", sequence) for sequence in sequences])[2]


def states_of_theirs(reference, tokens):
    """Every hidden state after a layer, and the last one after the norm, at real tokens."""
    taken = []
    parts = [*reference.esmc.layers, reference.esmc.norm]
    hooks = [part.register_forward_hook(lambda *call: taken.append(call[-1])) for part in parts]
    with torch.no_grad():
        reference.esmc(tokens, attention_mask=(tokens != PAD).long())
    for hook in hooks:
        hook.remove()
    return [each[tokens != PAD] for each in taken]


def states_of_ours(backbone, tokens, make=Packing.of):
    taken = []
    parts = [*backbone.layers, backbone.norm]
    hooks = [part.register_forward_hook(lambda *call: taken.append(call[-1])) for part in parts]
    packing = make(tokens != PAD)
    with torch.no_grad():
        backbone(tokens, packing)
    for hook in hooks:
        hook.remove()
    return [packing.unpack(each)[tokens != PAD] for each in taken]


def error(ours, theirs):
    """Largest difference in standard deviations of the oracle."""
    return ((ours - theirs).abs().max() / theirs.std()).item()


@pytest.fixture(scope="module")
def reference(request):
    return random_esmc(*SHAPES[request.param])


def sizes(*fast, slow=()):
    params = [*fast, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]
    return pytest.mark.parametrize("reference", params, indirect=True, scope="module")


def batches(cases):
    return pytest.mark.parametrize("tokens", [tokens_of(*case) for case in cases.values()], ids=[*cases])


@batches(BATCHES | LONG)
@sizes("tiny", "300M, three layers", "6B's 80 layers, narrow", slow=["300M", "600M", "6B, four layers"])
def test_every_hidden_state_is_transformers(reference, tokens):
    ours, theirs = states_of_ours(ours_of(reference), tokens), states_of_theirs(reference, tokens)
    errors = [error(mine, other) for mine, other in zip(ours, theirs, strict=True)]
    assert len(errors) == reference.config.num_hidden_layers + 1
    assert max(errors) < TOLERANCE, errors
