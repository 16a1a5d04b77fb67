"""Chains of models of transformers' through every job: fitting, embedding, stores, combining, commands."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from foreign import bert, bert_tokenizer, bpe_tokenizer, kmer_tokenizer, save, t5, t5_tokenizer
from helpers import embed_alone, random_sequence, share_of_estimate
from test_automodel_files import with_own_code
from test_fitting import KilledError, killed_after

import rd_torch
from rd_torch import RDModel, TransformersBackbone, hardware
from rd_torch.batching import LEAST_TOKENS, bytes_per_token, find_budget
from rd_torch.cli import main

SEQUENCES = [random_sequence(5 + 7 * k % 41, k) for k in range(60)]
PROTEINS = [(f"P{k}", sequence) for k, sequence in enumerate(SEQUENCES)]
GENES = [("g1", "ACGTTGCAAGCTA" * 6), ("g2", "acguugca"), ("g3", "NACGNTR" * 9)]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* are too few to determine maps"),
    pytest.mark.filterwarnings("ignore:letters that are no nucleotide"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of two BERTs with the same tokens, and of two T5s."""
    place = tmp_path_factory.mktemp("models")
    tokenizer = bert_tokenizer(place / "tokenizer")
    bert(place / "small", width=16, tokenizer=tokenizer)
    bert(place / "large", width=24, layers=3, seed=1, tokenizer=tokenizer)
    t5(place / "small-t5", width=16, tokenizer=t5_tokenizer())
    t5(place / "t5", layers=3, seed=1, tokenizer=t5_tokenizer())
    return place


CHAINS = {"bert": {"small": "small", "large": "large"}, "t5": {"small": "small-t5", "large": "t5"}}


@pytest.fixture(scope="module", params=CHAINS)
def sources(folder, request):
    """The two levels of a chain, 16 and 24 wide."""
    return {level: f"hf:{folder / name}" for level, name in CHAINS[request.param].items()}


@pytest.fixture(scope="module")
def chain(sources):
    return rd_torch.fit(sources, SEQUENCES, tokens_per_batch=100)


@pytest.fixture(scope="module")
def saved(chain, tmp_path_factory):
    """The chain's folder."""
    place = tmp_path_factory.mktemp("saved") / "chain"
    chain.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    path = tmp_path_factory.mktemp("fasta") / "proteins.fasta"
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in PROTEINS))
    return path


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def read(path):
    store = rd_torch.open_store(path)
    return {name: np.asarray(store[name]) for name in store}


class Progress:
    """Counts residues: those of an earlier run, and new ones."""

    def __init__(self):
        self.earlier = self.new = 0

    def __call__(self, residues, before):
        self.earlier += residues * before
        self.new += residues * (not before)

    def require_resumed(self):
        """Require that a part was there, and only the rest was computed."""
        assert self.earlier > 0
        assert self.new > 0
        assert self.earlier + self.new == sum(map(len, SEQUENCES))


def test_fits_are_those_of_moments_by_hand(sources, chain):
    rows = {"small": [], "large": []}
    for level, found in rows.items():
        backbone = TransformersBackbone.from_pretrained(sources[level].removeprefix("hf:"))
        found += [
            torch.tensor(each)
            for each in rd_torch.embed(RDModel({level: backbone}, []), SEQUENCES, pool="none")
        ]
    joint = torch.cat([torch.cat(each) for each in rows.values()], 1).double()
    moments = rd_torch.RunningMoments(40)
    moments.update(joint)
    assert chain.config.provenance["fit"]["residues"] == len(joint) == sum(map(len, SEQUENCES))
    (stage,) = rd_torch.solve_stages(moments, {"small": 16, "large": 24})
    for name in ("W", "b", "m"):
        torch.testing.assert_close(
            getattr(chain.stages["large"], name).double(), getattr(stage, name), atol=1e-4, rtol=1e-3
        )


