"""What a chain of ESM-C promises by itself: no oracle is needed here."""

import copy
import pickle

import numpy as np
import pytest
import torch
from esmc import SHAPES, WIDTHS, our_esmc, small_esmc, tokens_of
from helpers import random_esm2, random_sequence, random_stages, require_one_graph
from torch.nn import functional

import rd_torch
from rd_torch import ESMC, RDModel
from rd_torch.backbone.packing import Packing
from rd_torch.backbone.preparing import LIMITS
from rd_torch.levels import ESMC_ALPHABET

PAD, MASK, BREAK = ESMC_ALPHABET.padding_idx, ESMC_ALPHABET.mask_idx, ESMC_ALPHABET.get_idx("|")
SEQUENCES = ("MKTAYIAKQR<mask>QISFVK<mask>", "M", "XBUZO|MK|", "<mask><mask>", random_sequence(41))
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_source = pytest.mark.parametrize("predict_from", ["nested", "previous"])


@pytest.fixture(scope="module")
def model():
    return small_esmc()


@pytest.fixture
def tokens():
    return tokens_of(*SEQUENCES)


def calls_of(model):
    """The backbones that run, by level, as they run."""
    calls = []
    for name, backbone in model.backbones.items():
        backbone.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


@each_source
@each_dtype
@torch.no_grad()
def test_prefixes_are_equal_to_the_bit_at_every_token(tokens, dtype, predict_from):
    model = small_esmc(predict_from).to(dtype)
    out = model(tokens)
    assert out.embeddings.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for level, width in WIDTHS.items():
        prefix = out.embeddings[..., :width]
        assert torch.equal(out.representations[level], prefix)
        assert torch.equal(model(tokens, width=width).embeddings, prefix)
        assert torch.equal(model.encode(tokens, width=width - 3), prefix[..., :-3])
        assert torch.equal(model.truncate(level)(tokens).embeddings, prefix)
        assert prefix[tokens != PAD].abs().amax(-1).min() > 0
    assert not out.embeddings[tokens == PAD].any()


@pytest.mark.parametrize(("width", "levels"), [(1, "a"), (32, "a"), (33, "ab"), (48, "ab"), (64, "abc")])
def test_a_width_runs_only_the_backbones_it_needs(tokens, width, levels):
    model = small_esmc()
    expected = model(tokens).embeddings[..., :width]
    logits = model.truncate(levels[-1])(tokens).logits
    calls = calls_of(model)
    out = model(tokens, width=width)
    assert calls == list(levels)
    assert torch.equal(out.embeddings, expected)
    assert torch.equal(out.logits, logits)


@each_dtype
@torch.no_grad()
def test_an_embedding_does_not_depend_on_its_batch(tokens, dtype):
    model = small_esmc().to(dtype)
    together = model(tokens).embeddings
    for row, sequence in zip(together, SEQUENCES, strict=True):
        alone = model(tokens_of(sequence)).embeddings[0]
        difference = (row[: len(alone)] - alone).abs()
        if dtype in (torch.float32, torch.float64):
            assert difference.max() <= 2e-5 * together[tokens != PAD].std()
        else:
            assert difference.mean() <= LIMITS[dtype].error * together[tokens != PAD].std()


@torch.no_grad()
def test_packed_and_padded_batches_are_alike(model, tokens, monkeypatch):
    packed = model(tokens)
    monkeypatch.setattr(Packing, "of", Packing.padded)
    padded = model(tokens)
    torch.testing.assert_close(padded.embeddings, packed.embeddings, rtol=0, atol=2e-5)
    torch.testing.assert_close(padded.logits, packed.logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_larger_rows_are_raw_at_special_tokens_and_chain_breaks(model, tokens):
    larger = small_esmc(special_rows="larger")
    out, maps = larger(tokens), model(tokens)
    packing = Packing.of(tokens != PAD)
    raw = packing.unpack(larger.backbones["c"](tokens, packing))
    special = (tokens != PAD) & ~out.residue_mask
    assert special[tokens == BREAK].all()
    assert torch.equal(out.embeddings[special], raw[special])
    assert torch.equal(out.embeddings[out.residue_mask], maps.embeddings[out.residue_mask])


def test_contacts_are_refused_in_a_sentence(model, tokens):
    expected = "expected a backbone with a contact head, got one of esmc, which has none"
    for ask in (model.predict_contacts, lambda tokens: model(tokens, return_contacts=True)):
        with pytest.raises(RuntimeError, match=f"^{expected}$"):
            ask(tokens)


def test_a_chain_break_is_a_token_but_no_residue_and_doors_for_strings_refuse_it(model, tmp_path):
    tokens = tokens_of("MK|V")
    assert tokens.tolist() == [[0, 20, 15, 31, 7, 2]]
    assert model(tokens).residue_mask.tolist() == [[False, True, True, False, True, False]]
    alone = model(tokens_of("MKV")).embeddings
    assert (model(tokens).embeddings[0, 1] - alone[0, 1]).abs().max() > 1e-3, "attention crosses it"
    with pytest.raises(ValueError, match=r"expected letters, '-', '.' or '\*', got '\|' at position 3"):
        rd_torch.embed(model, ["MK|V"])
    with pytest.raises(ValueError, match=r"got '\|' at position 3"):
        rd_torch.embed_to_store(model, [("one", "MK|V")], tmp_path / "out.h5", strict=True)
    assert not (tmp_path / "out.h5").exists()
    with pytest.raises(ValueError, match=r"got '\|' at position 3"):
        rd_torch.fit(dict(model.backbones.items()), ["MK|V", "MKV"])


MIXED = {
    "ESM-2 first": lambda: {"a": random_esm2(1, 32, 4), "b": our_esmc(1, 48, 2)},
    "ESM-C first": lambda: {"a": our_esmc(1, 32, 2), "b": random_esm2(1, 48, 4)},
}


@pytest.mark.parametrize("backbones", MIXED.values(), ids=[*MIXED])
def test_families_of_two_alphabets_are_refused_with_what_differs(backbones):
    break_alone = r"(no sequence of tokens|the 3 tokens 0 31 2) for level"
    message = (
        rf"expected backbones of one alphabet, got others: '\|' is {break_alone} a \(esm[2c]\) and "
        rf"{break_alone} b \(esm[2c]\); embed with each alone"
    )
    family = backbones()
    with pytest.raises(ValueError, match=message):
        RDModel(family, random_stages(widths={"a": 32, "b": 48}))
    with pytest.raises(ValueError, match=message):
        rd_torch.fit(family, ["MKTAYIAKQR", "ACDEFGHIKL"])


# Soft sequences


def soft_tokens(*sequences, dtype=torch.float32):
    """Random distributions where residues, masks and breaks stand; ends and padding as they are."""
    tokens = tokens_of(*sequences)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*tokens.shape, len(ESMC_ALPHABET), dtype=dtype, generator=generator)
    return torch.where((tokens >= 4)[..., None], logits.softmax(-1), one_hot(tokens, dtype))


