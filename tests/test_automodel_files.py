"""Models of transformers' from folders and the Hub: what is read, refused and written."""

import copy
import json
import os
import pickle
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from foreign import bert, bert_tokenizer, esm, esm_tokenizer, save, t5, t5_tokenizer, transformers
from helpers import random_sequence, tokens_of
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_hub import hub  # noqa: F401  # a fixture

import rd_torch
from rd_torch import RDModel, TransformersBackbone
from rd_torch.backbone import autoload
from rd_torch.weights import Hub

SEQUENCES = [random_sequence(length, length) for length in (40, 3, 17, 33, 8, 51)]


@pytest.fixture
def folder(tmp_path):
    """A folder with a BERT and its tokenizer."""
    bert(tmp_path / "model", tokenizer=bert_tokenizer(tmp_path / "tokenizer"))
    return tmp_path / "model"


def embed(model):
    return rd_torch.embed(model, SEQUENCES)


def from_parts(model, tokenizer, level="a"):
    return RDModel({level: TransformersBackbone(model, tokenizer)}, []).eval()


@pytest.mark.parametrize("whole", [True, False])
def test_t5_folders_give_the_encoder(tmp_path, whole):
    model, tokenizer = t5(tmp_path / "t5", whole=whole, tokenizer=t5_tokenizer()), t5_tokenizer()
    chain = RDModel.from_pretrained(f"hf:{tmp_path / 't5'}")
    assert list(chain.backbones) == ["t5"]
    assert type(chain.backbones["t5"].model).__name__ == "T5EncoderModel"
    encoder = model.get_encoder() if whole else model
    torch.testing.assert_close(embed(chain), embed(from_parts(encoder, tokenizer)))


def test_folders_with_heads_are_read_without_them(tmp_path, recwarn, capfd):
    config = bert().config
    torch.manual_seed(1)
    model = transformers.BertForMaskedLM(config).eval()
    save(model, bert_tokenizer(tmp_path / "tokenizer"), tmp_path / "model")
    chain = RDModel.from_pretrained(f"hf:{tmp_path / 'model'}", "small")
    assert list(chain.backbones) == ["small"]
    expected = embed(from_parts(model.bert, bert_tokenizer(tmp_path / "tokenizer")))
    torch.testing.assert_close(embed(chain), expected)
    assert not recwarn.list
    assert "cls.predictions" not in capfd.readouterr().err


