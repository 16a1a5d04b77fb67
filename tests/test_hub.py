"""`from_pretrained` and `push_to_hub` end to end, with a Hub on this machine."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from esmc import oracle, our_esmc
from files import published_arrays
from helpers import random_esm2, random_sequence, small_model
from hub_server import FakeHub, Fault, no_fault

import rd_torch
from rd_torch.cli import main
from rd_torch.levels import ESM2_LEVELS, ESMC_LEVELS, Level, Reference
from rd_torch.weights import Hub, read_checkpoint, shipped_checkpoints
from rd_torch.weights.known import ESM2_ON_HUB, ESMC_ON_HUB, PUBLISHED_MAPS

MINI = shipped_checkpoints()["esm2-rd-mini"]
SMALL = ("config.json", "maps.safetensors", "backbones/28K.safetensors", "backbones/90K.safetensors")
LAST = SMALL[-1]
CHAIN = "someone/chain"
BACKBONE = "someone/esm-28K"
WEIGHTS = "model.safetensors"

load = rd_torch.RDModel.from_pretrained


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub, and huggingface_hub pointed at it with an empty cache."""
    with FakeHub(tmp_path / "served") as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        old = huggingface_hub.file_download  # which before 1.0 had a name of its own for the template
        monkeypatch.setattr(old, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        new_session()
        yield server
    new_session()


@pytest.fixture
def cache(hub, tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def no_waiting(monkeypatch):
    """Between one try and the next huggingface_hub sleeps, half a minute in all."""
    monkeypatch.setattr(time, "sleep", lambda _: None)


def new_session():
    """Before 1.0 huggingface_hub asked only once, for a session, whether it is offline."""
    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()


def offline(monkeypatch, is_offline=True):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", is_offline)
    new_session()


def chain_files(names=SMALL):
    return {name: (MINI / name).read_bytes() for name in names}


def whole_chain():
    return [*SMALL, "backbones/207K.safetensors", "backbones/1M.safetensors"]


def changed(name, tensor):
    """A file of the shipped family with 1 added to one tensor."""
    tensors = safetensors.torch.load((MINI / name).read_bytes())
    tensors[tensor] = tensors[tensor] + 1
    return safetensors.torch.save(tensors)


def backbone_files(level="28K", weights=None):
    """A backbone as a repository of its own."""
    content = weights or (MINI / f"backbones/{level}.safetensors").read_bytes()
    return {"config.json": b'{"model_type": "esm", "vocab_size": 33}', WEIGHTS: content}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def same(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


def bias(model):
    """What `changed` changes in a backbone."""
    return model.backbones["28K"].emb_layer_norm_after.bias


def forget(cache, repo):
    """Takes a repository's files out of the cache and leaves what is remembered of them."""
    for part in ("blobs", "snapshots"):
        for path in (cache / folder_of(repo) / part).rglob("*"):
            if not path.is_dir():
                path.unlink()


def folder_of(repo):
    return f"models--{repo.replace('/', '--')}"


def record_of(cache, repo):
    return json.loads((cache / folder_of(repo) / "rd_torch.json").read_text())


def start(hub, home, code, **variables):
    """A process of its own, which finds the Hub and the cache by the real variables."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    mine = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**inherited, "OMP_NUM_THREADS": "1", **mine, **variables},
        cwd=Path(__file__).parents[1],
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


# Our own checkpoints.


def test_our_checkpoint_loads_by_hub_id_to_the_bit(hub):
    hub.add(CHAIN, chain_files(whole_chain()))
    theirs, ours = load(CHAIN), load("esm2-rd-mini")
    assert same(theirs, ours)
    assert theirs.config == ours.config


def test_a_level_downloads_only_what_it_needs(hub):
    hub.add(CHAIN, chain_files(whole_chain()))
    small = load(CHAIN, level="90K")
    assert same(small, load("esm2-rd-mini", level="90K"))
    assert sorted(hub.downloads(CHAIN)) == sorted(SMALL)


def test_what_reconstructs_is_downloaded_when_it_is_asked_for(hub):
    hub.add(CHAIN, chain_files((*SMALL, "reconstruction.safetensors")))
    model = load(CHAIN, level="90K")
    assert sorted(hub.downloads(CHAIN)) == sorted(SMALL)
    nested = torch.ones(3, 40)
    embedding, r2 = model.reconstruct(nested, "90K")
    expected = load("esm2-rd-mini", level="90K").reconstruct(nested, "90K")
    assert torch.equal(embedding, expected.embedding)
    assert r2 == pytest.approx(expected.r2)
    assert "reconstruction.safetensors" in hub.downloads(CHAIN)


def test_a_repository_without_what_reconstructs_gives_the_maps_estimate(hub):
    hub.add(CHAIN, chain_files())
    model, ours = load(CHAIN, level="90K"), load("esm2-rd-mini", level="90K")
    nested = torch.as_tensor(rd_torch.embed(ours, [random_sequence(60)], pool="none")[0])[:, :40]
    embedding, r2 = model.reconstruct(nested, "90K")
    expected = ours.reconstruct(nested, "90K").embedding
    assert r2 is None
    assert (embedding - expected).std() < 0.2 * expected.std()  # another estimate, nearly as good


def test_nothing_is_downloaded_twice(hub):
    hub.add(CHAIN, chain_files())
    load(CHAIN, level="90K")
    hub.requests.clear()
    load(CHAIN, level="90K")
    assert hub.downloads(CHAIN) == []


COMPARE = f"""
import torch, rd_torch
theirs, ours = (rd_torch.RDModel.from_pretrained(name, level="90K") for name in ("{CHAIN}", "esm2-rd-mini"))
theirs, ours = theirs.state_dict(), ours.state_dict()
assert list(theirs) == list(ours) and all(torch.equal(theirs[name], ours[name]) for name in ours)
"""


def test_the_environment_says_where_the_hub_the_cache_and_the_token_are(hub, tmp_path):
    hub.add(CHAIN, chain_files())
    hub.repositories[CHAIN].token = "hf_secret"
    finish(start(hub, tmp_path / "home", COMPARE, HF_TOKEN="hf_secret"))
    assert sorted(hub.downloads(CHAIN)) == sorted(SMALL)
    assert (tmp_path / "home" / "hub" / folder_of(CHAIN) / "rd_torch.json").is_file()
    hub.requests.clear()
    finish(start(hub, tmp_path / "home", COMPARE, HF_HUB_OFFLINE="1"))
    assert hub.requests == []


def test_cache_dir_is_where_files_go(hub, cache, tmp_path):
    hub.add(CHAIN, chain_files())
    hub.add(BACKBONE, backbone_files())
    where = {"level": "90K", "cache_dir": tmp_path / "elsewhere", "backbones": {"28K": BACKBONE}}
    load(CHAIN, **where)
    assert {path.name for path in (tmp_path / "elsewhere").glob("models--*")} == {
        folder_of(CHAIN),
        folder_of(BACKBONE),
    }
    assert record_of(tmp_path / "elsewhere", CHAIN)["files"]
    assert not cache.exists()
    load(CHAIN, **where, local_files_only=True)


@pytest.mark.filterwarnings("ignore:no checksum of")
def test_a_cache_dir_in_the_home_folder_has_its_record(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    commit = hub.add(MAPS.repo, MAPS.files(0))
    MAPS.read(Hub("~/mine"))
    folder = next(path for path in tmp_path.rglob(folder_of(MAPS.repo)) if (path / "snapshots").is_dir())
    assert json.loads((folder / "rd_torch.json").read_text())["commit"] == commit


def test_revision_picks_a_commit_or_a_branch(hub):
    first = hub.add(CHAIN, chain_files())
    name = "backbones/28K.safetensors"
    newer = {**chain_files(), name: changed(name, "emb_layer_norm_after.bias")}
    second = hub.add(CHAIN, newer, branch="try/this")
    old, new = (load("esm2-rd-mini", level="90K"), bias(load("esm2-rd-mini", level="90K")) + 1)
    assert same(load(CHAIN, level="90K"), old)
    assert same(load(CHAIN, level="90K", revision=first), old)
    assert torch.equal(bias(load(CHAIN, level="90K", revision=second)), new)
    assert torch.equal(bias(load(CHAIN, level="90K", revision="try/this")), new)
    hub.add(CHAIN, newer)
    assert torch.equal(bias(load(CHAIN, level="90K")), new)
    with pytest.raises(FileNotFoundError, match=rf"(?s)of {CHAIN} from the Hub.*Revision Not Found"):
        load(CHAIN, revision="nowhere")


def test_a_chain_is_of_one_commit_though_the_branch_moves_meanwhile(hub):
    hub.add(CHAIN, chain_files())
    name = "backbones/28K.safetensors"

    def move(request):
        if request.method == "GET" and request.path == "maps.safetensors":
            hub.fault = no_fault
            hub.add(CHAIN, {**chain_files(), name: changed(name, "emb_layer_norm_after.bias")})

    hub.fault = move
    assert same(load(CHAIN, level="90K"), load("esm2-rd-mini", level="90K"))


def test_a_file_that_the_repository_lacks_is_named(hub):
    hub.add(CHAIN, chain_files(SMALL[:-1]))
    with pytest.raises(
        FileNotFoundError, match=rf"expected backbones/90K.safetensors in the repository {CHAIN}, got a rep"
    ):
        load(CHAIN, level="90K")
    with pytest.raises(FileNotFoundError, match=r"(?s)of someone/else from .*Repository Not Found"):
        load("someone/else")


@pytest.mark.parametrize("text", [b"{", b"[]"])
@pytest.mark.parametrize("repo", [CHAIN, BACKBONE])
def test_a_config_that_does_not_read_is_refused_by_name(hub, repo, text):
    hub.add(repo, {**(chain_files() if repo == CHAIN else backbone_files()), "config.json": text})
    with pytest.raises(ValueError, match=r"expected .*config.*config\.json"):
        load(repo)


def test_maps_alone_are_read_and_what_they_lack_is_told(hub, tmp_path):
    nesting = rd_torch.Nesting.from_pretrained("esm2-rd-mini", level="90K")
    levels = tuple(rd_torch.Level(level.name, None, level.width, None) for level in nesting.config.levels)
    names_alone = replace(nesting, config=replace(nesting.config, levels=levels))
    for name, saved in (("maps", names_alone), ("esm2", nesting)):
        saved.save_pretrained(tmp_path / name)
        files = (path for path in (tmp_path / name).iterdir() if path.is_file())
        hub.add(f"some/{name}", {path.name: path.read_bytes() for path in files})
        assert rd_torch.Nesting.from_pretrained(f"some/{name}").fingerprint() == saved.fingerprint()
    cure = "give backbones by RDModel.from_pretrained.'some/{}', backbones={{'28K': ..., '90K': ...}}."
    with pytest.raises(
        FileNotFoundError, match=f"level 28K, got some/maps without it: {cure.format('maps')}"
    ):
        load("some/maps")
    with pytest.raises(FileNotFoundError, match=f"got a repository without it; or {cure.format('esm2')}"):
        load("some/esm2")


def test_the_cache_stays_one_that_the_hubs_own_tools_read(hub, cache):
    hub.add(CHAIN, chain_files())
    load(CHAIN, level="90K")
    found = huggingface_hub.scan_cache_dir(cache)
    assert found.warnings == []
    assert [(repo.repo_id, repo.nb_files) for repo in found.repos] == [(CHAIN, len(SMALL))]


# Without network.


@pytest.mark.parametrize("by", ["variable", "argument"])
def test_offline_loads_what_is_cached_without_a_request(hub, monkeypatch, by):
    hub.add(CHAIN, chain_files())
    hub.add(BACKBONE, backbone_files())
    load(CHAIN, level="90K", backbones={"28K": BACKBONE})
    hub.requests.clear()
    if by == "variable":
        offline(monkeypatch)
    model = load(CHAIN, level="90K", backbones={"28K": BACKBONE}, local_files_only=by == "argument")
    assert same(model, load("esm2-rd-mini", level="90K"))
    assert hub.requests == []


@pytest.mark.parametrize("by", ["variable", "argument"])
@pytest.mark.parametrize(
    ("repo", "level", "command"),
    [
        *((reference.repo, None, f"rd-torch download {name}") for name, reference in ESM2_ON_HUB.items()),
        (PUBLISHED_MAPS, "650M", "rd-torch download "),
        (CHAIN, None, f"hf download {CHAIN}"),
    ],
)
def test_offline_with_nothing_cached_names_the_command_to_run(hub, monkeypatch, repo, level, command, by):
    if by == "variable":
        offline(monkeypatch)
    said = rf"of {repo} from the Hub or its cache, got it from neither: run `{command}"
    with pytest.raises(FileNotFoundError, match=said):
        load(repo, level=level, local_files_only=by == "argument")
    assert hub.requests == []


def test_the_command_that_is_named_makes_it_load_offline(hub, monkeypatch):
    hub.add(CHAIN, chain_files())
    huggingface_hub.snapshot_download(CHAIN)  # what `hf download` calls
    offline(monkeypatch)
    assert same(load(CHAIN, level="90K"), load("esm2-rd-mini", level="90K"))


@pytest.mark.parametrize("how", ["unreachable", "failing"])
def test_what_is_cached_loads_when_the_hub_does_not_answer(hub, monkeypatch, how):
    hub.add(CHAIN, chain_files())
    load(CHAIN, level="90K")
    if how == "failing":
        hub.fault = lambda _: Fault(status=503)
    else:
        hub.stop()
    assert same(load(CHAIN, level="90K"), load("esm2-rd-mini", level="90K"))


# Checksums that are known.


def test_other_bytes_than_the_known_ones_of_esm2_are_refused(hub, monkeypatch):
    known, files = ESM2_ON_HUB["8M"], backbone_files()
    hub.add(known.repo, files, commit=known.revision)
    said = (
        rf"expected sha256 {known.sha256[WEIGHTS]} of .*{WEIGHTS}, got {sha256(files[WEIGHTS])}: the file is"
    )
    with pytest.raises(ValueError, match=said):
        load(known.repo)
    assert {request.revision for request in hub.requests} == {known.revision}
    with pytest.raises(ValueError, match=said):  # though it is cached
        load("esm2-rd-mini", level="28K", backbones={"28K": known.repo})
    offline(monkeypatch)
    with pytest.raises(ValueError, match=said):
        load(known.repo)
    with pytest.raises(ValueError, match=said):
        load(known.repo, local_files_only=True)


def test_another_revision_of_esm2_is_not_compared_with_the_known_one(hub):
    hub.add(ESM2_ON_HUB["8M"].repo, backbone_files())
    model = load(ESM2_ON_HUB["8M"].repo, revision="main")
    (level,) = model.config.widths
    ours = load("esm2-rd-mini", level="28K").backbones["28K"]
    assert same(model.backbones[level], ours)


def test_a_reference_with_the_right_checksum_loads(hub):
    files = backbone_files()
    commit = hub.add(BACKBONE, files)
    reference = Reference(BACKBONE, commit, {WEIGHTS: sha256(files[WEIGHTS])})
    model = load("esm2-rd-mini", level="90K", backbones={"28K": reference})
    assert same(model, load("esm2-rd-mini", level="90K"))
    assert model.config.levels[0].reference == reference


def test_a_reference_with_a_wrong_checksum_is_refused_until_the_file_is_the_right_one(hub):
    name = "backbones/28K.safetensors"
    right, wrong = (MINI / name).read_bytes(), changed(name, "emb_layer_norm_after.bias")
    commit = hub.add(BACKBONE, backbone_files(weights=wrong))
    backbones = {"28K": Reference(BACKBONE, commit, {WEIGHTS: sha256(right)})}
    for _ in range(2):
        with pytest.raises(ValueError, match=f"expected sha256 {sha256(right)} of") as refused:
            load("esm2-rd-mini", level="90K", backbones=backbones)
    assert f"got {sha256(wrong)}" in str(refused.value)
    for path in re.search(r"delete (\S+) and (\S+) and download", str(refused.value)).groups():
        Path(path).unlink()
    hub.replace(BACKBONE, commit, WEIGHTS, right)
    assert same(load("esm2-rd-mini", level="90K", backbones=backbones), load("esm2-rd-mini", level="90K"))


def test_a_file_that_was_damaged_in_the_cache_is_refused(hub, cache):
    files = chain_files()
    commit = hub.add(CHAIN, files)
    load(CHAIN, level="90K")
    path = cache / folder_of(CHAIN) / "snapshots" / commit / "maps.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.resolve().write_bytes(damaged)
    said = f"expected sha256 {sha256(files['maps.safetensors'])} of .*maps.safetensors, got {sha256(damaged)}"
    with pytest.raises(ValueError, match=said):
        load(CHAIN, level="90K", local_files_only=True)


# Checksums that are not known: the first are kept.


@dataclass(frozen=True)
class Kept:
    """A repository whose first commit is kept.

    Attributes:
        repo: its name.
        file: one of its files whose bytes `files` changes with the number.
        files: its files by number.
        read: what of it the number shows in.
    """

    repo: str
    file: str
    files: Callable[[int], dict[str, bytes]]
    read: Callable[..., torch.Tensor]


def maps_files(number, levels=("8M", "35M")):
    files = {}
    for smaller, larger in pairwise(levels):
        p, q = ESM2_LEVELS[smaller].width, ESM2_LEVELS[larger].width
        arrays = published_arrays(p, q, "pcr") | {"pca__mean_": np.full(q, float(number))}
        content = io.BytesIO()
        np.savez(content, **arrays)
        files[f"weights/rd-scaler-{smaller}-{larger}-pcr-incremental-1k.npz"] = content.getvalue()
    return files


def read_maps(hub=None, revision=None):
    return read_checkpoint(PUBLISHED_MAPS, "35M", hub, revision).maps["35M"]["m"]


def shards(number):
    """A small backbone in two shards, as 15B has them."""
    tensors = random_esm2(2, 32, 2).state_dict()
    tensors["emb_layer_norm_after.bias"] = torch.full((32,), float(number))
    names = sorted(tensors)
    files, index = {}, {}
    for k, part in enumerate((names[:20], names[20:])):
        name, content = f"pytorch_model-0000{k + 1}-of-00002.bin", io.BytesIO()
        torch.save({each: tensors[each].clone() for each in part}, content)
        files[name] = content.getvalue()
        index |= dict.fromkeys(part, name)
    files["pytorch_model.bin.index.json"] = json.dumps({"weight_map": index}).encode()
    return {**files, "config.json": b'{"model_type": "esm"}'}


def read_15b(hub=None, revision=None):
    checkpoint = read_checkpoint(ESM2_ON_HUB["15B"].repo, None, hub, revision)
    level, tensors = checkpoint.read_backbone(checkpoint.config.levels[0], None, hub or Hub())
    assert (level.num_layers, level.width) == (2, 32)
    return tensors["emb_layer_norm_after.bias"]


MAPS = Kept(PUBLISHED_MAPS, "weights/rd-scaler-8M-35M-pcr-incremental-1k.npz", maps_files, read_maps)
ESM2_15B = Kept(ESM2_ON_HUB["15B"].repo, "pytorch_model-00001-of-00002.bin", shards, read_15b)
each_kept = pytest.mark.parametrize("kept", [MAPS, ESM2_15B], ids=["maps", "15B"])
quietly = pytest.mark.filterwarnings("ignore:no checksum of")


@each_kept
def test_the_first_checksum_is_kept_and_that_is_said_once(hub, cache, kept):
    files = kept.files(0)
    commit = hub.add(kept.repo, files)
    with pytest.warns(UserWarning, match=rf"no checksum of .* in {kept.repo} is known") as said:
        assert kept.read().unique().tolist() == [0]
    assert len(said) == len(files)
    named = [str(each.message) for each in said if kept.file in str(each.message)]
    assert len(named) == 1
    assert f"sha256 {sha256(files[kept.file])} of this first download is kept in {cache}" in named[0]
    record = record_of(cache, kept.repo)
    assert record["commit"] == commit
    assert {name: each["sha256"] for name, each in record["files"].items()} == {
        f"{commit}/{name}": sha256(content) for name, content in files.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept.read()


@each_kept
@quietly
def test_the_first_commit_is_kept_when_the_branch_moves_on(hub, monkeypatch, kept):
    first = hub.add(kept.repo, kept.files(0))
    kept.read()
    second = hub.add(kept.repo, kept.files(1))
    hub.requests.clear()
    assert kept.read().unique().tolist() == [0]
    assert {request.revision for request in hub.requests} <= {first}
    offline(monkeypatch)
    assert kept.read().unique().tolist() == [0]
    offline(monkeypatch, False)
    assert kept.read(revision="main").unique().tolist() == [1]
    assert kept.read(revision=second).unique().tolist() == [1]
    assert kept.read().unique().tolist() == [0]


@quietly
def test_files_that_come_later_are_of_the_first_commit_too(hub):
    levels = ("8M", "35M", "150M")
    first = hub.add(PUBLISHED_MAPS, maps_files(0, levels))
    read_maps()
    hub.add(PUBLISHED_MAPS, maps_files(1, levels))
    hub.requests.clear()
    maps = read_checkpoint(PUBLISHED_MAPS, "150M", predict_from="previous").maps
    assert [maps[level]["m"].unique().tolist() for level in levels[1:]] == [[0], [0]]
    assert {request.revision for request in hub.requests} == {first}


@each_kept
@quietly
def test_other_bytes_at_the_first_commit_are_refused(hub, cache, kept):
    first, other = kept.files(0), kept.files(1)[kept.file]
    commit = hub.add(kept.repo, first)
    kept.read()
    forget(cache, kept.repo)
    hub.replace(kept.repo, commit, kept.file, other)
    said = rf"expected sha256 {sha256(first[kept.file])} of {commit}/{kept.file}, got {sha256(other)}: the"
    for _ in range(2):
        with pytest.raises(ValueError, match=said):
            kept.read()
    forget(cache, kept.repo)
    hub.replace(kept.repo, commit, kept.file, first[kept.file])
    assert kept.read().unique().tolist() == [0]


@quietly
def test_the_authors_maps_load_by_hub_id_to_the_bit(hub, tmp_path):
    files = maps_files(0.5)
    hub.add(PUBLISHED_MAPS, files)
    for name, content in files.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    backbones = {"8M": rd_torch.ESM2(1, 320, 20), "35M": rd_torch.ESM2(1, 480, 20)}
    model = load(PUBLISHED_MAPS, level="35M", backbones=backbones)
    assert same(model, load(tmp_path / "copy", level="35M", backbones=backbones))
    assert hub.downloads(PUBLISHED_MAPS) == list(files)


# Downloads that break.


def break_off(name, times, sent=50_000):
    """Connections that close within the file, the first so many times."""
    left = [times]

    def fault(request):
        if request.method == "GET" and request.path == name and left[0]:
            left[0] -= 1
            return Fault(sent=sent)
        return None

    return fault


def too_short(name):
    """Answers that are whole, but of another length than was announced."""
    return lambda each: Fault(sent=999, honest=True) if (each.method, each.path) == ("GET", name) else None


def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub, monkeypatch, no_waiting):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.add(CHAIN, chain_files())
    hub.fault = break_off(LAST, 2)
    for _ in range(3):  # before 1.0 huggingface_hub left it to the next call to go on
        with suppress(OSError):
            model = load(CHAIN, level="90K")
    assert same(model, load("esm2-rd-mini", level="90K"))
    asked = [each for each in hub.requests if each.method == "GET" and each.path == LAST]
    assert [each.headers.get("range") for each in asked] == [None, "bytes=50000-", "bytes=100000-"]


def test_a_download_that_keeps_breaking_off_is_an_error_that_names_the_file(hub, no_waiting):
    hub.add(CHAIN, chain_files())
    hub.fault = break_off(LAST, 1000, sent=0)
    with pytest.raises(FileNotFoundError, match=rf"expected {LAST} of {CHAIN} from the Hub"):
        load(CHAIN, level="90K")


@pytest.mark.parametrize("fault", [break_off(LAST, 1000, sent=0), too_short(LAST)], ids=["broken", "short"])
def test_a_broken_download_leaves_nothing_that_would_be_loaded(hub, no_waiting, fault):
    hub.add(CHAIN, chain_files())
    hub.fault = fault
    with pytest.raises(Exception, match="closed connection|broken|Consistency check failed|from the Hub"):
        load(CHAIN, level="90K")
    with pytest.raises(FileNotFoundError, match=rf"expected {LAST} of {CHAIN} from the Hub or its cache"):
        load(CHAIN, level="90K", local_files_only=True)
    hub.fault = no_fault
    assert same(load(CHAIN, level="90K"), load("esm2-rd-mini", level="90K"))


def test_a_file_that_is_truncated_on_the_hub_is_refused(hub):
    hub.add(CHAIN, {**chain_files(), LAST: chain_files()[LAST][:-4]})
    with pytest.raises(ValueError, match=rf"whole safetensors file, got one that cannot be read: .*{LAST}"):
        load(CHAIN, level="90K")


def failing(method, path):
    """Errors of the server for one kind of request for one file."""
    return lambda each: Fault(status=500) if (each.method, each.path) == (method, path) else None


@pytest.mark.parametrize(
    ("method", "path"),
    [("HEAD", LAST), ("GET", LAST), ("HEAD", "config.json"), ("GET", "config.json")],
)
def test_an_error_of_the_server_is_told_and_the_next_try_succeeds(hub, no_waiting, method, path):
    hub.add(CHAIN, chain_files())
    hub.fault = failing(method, path)
    with pytest.raises(FileNotFoundError, match=rf"expected {path} of {CHAIN} from the Hub .*the Hub said: "):
        load(CHAIN, level="90K")
    hub.fault = no_fault
    assert same(load(CHAIN, level="90K"), load("esm2-rd-mini", level="90K"))


def test_a_config_that_could_not_be_had_does_not_pass_for_one_that_is_right(hub, no_waiting):
    hub.add(BACKBONE, {**backbone_files(), "config.json": b'{"model_type": "esm", "vocab_size": 40}'})
    with pytest.raises(ValueError, match="expected an ESM-2 with vocab_size 33, got 40"):
        load(BACKBONE)
    hub.fault = failing("HEAD", "config.json")
    with pytest.raises((ValueError, FileNotFoundError), match=rf"config.json of {BACKBONE}|vocab_size"):
        load(BACKBONE, cache_dir=hub.root / "empty")


def test_two_processes_may_fill_one_empty_cache_at_once(hub, tmp_path):
    commit = hub.add(CHAIN, chain_files())
    both = threading.Barrier(2)

    def side_by_side(request):
        if request.method == "HEAD":
            both.wait(timeout=60)

    hub.fault = side_by_side
    processes = [start(hub, tmp_path / "home", COMPARE) for _ in range(2)]
    for process in processes:
        finish(process)
    record = record_of(tmp_path / "home" / "hub", CHAIN)
    assert {name: each["sha256"] for name, each in record["files"].items()} == {
        f"{commit}/{name}": sha256(content) for name, content in chain_files().items()
    }


# Uploads.


def uploaded(hub, repo, branch="main"):
    return set(hub.files(repo, branch)) - {".gitattributes"}


def referenced_chain(hub):
    """A chain whose backbones came from repositories of their own."""
    repos = {level: f"someone/esm-{level}" for level in ("28K", "90K")}
    for level, repo in repos.items():
        hub.add(repo, backbone_files(level))
    return load("esm2-rd-mini", level="90K", backbones=repos)


@pytest.mark.parametrize("xet", [True, False], ids=["in parts", "at once"])
def test_a_pushed_chain_loads_by_its_id_to_the_bit(hub, monkeypatch, xet):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", not xet, raising=False)
    model = small_model()
    address = model.push_to_hub(CHAIN)
    assert uploaded(hub, CHAIN) == {
        "config.json",
        "maps.safetensors",
        "README.md",
        *(f"backbones/{level}.safetensors" for level in "abc"),
    }
    assert address == f"{hub.url}/{CHAIN}/commit/{hub.resolve(CHAIN, 'main')}"
    again = load(CHAIN)
    assert same(again, model)
    assert again.config == model.config


def test_a_pushed_chain_has_a_card_that_the_hub_reads(hub):
    small_model().push_to_hub(CHAIN)
    card = huggingface_hub.ModelCard(hub.files(CHAIN)["README.md"].decode())
    assert card.data.library_name == "rd_torch"
    assert f'from_pretrained("{CHAIN}")' in card.text


def test_a_second_push_replaces_the_first(hub):
    model = small_model()
    model.push_to_hub(CHAIN)
    with torch.no_grad():
        model.backbones["a"].emb_layer_norm_after.bias.add_(1)
    model.push_to_hub(CHAIN, commit_message="Moved a bias")
    assert hub.bodies[f"/api/models/{CHAIN}/commit/main"]["summary"] == "Moved a bias"
    assert same(load(CHAIN), model)


def test_a_smaller_chain_leaves_no_backbones_of_a_larger_one(hub):
    small_model().push_to_hub(CHAIN)
    small_model().truncate("b").push_to_hub(CHAIN)
    assert "backbones/b.safetensors" in hub.files(CHAIN)
    assert "backbones/c.safetensors" not in hub.files(CHAIN)
    assert same(load(CHAIN), small_model().truncate("b"))


def test_what_reconstructs_an_earlier_chain_does_not_stay(hub):
    load("esm2-rd-mini", level="90K").push_to_hub(CHAIN)
    assert "reconstruction.safetensors" in hub.files(CHAIN)
    small_model().push_to_hub(CHAIN)
    assert "reconstruction.safetensors" not in hub.files(CHAIN)


def test_a_push_to_a_branch_leaves_the_main_one(hub):
    model = small_model()
    model.push_to_hub(CHAIN)
    with torch.no_grad():
        model.backbones["a"].emb_layer_norm_after.bias.add_(1)
    for _ in range(2):
        model.push_to_hub(CHAIN, revision="next")
    assert same(load(CHAIN, revision="next"), model)
    assert same(load(CHAIN), small_model())


def test_a_private_repository_is_made_with_the_token_given(hub, monkeypatch):
    model = small_model()
    model.push_to_hub(CHAIN, private=True, token="hf_mine")
    assert hub.repositories[CHAIN].token == "hf_mine"
    with pytest.raises(FileNotFoundError, match=rf"of {CHAIN} from the Hub"):
        load(CHAIN)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert same(load(CHAIN), model)


def test_referenced_backbones_are_not_uploaded_and_load_from_where_they_lie(hub, tmp_path):
    model = referenced_chain(hub)
    model.push_to_hub(CHAIN, backbones="referenced")
    assert uploaded(hub, CHAIN) == {
        "config.json", "maps.safetensors", "reconstruction.safetensors", "README.md",
    }  # fmt: skip
    hub.requests.clear()
    again = load(CHAIN, cache_dir=tmp_path / "empty")
    assert same(again, model)
    assert again.config == model.config
    assert hub.downloads("someone/esm-28K") == ["config.json", WEIGHTS]
    assert again.config.levels[0].reference == Reference(
        "someone/esm-28K",
        hub.resolve("someone/esm-28K", "main"),
        {WEIGHTS: sha256(backbone_files()[WEIGHTS])},
    )


def test_a_reference_stays_at_its_commit_when_the_branch_moves_on(hub, tmp_path):
    model = referenced_chain(hub)
    model.push_to_hub(CHAIN, backbones="referenced")
    other = changed("backbones/28K.safetensors", "emb_layer_norm_after.bias")
    hub.add("someone/esm-28K", backbone_files(weights=other))
    assert same(load(CHAIN, cache_dir=tmp_path / "empty"), model)


def test_a_changed_backbone_is_not_pushed_as_a_reference(hub):
    model = referenced_chain(hub)
    with torch.no_grad():
        bias(model).add_(1)
    said = r"expected backbone 28K as it came from someone/esm-28K, got a changed emb_layer_norm_after.bias"
    with pytest.raises(ValueError, match=said):
        model.push_to_hub(CHAIN, backbones="referenced")
    with pytest.raises(
        ValueError, match="expected a backbone that came from the Hub at level a, got one from elsewhere"
    ):
        small_model().push_to_hub(CHAIN, backbones="referenced")
    assert CHAIN not in hub.repositories


def test_backbones_in_half_precision_count_as_those_they_came_from(hub):
    referenced_chain(hub).half().push_to_hub(CHAIN, backbones="referenced")
    assert same(load(CHAIN), load("esm2-rd-mini", level="90K"))


def test_a_chain_with_references_can_be_pushed_with_its_tensors(hub):
    model = referenced_chain(hub)
    model.push_to_hub(CHAIN)
    again = load(CHAIN)
    assert same(again, model)
    assert [level.reference for level in again.config.levels] == [None, None]


# ESM-C, whose checksums nobody has published.


TINY = {"300M": (2, 32, 2), "600M": (2, 48, 2), "6B": (3, 64, 4)}
FIRST = ESMC_ON_HUB["300M"].repo
PROTEINS = [random_sequence(5 + 7 * k % 31, k) for k in range(40)]


def esmc_files(level, seed=0):
    """A backbone of a size's shape here, as transformers writes it."""
    state = our_esmc(*TINY[level], seed).state_dict().items()
    tensors = {name if name.startswith("lm_head.") else f"esmc.{name}": each for name, each in state}
    facts = {"model_type": "esmc", "vocab_size": 64, "num_attention_heads": TINY[level][2]}
    return {"config.json": json.dumps(facts).encode(), WEIGHTS: safetensors.torch.save(tensors)}


@pytest.fixture
def esmc(hub, monkeypatch):
    """The repositories of ESM-C, at sizes that tests can hold."""
    for name, shape in TINY.items():
        monkeypatch.setitem(ESMC_LEVELS, name, Level(name, *shape, family="esmc"))
        hub.add(ESMC_ON_HUB[name].repo, esmc_files(name))
    return hub


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_esmc_is_downloaded_up_to_a_level_and_kept_as_it_first_came(esmc, cache):
    result = run("download", "600M")
    assert result.exit_code == 0, result.output
    assert "All files for 600M are there." in result.output
    for name in ("300M", "600M"):
        assert re.search(rf"^ +{name} .*/model.safetensors$", result.stdout, re.M)
        assert (
            f"no checksum of {esmc.resolve(ESMC_ON_HUB[name].repo, 'main')}/model.safetensors"
            in result.stderr
        )
    assert esmc.downloads(ESMC_ON_HUB["6B"].repo) == []
    esmc.requests.clear()
    again = run("download", "600M")
    assert again.exit_code == 0
    assert "no checksum" not in again.stderr
    assert esmc.downloads(FIRST) == []
    first = load(FIRST)
    assert list(first.config.widths) == ["300M"]
    esmc.add(FIRST, esmc_files("300M", seed=1))
    assert same(load(FIRST), first), "the main branch has moved on, and the first commit holds"


def test_a_file_of_esmc_that_has_changed_is_refused(esmc, cache):
    assert run("download", "300M").exit_code == 0
    esmc.replace(FIRST, esmc.resolve(FIRST, "main"), WEIGHTS, esmc_files("300M", seed=1)[WEIGHTS])
    forget(cache, FIRST)
    result = run("download", "300M")
    assert result.exit_code == 1
    assert re.search(r"Error: expected sha256 \w+ of \w+/model.safetensors, got \w+", result.output)
    with pytest.raises(ValueError, match=r"expected sha256 \w+ of \w+/model.safetensors, got \w+"):
        load(FIRST)


def test_options_of_maps_are_refused_where_there_are_none(esmc):
    result = run("download", "600M", "--regressor", "ridge")
    assert result.exit_code == 1
    message = "expected options of the authors' maps with a level of ESM-2, got level 600M"
    assert message in result.output
    assert esmc.requests == []


@pytest.mark.filterwarnings("ignore:no checksum of")
def test_a_chain_is_fitted_of_esmc_on_the_hub(esmc, tmp_path):
    names = ("300M", "600M", "6B")
    chain = rd_torch.fit({name: f"biohub/ESMC-{name}" for name in names}, PROTEINS)
    assert chain.config.widths == {"300M": 32, "600M": 48, "6B": 64}
    for level in chain.config.levels:
        assert level.reference.repo == f"biohub/ESMC-{level.name}"
        assert level.reference.sha256 == {WEIGHTS: sha256(esmc_files(level.name)[WEIGHTS])}
    fasta = tmp_path / "in.fasta"
    fasta.write_text("".join(f">P{k}\n{sequence}\n" for k, sequence in enumerate(PROTEINS)))
    result = run(
        "fit", fasta, "-o", tmp_path / "chain", "--backbones", "esmc", "--levels", "300M,600M,6B",
        "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    typed = load(tmp_path / "chain")
    assert same(typed, chain)
    assert typed.config.provenance["backbones"] == {name: f"biohub/ESMC-{name}" for name in names}
    chain.push_to_hub(CHAIN, backbones="referenced")
    assert uploaded(esmc, CHAIN) == {
        "config.json", "maps.safetensors", "reconstruction.safetensors", "README.md",
    }  # fmt: skip
    again = load(CHAIN, level="600M")
    assert again.fingerprint() == chain.truncate("600M").fingerprint()
    with torch.no_grad():
        chain.backbones["300M"].norm.weight.add_(1)
    with pytest.raises(ValueError, match=r"expected backbone 300M as it came from biohub/ESMC-300M, got a"):
        chain.push_to_hub(CHAIN, backbones="referenced")


@pytest.mark.filterwarnings("ignore:no checksum of")
def test_verify_and_export_find_a_size_of_esmc_by_its_name(esmc, tmp_path):
    oracle()
    result = run("verify", "600M", "--device", "cpu")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert any(line.startswith("pass  600M against transformers: largest difference") for line in lines)
    assert f"pass  files of 600M: biohub/ESMC-600M at {esmc.resolve('biohub/ESMC-600M', 'main')}" in lines
    assert lines[-1] == "PASSED"
    result = run("verify", "6G", "--model", "biohub/ESMC-600M")
    assert result.exit_code == 1
    assert "expected level to be one of '600M', got '6G'" in result.output
    written = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rd_torch.exporting.export", lambda model, path: written.append(model.config))
        assert run("export", "300M", "-o", tmp_path / "model.onnx").exit_code == 0
    assert list(written[0].widths) == ["300M"]


def test_layers_of_a_backbone_are_referenced_pushed_and_loaded(hub, tmp_path):
    repos = {level: f"someone/esm-{level}" for level in ("28K", "90K")}
    for level, repo in repos.items():
        hub.add(repo, backbone_files(level))
    sequences = [random_sequence(30, seed) for seed in range(20)]
    sources = {"28K": repos["28K"], "90K@1": repos["90K"], "90K@2": repos["90K"]}
    model = rd_torch.fit(sources, sequences, added=16)
    assert model.backbones["90K"].depth == 2
    for storage, files in (
        ("referenced", set()),
        ("included", {f"backbones/{level}.safetensors" for level in repos}),
    ):
        repo = f"{CHAIN}-{storage}"
        model.push_to_hub(repo, backbones=storage)
        assert {name for name in uploaded(hub, repo) if name.startswith("backbones/")} == files
        again = load(repo, cache_dir=tmp_path / storage)
        assert same(again, model)
        assert again.backbones["90K"].depth == 2
        assert load(repo, level="90K@1").backbones["90K"].depth == 1
    with torch.no_grad():
        model.backbones["90K"].layers[1].fc2.bias.add_(1)
    with pytest.raises(
        ValueError, match="expected backbone 90K@2 as it came from someone/esm-90K, got a changed"
    ):
        model.push_to_hub(CHAIN, backbones="referenced")
    alone = load(repos["90K"], layers={"esm-90K": 1})
    assert alone.config.levels[0].depth == 1