def test_prefixes_are_the_smaller_chains_to_the_bit(chain):
    vectors = rd_torch.embed(chain, SEQUENCES)
    assert vectors.shape == (60, 24)
    assert (rd_torch.embed(chain, SEQUENCES, width=16) == vectors[:, :16]).all()
    assert (rd_torch.embed(chain.truncate("small"), SEQUENCES) == vectors[:, :16]).all()


def test_models_of_different_tokens_are_refused(folder):
    with pytest.raises(
        ValueError, match=r"expected backbones of one alphabet, got others: '' is the 2 tokens"
    ):
        rd_torch.fit({"a": f"hf:{folder / 'small'}", "b": f"hf:{folder / 't5'}"}, SEQUENCES)


@pytest.mark.parametrize(
    ("pool", "suffix"),
    [("none", "h5"), ("mean", "h5"), ("mean", "parquet"), ("max", "parquet"), ("std", "pt")],
)
def test_stores_hold_what_embed_gives_also_after_a_kill(chain, tmp_path, pool, suffix):
    path = tmp_path / f"out.{suffix}"
    options, progress = {"pool": pool, "tokens_per_batch": 20}, Progress()
    with pytest.raises(KilledError):
        rd_torch.embed_to_store(chain, PROTEINS, path, progress=killed_after(700), **options)
    assert not path.exists()
    assert rd_torch.embed_to_store(chain, PROTEINS, path, progress=progress, **options) == {}
    progress.require_resumed()
    expected = rd_torch.embed(chain, SEQUENCES, **options)
    for (name, rows), (identifier, sequence), mine in zip(
        read(path).items(), PROTEINS, expected, strict=True
    ):
        assert name == identifier
        np.testing.assert_allclose(rows, mine, atol=2e-5)
        assert pool != "none" or len(rows) == len(sequence)


def test_cls_and_windows_need_the_tokens_for_them(folder, tmp_path):
    model = RDModel.from_pretrained(f"hf:{folder / 't5'}")
    genes = RDModel({"a": TransformersBackbone(bert(vocab=10), bpe_tokenizer("ACGTN", []))}, [])
    joined = RDModel({"a": TransformersBackbone(bert(vocab=20), bpe_tokenizer("ACGTN"))}, [])
    small = RDModel.from_pretrained(f"hf:{folder / 'small'}")
    first = small(small.alphabet.get_batch_converter()([("", SEQUENCES[0])])[2]).embeddings[:, 0].detach()
    np.testing.assert_allclose(rd_torch.embed(small, SEQUENCES, pool="cls")[:1], first, atol=1e-5)
    for pool in ("cls", ["mean", "cls"]):
        message = (
            "expected a pool over residues, got 'cls', though the model's tokenizer puts no token before a"
        )
        with pytest.raises(ValueError, match=message):
            rd_torch.embed(model, SEQUENCES, pool=pool)
        with pytest.raises(ValueError, match=message):
            rd_torch.embed_to_store(model, PROTEINS, tmp_path / "out.h5", pool=pool)
    assert rd_torch.embed(genes, ["ACGTACGTA"], windows=4).shape == (1, 32)
    message = (
        "expected whole sequences, got windows, though the model's tokenizer makes tokens of several letters"
    )
    with pytest.raises(ValueError, match=message):
        rd_torch.embed(joined, ["ACGTACGTA"], windows=4)
    with pytest.raises(ValueError, match=message):
        rd_torch.embed_to_store(joined, GENES, tmp_path / "out.h5", windows=4)
    assert not list(tmp_path.iterdir())


def test_windows_blend_rows_of_the_residues_that_they_are_of(folder):
    for name in ("small", "t5"):
        model = RDModel.from_pretrained(f"hf:{folder / name}")
        sequence = random_sequence(30, 5)
        rows = rd_torch.embed(model, [sequence], pool="none", windows=(20, 10))[0]
        assert rows.shape[0] == 30
        first = rd_torch.embed(model, [sequence[:20]], pool="none")[0]
        last = rd_torch.embed(model, [sequence[10:]], pool="none")[0]
        np.testing.assert_allclose(rows[:10], first[:10], atol=1e-5)
        np.testing.assert_allclose(rows[20:], last[10:], atol=1e-5)
        mean = rd_torch.embed(model, [sequence], windows=(20, 10))[0]
        np.testing.assert_allclose(mean, rows.mean(0), atol=1e-5)


