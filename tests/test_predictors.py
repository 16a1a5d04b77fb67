"""Predictors: tables read or refused, splits that similar sequences do not cross, folders, predictions."""

import json
import random
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from helpers import tiny_model

import rd_torch
from rd_torch import Learned, RDModel, learn
from rd_torch.cli import main
from rd_torch.learning import group_similar, read_examples, split_sequences
from rd_torch.learning import teaching as job

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def proteins(count, length=40, seed=0):
    draw = random.Random(seed)
    return ["".join(draw.choices(LETTERS, k=length + draw.randrange(9))) for _ in range(count)]


def mutate(sequence, changes, seed=0):
    draw, letters = random.Random(seed), list(sequence)
    for place in draw.sample(range(len(letters)), changes):
        letters[place] = draw.choice(LETTERS)
    return "".join(letters)


COUNT = 240
SEQUENCES = proteins(COUNT)


@pytest.fixture(scope="module")
def mini():
    return RDModel.from_pretrained("esm2-rd-mini")


@pytest.fixture(scope="module")
def vectors(mini):
    return rd_torch.embed(mini, SEQUENCES)


def table_of(labels, **columns):
    return {"sequence": SEQUENCES[: len(labels)], "y": list(labels), **columns}


@pytest.fixture(scope="module")
def middle(mini, vectors):
    """A predictor of what the first 48 features know and the first 32 do not, and its labels."""
    labels = with_signal_between(vectors, 32, 48)
    return learn(table_of(labels), "y", model=mini, name="esm2-rd-mini"), labels


def with_signal_between(vectors, start, end):
    """Labels that features from `start` to `end` give, without what those before them know."""
    block, before = vectors[:, start : start + 4].astype(float), vectors[:, :start].astype(float)
    assert start + 4 <= end
    signal = (block - block.mean(0)) @ np.random.default_rng(0).normal(size=4)
    if start:
        known = np.c_[before - before.mean(0)]
        signal = signal - known @ np.linalg.lstsq(known, signal, rcond=None)[0]
    return 50 + 5 * signal / signal.std()


@pytest.mark.parametrize(("start", "end"), [(0, 32), (32, 48), (64, 128)])
def test_a_signal_in_a_block_of_a_chain_is_found_at_its_level(mini, vectors, start, end):
    labels = with_signal_between(vectors, start, end)
    findings = learn(table_of(labels), "y", model=mini).findings
    assert findings.width == end
    assert findings.level == mini.config.levels_for(end)[-1]
    assert findings.chosen.score > 0.5
    assert all(row.high < 0.5 for row in findings.widths if row.width < end)


def test_shuffled_labels_predict_nothing_and_that_is_said(mini, middle):
    labels = np.random.default_rng(0).permutation(middle[1])
    with pytest.warns(
        UserWarning, match="the embeddings predict little of y, or nothing: the R\\^2 is .* guessing is 0.00"
    ):
        findings = learn(table_of(labels), "y", model=mini).findings
    assert findings.score < 0.1


