"""Token budgets: found, kept, halved when memory runs out; nothing lost on the way."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from helpers import random_sequence, share_of_estimate, small_model

import rd_torch
from rd_torch import batching, hardware
from rd_torch.batching import LEAST_TOKENS, MOST_TOKENS, bytes_per_token, find_budget, run_batches
from rd_torch.levels import ALPHABET

CPU = torch.device("cpu")
SEQUENCES = [random_sequence(length, seed) for seed, length in enumerate((5, 60, 61, 1, 33, 8, 59, 30, 2))]


def scarce(most, error=torch.OutOfMemoryError):
    """Computes the number of tokens; runs out of memory above `most` of them."""

    def compute(tokens):
        if tokens.numel() > most:
            raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate a lot")
        return tokens

    return compute


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
@pytest.mark.parametrize("most", [63, 70, 150, 400])
def test_a_batch_too_large_is_halved_with_a_warning_and_nothing_is_lost(most, error):
    with pytest.warns(
        UserWarning, match="tokens were too many for the memory of cpu: batches hold at most"
    ) as said:
        done = list(run_batches(scarce(most, error), SEQUENCES, ALPHABET, 1_000, CPU))
    assert sorted(index for batch in done for index in batch.indices) == list(range(len(SEQUENCES)))
    assert max(batch.result.numel() for batch in done) <= most
    assert len(said) <= 5  # the budget stays halved
    for batch in done:
        assert batch.result.shape == (len(batch.indices), max(len(SEQUENCES[i]) for i in batch.indices) + 2)


def test_the_budget_stays_halved_for_the_batches_that_follow():
    with pytest.warns(UserWarning, match="too many") as said:
        done = list(run_batches(scarce(130), ["A" * 30] * 100, ALPHABET, 1_000, CPU))
    assert sum(len(batch.indices) for batch in done) == 100
    assert len(said) == 2  # 992 and 256 tokens of the first batch; none of the three after it


def test_one_sequence_that_takes_too_much_is_an_error_that_says_how_long_it_is():
    with (
        pytest.warns(UserWarning, match="too many"),
        pytest.raises(
            MemoryError, match="expected memory for one sequence of 61 residues, got none left on cpu: cut"
        ),
    ):
        list(run_batches(scarce(62), SEQUENCES, ALPHABET, 1_000, CPU))


@pytest.mark.parametrize("words", batching._SHORT_OF_MEMORY)
def test_words_of_onednn_and_cpp_are_known_for_a_lack_of_memory(words):
    def compute(tokens):
        if tokens.numel() > 100:
            raise RuntimeError(words)

    with pytest.warns(UserWarning, match="too many"):
        assert len(list(run_batches(compute, SEQUENCES, ALPHABET, 1_000, CPU))) > 1


@pytest.mark.parametrize(
    "words", ["shapes cannot be multiplied", "could not create a primitive descriptor for matmul"]
)
def test_other_errors_pass(words):
    def compute(tokens):
        raise RuntimeError(words)

    with pytest.raises(RuntimeError, match=words):
        list(run_batches(compute, SEQUENCES, ALPHABET, 100, CPU))


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_a_sequence_longer_than_the_budget_goes_alone_without_a_warning(budget):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = list(run_batches(lambda tokens: tokens.numel(), SEQUENCES, ALPHABET, budget, CPU))
    assert all(batch.result <= budget or len(batch.indices) == 1 for batch in done)
    assert list(run_batches(lambda tokens: 0, [], ALPHABET, budget, CPU)) == []


def test_embeddings_are_the_same_when_memory_was_short(monkeypatch):
    model = small_model()
    expected = rd_torch.embed(model, SEQUENCES)
    encode = model.encode

    def short(tokens, **options):
        if tokens.numel() > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(tokens, **options)

    monkeypatch.setattr(model, "encode", short)
    with pytest.warns(UserWarning, match="too many"):
        np.testing.assert_allclose(rd_torch.embed(model, SEQUENCES), expected, atol=2e-5)


def test_a_fit_is_the_same_when_memory_was_short(monkeypatch):
    backbones = small_model().family()
    expected = rd_torch.fit(backbones, SEQUENCES)
    forward = rd_torch.ESM2.forward

    def short(self, tokens, *rest):
        if tokens.numel() > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, tokens, *rest)

    monkeypatch.setattr(rd_torch.ESM2, "forward", short)
    with pytest.warns(UserWarning, match="too many"):
        again = rd_torch.fit(backbones, SEQUENCES)
    assert again.config.provenance["fit"] == expected.config.provenance["fit"]
    for name, stage in expected.stages.items():
        torch.testing.assert_close(again.stages[name].W, stage.W, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("free", "expected"), [(0, LEAST_TOKENS), (None, MOST_TOKENS["cpu"]), (10**15, MOST_TOKENS["cpu"])]
)
def test_the_budget_has_bounds(monkeypatch, free, expected):
    monkeypatch.setattr(hardware, "free_bytes", lambda _: free)
    assert find_budget(small_model().family().values(), CPU) == expected


def test_between_its_bounds_the_budget_is_what_half_of_the_free_memory_takes(monkeypatch):
    family = small_model().family().values()
    monkeypatch.setattr(hardware, "free_bytes", lambda _: 2 * 5_000 * bytes_per_token(family))
    assert find_budget(family, CPU) == 5_000


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_estimate_covers_what_a_forward_pass_takes():
    make = """
from rd_torch.backbone.esm2 import ESM2
model = RDModel({"only": ESM2(2, 640, 20)}, []).eval()
"""
    assert 0.2 < share_of_estimate(make, (8, 512)) < 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs an address-space limit")
@pytest.mark.slow
def test_a_real_shortage_of_memory_halves_the_batch(tmp_path):
    code = """
import resource, warnings, torch, psutil
from rd_torch import RDModel, embed
from rd_torch.backbone.esm2 import ESM2
from rd_torch.levels import ALPHABET
torch.set_num_threads(1)
model = RDModel({"only": ESM2(1, 640, 20)}, []).eval()
embed(model, ["MKV"])
now = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (now + 300 * 2**20,) * 2)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    vectors = embed(model, ["MKVLA" * 100] * 64, tokens_per_batch=40_000)
print(vectors.shape, sum("too many" in str(each.message) for each in said))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    shape, said = done.stdout.rsplit(maxsplit=1)
    assert shape == "(64, 640)"
    assert 1 <= int(said) <= 5


@pytest.mark.capability
@pytest.mark.parametrize("emulated", [True, False])
def test_a_dtype_that_the_device_emulates_is_said_once_with_the_faster_one(monkeypatch, emulated):
    monkeypatch.setattr(hardware, "is_emulated", lambda device, dtype: emulated and dtype == torch.float16)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rd_torch.embed(small_model().half(), SEQUENCES, tokens_per_batch=70)
        rd_torch.embed(small_model(), SEQUENCES, tokens_per_batch=70)
    expected = "cpu computes float16 in emulation: results are right, but float32 is faster"
    assert [str(each.message) for each in said] == emulated * [expected]