def test_a_fit_goes_on_after_a_kill_to_the_same_bits(sources, saving, tmp_path):
    options, progress = {"tokens_per_batch": 30, "work_folder": tmp_path / "work"}, Progress()
    with pytest.raises(KilledError):
        rd_torch.fit(sources, SEQUENCES, progress=killed_after(800), **options)
    again = rd_torch.fit(sources, SEQUENCES, progress=progress, **options)
    progress.require_resumed()
    whole = rd_torch.fit(sources, SEQUENCES, tokens_per_batch=30)
    assert again.fingerprint() == whole.fingerprint()
    other = TransformersBackbone.from_pretrained(sources["large"].removeprefix("hf:"))
    with torch.no_grad():
        next(other.model.encoder.parameters()).add_(1)
    with pytest.raises(ValueError, match="with which .* was begun, got"):
        rd_torch.fit({**sources, "large": other}, SEQUENCES, **options)


def test_raw_stores_are_combined_to_what_the_chain_gives(chain, saved, tmp_path):
    paths = embed_alone(chain, tmp_path / "raw", proteins=PROTEINS)
    rd_torch.combine_stores(rd_torch.Nesting.from_pretrained(saved), paths, tmp_path / "nested.h5")
    expected = rd_torch.embed(chain, SEQUENCES)
    np.testing.assert_allclose(np.stack(list(read(tmp_path / "nested.h5").values())), expected, atol=2e-5)


def test_raw_stores_of_another_layer_are_refused(folder, tmp_path):
    backbone = TransformersBackbone.from_pretrained(folder / "large")
    taken, other = RDModel({"a@1": backbone}, []), RDModel({"a": backbone}, [])
    assert (taken.num_layers, other.num_layers) == (3, 3)
    paths = {"a@1": tmp_path / "other.h5"}
    rd_torch.embed_to_store(other, PROTEINS, paths["a@1"])
    taken.save_pretrained(tmp_path / "taken")
    nesting = rd_torch.Nesting.from_pretrained(tmp_path / "taken")
    with pytest.raises(ValueError, match="expected embeddings of layer 1 at level a@1, got those of layer 3"):
        rd_torch.combine_stores(nesting, paths, tmp_path / "nested.h5")


def test_models_of_different_tokens_are_chained_by_their_stores(folder, tmp_path):
    paths = {}
    for level in ("small", "t5"):
        paths[level] = tmp_path / f"{level}.h5"
        rd_torch.embed_to_store(RDModel.from_pretrained(f"hf:{folder / level}"), PROTEINS, paths[level])
    nesting = rd_torch.fit_stores(paths, regressor="ols")
    assert nesting.config.widths == {"small": 16, "t5": 24}
    rd_torch.combine_stores(nesting, paths, tmp_path / "nested.h5")
    nested, small = read(tmp_path / "nested.h5"), read(paths["small"])
    assert all((nested[name][:16] == small[name]).all() for name in small)