def test_a_saved_predictor_gives_the_same_numbers(middle, mini, tmp_path):
    learned, _ = middle
    learned.save(tmp_path / "predictor")
    again = Learned.load(tmp_path / "predictor")
    new = proteins(7, seed=1)
    assert list(again.predict(new)) == list(learned.predict(new, model=mini))
    assert again.findings == learned.findings
    names = {path.name for path in (tmp_path / "predictor").iterdir()}
    assert names == {"config.json", "head.safetensors", "README.md", "widths.tsv", "widths.png"}
    assert b"pickle" not in (tmp_path / "predictor" / "head.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="expected nothing at"):
        learned.save(tmp_path / "predictor")


def test_only_backbones_that_the_width_needs_are_loaded_and_run(middle, mini, monkeypatch):
    learned, _ = middle
    assert learned.findings.width == 48
    assert list(learned.load_model().config.widths) == ["28K", "90K"]
    for name in ("207K", "1M"):
        monkeypatch.setattr(mini.backbones[name], "forward", lambda *_, **__: pytest.fail("a backbone ran"))
    assert len(list(learned.predict(SEQUENCES[:3], model=mini))) == 3


def test_predictions_are_those_of_the_embedding_and_have_intervals(middle, vectors):
    learned, labels = middle
    assert learned.findings.spearman > 0.8
    found = list(learned.predict(SEQUENCES))
    expected = learned.head(vectors[:, :48].astype(np.float64))[:, 0]
    np.testing.assert_allclose([each.value for each in found], expected, atol=1e-4)
    assert [each.identifier for each in found] == [str(number) for number in range(1, COUNT + 1)]
    inside = [each.low <= label <= each.high for each, label in zip(found, labels, strict=True)]
    assert np.mean(inside) >= 0.9
    named = list(learned.predict([("P1", SEQUENCES[0])]))
    assert (named[0].identifier, named[0].value) == ("P1", pytest.approx(found[0].value))


def test_intervals_hold_nine_of_ten_proteins_that_never_taught(mini):
    sequences = proteins(400, seed=5)
    vectors = rd_torch.embed(mini, sequences, width=32)
    labels = vectors @ np.random.default_rng(0).normal(size=32)
    labels = labels / labels.std() + np.random.default_rng(1).normal(size=400)
    learned = learn({"sequence": sequences[:200], "y": labels[:200]}, "y", model=mini, widths=[32])
    found = learned.predict(sequences[200:], model=mini)
    inside = [each.low <= label <= each.high for each, label in zip(found, labels[200:], strict=True)]
    assert 0.84 <= np.mean(inside) <= 0.96


def test_another_chain_is_refused(middle, tmp_path):
    learned, _ = middle
    with pytest.raises(ValueError, match="expected level to be one of 'a', 'b'"):
        list(learned.predict(["MKV"], model=tiny_model()))
    other = RDModel.from_pretrained("esm2-rd-mini")
    with torch.no_grad():
        next(other.backbones["28K"].parameters()).add_(1)
    with pytest.raises(
        ValueError, match="expected the chain that was learnt on, esm2-rd-mini, .*got another"
    ):
        list(learned.predict(["MKV"], model=other))


def test_folders_that_are_no_predictor_are_refused(middle, tmp_path):
    learned, _ = middle
    with pytest.raises(FileNotFoundError, match="expected a predictor at"):
        Learned.load(tmp_path)
    learned.save(tmp_path / "one")
    config = tmp_path / "one" / "config.json"
    kept = config.read_text()
    config.write_text(json.dumps(json.loads(kept) | {"format": 2}))
    with pytest.raises(ValueError, match="expected a predictor of format 1 .*, got .*format 2"):
        Learned.load(tmp_path / "one")
    config.write_text(json.dumps(json.loads(kept) | {"classes": ["a", "b", "c"]}))
    with pytest.raises(ValueError, match="expected finite tensors that fit config.json"):
        Learned.load(tmp_path / "one")
    config.write_text(kept)
    (tmp_path / "one" / "head.safetensors").write_bytes(b"\x80\x04K\x01.")  # a pickle
    with pytest.raises(ValueError, match="expected the head of a predictor"):
        Learned.load(tmp_path / "one")


def test_classes_come_with_probabilities_and_with_how_often_they_were_right(mini, vectors, tmp_path):
    labels = np.where(vectors[:, 3] > np.median(vectors[:, 3]), "in", "out")
    learned = learn(table_of(labels), "y", model=mini)
    assert learned.findings.classes == ["in", "out"]
    found = list(learned.predict(SEQUENCES, model=mini))
    assert np.mean([each.value == label for each, label in zip(found, labels, strict=True)]) > 0.9
    assert all(sum(each.probabilities.values()) == pytest.approx(1) for each in found)
    assert {each.right for each in found} <= set(learned.findings.right)
    assert learned.findings.confidences == sorted(learned.findings.confidences)


def test_several_labels_a_protein(mini, vectors):
    names = np.array(["", "metal", "zinc"])
    signs = (vectors[:, [3, 5]] > np.median(vectors[:, [3, 5]], axis=0)) * [1, 2]
    labels = [";".join(sorted(set(names[row]) - {""})) for row in signs]
    learned = learn(table_of(labels), "y", model=mini, task="multilabel", widths=[32])
    assert learned.findings.classes == ["metal", "zinc"]
    assert learned.findings.score > 0.2
    found = list(learned.predict(SEQUENCES, model=mini))
    assert np.mean([";".join(each.value) == label for each, label in zip(found, labels, strict=True)]) > 0.7


def test_residues_are_predicted_each(mini, tmp_path):
    states = ["".join("H" if letter in "AEKLMQR" else "C" for letter in each) for each in SEQUENCES]
    states = ["-" + each[1:] for each in states]
    learned = learn(table_of(states), "y", tmp_path / "states", model=mini, per_residue=True, widths=[32])
    assert learned.findings.score > 0.9
    assert learned.findings.rows == sum(map(len, SEQUENCES)) - len(SEQUENCES)
    found = list(learned.predict([SEQUENCES[0]], model=mini))
    assert [each.position for each in found] == list(range(1, len(SEQUENCES[0]) + 1))
    right = [each.value == state for each, state in zip(found[1:], states[0][1:], strict=True)]
    assert np.mean(right) > 0.9


def test_numbers_of_residues_are_predicted_each(mini):
    numbers = [" ".join(str(LETTERS.index(letter)) for letter in each) for each in SEQUENCES]
    learned = learn(table_of(numbers), "y", model=mini, per_residue=True, widths=[32])
    assert learned.findings.task == "regression"
    assert learned.findings.score > 0.5


def test_a_kill_loses_no_embedding(mini, tmp_path, monkeypatch, middle):
    embedded = []
    embed_to_store = rd_torch.learning.vectors.embed_to_store

    def counting(*arguments, progress, **options):
        return embed_to_store(*arguments, progress=lambda n, before: embedded.append((n, before)), **options)

    monkeypatch.setattr("rd_torch.learning.vectors.embed_to_store", counting)
    with monkeypatch.context() as patch:
        patch.setattr(job, "select", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            learn(table_of(middle[1]), "y", tmp_path / "out", model=mini)
    assert not (tmp_path / "out").exists()
    embedded.clear()
    learned = learn(table_of(middle[1]), "y", tmp_path / "out", model=mini, name="esm2-rd-mini")
    assert all(before for _, before in embedded)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    np.testing.assert_allclose(
        learned.head.tensors["weights"], middle[0].head.tensors["weights"], rtol=0, atol=1e-9
    )


def test_similar_sequences_are_in_one_group_and_others_are_not():
    families = proteins(30, length=200, seed=3)
    members = [mutate(each, 40, seed) for each in families for seed in range(4)]
    numbers = group_similar([*members, members[0]]).numbers
    assert numbers[-1] == numbers[0]
    by_family = numbers[:-1].reshape(30, 4)
    assert (by_family == by_family[:, :1]).all()
    assert len(set(by_family[:, 0])) == 30


def test_chains_of_similar_sequences_are_one_group():
    walk = [proteins(1, length=200)[0]]
    for seed in range(12):
        walk.append(mutate(walk[-1], 40, seed))
    assert len(set(group_similar([*walk, *proteins(5, 200, seed=9)]).numbers)) == 6


def test_peptides_that_differ_in_the_middle_are_similar():
    numbers = group_similar(["GILGFVFTL", "GILGKVFTL", "NLVPMVATV", "CINGVCWTV"]).numbers
    assert numbers[0] == numbers[1]
    assert len(set(numbers)) == 3


def test_folds_keep_groups_whole_and_are_of_equal_size():
    families = proteins(40, length=200, seed=3)
    sequences = [mutate(each, 30, seed) for each in families for seed in range(3)]
    split = split_sequences(sequences)
    assert "shared words of 5 residues" in split.how
    assert (split.folds.reshape(40, 3) == split.folds.reshape(40, 3)[:, :1]).all()
    assert np.bincount(split.folds).tolist() == [24] * 5
    classes = np.repeat(np.arange(40) % 2, 3)
    by_class = split_sequences(sequences, classes=classes)
    assert all(np.bincount(classes[by_class.folds == fold]).tolist() == [12, 12] for fold in range(5))


def test_variants_of_one_protein_are_split_at_random_and_that_is_said():
    sequences = [mutate(SEQUENCES[0], 2, seed) for seed in range(60)]
    with pytest.warns(UserWarning, match="as variants of one protein are: folds are drawn at random"):
        split = split_sequences([*sequences, sequences[0]])
    assert "at random" in split.how
    assert split.folds[-1] == split.folds[0]


def test_a_leak_between_train_and_test_is_caught():
    sequences = proteins(60, length=100)
    cells = ["train"] * 40 + ["test"] * 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = split_sequences(sequences, cells)
    assert (split.folds >= 0).tolist() == [True] * 40 + [False] * 20
    similar = [*sequences[:-1], mutate(sequences[0], 20)]
    with pytest.warns(UserWarning, match="1 sequences of the test set are similar to one that teaches"):
        split_sequences(similar, cells)
    equal = [*sequences[:-1], sequences[0]]
    with pytest.raises(ValueError, match="got 1 that stand in several, the first in train and test"):
        split_sequences(equal, cells)


def test_fold_columns_of_proteingym_are_taken_as_they_are(mini, middle):
    folds = np.arange(COUNT) % 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learned = learn(
            table_of(middle[1], fold_random_5=folds), "y", model=mini, split_column="fold_random_5"
        )
    assert learned.findings.split == "the folds are those of the split column"
    assert learned.findings.width == 48
    sequences = [mutate(SEQUENCES[0], 2, seed) for seed in range(60)]
    with pytest.warns(UserWarning, match="60 sequences are similar to one in another fold"):
        split_sequences(sequences, [str(k % 5) for k in range(60)])


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["train"] * 60, "expected sequences that teach and a test set, got 60 of 'train' alone"),
        (["a", "b"] * 30, "expected train and test, or 3 to 20 names of folds"),
        ([str(k) for k in range(60)], "expected train and test, or 3 to 20 names of folds"),
        (["test", "0", "1", "2"] * 15, "expected train and test, or 3 to 20 names of folds"),
        (["train", ""] * 30, "expected a set or a fold for each sequence, got none for number 2"),
    ],
)
def test_split_columns_that_say_something_else_are_refused(cells, message):
    with pytest.raises(ValueError, match=message):
        split_sequences(proteins(60), cells)