def test_files_of_another_shape_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    changed = tensors | {"encoder.layer.1.output.dense.weight": torch.zeros(32, 63)}
    save_file(
        {name: each.clone() for name, each in changed.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="expected a model and a tokenizer that transformers loads, got"):
        RDModel.from_pretrained(f"hf:{folder}")


def test_a_model_without_the_mark_is_refused_with_the_cure(folder):
    message = (
        "whose model_type is 'esm' or 'esmc', got 'bert' in .*: hf: before its name has transformers load"
    )
    with pytest.raises(ValueError, match=message):
        RDModel.from_pretrained(folder)


@pytest.mark.parametrize("removed", ["encoder.layer.1.output.dense.weight", "embeddings.LayerNorm.bias"])
@pytest.mark.parametrize("head", [False, True])
def test_files_that_leave_weights_out_are_refused(folder, removed, head):
    tensors = load_file(folder / "model.safetensors")
    left = {name: each.clone() for name, each in tensors.items() if name != removed}
    if head:
        left["cls.predictions.bias"] = torch.zeros(30)
    save_file(left, folder / "model.safetensors", {"format": "pt"})
    message = f"expected a file with every weight of BertModel, got {folder} without {removed} .1 in all."
    with pytest.raises(ValueError, match=message):
        RDModel.from_pretrained(f"hf:{folder}")


def test_what_no_hidden_state_needs_may_be_left_out(folder):
    """A pooler is random then, and no part of anything."""
    before = RDModel.from_pretrained(f"hf:{folder}")
    tensors = load_file(folder / "model.safetensors")
    left = {name: each.clone() for name, each in tensors.items() if "pooler" not in name}
    assert len(left) < len(tensors)
    save_file(left, folder / "model.safetensors", {"format": "pt"})
    after = RDModel.from_pretrained(f"hf:{folder}")
    assert after.fingerprint() == before.fingerprint()
    assert (embed(after) == embed(before)).all()


def test_other_folders_are_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("nothing", "empty"):
        message = f"expected a model and a tokenizer that transformers loads, got {tmp_path / name}"
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            RDModel.from_pretrained(f"hf:{tmp_path / name}")
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises((ValueError, FileNotFoundError), match="expected a model and a tokenizer that transf"):
        RDModel.from_pretrained(f"hf:{broken}")
    config = transformers.BartConfig(
        vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    bart = transformers.BartModel(config)
    save(bart, bert_tokenizer(tmp_path / "tokenizer"), tmp_path / "bart")
    with pytest.raises(ValueError, match="expected an encoder, got BartModel in .* as it does of T5"):
        RDModel.from_pretrained(f"hf:{tmp_path / 'bart'}")
    part = from_parts(bart.get_encoder(), bert_tokenizer(tmp_path / "tokenizer"))
    with pytest.raises(
        ValueError, match="expected a model that transformers loads by itself, got BartEncoder"
    ):
        part.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="alone, got it with options of chains of several levels"):
        RDModel.from_pretrained(f"hf:{folder}", regressor="pcr")


def test_models_with_adapters_embed_and_are_not_saved_without_their_weights(folder, tmp_path):
    model = transformers.BertModel.from_pretrained(folder)
    model.add_adapter(LoraConfig(target_modules=["query"], r=2, init_lora_weights=False))
    tokenizer = bert_tokenizer(tmp_path / "tokenizer")
    chain = from_parts(model, tokenizer)
    assert abs(embed(chain) - embed(from_parts(bert(), tokenizer))).max() > 1e-3
    with pytest.raises(ValueError, match="expected a model without adapters, .* got BertModel with some"):
        chain.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("name", ["half", "half.v1"])
def test_folders_may_have_any_name(folder, tmp_path, name):
    """Also one that modules have for something else, or one with a dot."""
    folder.rename(tmp_path / name)
    chain = RDModel.from_pretrained(f"hf:{tmp_path / name}")
    assert list(chain.backbones) == [{"half": "half_", "half.v1": "half_v1"}[name]]


MODELING = """
from pathlib import Path
from transformers import BertConfig, BertModel
Path({marker!r}).touch()
class OwnConfig(BertConfig):
    model_type = "own"
class OwnModel(BertModel):
    config_class = OwnConfig
"""


def with_own_code(folder, tmp_path):
    """A copy of a model whose files bring code, which leaves a file behind when it is run; and that file."""
    marker = tmp_path / "marker"
    folder = shutil.copytree(folder, tmp_path / "own-code" / "model")
    (folder / "own.py").write_text(MODELING.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, marker


@pytest.fixture
def with_code(folder, tmp_path):
    return with_own_code(folder, tmp_path)


REFUSED = "whose files bring Python code, none of which was run: read it and, if you trust it, allow it by"


@pytest.mark.parametrize("model_type", ["own", "bert"])
def test_code_in_files_is_not_run(with_code, model_type):
    """Also where transformers has a class of its own for the model type, which may compute something else."""
    folder, marker = with_code
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    for load in (
        lambda: RDModel.from_pretrained(f"hf:{folder}"),
        lambda: TransformersBackbone.from_pretrained(folder),
        lambda: rd_torch.fit({"a": f"hf:{folder}"}, SEQUENCES),
        lambda: RDModel.from_pretrained(f"hf:{folder}", trust_remote_code=["another/model", "m", ""]),
    ):
        with pytest.raises(ValueError, match=REFUSED):
            load()
    with pytest.raises(
        TypeError, match="expected the names of models whose code may be run, got True: name them"
    ):
        RDModel.from_pretrained(f"hf:{folder}", trust_remote_code=True)
    assert not marker.exists()


def test_code_of_a_tokenizer_is_not_run(folder, tmp_path):
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'marker')!r}).touch()\n")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["own.Own", None]}}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=REFUSED):
        RDModel.from_pretrained(f"hf:{folder}")
    assert not (tmp_path / "marker").exists()