def one_hot(tokens, dtype=torch.float32):
    return functional.one_hot(tokens, len(ESMC_ALPHABET)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@torch.no_grad()
def test_one_hot_distributions_give_what_ids_give(tokens, dtype):
    model = small_esmc().to(dtype)
    expected = model(tokens, need_head_weights=True)
    for given in (torch.float32, torch.float64, torch.float16):
        out = model(one_hot(tokens, given), need_head_weights=True)
        for name in ("embeddings", "logits", "attentions"):
            torch.testing.assert_close(out[name], expected[name], rtol=0, atol=1e-6)
        assert torch.equal(out.residue_mask, expected.residue_mask)


def test_what_is_at_mask_or_at_a_break_enters_as_their_embeddings():
    """There is no token dropout: a distribution's embedding is the mean of all tokens' under it."""
    backbone = our_esmc(2, 32, 2).double()
    soft = soft_tokens("MKT|AY<mask>", "MK", dtype=torch.float64)
    packing = Packing.of(soft[..., PAD] < 1)
    got = packing.unpack(backbone.embedded(*backbone.weigh(soft, packing, torch.float64)))
    expected = soft @ backbone.embed_tokens.weight[: len(ESMC_ALPHABET)]
    real = packing.real
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-12)


def test_the_whole_chain_passes_gradcheck(model):
    double = copy.deepcopy(model).truncate("b").double()
    soft = soft_tokens("MK|V<mask>", dtype=torch.float64).requires_grad_()
    weights = torch.randn(48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(lambda p: (double.encode(p) * weights).sum(), soft)


def test_distributions_over_all_rows_of_the_table_are_refused(model):
    with pytest.raises(ValueError, match=r"\(batch, time, 33\), got \(1, 4, 64\)"):
        model(torch.full((1, 4, 64), 1 / 64))
    with pytest.raises(ValueError, match="expected token ids from 0 to 32, got 5 to 40"):
        model(torch.tensor([[5, 40]]))


def test_distributions_compile_as_one_graph_and_export(model):
    batches = soft_tokens("MKTAYIA", "MK", "M|V"), soft_tokens("MKTAY<mask>IAKQRW", "MK<mask>AY")
    require_one_graph(model.truncate("b"), *batches)


# As any module


def test_state_dicts_copies_and_pickles_have_everything(model, tokens):
    state = model.state_dict()
    assert not any("inv_freq" in name for name in state)
    expected = model(tokens).embeddings
    other = RDModel(
        {name: ESMC(*shape) for name, shape in SHAPES.items()}, random_stages(widths=WIDTHS, seed=1)
    ).eval()
    assert not torch.equal(other(tokens).embeddings, expected)
    other.load_state_dict(state)
    for copied in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(tokens).embeddings, expected)
        assert copied.fingerprint() == model.fingerprint()


def test_a_chain_without_numbers_says_so(tokens):
    chain = small_esmc().to("meta")
    with pytest.raises(ValueError, match="expected tokens and backbones on one device, got cpu and meta"):
        chain(tokens)
    with pytest.raises(ValueError, match="expected a module with numbers, got .* on the meta device"):
        chain.fingerprint()


@torch.no_grad()
def test_embedding_is_the_mean_over_residues(model):
    sequences = [random_sequence(length, length) for length in (3, 30, 17)]
    vectors = rd_torch.embed(model, sequences)
    for vector, sequence in zip(vectors, sequences, strict=True):
        rows = model(tokens_of(sequence)).embeddings[0, 1:-1].double()
        np.testing.assert_allclose(vector, rows.mean(0), atol=1e-5)
