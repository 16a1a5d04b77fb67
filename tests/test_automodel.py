"""Models of transformers' as backbones: against the models themselves, called by hand."""

import copy
import pickle

import numpy as np
import pytest
import torch
from foreign import (
    bert,
    bert_tokenizer,
    bpe_tokenizer,
    esm,
    esm_tokenizer,
    gpt_tokenizer,
    kmer_tokenizer,
    livened,
    roberta,
    t5,
    t5_tokenizer,
    transformers,
)
from helpers import random_sequence, tokens_of

import rd_torch
from rd_torch import RDModel, TransformersBackbone
from rd_torch.backbone import is_real, is_residue, tokenize

SEQUENCES = [random_sequence(length, length) for length in (40, 1, 17, 33, 8)] + ["XBUZOLAGV"]
GENES = ["ACGTTGCAAGCTACGT", "A", "NACGNT", "ACGACGTTT" * 5]


def gpt(tokenizer):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64
    )
    return livened(transformers.GPT2Model(config))


def mamba(tokenizer):
    """A model without attention."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2)
    return livened(transformers.MambaModel(config))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Models with their tokenizers, by shape."""
    folder = tmp_path_factory.mktemp("tokenizers")
    kmers, joined, end = kmer_tokenizer(folder / "kmers"), bpe_tokenizer(letters="ACGTN"), gpt_tokenizer()
    return {
        "bert": (bert(), bert_tokenizer(folder / "bert"), SEQUENCES),
        "t5": (t5(), t5_tokenizer(), SEQUENCES),
        "esm": (esm(token_dropout=False).esm, esm_tokenizer(folder / "esm"), SEQUENCES),
        "roberta": (roberta(positions=64), esm_tokenizer(folder / "roberta"), SEQUENCES),
        "gpt": (gpt(end), end, SEQUENCES),
        "mamba": (mamba(end), end, SEQUENCES),
        "kmers": (bert(vocab=len(kmers)), kmers, GENES),
        "bpe": (bert(vocab=len(joined)), joined, GENES),
    }


SHAPES = ("bert", "t5", "esm", "roberta", "gpt", "mamba", "kmers", "bpe")


def by_hand(model, ids, layer=None):
    """What a user's own code computes of one sequence; `(tokens, width)`."""
    with torch.no_grad():
        tokens = torch.tensor([ids])
        out = model(tokens, attention_mask=torch.ones_like(tokens), output_hidden_states=True)
    return (out.last_hidden_state if layer in (None, 2) else out.hidden_states[layer])[0]


def name_of(layer):
    """The name of a level at a layer; None stands for the last hidden state."""
    return "a" if layer is None else f"a@{layer}"