def test_a_test_set_judges_and_does_not_teach(mini, middle):
    labels = middle[1].copy()
    cells = ["train"] * 180 + ["test"] * 60
    learned = learn(table_of(labels, set=cells), "y", model=mini, split_column="set")
    assert learned.findings.sequences == 180
    assert learned.findings.chosen.test > 0.5
    labels[180:] = np.random.default_rng(0).permutation(labels[180:]) + 100
    other = learn(table_of(labels, set=cells), "y", model=mini, split_column="set")
    assert np.array_equal(other.head.tensors["weights"], learned.head.tensors["weights"])
    assert other.findings.score == learned.findings.score
    assert other.findings.chosen.test < 0


GOOD = [f"{k / 7:.3f}" for k in range(30)]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["1.5"] * 30, {}, "expected numbers that differ in 'y' of the table, got 1.5 alone"),
        ([*GOOD[:29], "inf"], {}, "expected finite numbers in 'y' of the table, got 'inf' \\(line 30\\)"),
        ([*GOOD[:29], "high"], {}, "expected numbers in 'y' of the table, got 'high' \\(line 30\\)"),
        (["in"] * 30, {}, "expected 2 to 100 classes, each of 5 sequences or more, got 30 of 'in'"),
        (["in"] * 27 + ["out"] * 3, {}, "got 3 of 'out' among 2 in 'y'"),
        (GOOD[:9], {}, "expected 10 labelled sequences or more, got 9"),
        (GOOD, {"head": "logistic"}, "expected the head for regression to be one of 'ridge', 'mlp'"),
        (GOOD, {"task": "ranking"}, "expected task to be one of 'regression'"),
        (GOOD, {"task": "ranking", "per_residue": True}, "expected task to be one of 'regression'"),
        (GOOD, {"widths": [200]}, "expected a width from 1 to 128"),
        (GOOD, {"pool": "none"}, "expected a pool that gives a vector a sequence, got 'none'"),
        (GOOD, {"sequence_column": "seq"}, "expected a column 'seq', got 'sequence', 'y' in the table"),
        (GOOD, {"split_column": "set"}, "expected a column 'set', got 'sequence', 'y' in the table"),
        (GOOD, {"per_residue": True}, "expected a label for each of 46 residues in 'y' of the table, got 5"),
        (["a;b"] * 30, {"task": "multilabel"}, "expected a label that 5 sequences or more have"),
    ],
)
def test_labels_and_options_that_do_not_serve_are_refused(mini, labels, options, message):
    with pytest.raises(ValueError, match=message):
        learn(table_of(labels), "y", model=mini, **options)
    with pytest.raises(TypeError, match="expected options among task, head"):
        learn(table_of(labels), "y", model=mini, nothing=1)


