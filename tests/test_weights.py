import json
import shutil

import pytest
import torch
from files import rewrite
from safetensors.torch import load_file

import rd_torch
from rd_torch.config import RDConfig
from rd_torch.weights import shipped_checkpoints

TOKENS = torch.tensor([[0, 20, 15, 11, 5, 19, 12, 2, 1], [0, 4, 5, 32, 7, 8, 9, 10, 2]])


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(shipped_checkpoints()["esm2-rd-mini"], tmp_path / "copy")
    return tmp_path / "copy"


def test_shipped_checkpoint_round_trips_to_the_bit(tmp_path):
    model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
    model.save_pretrained(tmp_path / "saved")
    again = rd_torch.RDModel.from_pretrained(tmp_path / "saved")
    assert again.config == model.config
    before, after = model.state_dict(), again.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model(TOKENS).embeddings, again(TOKENS).embeddings)
    assert not again.training


def test_a_model_is_saved_over_the_folder_it_came_from(folder):
    model = rd_torch.RDModel.from_pretrained(folder)
    with torch.no_grad():
        model.backbones["28K"].layers[0].fc1.weight.add_(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder)
    for state in (model.state_dict(), rd_torch.RDModel.from_pretrained(folder).state_dict()):
        assert all(torch.equal(before[name], state[name]) for name in before)


def test_the_card_says_how_to_load_and_names_no_path(tmp_path):
    model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
    model.save_pretrained(tmp_path / "esm2-rd-mini")
    card = (tmp_path / "esm2-rd-mini" / "README.md").read_text()
    assert 'RDModel.from_pretrained("esm2-rd-mini")  # level="28K" stops there' in card
    assert str(tmp_path) not in card
    assert card == (shipped_checkpoints()["esm2-rd-mini"] / "README.md").read_text()


def test_whoever_reads_the_config_reads_the_tensors(tmp_path):
    rd_torch.RDModel.from_pretrained("esm2-rd-mini").save_pretrained(tmp_path)
    modes = {path.stat().st_mode for path in tmp_path.rglob("*.*") if path.is_file()}
    assert len(modes) == 1


def test_a_level_is_loaded_without_reading_what_lies_above(folder):
    whole = rd_torch.RDModel.from_pretrained(folder)
    (folder / "backbones" / "1M.safetensors").unlink()
    (folder / "backbones" / "207K.safetensors").unlink()
    maps = load_file(folder / "maps.safetensors")
    rewrite({name: maps[name] for name in maps if name.startswith("90K")}, folder / "maps.safetensors")
    small = rd_torch.RDModel.from_pretrained(folder, level="90K")
    assert list(small.config.widths) == ["28K", "90K"]
    assert torch.equal(small(TOKENS).embeddings, whole(TOKENS).embeddings[..., :48])


def test_dtype_is_the_backbones():
    model = rd_torch.RDModel.from_pretrained("esm2-rd-mini", dtype=torch.bfloat16)
    assert model.backbones["1M"].embed_tokens.weight.dtype == torch.bfloat16
    assert model.stages["1M"].W.dtype == torch.float32
    assert model(TOKENS).embeddings.dtype == torch.float32


@pytest.mark.parametrize("name", ["config.json", "maps.safetensors", "backbones/207K.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"expected a checkpoint file .*{name}, got nothing"):
        rd_torch.RDModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["maps.safetensors", "backbones/207K.safetensors", "reconstruction.safetensors"]
)
@pytest.mark.parametrize("size", [0, 100, -4])
def test_a_truncated_file_is_named(folder, name, size):
    path = folder / name
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"whole safetensors file, got one that cannot be read: .*{name}"):
        rd_torch.RDModel.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "levels": [{"name": "a"}]}'])
def test_a_config_that_does_not_read_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="expected the config of a checkpoint in"):
        rd_torch.RDModel.from_pretrained(folder)


def test_another_format_is_refused(folder):
    values = json.loads((folder / "config.json").read_text()) | {"format": 99}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="format 1, got 99"):
        rd_torch.RDModel.from_pretrained(folder)


