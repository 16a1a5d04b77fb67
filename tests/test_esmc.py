"""The oracle is transformers' `EsmcModel` in float32 with random weights, the same tensors on both sides."""

import copy

import pytest
import torch
from esmc import SHAPES as SMALL
from esmc import oracle, our_esmc, ours_of, random_esmc, small_esmc, tokens_of
from helpers import random_sequence
from torch import nn
from torch.nn import functional

from rd_torch import ESMC_LEVELS, RDModel, TransformersForMaskedLM
from rd_torch.backbone import hidden_width
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


def test_published_sizes_have_the_shapes_of_transformers_configs():
    shapes = {name: level.shape for name, level in ESMC_LEVELS.items()}
    assert shapes == {"300M": (30, 960, 15), "600M": (36, 1152, 18), "6B": (80, 2560, 40)}
    assert [hidden_width(width) for _, width, _ in shapes.values()] == [2560, 3072, 6912]
    largest = oracle().EsmcConfig()  # the others' are not in the package
    shape = largest.num_hidden_layers, largest.hidden_size, largest.num_attention_heads
    assert (shape, largest.intermediate_size, largest.vocab_size) == (shapes["6B"], 6912, 64)


def test_our_own_random_backbone_has_the_oracles_numbers():
    ours, theirs = (
        our_esmc(2, 48, 2, seed=3).state_dict(),
        ours_of(random_esmc(2, 48, 2, seed=3)).state_dict(),
    )
    assert list(ours) == list(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


PADDED = {
    "at the left": [[1, 1, 1, 0, 20, 15, 4, 2], [1, 0, 20, 32, 15, 4, 7, 2]],
    "inside": [[0, 20, 1, 15, 1, 1, 4, 2], [0, 5, 6, 1, 31, 8, 9, 2]],
    "everywhere": [[1, 0, 20, 1, 15, 4, 2, 1], [1, 1, 0, 1, 20, 2, 1, 1]],
}


@pytest.mark.parametrize("tokens", [torch.tensor(rows) for rows in PADDED.values()], ids=[*PADDED])
@sizes("tiny")
def test_padding_may_stand_anywhere_and_columns_are_positions(reference, tokens):
    ours, theirs = states_of_ours(ours_of(reference), tokens), states_of_theirs(reference, tokens)
    errors = [error(mine, other) for mine, other in zip(ours, theirs, strict=True)]
    assert max(errors) < TOLERANCE, errors


@batches(BATCHES)
@sizes("tiny", "300M, three layers")
@torch.no_grad()
def test_logits_are_transformers_and_64_wide(reference, tokens):
    expected = reference(tokens, attention_mask=(tokens != PAD).long()).logits
    logits = RDModel({"x": ours_of(reference)}, [])(tokens).logits
    assert logits.shape == (*tokens.shape, 64)
    assert error(logits[tokens != PAD], expected[tokens != PAD]) < TOLERANCE
    assert not logits[tokens == PAD].any()


@batches(BATCHES)
@sizes("tiny", "300M, three layers")
@torch.no_grad()
def test_attention_maps_are_transformers_eager_ones(reference, tokens):
    eager = copy.deepcopy(reference)
    eager.set_attn_implementation("eager")
    expected = eager.esmc(tokens, attention_mask=(tokens != PAD).long(), output_attentions=True).attentions
    maps = RDModel({"x": ours_of(reference)}, [])(tokens, need_head_weights=True).attentions
    assert maps.shape[1] == len(expected) == reference.config.num_hidden_layers
    rows = (tokens != PAD)[:, None, :, None]
    for ours, theirs in zip(maps.unbind(1), expected, strict=True):
        torch.testing.assert_close(ours, theirs.masked_fill(~rows, 0), rtol=0, atol=1e-5)


def test_the_batch_converter_gives_the_tokenizers_ids():
    tokenizer = oracle().EsmcTokenizer()
    assert tokenizer.get_vocab() == ESMC_ALPHABET.tok_to_idx
    for sequences in [*BATCHES.values(), ["MKV|ACD|W", "|M|", "A<mask>|<mask>", "<cls>M<eos>"]]:
        expected = tokenizer(sequences, return_tensors="pt", padding=True)
        tokens = tokens_of(*sequences)
        assert torch.equal(tokens, expected["input_ids"])
        assert torch.equal((tokens != PAD).long(), expected["attention_mask"])


def weighted(embeddings):
    """A loss that weighs every feature of every token differently."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(embeddings.shape, dtype=torch.float64, generator=generator).to(embeddings.dtype)
    return (embeddings * weights).sum() + embeddings.square().mean()


def assert_same(ours, theirs, within):
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        scale = theirs[name].abs().max().clamp(min=1e-3)
        assert (gradient - theirs[name]).abs().max() <= within * scale, name


def gradients(model):
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.fixture
def exact_angles(monkeypatch):
    """transformers computes angles in float32 even in a float64 model."""

    def forward(self, x, position_ids):
        angles = position_ids[..., None].to(self.inv_freq.dtype) * self.inv_freq
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()

    kind = type(random_esmc(1, 32, 2).esmc.rotary_emb)
    monkeypatch.setattr(kind, "forward", forward)


@pytest.mark.parametrize("predict_from", ["nested", "previous"])
def test_gradients_are_those_of_the_formula_on_transformers_encoders(exact_angles, predict_from):
    tokens = tokens_of(*BATCHES["several masks"], *BATCHES["rare residues and chains"])
    real = tokens != PAD
    model = small_esmc(predict_from).double()
    encoders = {
        name: random_esmc(*shape, seed=k).double().esmc for k, (name, shape) in enumerate(SMALL.items())
    }
    nested = previous = None
    for name, encoder in encoders.items():
        raw = encoder(tokens, attention_mask=real.long()).last_hidden_state
        if nested is None:
            nested = raw
        else:
            stage = model.stages[name]
            source = nested if predict_from == "nested" else previous
            added = (raw - (source @ stage.W + stage.b) - stage.m) @ stage.V
            nested = torch.cat((nested, added), dim=-1)
        previous = raw
    embeddings = model(tokens).embeddings
    torch.testing.assert_close(embeddings[real], nested[real], rtol=0, atol=1e-10)
    weighted(nested[real]).backward()
    weighted(embeddings[real]).backward()
    theirs = {
        f"backbones.{level}.{name}": gradient
        for level, encoder in encoders.items()
        for name, gradient in gradients(encoder).items()
    }
    assert_same(gradients(model), theirs, 1e-9)


@pytest.mark.slow
def test_gradients_at_full_width_are_transformers():
    reference = random_esmc(*SHAPES["300M, three layers"])
    tokens = tokens_of(*BATCHES["unequal lengths"], *BATCHES["several masks"])
    real = tokens != PAD
    backbone = ours_of(copy.deepcopy(reference))
    weighted(RDModel({"x": backbone}, [])(tokens).embeddings[real]).backward()
    weighted(reference.esmc(tokens, attention_mask=real.long()).last_hidden_state[real]).backward()
    assert_same(gradients(backbone), gradients(reference.esmc), 2e-4)


def test_the_masked_lm_trains_as_transformers_does(exact_angles):
    reference = random_esmc(3, 64, 4).double()
    ours = TransformersForMaskedLM(RDModel({"x": ours_of(copy.deepcopy(reference))}, [])).eval()
    labels = tokens_of(*BATCHES["unequal lengths"], "MKTAY|IAKQR")
    tokens = labels.masked_fill((torch.arange(labels.shape[1]) % 5 == 2) & (labels > 3), MASK)
    labels = labels.masked_fill(tokens != MASK, -100)
    given = {"input_ids": tokens, "attention_mask": (tokens != PAD).long(), "labels": labels}
    out, expected = ours(**given), reference(**given)
    assert out.logits.shape[-1] == ours.config.vocab_size == reference.config.vocab_size == 64
    torch.testing.assert_close(out.loss.float(), expected.loss, rtol=1e-6, atol=0)
    out.loss.backward()
    functional.cross_entropy(expected.logits.flatten(0, 1), labels.flatten()).backward()  # theirs is float32
    theirs = {name.removeprefix("esmc."): each for name, each in gradients(reference).items()}
    assert "lm_head.decoder.weight" in theirs
    assert_same(gradients(ours.chain.backbones["x"]), theirs, 1e-9)


class Soft(nn.Module):
    """Stands in the place of a table of embeddings: the mean of its rows under the distributions."""

    def __init__(self, table, distributions):
        super().__init__()
        self.table, self.distributions = table, distributions

    def forward(self, _tokens):
        return self.distributions @ self.table[: self.distributions.shape[-1]]


def test_gradients_to_distributions_are_transformers(exact_angles):
    reference = random_esmc(3, 32, 2).double()
    model = RDModel({"x": ours_of(copy.deepcopy(reference))}, [])
    tokens = tokens_of("MKTAY|IAKQR", "MKV<mask>A", "M")
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(*tokens.shape, len(ESMC_ALPHABET), dtype=torch.float64, generator=generator)
    hard = functional.one_hot(tokens, len(ESMC_ALPHABET)).double()
    soft = torch.where((tokens >= 4)[..., None], random.softmax(-1), hard)
    ours, theirs = (soft.clone().requires_grad_() for _ in range(2))
    reference.esmc.embed_tokens = Soft(reference.esmc.embed_tokens.weight, theirs)
    real = tokens != PAD
    out = reference.esmc(tokens, attention_mask=real.long()).last_hidden_state[real]
    embeddings = model(ours).embeddings[real]
    torch.testing.assert_close(embeddings, out, rtol=0, atol=1e-10)
    weighted(out).backward()
    weighted(embeddings).backward()
    assert theirs.grad[real].abs().amin(0).min() > 0
    torch.testing.assert_close(ours.grad[real], theirs.grad[real], rtol=0, atol=1e-9)
    assert not ours.grad[~real].any()
