"""`rd-torch info`, `download`, `convert` and `verify` on the tests' own files."""

import hashlib

import pytest
import torch
from click.testing import CliRunner
from files import perturbed_esm2, save_fair_esm, save_published, transformers_model
from helpers import tokens_of

import rd_torch
from rd_torch.cli import main
from rd_torch.levels import Level, Reference
from rd_torch.weights import known, read_checkpoint

TOKENS = tokens_of("MKTAYIAKQR<mask>QISFVK", "ACDEF")
SIZES = {"8M": (2, 320, 20), "35M": (2, 480, 20)}


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def ran(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def small_sizes(monkeypatch):
    """ESM-2's levels with two layers, so that tests' own files can stand for the real ones."""
    for name, shape in SIZES.items():
        level = Level(name, *shape)
        monkeypatch.setitem(rd_torch.ESM2_LEVELS, name, level)


@pytest.fixture
def hub(small_sizes, tmp_path, monkeypatch):
    """A cache with maps and both backbones, at pinned commits with their true checksums; no network."""
    for k, name in enumerate(SIZES):
        reference = known.ESM2_ON_HUB[name]
        snapshot = (
            tmp_path / "hub" / f"models--{reference.repo.replace('/', '--')}" / "snapshots" / ("a" * 40)
        )
        transformers_model(perturbed_esm2(*SIZES[name], seed=k)).save_pretrained(snapshot)
        sha256 = hashlib.sha256((snapshot / "model.safetensors").read_bytes()).hexdigest()
        pinned = Reference(reference.repo, "a" * 40, {"model.safetensors": sha256})
        monkeypatch.setitem(known.ESM2_ON_HUB, name, pinned)
    maps = tmp_path / "hub" / "models--singhlab--plm_reverse_distillation"
    save_published(maps / "snapshots" / ("b" * 40))
    (maps / "refs").mkdir()
    (maps / "refs" / "main").write_text("b" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_download_lists_what_is_there(hub):
    output = ran("download", "35M")
    assert "no checksum of" in output
    assert f"models--facebook--esm2_t6_8M_UR50D/snapshots/{'a' * 40}/model.safetensors" in output
    assert "All files for 35M are there." in output
    assert "no checksum of" not in ran("download", "35M")
    assert "the level of the authors' maps to be one of '8M', '35M'" in run("download", "9M").output
    assert "rd-torch download" in run("download", "150M").output


def test_info_tells_of_everything_that_loads(hub, tmp_path):
    assert "esm2-rd-mini" in ran("info")
    assert "28K" in ran("info", "--level", "90K")
    assert "1M" not in ran("info", "esm2-rd-mini", "--level", "90K").split("provenance")[0]
    output = ran("info", "singhlab/plm_reverse_distillation", "--level", "35M", "--pca", "incremental")
    assert "facebook/esm2_t12_35M_UR50D at aaaa" in output
    assert "0.900" in output
    save_fair_esm(perturbed_esm2(2, 64, 4), tmp_path / "tiny.pt")
    assert "tiny" in ran("info", tmp_path / "tiny.pt")
    output = run("info", "singhlab/plm_reverse_distillation").output
    assert "expected the level of the authors' maps to be one of '8M', '35M'" in output
    assert "got None" in output


@pytest.mark.parametrize("backbones", ["included", "referenced"])
def test_convert_writes_published_maps_as_a_checkpoint_of_ours(hub, tmp_path, backbones):
    source = "singhlab/plm_reverse_distillation"
    output = ran("convert", source, tmp_path / "ours", "--level", "35M", "--backbones", backbones)
    assert "Wrote the checkpoint to" in output
    folder = tmp_path / "ours" / "backbones"
    assert sorted(path.name for path in folder.glob("*")) == (
        ["35M.safetensors", "8M.safetensors"] if backbones == "included" else []
    )
    expected = rd_torch.RDModel.from_pretrained(source, level="35M")
    model = rd_torch.RDModel.from_pretrained(tmp_path / "ours")
    assert torch.equal(model(TOKENS).embeddings, expected(TOKENS).embeddings)
    card = (tmp_path / "ours" / "README.md").read_text()
    assert 'RDModel.from_pretrained("' in card
    assert "| 35M | 2 | 480 | 480 |  | 0.900 |" in card
    assert ("facebook/esm2_t12_35M_UR50D" in card) == (backbones == "referenced")
    assert "'regressor': 'pcr'" in card


@pytest.mark.filterwarnings("ignore:no checksum of")
def test_references_take_the_place_of_backbones_that_lay_there(hub, tmp_path):
    model = rd_torch.RDModel.from_pretrained("singhlab/plm_reverse_distillation", level="35M")
    model.save_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "ours", backbones="referenced")
    assert list((tmp_path / "ours" / "backbones").iterdir()) == []
    again = rd_torch.RDModel.from_pretrained(tmp_path / "ours")
    assert again.config.levels[0].reference.revision == "a" * 40
    assert torch.equal(again(TOKENS).embeddings, model(TOKENS).embeddings)


@pytest.mark.filterwarnings("ignore:no checksum of")
def test_a_changed_backbone_is_never_saved_by_reference(hub, tmp_path):
    model = rd_torch.RDModel.from_pretrained("singhlab/plm_reverse_distillation", level="35M")
    with torch.no_grad():
        model.backbones["35M"].layers[1].fc2.bias[3] += 1e-3
    with pytest.raises(
        ValueError, match=r"expected backbone 35M as it came from .*, got a changed layers\.1\.fc2\.bias"
    ):
        model.save_pretrained(tmp_path / "ours", backbones="referenced")
    with pytest.raises(
        ValueError, match="expected a backbone that came from the Hub at level 28K, got one from elsewhere"
    ):
        rd_torch.RDModel.from_pretrained("esm2-rd-mini").save_pretrained(tmp_path, backbones="referenced")
    with pytest.raises(
        ValueError, match="expected backbones to be one of 'included', 'referenced', got 'none'"
    ):
        model.save_pretrained(tmp_path / "ours", backbones="none")


def test_convert_writes_fair_esm_files_as_a_checkpoint_of_ours(tmp_path):
    module = perturbed_esm2(2, 64, 4)
    save_fair_esm(module, tmp_path / "tiny.pt")
    ran("convert", tmp_path / "tiny.pt", tmp_path / "ours", "--dtype", "bfloat16")
    model = rd_torch.RDModel.from_pretrained(tmp_path / "ours")
    assert model.backbones["tiny"].embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(model.backbones["tiny"].layers[0].fc1.weight, module.layers[0].fc1.weight.bfloat16())


def test_verify_passes_on_good_files_and_says_so(hub, tmp_path, monkeypatch):
    for k, name in enumerate(SIZES):
        path = tmp_path / known.FAIR_ESM_NAMES[name]
        save_fair_esm(perturbed_esm2(*SIZES[name], seed=k), path, half=name == "8M")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setitem(known.FAIR_ESM_SHA256, path.name, sha256)
    output = ran("verify", "35M", "--fair-esm", tmp_path)
    lines = output.splitlines()
    assert lines[-1] == "PASSED"
    assert "FAIL " not in output
    for words in (
        "8M against fair-esm: largest difference embeddings",
        "35M against fair-esm's file",
        "checksum of esm2_t12_35M_UR50D.pt: sha256",
        "prefix of 8M: 320 features, to the bit",
        f"files of 8M: facebook/esm2_t6_8M_UR50D at {'a' * 40}",
        "maps: fitted on",
    ):
        assert any(line.startswith(f"pass  {words}") for line in lines), (words, output)


def test_verify_fails_on_files_that_differ(hub, tmp_path, monkeypatch):
    for k, name in enumerate(SIZES):
        save_fair_esm(perturbed_esm2(*SIZES[name], seed=k + 5), tmp_path / known.FAIR_ESM_NAMES[name])
    result = run("verify", "35M", "--fair-esm", tmp_path)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == "FAILED"
    assert (
        "FAIL  8M against fair-esm's file: different from esm2_t6_8M_UR50D.pt: embed_tokens.weight"
        in result.output
    )
    assert "FAIL  checksum of esm2_t6_8M_UR50D.pt: sha256" in result.output


def test_verify_notices_a_forward_pass_that_differs(hub, monkeypatch):
    monkeypatch.setattr("rd_torch.backbone.esm2.MEAN_SHARE_KEPT", 0.8801)
    result = run("verify", "35M")
    assert result.exit_code == 1
    assert "FAIL  35M against fair-esm: largest difference" in result.output


def test_verify_notices_a_prefix_that_is_none(monkeypatch):
    forward = rd_torch.Stage.forward
    monkeypatch.setattr(rd_torch.Stage, "forward", lambda self, *inputs: forward(self, *inputs) * (1 + 1e-7))
    result = run("verify", "207K", "--model", "esm2-rd-mini")
    assert result.exit_code == 1
    assert "FAIL  prefix of 28K: 32 features" in result.output


def test_verify_fails_where_there_is_no_head_to_compare(tmp_path):
    transformers_model(perturbed_esm2(2, 64, 4)).esm.save_pretrained(tmp_path / "headless")
    result = run("verify", "headless", "--model", tmp_path / "headless")
    assert result.exit_code == 1
    assert "FAIL  headless against fair-esm: its checkpoint has no language-model head" in result.output


@pytest.mark.parametrize("fact", ["token_dropout", "tied"])
def test_verify_compares_relatives_of_esm2_as_they_are_computed(tmp_path, fact):
    backbone = rd_torch.ESM2(2, 32, 4, **{fact: False})
    rd_torch.RDModel({"relative": backbone}, []).save_pretrained(tmp_path / "chain")
    output = ran("verify", "relative", "--model", tmp_path / "chain", "--device", "cpu")
    assert "pass  relative against fair-esm: largest difference" in output


def test_verify_says_what_the_maps_were_fitted_on(tmp_path, small_sizes):
    save_published(tmp_path, raw=True)
    with pytest.warns(UserWarning, match="look fitted on the previous backbone's raw embedding"):
        assert read_checkpoint(tmp_path, "150M").config.provenance["fitted_on"] == "previous"


def test_embed_runs_on_published_maps_and_warns_once(hub, tmp_path):
    fasta = tmp_path / "in.fasta"
    fasta.write_text(">a\nMKTAYIAKQR\n")
    output = ran(
        "embed",
        fasta,
        "-o",
        tmp_path / "out.h5",
        "--model",
        "singhlab/plm_reverse_distillation",
        "--level",
        "35M",
    )
    assert "level 35M, width 480" in output
    assert output.count("no checksum of") == 1


def test_verify_takes_other_chains_and_backbones(tmp_path):
    output = ran("verify", "1M", "--model", "esm2-rd-mini")
    assert "pass  maps: fitted on nested, applied to nested" in output
    assert "pass  prefix of 28K: 32 features" in output
    assert "expected --backbone as LEVEL=SOURCE" in run("verify", "90K", "--backbone", "90K").output


def test_fit_takes_backbones_from_anywhere(tmp_path):
    save_fair_esm(perturbed_esm2(2, 32, 4), tmp_path / "a.pt")
    transformers_model(perturbed_esm2(2, 48, 4)).save_pretrained(tmp_path / "b")
    fasta = tmp_path / "in.fasta"
    fasta.write_text(">a\nMKTAYIAKQRQISFVKSHFSRQ\n>b\nACDEFGHIKLMNPQRSTVWYACDEFGHIKLM\n")
    backbones = ("--backbone", f"a={tmp_path / 'a.pt'}", "--backbone", f"b={tmp_path / 'b'}")
    ran("fit", fasta, "-o", tmp_path / "chain", *backbones)
    model = rd_torch.RDModel.from_pretrained(tmp_path / "chain")
    assert list(model.config.widths.items()) == [("a", 32), ("b", 48)]
    assert (
        "expected --backbones or --backbone, got both"
        in run("fit", fasta, "-o", tmp_path / "chain", "--backbones", "esm2-rd-mini", *backbones).output
    )