@pytest.mark.parametrize("layer", [None, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_token_in_a_batch_is_the_models_own_of_the_sequence_alone(parts, shape, layer):
    model, tokenizer, sequences = parts[shape]
    chain = RDModel({name_of(layer): TransformersBackbone(model, tokenizer)}, []).eval()
    tokens = tokenize(sequences, chain.alphabet)
    out = chain(tokens)
    assert out.logits is None
    assert (out.embeddings[~is_real(tokens, chain.alphabet)] == 0).all()
    for row, sequence in zip(out.embeddings, sequences, strict=True):
        ids = chain.alphabet.ids_of(sequence)
        expected = by_hand(model, ids, layer)
        torch.testing.assert_close(row[: len(ids)], expected, atol=2e-5 * float(expected.std()), rtol=0)
    residues = rd_torch.embed(chain, sequences, pool="none")
    means = rd_torch.embed(chain, sequences, tokens_per_batch=20)
    for rows, mean, row, mask in zip(residues, means, out.embeddings, out.residue_mask, strict=True):
        torch.testing.assert_close(torch.tensor(rows), row[mask], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.tensor(mean), row[mask].mean(0), atol=1e-5, rtol=1e-4)


def test_layers_are_of_other_chains(parts):
    model, tokenizer, _ = parts["bert"]
    backbone = TransformersBackbone(model, tokenizer)
    last, first = (RDModel({name_of(layer): backbone}, []) for layer in (None, 1))
    assert last.fingerprint() != first.fingerprint()
    for layer in (0, 3):
        with pytest.raises(ValueError, match=f"expected a layer from 1 to 2, got {layer}"):
            backbone.until(layer)


def test_transformers_esm_is_our_esm2(tmp_path):
    """With the same weights; and the two may stand in one chain, for their tokens are the same."""
    theirs = esm()
    theirs.save_pretrained(tmp_path)
    ours = RDModel.from_pretrained(tmp_path)
    foreign = TransformersBackbone(theirs.esm, esm_tokenizer(tmp_path / "tokenizer"))
    tokens = tokens_of("MKTAYIAKQRQISFVK", "M", "XBUZO")
    mine, other = ours(tokens), RDModel({"a": foreign}, [])(tokens)
    torch.testing.assert_close(mine.embeddings, other.embeddings, atol=2e-5, rtol=1e-5)
    assert torch.equal(mine.residue_mask, other.residue_mask)
    (backbone,) = ours.backbones.values()
    chain = rd_torch.fit({"ours": backbone, "theirs": foreign}, SEQUENCES, added="all", regressor="ols")
    assert chain(tokens).embeddings.shape == (3, 18, 64)


def test_special_tokens_are_no_residues(parts):
    model, tokenizer, sequences = parts["t5"]
    chain = RDModel({"a": TransformersBackbone(model, tokenizer)}, [])
    tokens = tokenize(sequences, chain.alphabet)
    counts = is_residue(tokens, chain.alphabet).sum(1).tolist()
    assert counts == [len(sequence) for sequence in sequences]
    assert chain(tokens).residue_mask.sum(1).tolist() == counts


def test_too_long_sequences_are_refused(tmp_path):
    backbone = TransformersBackbone(roberta(positions=50), esm_tokenizer(tmp_path))
    chain = RDModel({"a": backbone}, [])
    assert rd_torch.embed(chain, ["L" * 46]).shape == (1, 32)  # 48 tokens: positions begin at 2
    message = (
        "expected at most 48 tokens, for which RobertaModel has positions, got 49: take shorter sequences"
    )
    with pytest.raises(ValueError, match=message):
        rd_torch.embed(chain, ["L" * 47])
    pieces = rd_torch.embed(chain, ["L" * 100], windows=40)
    assert pieces.shape == (1, 32)


def small_opt():
    config = transformers.OPTConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=64,
        max_position_embeddings=48, word_embed_proj_dim=32, pad_token_id=0,
    )  # fmt: skip
    return transformers.OPTModel(config)


def small_openai_gpt():
    config = transformers.OpenAIGPTConfig(vocab_size=30, n_embd=32, n_layer=1, n_head=2, n_positions=48)
    return transformers.OpenAIGPTModel(config)


def small_ibert():
    config = transformers.IBertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=49, pad_token_id=0,
    )  # fmt: skip
    return transformers.IBertModel(config)


@pytest.mark.parametrize("make", [small_opt, small_openai_gpt, small_ibert])
def test_positions_are_counted_as_each_model_has_them(tmp_path, make):
    """With rows before the first one, under an own name, or in a table of an own class."""
    chain = RDModel({"a": TransformersBackbone(make().eval(), bert_tokenizer(tmp_path))}, [])
    assert rd_torch.embed(chain, ["L" * 46]).shape == (1, 32)
    with pytest.raises(ValueError, match="expected at most 48 tokens, for which .* has positions, got 49"):
        rd_torch.embed(chain, ["L" * 47])


class Untold(transformers.BertModel):
    """A model whose code does not tell its table of embeddings."""

    def get_input_embeddings(self):
        raise NotImplementedError


def test_models_that_do_not_tell_their_embeddings_are_taken(parts):
    model, tokenizer, _ = parts["bert"]
    other = Untold(model.config)
    other.load_state_dict(model.state_dict())
    chains = [RDModel({"a": TransformersBackbone(each.eval(), tokenizer)}, []) for each in (model, other)]
    one, two = (rd_torch.embed(chain, SEQUENCES) for chain in chains)
    assert (one == two).all()


def test_other_input_is_refused(parts):
    model, tokenizer, _ = parts["bert"]
    chain = RDModel({"a": TransformersBackbone(model, tokenizer)}, [])
    with pytest.raises(
        ValueError, match="expected token ids, got distributions, which BertModel does not take"
    ):
        chain(torch.eye(30)[None, 5:10])
    with pytest.raises(ValueError, match="expected token ids from 0 to 29, got 5 to 30"):
        chain(torch.tensor([[5, 30]]))
    with pytest.raises(
        RuntimeError, match="expected a backbone with a contact head, got one of transformers"
    ):
        chain.predict_contacts(torch.tensor([[2, 5, 3]]))


def test_batches_without_tokens_give_empty_tensors(parts):
    for shape in ("bert", "t5"):
        model, tokenizer, _ = parts[shape]
        chain = RDModel({"a": TransformersBackbone(model, tokenizer)}, [])
        assert chain(torch.zeros(0, 7, dtype=torch.int64)).embeddings.shape == (0, 7, chain.embed_dim)
        padding = torch.full((2, 3), chain.padding_idx)
        assert (chain(padding).embeddings == 0).all()


