"""`fit_stores`: files of embeddings give the maps that their backbones give."""

import json
import re
import signal
import socket
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import embed_alone, random_esm2, random_sequence, small_model
from safetensors import safe_open
from test_fitting import KilledError, killed_after, maps_of

import rd_torch
from rd_torch import (
    Level,
    Nesting,
    RDModel,
    RunningMoments,
    combine_stores,
    fit,
    fit_stores,
    open_store,
    solve_stages,
)
from rd_torch.cli import main
from rd_torch.levels import Reference
from rd_torch.sequences import Protein

PROTEINS = [Protein(f"sp|P{i}/x", random_sequence(20 + 7 * (i % 9), seed=i)) for i in range(40)]
SEQUENCES = [protein.sequence for protein in PROTEINS]
NAMES = [protein.identifier for protein in PROTEINS]
RESIDUES = sum(map(len, SEQUENCES))
WIDTHS_OF_MINI = {"28K": 32, "90K": 48, "207K": 64, "1M": 128}
WIDTHS = {"x": 6, "y": 9, "z": 14}
ROWS = 240


@pytest.fixture(scope="module")
def mini():
    return RDModel.from_pretrained("esm2-rd-mini")


@pytest.fixture(scope="module")
def raw_residues(mini, tmp_path_factory):
    """Files of the shipped backbones, residue by residue; not to be changed."""
    return embed_alone(mini, tmp_path_factory.mktemp("raw"), pool="none", proteins=PROTEINS)


def put(path, rows, names=None):
    """A file as other programs write it, of vectors or of a row for each residue."""
    with h5py.File(path, "w") as file:
        for place, row in enumerate(rows):
            file[names[place] if names else f"P{place}"] = row
    return path


