"""fair-esm's functions over the authors' maps, and transformers' way of calling."""

import pytest
import torch
from files import SMALL_LEVELS, perturbed_esm2, save_published
from helpers import small_model

import rd_torch
from rd_torch import pretrained


@pytest.fixture(scope="module")
def backbones():
    return {name: perturbed_esm2(*shape, seed=k) for k, (name, shape) in enumerate(SMALL_LEVELS.items())}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the Hub that holds maps of every kind, the network off."""
    snapshot = tmp_path / "models--singhlab--plm_reverse_distillation" / "snapshots" / ("0" * 40)
    save_published(snapshot)
    save_published(snapshot, regressor="ridge", pca="fbpca", sequences="5k")
    save_published(snapshot, method="naive")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.filterwarnings("ignore:no checksum of", "ignore:linear and ridge maps do not say")
def test_functions_and_names_give_model_and_alphabet(hub, backbones, tokens):
    model, alphabet = pretrained.esm2_rd_150M(backbones=backbones, cache_dir=hub)
    assert alphabet.get_batch_converter()([("a", "MK")])[2].tolist() == [[0, 20, 15, 2]]
    assert not model.training
    assert model.config.special_rows == "maps"
    assert model.config.provenance["options"]["sequences"] == "1k"
    for name in ("esm2.rd/150M", "esm2_rd_150M"):
        again, _ = pretrained.load_model_and_alphabet(name, backbones=backbones, cache_dir=hub)
        assert torch.equal(again(tokens).embeddings, model(tokens).embeddings)
    ridge, _ = pretrained.esm2_rd_150M(
        backbones=backbones, cache_dir=hub, regressor_type="ridge", pca_type="fbpca", n_pretrained_seqs=5_000
    )
    assert not torch.equal(ridge(tokens).embeddings, model(tokens).embeddings)
    naive, _ = pretrained.esm2_rd_150M(backbones=backbones, cache_dir=hub, scaler_type="naive")
    assert naive.config.method == "naive"
    small, _ = pretrained.esm2_rd_35M(backbones={k: backbones[k] for k in ("8M", "35M")}, cache_dir=hub)
    assert torch.equal(small(tokens).embeddings, model(tokens, width=480).embeddings)
    assert {name for name in dir(pretrained) if name.startswith("esm2_rd_")} == {
        f"esm2_rd_{level}" for level in list(rd_torch.ESM2_LEVELS)[1:]
    }


def test_other_names_load_what_from_pretrained_loads():
    model, alphabet = pretrained.load_model_and_alphabet("esm2-rd-mini")
    assert model.embed_dim == 128
    assert alphabet is model.alphabet


def test_wrong_names_and_options_list_the_known_ones():
    with pytest.raises(ValueError, match="level to be one of '35M', '150M', '650M', '3B', '15B', got '8M'"):
        pretrained.load_model_and_alphabet("esm2.rd/8M")
    with pytest.raises(ValueError, match="n_pretrained_seqs to be one of 500, 1000, 5000, 10000, got 2000"):
        pretrained.esm2_rd_35M(n_pretrained_seqs=2_000)
    with pytest.raises(ValueError, match="regressor to be one of 'pcr', 'linear', 'ridge', got 'ols'"):
        pretrained.esm2_rd_35M(regressor_type="ols")
    with pytest.raises(ValueError, match="expected options among method, .*, got 'kind'"):
        pretrained.esm2_rd_35M(kind="rd")
    with pytest.raises(ValueError, match="expected options of the authors' maps with these alone"):
        pretrained.load_model_and_alphabet("esm2-rd-mini", scaler_type="naive")
    with pytest.raises(FileNotFoundError, match="esm2-rd-nano"):
        pretrained.load_model_and_alphabet("esm2-rd-nano")


def test_the_transformers_door_equals_the_model(tokens):
    model = small_model()
    encoder = rd_torch.TransformersEncoder(model)
    assert encoder.config.hidden_size == model.embed_dim == 64
    expected = model(tokens).embeddings
    mask = (tokens != 1).long()
    for arguments in ((tokens, mask), (tokens, mask.bool()), (tokens,)):
        out = encoder(*arguments)
        assert torch.equal(out.last_hidden_state, expected)
        assert torch.equal(out[0], expected)
    assert torch.equal(encoder(input_ids=tokens, attention_mask=mask).last_hidden_state, expected)
    with pytest.raises(ValueError, match="expected an attention_mask of shape"):
        encoder(tokens, mask[:, 1:])


def test_the_mask_says_what_padding_is(tokens):
    encoder = rd_torch.TransformersEncoder(small_model())
    other = tokens.masked_fill(tokens == 1, 5)
    mask = (tokens != 1).long()
    assert torch.equal(encoder(other, mask).last_hidden_state, encoder(tokens).last_hidden_state)
    left = torch.nn.functional.pad(tokens[:1, :10], (3, 0), value=1)
    shifted = encoder(left).last_hidden_state[:, 3:]
    torch.testing.assert_close(shifted, encoder(tokens[:1, :10]).last_hidden_state, atol=2e-4, rtol=1e-4)


def test_autotokenizer_ids_are_the_same(tmp_path):
    from transformers import EsmTokenizer

    model = small_model()
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(model.alphabet.all_toks) + "\n")
    tokenizer = EsmTokenizer(str(vocabulary))
    sequences = ["MKTAYIAKQR", "MXBUZO", "M<mask>K"]
    batch = tokenizer(sequences, return_tensors="pt", padding=True)
    _, _, tokens = model.alphabet.get_batch_converter()([("", sequence) for sequence in sequences])
    assert torch.equal(batch["input_ids"], tokens)
    encoder = rd_torch.TransformersEncoder(model)
    assert torch.equal(encoder(**batch).last_hidden_state, model(tokens).embeddings)
