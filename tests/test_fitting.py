"""`fit`: one pass over sequences gives what all their residues' embeddings give."""

from itertools import accumulate, pairwise

import pytest
import torch
from helpers import random_esm2, random_sequence, tokens_of
from torch import nn

from rd_torch import ESM2, RDModel, RunningMoments, candidates, fit, solve_stages, sums
from rd_torch.sequences import Entry
from rd_torch.store import cut_windows

WIDTHS = {"small": 32, "large": 48}
LENGTHS = [1, 2, 37, 40, *(3 + 7 * k % 29 for k in range(38))]
SEQUENCES = [*(random_sequence(length, seed=k) for k, length in enumerate(LENGTHS)), "XBUZOMKV"]
RESIDUES = sum(map(len, SEQUENCES))

# Hidden states are float32: what is added, about 0.15 in size, differs by 2e-6 between batches of other
# shapes (measured), and the maps come out in float32.
TOLERANCE = 2e-5

ROWS = {
    "residues": lambda states: states[1:-1],
    "special tokens too": lambda states: states,
    "means of sequences": lambda states: states[1:-1].mean(0, keepdim=True),
}


def fair_family():
    return {name: random_esm2(2, width, 4, seed=width) for name, width in WIDTHS.items()}


def own_family():
    return {name: ESM2.sharing(module) for name, module in fair_family().items()}


@torch.no_grad()
def rows_by_hand(sequences=SEQUENCES, kind="residues"):
    """fair-esm's last hidden states, one sequence at a time."""
    rows = {}
    for name, module in fair_family().items():
        states = (module(tokens_of(one), repr_layers=[2])["representations"][2][0] for one in sequences)
        rows[name] = torch.cat([ROWS[kind](one) for one in states])
    return rows


@pytest.fixture(scope="module")
def collected():
    return rows_by_hand()


@pytest.fixture(scope="module")
def unseen():
    return rows_by_hand([random_sequence(50, seed=999)])


@pytest.fixture(scope="module")
def plain():
    """The fit with all defaults."""
    return fit(own_family(), SEQUENCES)


def solved_by_hand(rows, **options):
    moments = RunningMoments(sum(WIDTHS.values()))
    moments.update(torch.cat(list(rows.values()), dim=1).double())
    return solve_stages(moments, WIDTHS, **options)[0]