def test_tensors_of_another_level_are_refused(folder):
    shutil.copy(folder / "backbones" / "90K.safetensors", folder / "backbones" / "207K.safetensors")
    with pytest.raises(ValueError, match="expected the tensors of level 207K, got others"):
        rd_torch.RDModel.from_pretrained(folder)


def test_maps_that_are_not_the_configs_are_refused(folder):
    maps = load_file(folder / "maps.safetensors")
    maps["90K.V"] = maps["90K.V"][:, :3].contiguous()
    rewrite(maps, folder / "maps.safetensors")
    with pytest.raises(ValueError, match="expected the maps of level 90K as"):
        rd_torch.RDModel.from_pretrained(folder)
    del maps["90K.V"]
    rewrite(maps, folder / "maps.safetensors")
    with pytest.raises(ValueError, match="expected the maps of level 90K as"):
        rd_torch.RDModel.from_pretrained(folder)


def test_a_folder_here_goes_before_a_shipped_name(folder, tmp_path, monkeypatch):
    folder.rename(tmp_path / "esm2-rd-mini")
    (tmp_path / "esm2-rd-mini" / "maps.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint file .*maps\.safetensors"):
        rd_torch.RDModel.from_pretrained("esm2-rd-mini")


def test_unknown_names_list_what_there_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        FileNotFoundError, match=r"a shipped checkpoint \(esm2-rd-mini\) or a Hub id, got 'esm2-rd'"
    ):
        rd_torch.RDModel.from_pretrained("esm2-rd")
    with pytest.raises(FileNotFoundError, match=r"got '.*nowhere'"):
        rd_torch.RDModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="level to be one of '28K', '90K', '207K', '1M', got '3B'"):
        rd_torch.RDModel.from_pretrained("esm2-rd-mini", level="3B")


def test_a_hub_id_is_read_from_the_cache(folder, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--someone--chain"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    shutil.move(folder, repo / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = rd_torch.RDModel.from_pretrained("someone/chain")
    assert torch.equal(
        model(TOKENS).embeddings, rd_torch.RDModel.from_pretrained("esm2-rd-mini")(TOKENS).embeddings
    )
    with pytest.raises(
        FileNotFoundError,
        match=r"of someone/else from the Hub or its cache, got it from neither.*the Hub said",
    ):
        rd_torch.RDModel.from_pretrained("someone/else")


def test_configs_that_cannot_be_are_refused():
    config = rd_torch.RDModel.from_pretrained("esm2-rd-mini").config
    assert RDConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="at least one level"):
        RDConfig((), (), ())
    with pytest.raises(ValueError, match="one stage fewer than the 4 levels"):
        RDConfig(config.levels, (16,), (None,))
    with pytest.raises(ValueError, match="levels of different names"):
        RDConfig(config.levels[:1] * 2, (0,), (None,))
    with pytest.raises(ValueError, match="nested width differs from the backbone's at 90K"):
        RDConfig(config.levels[:2], (5,), (None,), special_rows="larger")
    with pytest.raises(ValueError, match="predict_from to be one of 'nested', 'previous', got 'raw'"):
        RDConfig(config.levels[:1], (), (), predict_from="raw")
    with pytest.raises(ValueError, match=r"level name without a dot, got '1\.2M'"):
        rd_torch.Level("1.2M", 1, 32, 2)
    with pytest.raises(ValueError, match="heads of an even size"):
        rd_torch.Level("a", 1, 32, 3)


def test_a_level_may_be_only_a_name_and_a_width():
    level = rd_torch.Level("any", None, 7, None)
    with pytest.raises(
        ValueError, match="expected a level with layers and heads, got any, a name and a width"
    ):
        level.shape  # noqa: B018  # the access is the test
    config = rd_torch.RDConfig((level,), (), ())
    assert rd_torch.RDConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert rd_torch.ESM2_LEVELS["8M"].shape == (6, 320, 20)


def test_configs_are_written_as_they_were():
    path = shipped_checkpoints()["esm2-rd-mini"] / "config.json"
    config = rd_torch.RDConfig.from_dict(json.loads(path.read_text()))
    assert json.dumps(config.to_dict(), indent=2) + "\n" == path.read_text()