def test_nucleic_acids_go_through_the_doors_of_models_of_them(tmp_path):
    joined, kmers = bpe_tokenizer("ACGTN"), kmer_tokenizer(tmp_path / "kmers")
    for name, tokenizer in (("bpe", joined), ("kmers", kmers)):
        save(bert(vocab=len(tokenizer)), tokenizer, tmp_path / name)
        model = RDModel.from_pretrained(f"hf:{tmp_path / name}")
        sequences = ["ACGTTGCAAGCTA" * 6, "ACGTTGCA", "NACGNTN" * 9]
        vectors = rd_torch.embed(model, [sequence for _, sequence in GENES])
        np.testing.assert_allclose(vectors, rd_torch.embed(model, sequences), atol=1e-6)
        rd_torch.embed_to_store(model, GENES, tmp_path / f"{name}.h5", pool="none")
        rows = read(tmp_path / f"{name}.h5")
        around = model.prepend_bos + model.append_eos
        for (identifier, _), sequence, vector in zip(GENES, sequences, vectors, strict=True):
            assert len(rows[identifier]) == len(model.alphabet.ids_of(sequence)) - around < len(sequence)
            np.testing.assert_allclose(rows[identifier].mean(0), vector, atol=1e-5)
        with pytest.raises(ValueError, match="expected the sequence of DNA, got 'L' at position 1"):
            rd_torch.embed(model, ["LAGV"])
        failures = rd_torch.embed_to_store(model, [*GENES, ("p", "LAGV")], tmp_path / f"{name}-2.h5")
        assert list(failures) == ["p"]
        fitted = rd_torch.fit({"a": model.backbones[name]}, [sequence for _, sequence in GENES])
        assert fitted.config.provenance["fit"]["residues"] > 0
        (tmp_path / "genes.fasta").write_text("".join(f">{key}\n{letters}\n" for key, letters in GENES))
        output = tmp_path / f"{name}-3.h5"
        result = run("embed", tmp_path / "genes.fasta", "-o", output, "--model", f"hf:{tmp_path / name}")
        assert result.exit_code == 0, result.output
        np.testing.assert_array_equal(np.stack(list(read(output).values())), vectors)


def test_commands_take_such_models(sources, saved, fasta, tmp_path):
    small, large = sources.values()
    result = run("info", small)
    assert result.exit_code == 0, result.output
    name = Path(small).name
    assert re.search(rf"{name} +transformers +2 +\d +16 +16", result.output)
    result = run("embed", fasta, "-o", tmp_path / "a.h5", "--model", small, "--width", 8)
    assert result.exit_code == 0, result.output
    expected = rd_torch.embed(RDModel.from_pretrained(small), SEQUENCES, width=8)
    np.testing.assert_allclose(np.stack(list(read(tmp_path / "a.h5").values())), expected, atol=1e-5)
    result = run("convert", small, tmp_path / "converted", "--dtype", "float16")
    assert result.exit_code == 0, result.output
    assert RDModel.from_pretrained(tmp_path / "converted").dtype == torch.float16
    for command in (
        ("info", tmp_path / "converted"),
        ("embed", fasta, "-o", tmp_path / "b.parquet", "--model", saved),
        ("fit", fasta, "-o", tmp_path / "chain", "--backbone", f"small={small}",
         "--backbone", f"large={large}"),
        ("embed", fasta, "-o", tmp_path / "small.h5", "--model", small),
        ("embed", fasta, "-o", tmp_path / "large.h5", "--model", large),
        ("combine", f"small={tmp_path / 'small.h5'}", f"large={tmp_path / 'large.h5'}",
         "-o", tmp_path / "c.h5", "--model", tmp_path / "chain"),
    ):  # fmt: skip
        result = run(*command)
        assert result.exit_code == 0, result.output
    fitted = RDModel.from_pretrained(tmp_path / "chain")
    nested = np.stack(list(read(tmp_path / "c.h5").values()))
    np.testing.assert_allclose(nested, rd_torch.embed(fitted, SEQUENCES), atol=2e-5)
    assert fitted.config.provenance["backbones"]["small"].endswith(name)


def test_commands_say_what_they_cannot_do_with_such_models(folder, saved, fasta, tmp_path):
    output = tmp_path / "a.h5"
    for command, message in (
        (("verify", "large", "--model", saved), "expected levels of ESM-2 or ESM-C, which other"),
        (("export", "large", "--model", saved, "-o", tmp_path / "a.onnx"), "is a model of transformers'"),
        (("embed", fasta, "-o", output, "--model", f"hf:{folder / 't5'}", "--pool", "cls"), "got 'cls'"),
        (("embed", fasta, "-o", output, "--model", f"hf:{folder / 'none'}"), "expected a model and a"),
    ):  # fmt: skip
        result = run(*command)
        assert result.exit_code == 1, result.output
        assert message in result.output
        assert len([line for line in result.output.splitlines() if line.startswith("Error")]) == 1
        assert "Traceback" not in result.output
    assert not output.exists()


