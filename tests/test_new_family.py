"""CONTRIBUTING's recipe for a family of models, followed for an architecture of its own, in a few lines."""

import inspect

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import embed_alone, random_sequence
from torch import nn

import rd_torch
from rd_torch.backbone import FAMILIES, Backbone, is_residue
from rd_torch.cli import main
from rd_torch.levels import ALPHABET


class Convolutional(Backbone):
    """A residual stack of convolutions within each sequence, over ESM-2's alphabet."""

    family = "convolutional"
    heads = ("lm_head",)
    alphabet = ALPHABET

    def __init__(self, num_layers, embed_dim):
        super().__init__()
        self.num_layers, self.embed_dim, self.attention_heads = num_layers, embed_dim, 1
        self.embed_tokens = nn.Embedding(len(ALPHABET), embed_dim)
        self.layers = nn.ModuleList(nn.Conv1d(embed_dim, embed_dim, 5, padding=2) for _ in range(num_layers))
        self.lm_head = nn.Linear(embed_dim, len(ALPHABET))

    @classmethod
    def of_level(cls, level):
        return cls(level.num_layers, level.width)

    def forward(self, tokens, packing, sink=None):
        x = self.embed_tokens(tokens) * packing.real[..., None]
        for layer in self.layers:  # padding stays zeros, as beyond the ends of a sequence alone
            x = (x + torch.tanh(layer(x.mT).mT)) * packing.real[..., None]
        return packing.pack(x)

    def logits(self, hidden):
        return self.lm_head(hidden)


@pytest.fixture
def sequences():
    return [random_sequence(length, length) for length in (40, 3, 25, 60, 11, 33)]


@pytest.fixture
def chain(monkeypatch, sequences):
    monkeypatch.setitem(FAMILIES, Convolutional.family, Convolutional)
    return rd_torch.fit(
        {"small": Convolutional(1, 8), "large": Convolutional(2, 12)}, sequences, regressor="ols"
    )


def test_the_recipe_is_short():
    assert len(inspect.getsource(Convolutional).splitlines()) < 60


def test_a_new_family_is_embedded_saved_and_loaded(chain, sequences, tmp_path):
    vectors = rd_torch.embed(chain, sequences)
    alone = [rd_torch.embed(chain, [sequence])[0] for sequence in sequences]
    np.testing.assert_allclose(vectors, alone, rtol=1e-5, atol=1e-5)
    assert (rd_torch.embed(chain, sequences, width=8) == vectors[:, :8]).all()
    chain.save_pretrained(tmp_path / "chain")
    again = rd_torch.RDModel.from_pretrained(tmp_path / "chain")
    assert again.fingerprint() == chain.fingerprint()
    assert again.config.levels[1].family == "convolutional"
    proteins = list(zip("abcdef", sequences, strict=True))
    rd_torch.embed_to_store(again, proteins, tmp_path / "out.h5", pool="none")
    with rd_torch.open_store(tmp_path / "out.h5") as store:
        assert store["d"].shape == (60, 12)
    raw = embed_alone(chain, tmp_path / "raw", proteins=proteins)
    rd_torch.combine_stores(rd_torch.Nesting.from_pretrained(tmp_path / "chain"), raw, tmp_path / "nested.h5")
    (tmp_path / "in.fasta").write_text("".join(f">{name}\n{each}\n" for name, each in proteins))
    command = ["embed", tmp_path / "in.fasta", "-o", tmp_path / "typed.h5", "--model", tmp_path / "chain"]
    result = CliRunner().invoke(main, list(map(str, command)))
    assert result.exit_code == 0, result.output
    for name in ("nested", "typed"):
        with rd_torch.open_store(tmp_path / f"{name}.h5") as store:
            np.testing.assert_allclose(store[:], vectors, rtol=1e-5, atol=1e-5)


def test_a_new_family_is_trained_and_frozen(chain):
    tokens = chain.alphabet.get_batch_converter()([("a", "MKV"), ("b", "M")])[2]
    assert chain(tokens).logits.shape == (2, 5, 33)
    assert torch.equal(chain(tokens).residue_mask, is_residue(tokens, ALPHABET))
    predictor = rd_torch.Predictor(chain, rd_torch.SequenceHead(12, 1, task="regression"))
    predictor(tokens, torch.ones(2))["loss"].backward()
    assert all(each.grad is not None for each in predictor.parameters() if each.requires_grad)
    assert chain.backbones["small"].embed_tokens.weight.grad.any()
    assert not any(each.requires_grad for each in chain.freeze_backbones().parameters())


def test_an_unknown_family_is_named(monkeypatch, tmp_path):
    rd_torch.RDModel({"one": Convolutional(1, 8)}, []).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="expected a level of a family among esm2, esmc, .*, got convolutional"
    ):
        rd_torch.RDModel.from_pretrained(tmp_path)