def assert_added_features(model, rows, expected):
    """The model widens raw embeddings as `expected`, `(rows, added)` float64, says."""
    added = model.combine(rows)[:, WIDTHS["small"] :].double()
    torch.testing.assert_close(added, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", [own_family, fair_family])
@pytest.mark.parametrize("regressor", ["pcr", "ols", "ridge"])
def test_a_fit_equals_solving_on_all_residues_collected_by_hand(family, regressor, collected, unseen):
    model = fit(family(), SEQUENCES, regressor=regressor, alpha=5.0, tokens_per_batch=200)
    stage = solved_by_hand(collected, regressor=regressor, alpha=5.0)
    for rows in (collected, unseen):
        nested, larger = (rows[name].double() for name in WIDTHS)
        assert_added_features(model, rows, stage(nested, larger)[:, WIDTHS["small"] :])
    explained = model.stages["large"].explained
    assert explained.r2 == pytest.approx(stage.explained.r2, abs=1e-5)
    assert explained.kept == pytest.approx(stage.explained.kept, abs=1e-5)
    assert len(collected["small"]) == RESIDUES


@pytest.mark.parametrize("kind", ["special tokens too", "means of sequences"])
def test_rows_of_another_kind_would_be_seen(kind, plain, unseen):
    stage = solved_by_hand(rows_by_hand(kind=kind))
    expected = stage(*(unseen[name].double() for name in WIDTHS))
    assert (plain.combine(unseen) - expected).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("tokens_per_batch", [1, 45, 300])
def test_a_fit_does_not_depend_on_the_cutting_into_batches(tokens_per_batch, plain, unseen):
    model = fit(own_family(), SEQUENCES, tokens_per_batch=tokens_per_batch)
    expected = plain.combine(unseen)[:, WIDTHS["small"] :].double()
    assert_added_features(model, unseen, expected)


def test_a_generator_is_accepted(plain):
    model = fit(own_family(), (one for one in SEQUENCES))
    assert torch.equal(model.stages["large"].W, plain.stages["large"].W)


def test_provenance_counts_sequences_and_residues(plain):
    facts = plain.config.provenance["fit"]
    assert (facts["sequences"], facts["residues"]) == (len(SEQUENCES), RESIDUES)


def test_the_model_comes_back_in_eval_mode_with_float32_maps(plain):
    assert isinstance(plain, RDModel)
    assert not any(module.training for module in plain.modules())
    assert all(part.dtype == torch.float32 for part in plain.stages.buffers())
    assert plain.config.widths == WIDTHS
    assert plain.stages["large"].explained == plain.config.explained[0]


def test_backbones_are_shared_not_copied():
    family = fair_family()
    model = fit(family, SEQUENCES[:10])
    for name, module in family.items():
        assert model.backbones[name].embed_tokens.weight is module.embed_tokens.weight
        assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("predict_from", ["nested", "previous"])
@pytest.mark.parametrize(("added", "counts"), [(5, (5, 5)), ([0, 7], (0, 7)), ("all", (48, 40))])
def test_options_reach_the_solution_and_the_config(predict_from, added, counts):
    family = {**own_family(), "third": ESM2.sharing(random_esm2(1, 40, 4, seed=3))}
    model = fit(family, SEQUENCES[:20], predict_from=predict_from, added=added, regressor="ols")
    assert model.config.predict_from == predict_from
    assert model.config.added == counts
    source = {"nested": 32 + counts[0], "previous": 48}[predict_from]
    assert model.stages["third"].W.shape == (source, 40)
    out = model(tokens_of(SEQUENCES[3]))
    assert out.embeddings.shape[-1] == 32 + sum(counts)


def test_progress_hears_of_every_residue(plain):
    seen = []
    model = fit(
        own_family(),
        SEQUENCES,
        progress=lambda residues, before: seen.append((residues, before)),
        tokens_per_batch=100,
    )
    assert sum(residues for residues, _ in seen) == sum(map(len, SEQUENCES))
    assert not any(before for _, before in seen)
    assert model.config.provenance["fit"]["sequences"] == len(SEQUENCES)


@pytest.mark.parametrize("tokens_per_batch", [50, 300])
def test_no_more_than_a_batch_of_rows_is_ever_held(tokens_per_batch, monkeypatch):
    rows = []
    update = RunningMoments.update

    def counting(moments, batch):
        rows.append(len(batch))
        update(moments, batch)

    monkeypatch.setattr(RunningMoments, "update", counting)
    fit(own_family(), SEQUENCES, tokens_per_batch=tokens_per_batch)
    assert max(rows) <= tokens_per_batch
    assert sum(rows) == RESIDUES


def test_a_stream_is_read_window_by_window(monkeypatch):
    read, read_at_updates = [0], []
    update = RunningMoments.update

    def stream():
        for k in range(300):
            read[0] += 1
            yield random_sequence(6, seed=k)

    def watching(moments, batch):
        read_at_updates.append(read[0])
        update(moments, batch)

    monkeypatch.setattr(RunningMoments, "update", watching)
    fit(own_family(), stream(), tokens_per_batch=16)  # 64 batches of two sequences are a window
    assert read_at_updates[0] < 150
    assert read_at_updates[-1] == 300


@pytest.mark.parametrize("sequences", [[], iter(()), ["M"]])
def test_a_stream_of_fewer_than_two_residues_is_refused(sequences):
    with pytest.raises(ValueError, match=r"expected at least 2 rows for a covariance, got [01]"):
        fit(own_family(), sequences)


def test_a_backbone_of_another_kind_is_refused():
    message = (
        r"expected a backbone of rd_torch or an esm.ESM2, got Linear: rd_torch.TransformersBackbone takes"
    )
    with pytest.raises(TypeError, match=message):
        fit({**own_family(), "other": nn.Linear(2, 2)}, SEQUENCES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regressor": "lasso"}, "expected regressor to be one of"),
        ({"predict_from": "larger"}, "expected predict_from to be one of"),
        ({"added": 49}, "expected 1 whole numbers of added directions"),
        ({"tokens_per_batch": 0}, "expected tokens_per_batch of at least 1, got 0"),
    ],
)
def test_options_that_cannot_be_are_refused_before_a_sequence_is_read(options, message):
    def unread():
        raise AssertionError("a sequence was read")
        yield

    with pytest.raises(ValueError, match=message):
        fit(own_family(), unread(), **options)