def test_commands_run_code_of_files_that_are_named_alone(folder, fasta, tmp_path):
    place, marker = with_own_code(folder / "small", tmp_path)
    arguments = ("embed", fasta, "-o", tmp_path / "a.h5", "--model", f"hf:{place}")
    result = run(*arguments)
    assert result.exit_code == 1
    assert f"--trust-remote-code {place} on the command line" in result.output
    assert not marker.exists()
    result = run(*arguments, "--trust-remote-code", place)
    assert result.exit_code == 0, result.output
    assert marker.exists()
    for command in ("info", f"hf:{place}"), ("convert", f"hf:{place}", tmp_path / "converted"):
        assert run(*command).exit_code == 1
        result = run(*command, "--trust-remote-code", place)
        assert result.exit_code == 0, result.output


def test_preparing_leaves_such_models_as_they_are(chain, recwarn):
    expected = rd_torch.embed(chain, SEQUENCES)
    chain.prepare_inference()
    assert (rd_torch.embed(chain, SEQUENCES) == expected).all()
    assert not recwarn.list


def test_budgets_count_attention_maps(chain, monkeypatch):
    family = list(chain.backbones.values())
    assert bytes_per_token(family, 2_000) - bytes_per_token(family, 1_000) >= 16 * 2 * 1_000
    room = 3_000 * bytes_per_token(family, 3_000)
    monkeypatch.setattr(hardware, "free_bytes", lambda _: 2 * room)
    budget = find_budget(family, torch.device("cpu"))
    assert 2_700 <= budget <= 3_000
    assert budget * bytes_per_token(family, budget) <= room
    monkeypatch.setattr(hardware, "free_bytes", lambda _: 0)
    assert find_budget(family, torch.device("cpu")) == LEAST_TOKENS


def test_too_long_sequences_are_left_out_and_listed(tmp_path):
    backbone = TransformersBackbone(bert(max_position_embeddings=60), bert_tokenizer(tmp_path))
    chain = RDModel({"a": backbone}, [])
    proteins = {f"P{length}": random_sequence(length, length) for length in (12, 59, 30, 58, 200, 5)}
    failures = rd_torch.embed_to_store(chain, proteins.items(), tmp_path / "out.h5", tokens_per_batch=1000)
    assert set(failures) == {"P59", "P200"}
    assert "expected at most 60 tokens, for which BertModel has positions, got 61" in failures["P59"].reason
    kept = [name for name in proteins if name not in failures]
    with rd_torch.open_store(tmp_path / "out.h5") as store:
        assert list(store) == kept
        alone = rd_torch.embed(chain, [proteins[name] for name in kept])
        np.testing.assert_allclose(np.stack([store[name] for name in kept]), alone, atol=1e-5)
    listed = (tmp_path / "out.h5.failed.tsv").read_text()
    assert all(each in listed for each in ("P59", "P200", "--windows"))
    pieces = rd_torch.embed_to_store(chain, proteins.items(), tmp_path / "whole.h5", windows=58)
    assert not pieces


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("shape", ["t5", "bert"])
def test_the_estimate_covers_what_a_forward_pass_takes(shape):
    make = f"""
import tempfile
from foreign import bert, bert_tokenizer, t5, t5_tokenizer
from rd_torch import TransformersBackbone
if {shape!r} == "t5":
    parts = t5(width=64), t5_tokenizer()
else:
    options = {{"max_position_embeddings": 1024, "attn_implementation": "eager"}}
    parts = bert(width=64, heads=8, **options), bert_tokenizer(pathlib.Path(tempfile.mkdtemp()))
model = RDModel({{"only": TransformersBackbone(*parts)}}, []).eval()
"""
    assert 0.05 < share_of_estimate(make, (8, 1000)) < 1
