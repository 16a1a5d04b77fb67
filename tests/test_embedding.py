import numpy as np
import pytest
import torch

import rd_torch

SEQUENCES = ["MKTAYIAKQR", "M", "GGGSXBUZO" * 30, "MLLAVLYCLLWSFQTSA"]


@pytest.fixture(scope="module")
def mini():
    return rd_torch.RDModel.from_pretrained("esm2-rd-mini")


def by_hand(model, sequence):
    tokens = model.alphabet.get_batch_converter()([("x", sequence)])[2]
    with torch.no_grad():
        return model(tokens).embeddings[0, 1:-1].numpy()


def test_residue_rows_come_in_input_order(mini):
    arrays = rd_torch.embed(mini, SEQUENCES, pool="none")
    for array, sequence in zip(arrays, SEQUENCES, strict=True):
        np.testing.assert_allclose(array, by_hand(mini, sequence), atol=2e-5)


def test_mean_is_over_residues_alone(mini):
    vectors = rd_torch.embed(mini, SEQUENCES)
    expected = np.stack([by_hand(mini, sequence).mean(0) for sequence in SEQUENCES])
    np.testing.assert_allclose(vectors, expected, atol=2e-5)
    assert vectors.dtype == np.float32


@pytest.mark.parametrize("tokens_per_batch", [1, 300, 10_000])
def test_vectors_do_not_depend_on_the_batches(mini, tokens_per_batch):
    vectors = rd_torch.embed(mini, SEQUENCES, tokens_per_batch=tokens_per_batch)
    np.testing.assert_allclose(vectors, rd_torch.embed(mini, SEQUENCES), atol=2e-5)


@pytest.mark.parametrize("width", [1, 32, 40, 128])
def test_width_is_a_prefix_of_the_whole(mini, width):
    whole = rd_torch.embed(mini, SEQUENCES)
    assert np.array_equal(rd_torch.embed(mini, SEQUENCES, width=width), whole[:, :width])


def test_no_sequences_give_empty_results(mini):
    assert rd_torch.embed(mini, []).shape == (0, 128)
    assert rd_torch.embed(mini, [], width=48).shape == (0, 48)
    assert rd_torch.embed(mini, [], pool="none") == []


def test_misuse_is_refused_with_the_cure(mini):
    with pytest.raises(TypeError, match="got one string: put it in a list"):
        rd_torch.embed(mini, "MKT")
    with pytest.raises(ValueError, match=r"width from 1 to 128 \(levels: 28K 32, .*1M 128\), got 129"):
        rd_torch.embed(mini, ["MKT"], width=129)
    for width in (48.0, True):
        with pytest.raises(ValueError, match=f"width from 1 to 128 .*, got {width}"):
            rd_torch.embed(mini, ["MKT"], width=width)
    with pytest.raises(ValueError, match="expected pool to be one or several of 'mean', .*, got 'median'"):
        rd_torch.embed(mini, ["MKT"], pool="median")
    with pytest.raises(ValueError, match="expected a sequence, got none, in record number 2"):
        rd_torch.embed(mini, ["MKT", ""])


def test_options_that_do_not_exist_are_refused_before_anything_is_done(mini, tmp_path):
    with pytest.raises(TypeError, match="^expected options among pool, width, .*, got 'widht'$"):
        rd_torch.embed_to_store(mini, [("one", "MKV")], tmp_path / "out.h5", widht=3)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="^expected options among .*added, regressor, .*, got 'regresor'$"):
        rd_torch.fit(dict(mini.backbones.items()), iter(["MKV"]), work_folder=tmp_path / "w", regresor="ols")
    assert not list(tmp_path.iterdir())