@pytest.mark.parametrize("shape", ["bert", "t5", "esm", "gpt"])
def test_attention_maps_are_the_models_own(parts, shape):
    model, tokenizer, _ = parts[shape]
    chain = RDModel({"a": TransformersBackbone(model, tokenizer)}, []).eval()
    sequences = ["MKTAYIAK", "MKV"]
    tokens = tokenize(sequences, chain.alphabet)
    before = model.config._attn_implementation
    out = chain(tokens, need_head_weights=True)
    assert model.config._attn_implementation == before
    torch.testing.assert_close(out.embeddings, chain(tokens).embeddings, atol=1e-5, rtol=1e-5)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    for row, sequence in zip(out.attentions, sequences, strict=True):
        ids = torch.tensor([chain.alphabet.ids_of(sequence)])
        with torch.no_grad():
            answer = eager(ids, attention_mask=torch.ones_like(ids), output_attentions=True)
        expected = torch.cat(answer.attentions)
        time = ids.shape[1]
        torch.testing.assert_close(row[..., :time, :time], expected, atol=1e-5, rtol=1e-4)
        assert (row[..., time:, :] == 0).all()
        assert (row[..., time:] == 0).all()


def without_dropout(shape):
    if shape == "t5":
        return t5(dropout_rate=0.0)
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return bert(**none) if shape == "bert" else esm(**none).esm


@pytest.mark.parametrize("shape", ["bert", "t5", "esm"])
def test_gradients_are_the_models_own_with_and_without_checkpointing(parts, shape):
    model, tokenizer = without_dropout(shape), parts[shape][1]
    backbone = TransformersBackbone(copy.deepcopy(model), tokenizer)
    chain = RDModel({"a": backbone}, []).eval()
    tokens = tokenize(["MKTAYIAK", "MKV"], chain.alphabet)

    def gradients(compute, module):
        module.zero_grad()
        compute().square().sum().backward()
        return {name: each.grad.clone() for name, each in module.named_parameters() if each.grad is not None}

    reference = copy.deepcopy(model)
    mask = is_real(tokens, chain.alphabet)
    expected = gradients(
        lambda: reference(tokens, attention_mask=mask.long()).last_hidden_state[mask], reference
    )
    got = gradients(lambda: chain(tokens).embeddings, backbone.model)
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-4)
    chain.gradient_checkpointing_enable()
    assert chain.is_gradient_checkpointing
    calls = []
    chain.train()
    inner = next(each for each in backbone.model.modules() if isinstance(each, torch.nn.Linear))
    handle = inner.register_forward_pre_hook(lambda *_: calls.append(1))
    again = gradients(lambda: chain(tokens).embeddings, backbone.model)
    handle.remove()
    assert len(calls) == 2
    for name in got:
        torch.testing.assert_close(got[name], again[name], atol=1e-5, rtol=1e-4)
    chain.gradient_checkpointing_disable()
    assert not chain.is_gradient_checkpointing


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("shape", ["bert", "t5", "esm", "roberta", "gpt"])
def test_every_trainable_parameter_gets_a_gradient(parts, shape, layer):
    """Else a process of several would wait for it: poolers, heads of contacts, layers above the one taken."""
    model, tokenizer, sequences = parts[shape]
    model = copy.deepcopy(model).requires_grad_(True)  # other tests share it
    chain = RDModel({name_of(layer): TransformersBackbone(model, tokenizer)}, [])
    predictor = rd_torch.Predictor(chain, rd_torch.SequenceHead(chain.embed_dim, 1, task="regression"))
    tokens = tokenize(sequences, chain.alphabet)
    predictor(tokens, torch.ones(len(sequences)))["loss"].backward()
    trainable = {name: each for name, each in predictor.named_parameters() if each.requires_grad}
    assert not [name for name, each in trainable.items() if each.grad is None]
    has_idle = layer == 1 or shape not in ("t5", "gpt")
    assert any(not each.requires_grad for each in model.parameters()) == has_idle
    chain.freeze_backbones()
    assert not any(each.requires_grad for each in chain.parameters())
    with pytest.raises(ValueError, match="expected a family whose layers are known, got transformers"):
        chain.freeze_backbones(except_top=1)


def test_frozen_parameters_stay_frozen(parts):
    model, tokenizer, _ = parts["bert"]
    model = copy.deepcopy(model).requires_grad_(True)
    model.embeddings.requires_grad_(False)
    TransformersBackbone(model, tokenizer)
    assert not any(each.requires_grad for each in model.embeddings.parameters())
    assert all(each.requires_grad for each in model.encoder.parameters())