def vectors(dtype=np.float32):
    """Correlated vectors of three made-up models, by level."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(ROWS, 5))
    made = {}
    for level, width in WIDTHS.items():
        noise = rng.normal(size=(ROWS, width))
        made[level] = (hidden @ rng.normal(size=(5, width)) + 0.3 * noise + 2).astype(dtype)
    return made


@pytest.fixture
def means(tmp_path):
    """Files of vectors by level."""
    return {level: put(tmp_path / f"{level}.h5", rows) for level, rows in vectors().items()}


@pytest.fixture
def small_windows(monkeypatch):
    """Ten vectors of the made-up models a batch, twenty a window."""
    monkeypatch.setattr("rd_torch.raw_files.BATCH_BYTES", 10 * 4 * sum(WIDTHS.values()))
    monkeypatch.setattr("rd_torch.raw_files.BATCHES_PER_WINDOW", 2)


def assert_same_maps(one, other):
    assert maps_of(one).keys() == maps_of(other).keys()
    for name, tensor in maps_of(one).items():
        assert torch.equal(tensor, maps_of(other)[name]), name


@pytest.mark.parametrize("suffix", ["h5", "pt"])
@pytest.mark.parametrize("options", [{}, {"regressor": "ridge", "alpha": 3.0, "predict_from": "previous"}])
def test_files_of_residues_give_the_maps_that_their_backbones_give(
    mini, tmp_path, suffix, options, monkeypatch
):
    """The same rows are summed in other batches: in float64 nothing of that is left in float32."""
    monkeypatch.setattr("rd_torch.raw_files.BATCH_BYTES", 60 * 4 * sum(WIDTHS_OF_MINI.values()))
    paths = embed_alone(mini, tmp_path / "raw", suffix, "none", proteins=PROTEINS)
    nesting = fit_stores(paths, **options)
    chain = fit(mini.backbones, SEQUENCES, **options)
    assert nesting.config.widths == chain.config.widths
    assert nesting.config.predict_from == chain.config.predict_from
    assert nesting.config.added == chain.config.added
    for name, tensor in maps_of(chain).items():
        torch.testing.assert_close(maps_of(nesting)[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    for mine, other in zip(nesting.config.explained, chain.config.explained, strict=True):
        assert mine.r2 == pytest.approx(other.r2, abs=1e-6)
        assert mine.kept == pytest.approx(other.kept, abs=1e-6)


OPTIONS = [
    {},
    {"regressor": "ols", "added": [2, 0]},
    {"regressor": "ridge", "alpha": 10.0, "added": "all", "predict_from": "previous"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_files_of_means_give_what_numpys_covariance_gives(tmp_path, options, dtype):
    made = vectors(dtype)
    nesting = fit_stores({level: put(tmp_path / level, rows) for level, rows in made.items()}, **options)
    rows = np.concatenate([each.astype(np.float64) for each in made.values()], axis=1)
    scatter = np.cov(rows, rowvar=False) * (ROWS - 1)
    moments = RunningMoments.of(ROWS, torch.tensor(rows.mean(0)), torch.tensor(scatter))
    stages = solve_stages(moments, WIDTHS, **options)
    for level, stage in zip(["y", "z"], stages, strict=True):
        for name, tensor in stage.named_buffers():
            got = nesting.stages[level].get_buffer(name)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), tensor, rtol=1e-6, atol=2e-7)
    assert nesting.config.explained[0].r2 == pytest.approx(stages[0].explained.r2, abs=1e-12)
    assert [(level.num_layers, level.attention_heads) for level in nesting.config.levels] == [
        (None, None)
    ] * 3
    assert nesting.config.provenance["fit"]["solve"] == {"regressor": "pcr", **options}


def test_provenance_says_what_was_summed(means, raw_residues):
    facts = fit_stores(means, provenance={"stores": "mine"}).config.provenance
    assert facts["stores"] == "mine"
    assert facts["fit"] == {
        "sequences": ROWS, "rows": ROWS, "pool": "mean", "solve": {"regressor": "pcr"},
    }  # fmt: skip
    facts = fit_stores(raw_residues).config.provenance["fit"]
    assert (facts["sequences"], facts["rows"], facts["pool"]) == (len(PROTEINS), RESIDUES, "none")


def test_records_are_matched_by_identifier(means, tmp_path):
    back = vectors()["y"][::-1]
    names = [f"P{place}" for place in range(ROWS)][::-1]
    assert_same_maps(fit_stores(means | {"y": put(tmp_path / "back.h5", back, names)}), fit_stores(means))


@pytest.mark.usefixtures("small_windows")
def test_no_more_than_a_batch_of_rows_is_held_though_a_record_is_longer(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    records = [rng.normal(size=(length, sum(WIDTHS.values()))) for length in (3, 95, 1, 25, 7)]
    ends = np.cumsum(list(WIDTHS.values()))
    parts = zip(*(np.split(each, ends[:-1], axis=1) for each in records), strict=True)
    paths = {level: put(tmp_path / level, rows) for level, rows in zip(WIDTHS, parts, strict=True)}
    added, update = [], RunningMoments.update
    monkeypatch.setattr(
        RunningMoments, "update", lambda moments, rows: added.append(len(rows)) or update(moments, rows)
    )
    fit_stores(paths)
    assert max(added) <= 10
    assert sum(added) == 131


def test_no_backbone_and_no_network_is_asked_for(means, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("somebody asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(rd_torch.ESM2, "__init__", refuse)
    fit_stores(means).save_pretrained(tmp_path / "maps")
    combine_stores(Nesting.from_pretrained(tmp_path / "maps"), means, tmp_path / "out.h5")


@pytest.mark.usefixtures("small_windows", "saving")
@pytest.mark.parametrize("records", [21, 130, ROWS - 1])
def test_a_killed_fit_goes_on_to_the_same_bits(means, tmp_path, records):
    whole = fit_stores(means)
    with pytest.raises(KilledError):
        fit_stores(means, work_folder=tmp_path / "work", progress=killed_after(records))
    seen = {True: 0, False: 0}

    def count(more, before):
        seen[before] += more

    again = fit_stores(means, work_folder=tmp_path / "work", progress=count)
    assert_same_maps(again, whole)
    assert again.config == whole.config
    assert seen == {True: records // 20 * 20, False: ROWS - records // 20 * 20}


@pytest.mark.usefixtures("small_windows", "saving")
def test_a_killed_fit_of_residues_goes_on_to_the_same_bits(raw_residues, tmp_path, monkeypatch):
    monkeypatch.setattr("rd_torch.raw_files.BATCH_BYTES", 60 * 4 * sum(WIDTHS_OF_MINI.values()))
    whole = fit_stores(raw_residues)
    with pytest.raises(KilledError):
        fit_stores(raw_residues, work_folder=tmp_path / "work", progress=killed_after(25))
    before = []
    again = fit_stores(
        raw_residues, work_folder=tmp_path / "work", progress=lambda more, done: before.append(done)
    )
    assert any(before)
    assert not all(before)
    assert_same_maps(again, whole)


def changed(path, folder):
    folder.mkdir()
    (folder / path.name).write_bytes(path.read_bytes())
    with h5py.File(folder / path.name, "a") as file:
        next(iter(file.values()))[5] += 1
    return folder / path.name


@pytest.mark.usefixtures("small_windows", "saving")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("number", "expected the embeddings with which the fit in .*work was begun, got others: take those"),
        ("fewer", "expected the embeddings with which the fit in .*work was begun, got (others|fewer)"),
        ("level", "expected the levels {'x': 6, 'y': 9, 'z': 14}, with which .*work was begun, got {'x': 6"),
        ("pool", "expected the fingerprint .*, with which .*work was begun, .* take what it was begun with"),
    ],
)
def test_going_on_with_other_files_is_refused(means, tmp_path, change, message):
    with pytest.raises(KilledError):
        fit_stores(means, work_folder=tmp_path / "work", progress=killed_after(130))
    made = vectors()
    others = dict(means)
    if change == "number":
        others["y"] = changed(means["y"], tmp_path / "changed")
    elif change == "level":
        del others["z"]
    else:
        for level, rows in made.items():
            new = rows[:50] if change == "fewer" else rows[:, None]
            others[level] = put(tmp_path / f"other-{level}.h5", new)
    with pytest.raises(ValueError, match=message):
        fit_stores(others, work_folder=tmp_path / "work")


@pytest.mark.usefixtures("saving")
def test_a_fit_of_backbones_and_one_of_files_do_not_go_on_with_each_other(mini, raw_residues, tmp_path):
    fit(mini.backbones, SEQUENCES, work_folder=tmp_path / "work")
    with pytest.raises(ValueError, match="expected the fingerprint .*, with which .* was begun"):
        fit_stores(raw_residues, work_folder=tmp_path / "work")


def test_widths_that_do_not_grow_need_added(tmp_path):
    rng = np.random.default_rng(0)
    paths = {level: put(tmp_path / level, rng.normal(size=(50, 8))) for level in "ab"}
    with pytest.raises(ValueError, match="where widths do not grow, say how many with `added` .--added."):
        fit_stores(paths)
    nesting = fit_stores(paths, added=[3])
    assert nesting.config.widths == {"a": 8, "b": 11}


def test_so_few_rows_that_maps_are_not_determined_are_told(tmp_path):
    made = vectors()
    few = {level: put(tmp_path / f"few-{level}", rows[:29]) for level, rows in made.items()}
    message = "29 means are too few to determine maps of 29 features in all: take more than 29, or files of a"
    with pytest.warns(UserWarning, match=message):
        fit_stores(few)
    residues = {level: put(tmp_path / level, rows[None, :20]) for level, rows in made.items()}
    with pytest.warns(UserWarning, match="20 rows are too few .* take more than 29$") as said:
        fit_stores(residues)
    assert "every file holds one record alone, with 20 rows, which are taken for the residues" in str(said[0])


VECTORS = [np.arange(6.0) + k for k in range(8)]
LONGER = [np.arange(9.0) * k for k in range(8)]
RESIDUES_OF_6 = [np.ones((3, 6))] * 8
BROKEN = [*LONGER[:-1], np.full(9, np.nan)]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (VECTORS, LONGER[:-1], "same identifiers in every file, got 'P7' in .*x.h5 but not in .*y.h5"),
        (RESIDUES_OF_6, LONGER, "one vector a residue in every file, .* got one vector a protein in .*y.h5"),
        (VECTORS, BROKEN, "finite numbers, got NaN or infinity for 'P7' in .*y.h5"),
        (VECTORS, [*LONGER[:-1], np.ones(8)], "and one width, in .*y.h5, got 'P7' of float64"),
        (VECTORS[:1], LONGER[:1], "at least 2 rows for a covariance, got 1"),
        (LONGER, VECTORS, "where widths do not grow, say how many with `added`"),
        ([each.astype(int) for each in VECTORS], LONGER, "floating-point numbers .*, got 'P0' of int64"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*too few")
def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path, first, second, message):
    pairs = [
        f"{level}={put(tmp_path / f'{level}.h5', rows)}" for level, rows in (("x", first), ("y", second))
    ]
    result = CliRunner().invoke(main, ["fit", "--from-stores", *pairs, "-o", str(tmp_path / "maps")])
    assert result.exit_code == 1
    assert re.search(f"^Error: expected .*{message}", result.stderr.splitlines()[-1])
    assert not (tmp_path / "maps").exists()


def test_nested_embeddings_and_other_ways_to_pool_are_refused(mini, raw_residues, tmp_path):
    rd_torch.embed_to_store(mini, PROTEINS[:3], tmp_path / "nested.h5", width=48, pool="none")
    message = "expected raw embeddings of the 90K backbone in .*, got nested ones of levels 28K, 90K"
    with pytest.raises(ValueError, match=message):
        fit_stores(raw_residues | {"90K": tmp_path / "nested.h5"})
    paths = embed_alone(mini, tmp_path / "max", pool="max", proteins=PROTEINS[:3])
    with pytest.raises(ValueError, match="got pool 'max', which does not commute with the maps"):
        fit_stores(paths)


@pytest.mark.parametrize(("level", "got"), [("a.b", "'a.b'"), ("", "''")])
def test_levels_that_no_module_can_be_called_are_refused_before_anything_is_read(means, level, got):
    with pytest.raises(ValueError, match=f"expected a level name without a dot, got {got}"):
        fit_stores({level: means["x"]}, progress=lambda *_: pytest.fail("something was read"))
    with pytest.raises(ValueError, match="expected a file of embeddings for at least one level, got none"):
        fit_stores({})
    inputs = {"x": means["x"], "half": means["y"]}
    with pytest.raises(ValueError, match="expected levels by names that PyTorch's modules have .*, got half"):
        fit_stores(inputs, progress=lambda *_: pytest.fail("something was read"))


@pytest.fixture
def chain(means, tmp_path):
    """A checkpoint of maps alone."""
    fit_stores(means).save_pretrained(tmp_path / "chain")
    return tmp_path / "chain"


def test_what_is_saved_is_read_to_the_bit(means, chain):
    nesting, again = fit_stores(means), Nesting.from_pretrained(chain)
    assert_same_maps(again, nesting)
    assert again.config == nesting.config
    assert again.fingerprint() == nesting.fingerprint()
    assert sorted(path.name for path in chain.rglob("*")) == [
        "README.md", "config.json", "maps.safetensors", "reconstruction.safetensors",
    ]  # fmt: skip
    level = json.loads((chain / "config.json").read_text())["levels"][0]
    assert (level["name"], level["width"], level["num_layers"]) == ("x", 6, None)
    assert Nesting.from_pretrained(chain, level="y").config.widths == {"x": 6, "y": 9}


def test_a_chain_of_one_level_is_the_embedding_itself(means, tmp_path):
    fit_stores({"x": means["x"]}).save_pretrained(tmp_path / "chain")
    nesting = Nesting.from_pretrained(tmp_path / "chain")
    row = torch.randn(4, 6)
    assert torch.equal(nesting.combine({"x": row}), row)


def test_the_card_says_what_it_is_and_how_files_are_nested(chain):
    card = (chain / "README.md").read_text()
    assert "These are maps that turn raw embeddings of several models" in card
    assert "| y |  | 9 | 9 |" in card
    assert card.count("| not included |") == 3
    assert "ESM-2" not in card
    assert '{"x": "x.h5", "y": "y.h5", "z": "z.h5"}' in card
    assert "- fitted on: sequences 240, rows 240, pool mean, solve" in card


def test_the_card_of_maps_of_esm2_does_not_say_that_backbones_are_there(tmp_path):
    Nesting.from_pretrained("esm2-rd-mini").save_pretrained(tmp_path / "maps", name="ours")
    card = (tmp_path / "maps" / "README.md").read_text()
    assert "This is a chain of ESM-2 models" in card
    assert "| 28K | 2 | 32 | 32 |  |  | not included |" in card
    assert 'Nesting.from_pretrained("ours")' in card


def test_maps_are_not_written_over_backbones(mini, tmp_path):
    mini.truncate("90K").save_pretrained(tmp_path / "chain")
    with pytest.raises(
        ValueError, match="expected a folder without backbones .*, got .*chain: choose another"
    ):
        Nesting.from_pretrained(tmp_path / "chain").save_pretrained(tmp_path / "chain")
    RDModel.from_pretrained(tmp_path / "chain")


@pytest.mark.parametrize(
    ("suffix", "pool"), [("h5", "mean"), ("h5", "none"), ("pt", "mean"), ("pt", "none"), ("parquet", "mean")]
)
def test_combine_takes_the_maps(mini, raw_residues, tmp_path, suffix, pool):
    fit_stores(raw_residues).save_pretrained(tmp_path / "chain")
    nesting = Nesting.from_pretrained(tmp_path / "chain")
    paths = embed_alone(mini, tmp_path / "raw", suffix, pool, proteins=PROTEINS)
    output = tmp_path / f"out.{suffix}"
    arguments = ["combine", "--model", tmp_path / "chain", "-o", output]
    arguments += [f"{level}={path}" for level, path in paths.items()]
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    raw = {}
    for level, path in paths.items():
        with open_store(path) as store:
            rows = store.read(NAMES, as_torch=True)
            raw[level] = torch.cat(rows) if pool == "none" else rows
    with open_store(output) as store:
        assert (store.facts.levels, store.facts.num_layers, store.layer) == (tuple(paths), None, None)
        rows = store.read(NAMES, as_torch=True)
        got = torch.cat(rows) if pool == "none" else rows
    torch.testing.assert_close(got, nesting.combine(raw), rtol=0, atol=1e-5)


def test_combine_looks_at_widths_alone_where_levels_are_names(chain, means, tmp_path):
    folder = tmp_path / "pt"
    folder.mkdir()
    for place, row in enumerate(vectors()["x"]):  # of a layer that no level states
        kept = {"label": f"P{place}", "mean_representations": {12: torch.tensor(row)}}
        torch.save(kept, folder / f"P{place}.pt")
    nesting = Nesting.from_pretrained(chain)
    combine_stores(nesting, means | {"x": folder}, tmp_path / "one.h5")
    combine_stores(nesting, means, tmp_path / "two.h5")
    with open_store(tmp_path / "one.h5") as one, open_store(tmp_path / "two.h5") as two:
        assert np.array_equal(one.read(two.identifiers), two[:])
    with pytest.raises(ValueError, match="expected width 6 at level x, got 9 in .*y.h5: name each file"):
        combine_stores(nesting, means | {"x": means["y"]}, tmp_path / "three.h5")


def test_combine_refuses_files_that_state_another_model_than_the_fitted_one(mini, tmp_path):
    def embedded(model, level, name):
        path = tmp_path / f"{name}.h5"
        rd_torch.embed_to_store(RDModel({level: model.backbones[level]}, []), PROTEINS, path, pool="none")
        return path

    files = {level: embedded(mini, level, level) for level in ("28K", "90K")}
    nesting = fit_stores(files)
    combine_stores(nesting, files, tmp_path / "good.h5")
    exact = RDModel.from_pretrained("esm2-rd-mini", dtype=torch.float64)  # has another fingerprint, and may
    combine_stores(nesting, files | {"28K": embedded(exact, "28K", "exact")}, tmp_path / "nested-exact.h5")
    other = RDModel.from_pretrained("esm2-rd-mini")
    with torch.no_grad():
        other.backbones["28K"].embed_tokens.weight[5] += 1
    changed = files | {"28K": embedded(other, "28K", "changed")}
    with pytest.raises(ValueError, match="expected embeddings of fingerprint .* at level 28K, .* same model"):
        combine_stores(nesting, changed, tmp_path / "bad.h5")


def test_combine_refuses_another_programs_file_of_another_model(means, tmp_path):
    for name, model in (("x", "prot_t5"), ("other", "ankh")):
        path = put(tmp_path / f"{name}.h5", vectors()["x"])
        with h5py.File(path, "a") as file:
            file.attrs["model_name"] = model
    nesting = fit_stores(means | {"x": tmp_path / "x.h5"})
    assert nesting.config.levels[0].facts == {"model": "prot_t5"}
    with pytest.raises(
        ValueError, match="expected embeddings of model prot_t5 at level x, .* got those of ankh"
    ):
        combine_stores(nesting, means | {"x": tmp_path / "other.h5"}, tmp_path / "bad.h5")


def said_of(chain, levels="xyz"):
    needed = ", ".join(f"'{level}': ..." for level in levels)
    return (
        f"expected a checkpoint with the backbone of level {levels[0]}, got {chain} without it: give "
        f"backbones by RDModel.from_pretrained('{chain}', backbones={{{needed}}}), or nest embeddings that "
        "you have with rd-torch combine"
    )


def test_a_model_without_backbones_says_how_to_give_them(chain):
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(said_of(chain))}$"):
        RDModel.from_pretrained(chain)
    with pytest.raises(FileNotFoundError, match=re.escape(said_of(chain, "xy"))):
        RDModel.from_pretrained(chain, level="y")


@pytest.mark.parametrize(
    "command",
    [
        ("embed", "IN", "--model", "CHAIN", "-o", "OUT"),
        ("fit", "IN", "--backbones", "CHAIN", "-o", "OUT"),
        ("verify", "z", "--model", "CHAIN"),
        ("convert", "CHAIN", "OUT"),
        ("export", "z", "--model", "CHAIN", "-o", "OUT.onnx"),
    ],
)
def test_every_door_that_loads_a_model_says_so(chain, tmp_path, command):
    (tmp_path / "in.fasta").write_text(">a\nMKV\n")
    places = {"IN": tmp_path / "in.fasta", "OUT": tmp_path / "out.h5", "CHAIN": chain}
    arguments = [re.sub("IN|OUT|CHAIN", lambda found: str(places[found[0]]), each) for each in command]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"Error: {said_of(chain)}"
    assert not (tmp_path / "out.h5").exists()


def test_transformers_door_says_so_too(chain):
    pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError, match=re.escape(said_of(chain))):
        rd_torch.TransformersEncoder.from_pretrained(chain)


def test_maps_of_esm2_without_their_backbones_say_the_same(tmp_path):
    Nesting.from_pretrained("esm2-rd-mini", level="90K").save_pretrained(tmp_path / "maps")
    message = "expected a checkpoint with the backbone of level 28K, got .*maps without it: .*'90K': ..."
    with pytest.raises(FileNotFoundError, match=message):
        RDModel.from_pretrained(tmp_path / "maps")
    backbones = RDModel.from_pretrained("esm2-rd-mini", level="90K").backbones
    model = RDModel.from_pretrained(tmp_path / "maps", backbones=dict(backbones.items()))
    shipped = RDModel.from_pretrained("esm2-rd-mini", level="90K")
    assert model.fingerprint() == shipped.fingerprint()


def test_maps_keep_references_to_backbones_on_the_hub(mini, tmp_path):
    level = Level("28K", 2, 32, 2, Reference("nobody/nothing", "0" * 40))
    config = rd_torch.RDConfig((level,), (), ())
    Nesting(config, torch.nn.ModuleDict()).save_pretrained(tmp_path / "maps")
    assert Nesting.from_pretrained(tmp_path / "maps").config.levels[0].reference.repo == "nobody/nothing"


@pytest.mark.parametrize("where", ["modules", "files"])
def test_backbones_of_the_right_widths_make_a_model_of_the_maps(tmp_path, where):
    model = small_model()
    paths = embed_alone(model, tmp_path / "raw", pool="none", proteins=PROTEINS)
    fit_stores(paths).save_pretrained(tmp_path / "chain")
    backbones = dict(model.backbones.items())
    if where == "files":
        for level, backbone in model.backbones.items():
            RDModel({level: backbone}, []).save_pretrained(tmp_path / level)
        backbones = {level: tmp_path / level / "backbones" / f"{level}.safetensors" for level in backbones}
    loaded = RDModel.from_pretrained(tmp_path / "chain", backbones=backbones)
    fitted = fit(model.backbones, SEQUENCES)
    assert [level.num_layers for level in loaded.config.levels] == [2, 2, 3]
    got, expected = (rd_torch.embed(each, SEQUENCES[:4]) for each in (loaded, fitted))
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-4)
    loaded.save_pretrained(tmp_path / "whole")
    again = RDModel.from_pretrained(tmp_path / "whole")
    assert again.fingerprint() == loaded.fingerprint()


def test_backbones_of_other_widths_are_refused(chain, tmp_path):
    RDModel({"a": random_esm2(1, 16, 4)}, []).save_pretrained(tmp_path / "a")
    files = tmp_path / "a" / "backbones" / "a.safetensors"
    with pytest.raises(ValueError, match="expected a backbone of shape .*width=6.*, got .*width=16"):
        RDModel.from_pretrained(chain, backbones={"x": files})
    with pytest.raises(FileNotFoundError, match="expected a checkpoint with the backbone of level y"):
        RDModel.from_pretrained(chain, level="y", backbones={"x": random_esm2(1, 8, 2)})


def test_the_command_writes_what_python_writes(means, chain, tmp_path):
    pairs = [f"{level}={path}" for level, path in means.items()]
    output = tmp_path / "new" / "maps"
    result = CliRunner().invoke(main, ["fit", "--from-stores", *pairs, "-o", str(output)])
    assert result.exit_code == 0, result.output
    assert_same_maps(Nesting.from_pretrained(output), Nesting.from_pretrained(chain))
    stores = {level: f"{level}.h5" for level in WIDTHS}
    assert Nesting.from_pretrained(output).config.provenance["stores"] == stores
    assert re.search(r"^ +y +9 +9 +0\.\d{3} +\d\.\d{3}$", result.stdout, re.M)
    assert result.stderr.splitlines()[-1] == f"Wrote the maps to {output}."
    assert [path.name for path in output.parent.iterdir()] == ["maps"]
    shown = CliRunner().invoke(main, ["info", str(output)])
    assert shown.exit_code == 0
    assert result.stdout in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "widths", "regressor"),
    [
        (("--levels", "x,z"), {"x": 6, "z": 14}, "pcr"),
        (("--added", "2,3", "--regressor", "ols"), {"x": 6, "y": 8, "z": 11}, "ols"),
        (("--added", "all", "--predict-from", "previous"), {"x": 6, "y": 15, "z": 29}, "pcr"),
        (("--regressor", "ridge", "--alpha", "100"), WIDTHS, "ridge"),
    ],
)
def test_the_options_of_maps_work(means, tmp_path, arguments, widths, regressor):
    if "--levels" in arguments:
        means["y"] = tmp_path / "nowhere.h5"  # not opened
    pairs = [f"{level}={path}" for level, path in means.items()]
    output = tmp_path / "maps"
    result = CliRunner().invoke(main, ["fit", "--from-stores", *pairs, "-o", str(output), *arguments])
    assert result.exit_code == 0, result.output
    config = Nesting.from_pretrained(output).config
    assert config.widths == widths
    assert config.provenance["fit"]["solve"]["regressor"] == regressor
    assert config.predict_from == ("previous" if "previous" in arguments else "nested")
    if regressor == "ridge":
        assert_same_maps(Nesting.from_pretrained(output), fit_stores(means, regressor="ridge", alpha=100.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("8M",), "expected files as LEVEL=FILE, each level once, got 8M"),
        (("8M=",), "expected files as LEVEL=FILE, each level once, got 8M="),
        (("8M=a", "8M=b"), "expected files as LEVEL=FILE, each level once, got 8M=a, 8M=b"),
        (("8M=gone.h5",), "expected an embedding file or folder at gone.h5, got nothing there"),
        (("8M=a", "--levels", "9M"), "expected level to be one of '8M', got '9M'"),
        (("8M=a", "--levels", "8M,8M"), "expected each level once, got --levels 8M,8M"),
        (
            ("8M=a", "--strict"),
            "expected --from-stores without --strict, got them together: no protein is read",
        ),
        (
            ("8M=a", "--device", "cpu", "--tokens-per-batch", "9"),
            "expected --from-stores without --device and --tokens-per-batch, got them together",
        ),
        (("8M=a", "--added", "2,all"), "expected --added as numbers like 16,16 or 'all', got '2,all'"),
        (("8M=a", "--backbones", "esm2-rd-mini"), "without --backbones, got"),
        (("8M=a", "--backbone", "8M=b"), "without --backbone, got"),
        (("8M=a", "--cluster"), "without --cluster, got"),
        (("8M=a", "--workers", "2"), "without --workers, got"),
        (("8M=a", "--identifier", "word"), "without --identifier, got"),
        (("8M=a", "--sequence-column", "s"), "without --sequence-column, got"),
        (("8M=a", "--identifier-column", "s"), "without --identifier-column, got"),
        ((), "Missing argument 'PROTEINS...'"),
    ],
)
def test_wrong_arguments_get_one_clear_line(tmp_path, arguments, message):
    result = CliRunner().invoke(main, ["fit", "--from-stores", *arguments, "-o", str(tmp_path / "maps")])
    assert result.exit_code in (1, 2)
    assert message in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_backbones_in_the_output_are_told_before_the_files_are_read(mini, tmp_path):
    mini.truncate("28K").save_pretrained(tmp_path / "chain")
    arguments = ["fit", "--from-stores", "8M=gone.h5", "-o", str(tmp_path / "chain")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "Error: expected a folder without backbones to write maps alone to" in result.stderr
    RDModel.from_pretrained(tmp_path / "chain")


KILLED = """
import os, signal, sys
from rd_torch import raw_files, sums
from rd_torch.cli import main, progress

sums.SECONDS_BETWEEN_SAVES, raw_files.BATCH_BYTES, raw_files.BATCHES_PER_WINDOW = 0, 10 * 4 * 29, 2
done = []

def count(bar, records, before=False):
    done.append(records)
    if sum(done) >= 130:
        os.kill(os.getpid(), signal.SIGKILL)

progress.Bar.__call__ = count
main(sys.argv[1:])
"""


@pytest.mark.usefixtures("small_windows", "saving")
def test_a_command_that_is_killed_goes_on_to_the_same_bits(means, tmp_path):
    pairs = [f"{level}={path}" for level, path in means.items()]
    command = ["fit", "--from-stores", *pairs, "-o", str(tmp_path / "maps")]
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "maps").exists()
    with safe_open(tmp_path / "maps.part" / "moments.safetensors", framework="pt") as saved:
        assert json.loads(saved.metadata()["facts"])["sequences"] == 120
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert_same_maps(Nesting.from_pretrained(tmp_path / "maps"), fit_stores(means))
    assert not (tmp_path / "maps.part").exists()