def test_hidden_states_that_are_not_finite_are_refused():
    family = own_family()
    with torch.no_grad():
        family["large"].emb_layer_norm_after.bias[3] = float("nan")
    with pytest.raises(ValueError, match="expected finite rows, got NaN or infinity"):
        fit(family, SEQUENCES[:3])


BUDGET = 24
"""Tokens of a batch: the sequences are three windows."""


class KilledError(Exception):
    """Stands for a kill: nothing that is under work is saved."""


def killed_after(count):
    """Progress that ends a job when so many residues or records are done."""
    left = [count]

    def progress(more, before):
        left[0] -= more
        if left[0] < 0:
            raise KilledError

    return progress


def maps_of(model):
    return dict(model.stages.named_buffers())


@pytest.mark.parametrize("residues", [400, 600, RESIDUES - 1])
def test_a_killed_fit_goes_on_to_the_same_bits(residues, saving, tmp_path):
    whole = fit(own_family(), SEQUENCES, tokens_per_batch=BUDGET)
    folder = tmp_path / "work"
    with pytest.raises(KilledError):
        fit(
            own_family(),
            SEQUENCES,
            work_folder=folder,
            tokens_per_batch=BUDGET,
            progress=killed_after(residues),
        )
    seen = {True: 0, False: 0}

    def count(more, before):
        seen[before] += more

    model = fit(own_family(), SEQUENCES, work_folder=folder, progress=count)  # with the budget recorded
    for name, tensor in maps_of(model).items():
        assert torch.equal(tensor, maps_of(whole)[name]), name
    assert model.config == whole.config
    assert sum(seen.values()) == RESIDUES
    windows = list(cut_windows([Entry("", one) for one in SEQUENCES], BUDGET))
    assert seen[True] == max(end for end in accumulate(w.residues for w in windows) if end <= residues)


def test_a_finished_fit_is_solved_otherwise_without_another_pass(saving, tmp_path, monkeypatch):
    fit(own_family(), SEQUENCES, work_folder=tmp_path / "work", tokens_per_batch=BUDGET)
    expected = fit(own_family(), SEQUENCES, regressor="ols", tokens_per_batch=BUDGET)
    monkeypatch.setattr(candidates, "run_batches", None)
    model = fit(own_family(), SEQUENCES, work_folder=tmp_path / "work", regressor="ols")
    assert torch.equal(model.stages["large"].W, expected.stages["large"].W)


def test_moments_are_saved_once_a_minute(tmp_path, monkeypatch):
    saved, clock = [], [0.0]
    write = sums.write_whole
    monkeypatch.setattr(sums, "write_whole", lambda *given: (saved.append(clock[0]), write(*given)))
    monkeypatch.setattr(sums.time, "monotonic", lambda: clock[0])

    def slow(more, before):
        clock[0] += 10

    fit(own_family(), SEQUENCES, work_folder=tmp_path / "work", tokens_per_batch=8, progress=slow)
    *during, last = saved
    assert during[0] == 0, "the budget is on disk from the start on"
    assert last == clock[0]
    assert len(during) > 3
    assert min(b - a for a, b in pairwise(during)) >= 60