def test_copies_and_pickles_are_the_same(parts):
    _, tokenizer, sequences = parts["t5"]
    chain = RDModel({"a": TransformersBackbone(t5(), tokenizer)}, []).eval()
    expected = rd_torch.embed(chain, sequences)
    for again in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert (rd_torch.embed(again, sequences) == expected).all()
        assert again.fingerprint() == chain.fingerprint()


@pytest.mark.filterwarnings("ignore:cpu computes")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", ["bert", "t5", "esm"])
def test_half_precision_is_near_and_keeps_buffers_and_embeddings_in_float32(parts, shape, dtype):
    model, tokenizer, sequences = parts[shape]
    chain = RDModel({"a": TransformersBackbone(copy.deepcopy(model), tokenizer)}, []).eval()
    expected = torch.tensor(rd_torch.embed(chain, sequences))
    buffers = {name: each.clone() for name, each in chain.named_buffers()}
    half = copy.deepcopy(chain).to(dtype)
    assert half.dtype == dtype
    got = torch.tensor(rd_torch.embed(half, sequences))
    assert got.dtype == torch.float32
    assert (got - expected).abs().mean() < 0.05 * expected.std()
    for name, each in half.named_buffers():
        assert torch.equal(each, buffers[name]), name
    kept = [each for name, each in half.named_parameters() if name.endswith(".wo.weight")]
    assert all(each.dtype == (torch.float32 if dtype == torch.float16 else dtype) for each in kept)
    assert bool(kept) == (shape == "t5")
    assert chain.double().dtype == torch.float64


def test_numbers_that_are_not_finite_are_refused(parts):
    model, tokenizer, _ = parts["bert"]
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3] = 1e30
        model.encoder.layer[1].output.dense.weight[4] = torch.nan
    with pytest.raises(ValueError, match="expected finite numbers, got others from BertModel in float32"):
        TransformersBackbone(model, tokenizer)


class Unmasked(transformers.BertModel):
    """A model that attends to padding."""

    def forward(self, input_ids, attention_mask=None, **options):
        return super().forward(input_ids, attention_mask=None, **options)


def test_models_that_attend_to_padding_are_refused(parts):
    model, tokenizer, _ = parts["bert"]
    other = Unmasked(model.config)
    other.load_state_dict(model.state_dict())
    with pytest.raises(
        ValueError, match="expected a model that leaves out padding where its mask says so, got"
    ):
        TransformersBackbone(other.eval(), tokenizer)


def test_attention_that_depends_on_the_batch_is_refused(parts):
    _, tokenizer, sequences = parts["bert"]
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "block_size": 4}
    config = transformers.BigBirdConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **shape)
    with pytest.raises(ValueError, match="attends in one way, got BigBirdModel, whose sparse attention"):
        TransformersBackbone(transformers.BigBirdModel(config), tokenizer)
    config.attention_type = "original_full"
    chain = RDModel({"a": TransformersBackbone(transformers.BigBirdModel(config), tokenizer)}, [])
    alone, together = rd_torch.embed(chain, sequences[2:3]), rd_torch.embed(chain, sequences)
    np.testing.assert_allclose(together[2:3], alone, atol=1e-5)


def test_other_models_are_refused(parts, tmp_path):
    tokenizer = parts["bert"][1]
    with pytest.raises(ValueError, match="got BertForMaskedLM, which fails with AttributeError"):
        TransformersBackbone(transformers.BertForMaskedLM(parts["bert"][0].config), tokenizer)
    with pytest.raises(
        ValueError, match="expected a tokenizer with ids below 20, for which BertModel has embed"
    ):
        TransformersBackbone(bert(vocab=20), tokenizer)
    with pytest.raises(ValueError, match="got T5ForConditionalGeneration, which fails with ValueError"):
        TransformersBackbone(t5(whole=True), t5_tokenizer())
    with pytest.raises(ValueError, match="whose config states hidden_size as a number, got None in Linear"):
        TransformersBackbone(torch.nn.Linear(3, 3), tokenizer)


def test_backbones_of_different_tokens_are_no_chain(parts):
    backbones = {shape: TransformersBackbone(*parts[shape][:2]) for shape in ("bert", "t5")}
    with pytest.raises(
        ValueError,
        match=r"got others: '' is the 2 tokens 2 3 for level bert \(transformers\) and the 1 tokens 1 for "
        r"level t5 \(transformers\); embed with each alone",
    ):
        rd_torch.fit(backbones, SEQUENCES)