def test_nobody_is_asked_at_a_terminal(with_code):
    """transformers would ask whether to run the code, and a pasted line may say yes."""
    folder, marker = with_code
    code = "import sys, rd_torch; assert sys.stdin.isatty(); rd_torch.RDModel.from_pretrained(sys.argv[1])"
    mine, theirs = pty.openpty()
    os.write(mine, b"y\ny\ny\n")
    result = subprocess.run(
        [sys.executable, "-c", code, f"hf:{folder}"],
        stdin=theirs,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert REFUSED in result.stderr
    assert "[y/N]" not in result.stdout + result.stderr
    assert not marker.exists()


def test_code_of_models_that_are_named_is_run_and_saved(with_code, tmp_path, monkeypatch):
    folder, marker = with_code
    monkeypatch.chdir(folder.parent)
    chain = RDModel.from_pretrained(f"hf:{folder}", trust_remote_code=["./model"])
    assert marker.exists()
    assert type(chain.backbones["model"].model).__name__ == "OwnModel"
    chain.save_pretrained(tmp_path / "chain")
    with pytest.raises(ValueError, match=REFUSED):
        RDModel.from_pretrained(tmp_path / "chain")
    again = RDModel.from_pretrained(tmp_path / "chain", trust_remote_code=[str(tmp_path / "chain")])
    assert (embed(again) == embed(chain)).all()


def test_pickles_that_run_code_are_refused(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "marker",)

    (folder / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(
        (ValueError, FileNotFoundError), match="expected a model and a tokenizer that transform"
    ):
        RDModel.from_pretrained(f"hf:{folder}")
    assert not (tmp_path / "marker").exists()


def test_pickles_of_tensors_are_read(folder):
    expected = RDModel.from_pretrained(f"hf:{folder}")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert (embed(RDModel.from_pretrained(f"hf:{folder}")) == embed(expected)).all()


def test_without_transformers_one_sentence_says_so(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ModuleNotFoundError, match="^expected the package transformers, got none: pip install tr"
    ):
        RDModel.from_pretrained(f"hf:{folder}")


def test_without_sentencepiece_the_error_says_what_to_install(folder, monkeypatch):
    """transformers asks for another package, whose files these are not."""

    def fail(*_, **__):
        raise ValueError("`tiktoken` is required to read a `tiktoken` file.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    monkeypatch.setattr(autoload, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="needs a package: pip install sentencepiece protobuf"):
        RDModel.from_pretrained(f"hf:{folder}")


def test_transformers_is_not_imported_before_such_a_model_is_used():
    code = """
import sys, rd_torch
rd_torch.TransformersBackbone
rd_torch.embed(rd_torch.RDModel.from_pretrained("esm2-rd-mini", "28K"), ["MKV"])
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:cpu computes")
def test_half_precision_is_as_stored_in_our_checkpoints_and_float32_elsewhere(tmp_path, stored):
    save(t5().to(stored), t5_tokenizer(), tmp_path / "t5")
    chain = RDModel.from_pretrained(f"hf:{tmp_path / 't5'}")
    assert chain.dtype == torch.float32
    half = RDModel.from_pretrained(f"hf:{tmp_path / 't5'}", dtype=stored)
    assert half.dtype == stored
    half.save_pretrained(tmp_path / "chain")
    again = RDModel.from_pretrained(tmp_path / "chain")
    assert again.dtype == stored
    assert again.fingerprint() == half.fingerprint()
    assert (embed(again) == embed(half)).all()
    wide = RDModel.from_pretrained(tmp_path / "chain", dtype=torch.float32)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(embed(wide), embed(chain))


def test_what_is_saved_comes_back_also_over_itself(folder, tmp_path):
    chain = from_parts(bert(), bert_tokenizer(tmp_path / "tokenizer"), "a@1")
    expected = embed(chain)
    place = tmp_path / "chain"
    for _ in range(2):
        chain.save_pretrained(place)
        chain = RDModel.from_pretrained(place)
        assert (embed(chain) == expected).all()
        assert chain.backbones["a"].depth == 1
        assert chain.config.levels[0].layer == 1
        assert {path.name for path in (place / "backbones").iterdir()} == {"a"}
    assert "BertModel" in (place / "backbones" / "a" / "config.json").read_text()
    readable = {path.stat().st_mode & 0o777 for path in place.rglob("*") if path.is_file()}
    assert len(readable) == 1
    (native,) = RDModel.from_pretrained("esm2-rd-mini", "28K").backbones.values()
    RDModel({"a": native}, []).save_pretrained(place)  # the folder makes room for a file
    assert {path.name for path in (place / "backbones").iterdir()} == {"a.safetensors"}
    assert RDModel.from_pretrained(place).config.levels[0].family == "esm2"


def test_a_write_that_is_cut_off_does_not_look_whole(folder, tmp_path, monkeypatch):
    chain = RDModel.from_pretrained(f"hf:{folder}")
    chain.save_pretrained(tmp_path / "chain")

    def fail(*_, **__):
        raise OSError(28, "no space left")

    monkeypatch.setattr(type(chain.backbones["model"].model), "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        chain.save_pretrained(tmp_path / "chain")
    with pytest.raises(FileNotFoundError):
        RDModel.from_pretrained(tmp_path / "chain")
    monkeypatch.undo()
    chain.save_pretrained(tmp_path / "chain")
    assert (embed(RDModel.from_pretrained(tmp_path / "chain")) == embed(chain)).all()
    assert {path.name for path in (tmp_path / "chain" / "backbones").iterdir()} == {"model"}


def test_another_model_or_tokenizer_at_a_level_is_refused(folder, tmp_path):
    chain = RDModel.from_pretrained(f"hf:{folder}")
    chain.save_pretrained(tmp_path / "chain")
    other = bert(tmp_path / "other", width=48, tokenizer=bert_tokenizer(tmp_path / "tokenizer"))
    assert other.config.hidden_size == 48
    same = RDModel.from_pretrained(tmp_path / "chain", backbones={"model": f"hf:{folder}"})
    assert same.fingerprint() == chain.fingerprint()
    with pytest.raises(
        ValueError, match="expected a backbone of shape Level.name='model'.*width=32.*width=48"
    ):
        RDModel.from_pretrained(tmp_path / "chain", backbones={"model": f"hf:{tmp_path / 'other'}"})
    names = (tmp_path / "tokenizer" / "vocab.txt").read_text().splitlines()
    names[5:7] = names[6], names[5]
    (tmp_path / "tokenizer" / "vocab.txt").write_text("\n".join(names))
    swapped = transformers.BertTokenizerFast(str(tmp_path / "tokenizer" / "vocab.txt"), do_lower_case=False)
    swapped.save_pretrained(tmp_path / "chain" / "backbones" / "model")
    with pytest.raises(ValueError, match="expected the tokenizer that level model was made with, got one"):
        RDModel.from_pretrained(tmp_path / "chain")


@pytest.fixture
def served_hub(hub, monkeypatch):  # noqa: F811
    """The Hub on this machine, for parts of huggingface_hub too that before 1.0 keep its address."""
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    return hub


def served(hub, repo, folder, **options):  # noqa: F811
    return hub.add(repo, {path.name: path.read_bytes() for path in folder.iterdir()}, **options)


def test_models_from_the_hub_are_of_one_commit_and_can_be_referenced(served_hub, folder, tmp_path):
    commit = served(served_hub, "someone/bert", folder)
    chain = RDModel.from_pretrained("hf:someone/bert", cache_dir=tmp_path / "cache")
    assert list(chain.backbones) == ["bert"]
    reference = chain.config.levels[0].reference
    assert (reference.repo, reference.revision) == ("someone/bert", commit)
    chain.save_pretrained(tmp_path / "chain", backbones="referenced", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "chain" / "backbones").exists()
    other = bert(tmp_path / "newer", seed=5, tokenizer=bert_tokenizer(tmp_path / "tokenizer"))
    newer = served(served_hub, "someone/bert", tmp_path / "newer")
    again = RDModel.from_pretrained(tmp_path / "chain", cache_dir=tmp_path / "cache")
    assert (embed(again) == embed(chain)).all()
    latest = RDModel.from_pretrained("hf:someone/bert", cache_dir=tmp_path / "cache")
    assert latest.config.levels[0].reference.revision == newer
    assert (embed(latest) == embed(from_parts(other, bert_tokenizer(tmp_path / "tokenizer")))).all()
    old = RDModel.from_pretrained("hf:someone/bert", revision=commit, cache_dir=tmp_path / "cache")
    assert (embed(old) == embed(chain)).all()
    with torch.no_grad():
        again.backbones["bert"].model.embeddings.word_embeddings.weight[7] += 1
    with pytest.raises(
        ValueError, match="expected backbone bert as it came from someone/bert, got a changed"
    ):
        again.save_pretrained(tmp_path / "other", backbones="referenced", cache_dir=tmp_path / "cache")


def test_chains_with_such_levels_lie_on_the_hub_too(served_hub, folder, tmp_path):
    chain = RDModel.from_pretrained(f"hf:{folder}")
    chain.push_to_hub("someone/chain", token="secret")
    assert "backbones/model/model.safetensors" in served_hub.files("someone/chain")
    again = RDModel.from_pretrained("someone/chain", cache_dir=tmp_path / "cache")
    assert (embed(again) == embed(chain)).all()
    offline = RDModel.from_pretrained("someone/chain", cache_dir=tmp_path / "cache", local_files_only=True)
    assert offline.fingerprint() == chain.fingerprint()
    with pytest.raises(FileNotFoundError, match="hf download someone/chain"):
        RDModel.from_pretrained("someone/chain", cache_dir=tmp_path / "nothing", local_files_only=True)


def test_models_from_elsewhere_cannot_be_referenced(folder, tmp_path):
    chain = RDModel.from_pretrained(f"hf:{folder}")
    with pytest.raises(ValueError, match="expected a backbone that came from the Hub at level model"):
        chain.save_pretrained(tmp_path / "chain", backbones="referenced")


def test_names_are_trusted_whole(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = Hub(trusted="owner/model")
    assert ours.trusts("owner/model")
    assert ours.trusts("hf:owner/model")
    assert not any(map(ours.trusts, ("owner", "model", "owner/mode", "", "other/owner/model")))
    assert Hub(trusted=["model"]).trusts(str(folder))
    assert not Hub(trusted=False).trusts("owner/model")
    assert not Hub().trusts("")


@pytest.fixture(scope="module")
def dplm(tmp_path_factory):
    """An ESM as DPLM's: no token dropout, and a head of its own."""
    folder = tmp_path_factory.mktemp("dplm")
    model = esm(token_dropout=False, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.decoder.weight = torch.nn.Parameter(torch.randn(33, 32))
    return save(model, esm_tokenizer(folder / "tokenizer"), folder / "model"), folder / "model"


@pytest.mark.parametrize("mark", ["", "hf:"])
def test_dplm_is_read_natively(dplm, mark, tmp_path):
    theirs, folder = dplm
    chain = RDModel.from_pretrained(f"{mark}{folder}")
    (backbone,) = chain.backbones.values()
    assert isinstance(backbone, rd_torch.ESM2)
    assert backbone.facts == {"token_dropout": False, "tied": False}
    tokens = tokens_of("MKTAYIAKQR<mask>QISFVK<mask>", "XBUZOM", "M")
    real = tokens != 1
    with torch.no_grad():
        hidden = theirs.esm(tokens, attention_mask=real.long()).last_hidden_state
        logits = theirs(tokens, attention_mask=real.long()).logits
        out = chain(tokens)
    scale = hidden[real].std(), logits[real].std()
    torch.testing.assert_close(out.embeddings[real], hidden[real], atol=float(2e-5 * scale[0]), rtol=0)
    torch.testing.assert_close(out.logits[real], logits[real], atol=float(2e-5 * scale[1]), rtol=0)
    chain.save_pretrained(tmp_path / "chain")
    again = RDModel.from_pretrained(tmp_path / "chain")
    assert again.fingerprint() == chain.fingerprint()
    assert torch.equal(again(tokens).logits, out.logits)


def test_a_made_dplm_is_the_same(dplm):
    _, folder = dplm
    (backbone,) = RDModel.from_pretrained(folder).backbones.values()
    fresh = rd_torch.ESM2(2, 32, 4, token_dropout=False, tied=False)
    assert fresh.tensors().keys() == backbone.tensors().keys()
    assert "lm_head.weight" in fresh.tensors()
    tied = rd_torch.ESM2(2, 32, 4)
    assert "lm_head.weight" not in tied.tensors()


def test_another_esm_behind_hf_is_transformers_own(tmp_path):
    """With absolute positions, as ESM-1b has them, nothing native computes it."""
    model = esm(position_embedding_type="absolute", token_dropout=False)
    save(model, esm_tokenizer(tmp_path / "tokenizer"), tmp_path / "model")
    chain = RDModel.from_pretrained(f"hf:{tmp_path / 'model'}")
    assert isinstance(chain.backbones["model"], TransformersBackbone)
    with pytest.raises(ValueError, match="position_embedding_type"):
        RDModel.from_pretrained(tmp_path / "model")
    expected = embed(from_parts(copy.deepcopy(model.esm), esm_tokenizer(tmp_path / "tokenizer")))
    torch.testing.assert_close(embed(chain), expected)
    assert pickle.dumps(chain)