def test_a_class_of_one_family_cannot_be_scored(mini):
    family = [mutate(proteins(1, 200, seed=8)[0], 40, seed) for seed in range(20)]
    sequences = [*proteins(60, 200), *family]
    table = {"sequence": sequences, "y": ["in"] * 60 + ["out"] * 20}
    with pytest.raises(ValueError, match="expected each class in 3 folds or more, got 'out' in 1"):
        learn(table, "y", model=mini)


def test_rows_without_a_label_are_left_out_and_counted():
    labels = [1.0, None, float("nan"), *range(3, 30)]
    with pytest.warns(UserWarning, match="rows without a label, left out: 2"):
        examples = read_examples(pd.DataFrame(table_of(labels)), "y")
    assert examples.labels == [1.0, *range(3, 30)]
    assert examples.sequences == [SEQUENCES[0], *SEQUENCES[3:30]]
    with pytest.warns(UserWarning, match="2 different numbers, which are taken as numbers"):
        read_examples(table_of([0, 1] * 15), "y")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".csv.gz"])
def test_tables_of_every_kind_are_read_alike(tmp_path, suffix):
    frame = pd.DataFrame(table_of([float(label) for label in GOOD], name=[f"p{k}" for k in range(30)]))
    path = tmp_path / f"table{suffix}"
    if suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    examples, expected = read_examples(path, "y"), read_examples(frame, "y")
    assert examples.sequences == expected.sequences
    assert examples.labels == expected.labels
    assert examples.checksum == expected.checksum


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sequence,y\nMKV,1\nMK7,2\n" + "MKV,1\n" * 9, "got '7' at position 3 \\(line 3 of"),
        ("sequence,y\nMKV\n", "expected 2 columns, as in the header row, got 1 \\(line 2"),
        ("sequence,sequence\nMKV,1\n", "expected a table whose columns have different names"),
        ("just a line\n", "expected a table with commas, tabs or semicolons"),
        ("a,y\nfoo,1\n", "expected one column of sequences, got 'a'"),
    ],
)
def test_tables_that_are_none_are_refused(tmp_path, text, message):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_examples(path, "y")
    with pytest.raises(FileNotFoundError, match="expected a table at"):
        read_examples(tmp_path / "none.csv", "y")


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_commands_learn_and_predict(tmp_path, middle, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pd.DataFrame(table_of(middle[1])).to_csv("table.csv", index=False)
    result = run("learn", "table.csv", "--target", "y", "-o", "predictor")
    assert result.exit_code == 0, result.output
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert lines[0] == ["level", "width", "R^2", "from", "to", "penalty", "chosen"]
    assert [line[-1] for line in lines[1:]] == ["", "yes", "", ""]
    assert "backbones beyond 90K need not run" in result.stderr
    assert f", Spearman's correlation {middle[0].findings.spearman:.3f}. Split" in result.stderr
    assert Learned.load("predictor").findings.score == middle[0].findings.score
    (tmp_path / "new.fasta").write_text(f">one\n{SEQUENCES[0]}\n>two\nM7\n>three\n{SEQUENCES[1]}\n")
    result = run("predict", "new.fasta", "--predictor", "predictor", "-o", "out.tsv")
    assert result.exit_code == 3
    assert "level 90K, width 48" in result.stderr
    rows = [line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines()]
    assert rows[0] == ["identifier", "y", "low", "high"]
    expected = [each.value for each in middle[0].predict(SEQUENCES[:2])]
    assert [float(row[1]) for row in rows[1:]] == pytest.approx(expected, abs=1e-3)
    assert "two" in (tmp_path / "out.tsv.failed.tsv").read_text()
    assert not (tmp_path / "out.tsv.part").exists()
    again = run("learn", "table.csv", "--target", "y", "-o", "predictor")
    assert again.exit_code == 1
    assert "Error: expected nothing at predictor, got something" in again.output


def test_the_commands_of_classes_and_residues(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    states = ["".join("H" if letter in "AEKLMQR" else "C" for letter in each) for each in SEQUENCES]
    few = {"sequence": SEQUENCES[:40], "y": states[:40]}
    pd.DataFrame(few).to_csv("table.csv", index=False)
    options = ["--target", "y", "--per-residue", "--widths", "32,48", "-o", "states"]
    assert run("learn", "table.csv", *options).exit_code == 0
    (tmp_path / "new.fasta").write_text(f">one\n{SEQUENCES[0]}\n")
    assert run("predict", "new.fasta", "--predictor", "states", "-o", "out.tsv").exit_code == 0
    rows = [line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines()]
    assert rows[0] == ["identifier", "position", "y", "right", "p(C)", "p(H)"]
    assert "".join(row[2] for row in rows[1:]).count("H") > 10
    wrong = run("learn", "table.csv", "--target", "y", "--widths", "a", "-o", "other")
    assert "Error: expected --widths as numbers with commas between them, got 'a'" in wrong.output


def test_unrelated_proteins_of_any_length_are_not_similar_by_chance():
    sequences = [*proteins(150, length=300, seed=11), *proteins(5, length=9_000, seed=12)]
    assert group_similar(sequences).sizes.max() == 1


def test_a_higher_identity_is_taken_where_one_group_would_be_too_large():
    near = [mutate(each, 20, seed) for each in proteins(2, 200, seed=3) for seed in range(10)]
    bridge = near[0][:100] + near[10][100:]
    assert group_similar([*near, bridge]).sizes.max() == 21
    groups = group_similar([*near, bridge], 0.6)
    assert groups.sizes.max() <= 11
    assert "50%" not in groups.how


def test_mmseqs_is_taken_where_it_is_installed(tmp_path, monkeypatch):
    program = tmp_path / "mmseqs"
    program.write_text(
        "#!/bin/sh\n[ $1 = easy-cluster ] && [ $6 = 0.3 ] || exit 1\n"
        "printf '1\\t0\\n1\\t1\\n2\\t2\\n' > out_cluster.tsv\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    groups = group_similar(["MKV", "AAA", "MKL", "MKV"])
    assert groups.how == "by MMseqs2 at 30% identity"
    by_sequence = dict(zip(["MKV", "AAA", "MKL", "MKV"], groups.numbers.tolist(), strict=True))
    assert by_sequence["AAA"] == by_sequence["MKL"] != by_sequence["MKV"]  # numbers 0 and 1 of those in order
    program.write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    with pytest.raises(RuntimeError, match="expected MMseqs2 to group the sequences, got: broken"):
        group_similar(["MKV", "AAA"])


def test_tables_of_proteingym_are_read_as_they_are(tmp_path, middle):
    folds = [f"fold_{kind}_5" for kind in ("random", "modulo", "contiguous")]
    frame = pd.DataFrame(
        {
            "mutant": [f"A{k}G" for k in range(1, COUNT + 1)],
            "mutated_sequence": SEQUENCES,
            "DMS_score": middle[1],
            "DMS_score_bin": (middle[1] > 50).astype(int),
        }
        | {name: np.arange(COUNT) // 2 % 5 for name in folds}
    )
    frame.to_csv(tmp_path / "assay.csv", index=False)
    examples = read_examples(tmp_path / "assay.csv", "DMS_score", split_column="fold_modulo_5")
    assert examples.sequences == SEQUENCES
    assert examples.split[:6] == ["0", "0", "1", "1", "2", "2"]
    np.testing.assert_allclose(examples.labels, middle[1])