def begun(folder):
    with pytest.raises(KilledError):
        fit(own_family(), SEQUENCES, work_folder=folder, tokens_per_batch=BUDGET, progress=killed_after(700))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"sequences": ["MKV", *SEQUENCES]},
            "expected the sequences with which the fit in .*work was begun, got others",
        ),
        (
            {"sequences": SEQUENCES[:3]},
            "expected the sequences with which the fit in .*work was begun, got (others|fewer)",
        ),
        ({"sequences": []}, "expected the sequences with which the fit in .*work was begun, got fewer"),
        (
            {"tokens_per_batch": 23},
            "expected tokens_per_batch 24, with which .* was begun, got 23: leave it out",
        ),
        ({"family": "one"}, "expected the levels {'small': 32, 'large': 48}, with which"),
        ({"family": "changed"}, "expected the fingerprint [0-9a-f]+, with which"),
        ({"family": "half"}, "expected the fingerprint [0-9a-f]+, with which"),
    ],
)
def test_a_fit_of_something_else_is_refused(given, message, saving, tmp_path):
    begun(tmp_path / "work")
    family = own_family()
    if given.get("family") == "one":
        del family["large"]
    if given.get("family") == "changed":
        with torch.no_grad():
            family["large"].layers[1].fc1.bias[5] += 1e-3
    if given.get("family") == "half":
        family["large"].bfloat16()
    options = {"tokens_per_batch": given["tokens_per_batch"]} if "tokens_per_batch" in given else {}
    before = (tmp_path / "work" / "moments.safetensors").read_bytes()
    with pytest.raises(ValueError, match=message):
        fit(family, given.get("sequences", SEQUENCES), work_folder=tmp_path / "work", **options)
    assert (tmp_path / "work" / "moments.safetensors").read_bytes() == before


def test_moments_that_do_not_read_are_refused(saving, tmp_path):
    begun(tmp_path / "work")
    path = tmp_path / "work" / "moments.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"expected moments in .*moments.safetensors, got a file that cannot be read: rem"
    ):
        fit(own_family(), SEQUENCES, work_folder=tmp_path / "work")


@pytest.mark.parametrize("sequences", [[], ["M", ""]])
def test_a_fit_of_nothing_leaves_no_folder(sequences, tmp_path):
    with pytest.raises(ValueError, match="expected"):
        fit(own_family(), sequences, work_folder=tmp_path / "work")
    assert not list(tmp_path.iterdir())


def test_a_fit_that_ends_before_its_first_window_leaves_no_folder(saving, tmp_path):
    with pytest.raises(KilledError):
        fit(
            own_family(),
            SEQUENCES,
            work_folder=tmp_path / "work",
            tokens_per_batch=BUDGET,
            progress=killed_after(100),
        )
    assert not list(tmp_path.iterdir())


def test_a_fit_of_nothing_leaves_what_else_is_in_its_folder(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="expected"):
        fit(own_family(), [], work_folder=tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["notes", "thesis.txt"]


def test_two_fits_do_not_share_a_folder(tmp_path):
    def other(more, before):
        with pytest.raises(BlockingIOError, match=r"expected to write .*work alone, got another process"):
            fit(own_family(), SEQUENCES, work_folder=tmp_path / "work")
        raise KilledError

    with pytest.raises(KilledError):
        fit(own_family(), SEQUENCES, work_folder=tmp_path / "work", progress=other)
    fit(own_family(), SEQUENCES, work_folder=tmp_path / "work")
    with pytest.raises(FileNotFoundError, match="expected a folder .*nowhere to write to"):
        fit(own_family(), SEQUENCES, work_folder=tmp_path / "nowhere" / "work")
