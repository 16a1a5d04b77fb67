"""Jobs on a chain of ESM-C, from Python and on the command line."""

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from esmc import WIDTHS, oracle, random_esmc, save_packed, small_esmc, tokens_of
from helpers import embed_alone, random_sequence
from test_fitting import KilledError, killed_after, maps_of
from test_resume import embed as embed_in_windows
from test_resume import interrupt, same

import rd_torch
from rd_torch import Nesting, RDModel, open_store
from rd_torch.cli import main
from rd_torch.sequences import Protein

PROTEINS = [Protein(f"P{k}", random_sequence(5 + 7 * k % 31, k)) for k in range(120)]
SEQUENCES = [protein.sequence for protein in PROTEINS]
FEW = PROTEINS[:12]
FORMATS = [("h5", "mean"), ("h5", "none"), ("parquet", "mean"), ("parquet", "mean+cls"), ("pt", "none")]


@pytest.fixture(scope="module")
def model():
    return small_esmc()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The chain as a checkpoint."""
    folder = tmp_path_factory.mktemp("chain") / "tiny-esmc"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    path = tmp_path_factory.mktemp("proteins") / "in.fasta"
    path.write_text("".join(f">{each.identifier}\n{each.sequence}\n" for each in FEW))
    return path


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def ran(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def expected_rows(model, sequence, width=None):
    with torch.no_grad():
        return model(tokens_of(sequence), width=width).embeddings[0, 1:-1]


@pytest.mark.parametrize(("suffix", "pool"), FORMATS)
def test_stores_of_every_format_hold_what_the_model_gives(model, tmp_path, suffix, pool):
    path = tmp_path / f"out.{suffix}"
    rd_torch.embed_to_store(model, FEW, path, pool=pool.split("+") if "+" in pool else pool, width=48)
    with open_store(path) as store:
        assert list(store) == [each.identifier for each in FEW]
        assert store.facts.widths == (32, 48)
        for row, each in zip(store[:], FEW, strict=True):
            rows = expected_rows(model, each.sequence, 48)
            wanted = rows if pool == "none" else rows.double().mean(0)
            np.testing.assert_allclose(row[..., :48], wanted, atol=5e-5)


def test_embedding_takes_batches_windows_and_generators_alike(model):
    together = rd_torch.embed(model, SEQUENCES)
    few = rd_torch.embed(model, iter(SEQUENCES), tokens_per_batch=40)
    np.testing.assert_allclose(few, together, atol=2e-5)
    assert np.array_equal(rd_torch.embed(model, SEQUENCES, width=48), together[:, :48])
    long = random_sequence(90)
    (pieces,) = rd_torch.embed(model, [long], pool="none", windows=(30, 6))
    np.testing.assert_allclose(pieces[:24], expected_rows(model, long[:30])[:24], atol=2e-5)
    mean = rd_torch.embed(model, [long], windows=(30, 6))
    np.testing.assert_allclose(mean, [pieces.mean(0)], atol=2e-5)
    rows = rd_torch.embed(model, SEQUENCES[:3], pool="none")
    for row, sequence in zip(rows, SEQUENCES[:3], strict=True):
        np.testing.assert_allclose(row, expected_rows(model, sequence), atol=2e-5)


@pytest.mark.parametrize("suffix", ["h5", "parquet", "pt"])
def test_a_store_goes_on_after_a_kill_and_ends_the_same(model, tmp_path, suffix):
    embed_in_windows(model, tmp_path / f"whole.{suffix}", PROTEINS)
    interrupt(model, tmp_path / f"out.{suffix}", 2, proteins=PROTEINS)
    embed_in_windows(model, tmp_path / f"out.{suffix}", PROTEINS)
    assert same(tmp_path / f"out.{suffix}", tmp_path / f"whole.{suffix}")
    other = small_esmc()
    with torch.no_grad():
        other.backbones["b"].layers[1].mlp.gate_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="expected fingerprint"):
        embed_in_windows(other, tmp_path / f"out.{suffix}", PROTEINS)


def test_a_fit_goes_on_after_a_kill_to_the_same_bits(model, saving, tmp_path):
    backbones = dict(model.backbones.items())
    whole = rd_torch.fit(backbones, SEQUENCES, tokens_per_batch=60)
    arguments = {"tokens_per_batch": 60, "work_folder": tmp_path / "work"}
    with pytest.raises(KilledError):
        rd_torch.fit(backbones, SEQUENCES, progress=killed_after(1500), **arguments)
    before = []
    again = rd_torch.fit(
        backbones,
        SEQUENCES,
        progress=lambda residues, done: before.append(residues * done),
        **arguments,
    )
    assert sum(before) > 0
    assert all(torch.equal(tensor, maps_of(again)[name]) for name, tensor in maps_of(whole).items())
    assert again.config == whole.config
    assert [level.family for level in again.config.levels] == ["esmc"] * 3
    other = small_esmc().backbones["a"]
    with torch.no_grad():
        other.norm.weight[0] += 1
    with pytest.raises(ValueError, match="expected the fingerprint .*, with which .* was begun"):
        rd_torch.fit({**backbones, "a": other}, SEQUENCES, **arguments)


def test_a_fit_is_the_closed_form_of_all_residues(model):
    backbones = dict(model.backbones.items())
    chain = rd_torch.fit(backbones, SEQUENCES, regressor="ols")
    moments = rd_torch.RunningMoments(sum(WIDTHS.values()))
    with torch.no_grad():
        for sequence in SEQUENCES:
            raw = [
                RDModel({"x": each}, [])(tokens_of(sequence)).embeddings[0, 1:-1]
                for each in backbones.values()
            ]
            moments.update(torch.cat(raw, 1))
    expected = rd_torch.solve_stages(moments, WIDTHS, regressor="ols")
    for stage, other in zip(chain.stages.values(), expected, strict=True):
        for name, tensor in stage.named_buffers():
            torch.testing.assert_close(tensor, other.get_buffer(name).float(), rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize("pool", ["mean", "none"])
def test_raw_files_combine_to_what_the_model_embeds(model, folder, tmp_path, pool):
    paths = embed_alone(model, tmp_path / "raw", pool=pool, proteins=FEW)
    inputs = [f"{level}={path}" for level, path in paths.items()]
    ran("combine", *inputs, "--model", folder, "-o", tmp_path / "out.h5")
    nesting = Nesting.from_pretrained(folder)
    rd_torch.combine_stores(nesting, paths, tmp_path / "python.h5")
    expected = rd_torch.embed(model, [each.sequence for each in FEW], pool=pool)
    for name in ("out", "python"):
        with open_store(tmp_path / f"{name}.h5") as store:
            for row, wanted in zip(store[:], expected, strict=True):
                np.testing.assert_allclose(row, wanted, atol=2e-4)


# The command line


def test_info_embed_and_convert_take_a_chain(model, folder, fasta, tmp_path):
    output = ran("info", folder)
    for level in WIDTHS:
        assert f"\n{level:>8}        ESM-C " in output
    ran("embed", fasta, "-o", tmp_path / "out.h5", "--model", folder, "--width", 40, "--device", "cpu")
    with open_store(tmp_path / "out.h5") as store:
        assert np.array_equal(store[:], rd_torch.embed(model, [each.sequence for each in FEW])[:, :40])
    ran("convert", folder, tmp_path / "half", "--dtype", "bfloat16", "--level", "b")
    half = RDModel.from_pretrained(tmp_path / "half")
    assert list(half.config.widths) == ["a", "b"]
    assert half.dtype == torch.bfloat16
    assert half.backbones["b"].rotary_emb.inv_freq.dtype == torch.float32
    card = (tmp_path / "half" / "README.md").read_text()
    assert "ESM-C" in card


def test_a_record_with_a_chain_break_is_listed_and_the_others_are_embedded(model, folder, tmp_path):
    path = tmp_path / "in.fasta"
    path.write_text(">one\nMK|V\n>two\nMKV\n")
    result = run("embed", path, "-o", tmp_path / "out.h5", "--model", folder, "--device", "cpu")
    assert result.exit_code == 3
    listed = (tmp_path / "out.h5.failed.tsv").read_text().splitlines()
    assert listed[1].startswith("one\t")
    assert "got '|' at position 3" in listed[1]
    with open_store(tmp_path / "out.h5") as store:
        assert list(store) == ["two"]
        assert np.array_equal(store[:], rd_torch.embed(model, ["MKV"]))


@pytest.mark.parametrize("layout", ["transformers", "packed", "first"])
def test_one_backbone_converts_from_every_layout(layout, tmp_path, monkeypatch):
    monkeypatch.setitem(rd_torch.ESMC_LEVELS, "300M", rd_torch.Level("300M", 2, 64, 4, family="esmc"))
    theirs, source = random_esmc(2, 64, 4), tmp_path / "theirs"
    if layout == "transformers":
        theirs.save_pretrained(source)
    else:
        source = save_packed(theirs, source, first=layout == "first")
    ran("convert", source, tmp_path / "ours")
    tokens = tokens_of("MKTAY|IAKQR", "MK")
    with torch.no_grad():
        hidden = theirs.esmc(tokens, attention_mask=(tokens != 1).long()).last_hidden_state
        out = RDModel.from_pretrained(tmp_path / "ours")(tokens).embeddings
    torch.testing.assert_close(out[tokens != 1], hidden[tokens != 1], rtol=0, atol=5e-5)


def test_a_file_that_does_not_tell_its_heads_is_refused_in_one_line(tmp_path):
    result = run("convert", save_packed(random_esmc(2, 64, 4), tmp_path, first=True), tmp_path / "ours")
    assert result.exit_code == 1
    assert "expected a config.json beside the tensors" in result.output.splitlines()[-1]
    assert not (tmp_path / "ours").exists()


def test_fit_takes_the_backbones_of_a_chain_and_files(model, folder, fasta, tmp_path):
    options = ("--device", "cpu", "--regressor", "ols")
    ran("fit", fasta, "-o", tmp_path / "two", "--backbones", folder, "--levels", "a,c", *options)
    two = RDModel.from_pretrained(tmp_path / "two")
    assert two.config.widths == {"a": 32, "c": 64}
    pairs = [("--backbone", f"{level}={folder}") for level in ("a", "c")]
    ran("fit", fasta, "-o", tmp_path / "files", *sum(pairs, ()), *options)
    files = RDModel.from_pretrained(tmp_path / "files")
    tokens = tokens_of("MKTAY")
    assert torch.equal(files(tokens).embeddings, two(tokens).embeddings)
    assert torch.equal(two(tokens).representations["a"], model(tokens).representations["a"])
    unknown = run("fit", fasta, "-o", tmp_path / "none", "--backbone", f"9K={folder}", *options)
    assert "expected a level whose backbone is in" in unknown.output
    assert "(a, b, c), got '9K'" in unknown.output
    mixed = ("--backbone", f"a={folder}", "--backbone", "28K=esm2-rd-mini")
    result = run("fit", fasta, "-o", tmp_path / "mixed", *mixed, *options)
    assert result.exit_code == 1
    assert "got others: '|' is the 3 tokens 0 31 2 for level a (esmc)" in result.output
    assert not (tmp_path / "mixed").exists()


def test_fit_reads_the_wanted_backbones_of_a_chain_alone(folder, fasta, tmp_path):
    short = tmp_path / "short"
    shutil.copytree(folder, short)
    (short / "backbones" / "c.safetensors").unlink()
    ran("fit", fasta, "-o", tmp_path / "two", "--backbones", short, "--levels", "a,b", "--device", "cpu")
    assert list(RDModel.from_pretrained(tmp_path / "two").config.widths) == ["a", "b"]


def test_verify_compares_with_transformers(folder):
    oracle()
    output = ran("verify", "c", "--model", folder, "--device", "cpu")
    lines = output.splitlines()
    assert lines[-1] == "PASSED"
    assert "transformers " in lines[0]
    for level in WIDTHS:
        assert any(
            line.startswith(f"pass  {level} against transformers: largest difference") for line in lines
        )
    assert any(line.startswith("pass  prefix of a: 32 features, to the bit") for line in lines)


def test_verify_notices_a_forward_pass_that_differs(folder, monkeypatch):
    oracle()
    monkeypatch.setattr("rd_torch.backbone.esmc.DEPTH_WITHOUT_SCALE", 37)
    result = run("verify", "b", "--model", folder, "--device", "cpu")
    assert result.exit_code == 1
    assert "FAIL  b against transformers: largest difference embeddings" in result.output
    assert result.output.splitlines()[-1] == "FAILED"


@pytest.mark.parametrize("got", ["none", "4.56.2"])
def test_verify_says_what_is_missing(folder, monkeypatch, got):
    monkeypatch.setattr("rd_torch.oracles.version_of", lambda name: None if got == "none" else got)
    monkeypatch.setattr("rd_torch.oracles.find_spec", lambda name: None)
    result = run("verify", "b", "--model", folder)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == (
        "Error: expected transformers 5.16 or newer for the comparison of ESM-C, got "
        f"{got}: pip install --upgrade transformers"
    )


def test_export_writes_a_level(model, folder, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    output = ran("export", "a", "--model", folder, "-o", tmp_path / "model.onnx")
    assert "Wrote the model to" in output
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    tokens = tokens_of("MKTAY|IAKQR", "MK")
    with torch.no_grad():
        expected = model(tokens, width=32).embeddings
    got, _ = session.run(None, {"tokens": tokens.numpy()})
    np.testing.assert_allclose(got, expected, atol=1e-4 * float(expected.std()))
    levels = json.loads(session.get_modelmeta().custom_metadata_map["rd_torch.levels"])
    assert levels == {"a": 32}
