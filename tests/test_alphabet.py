"""The alphabet and the batch converter against fair-esm's, which they replace call for call."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from Bio.Seq import MutableSeq, Seq
from esm.data import Alphabet as FairAlphabet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from rd_torch.alphabet import Alphabet
from rd_torch.letters import LETTERS, RESIDUE_LETTERS
from rd_torch.levels import ALPHABET

OURS, THEIRS = Alphabet.from_architecture("ESM-1b"), FairAlphabet.from_architecture("ESM-1b")

WHITESPACE = st.sampled_from([*" \t\n\r\v\f\x1c\x85\u00a0\u2003\u3000", "  ", " \n "])
UNKNOWN = st.sampled_from(
    [*"JjklmO*?1ß\u200b\ufeff", "<", ">", "<ma", "sk>", "<MASK>", "<null_2>", "<m<mask>"]
)
TOKENS = st.sampled_from(THEIRS.all_toks)
KNOWN = st.lists(TOKENS | WHITESPACE, max_size=30).map("".join)
ANYTHING = st.lists(TOKENS | WHITESPACE | UNKNOWN | st.characters(), max_size=20).map("".join) | st.text()
READABLE = LETTERS | set("".join(THEIRS.all_toks))
LENGTHS = st.sampled_from([None, 0, 1, 3, 10, -1])
MANY = settings(max_examples=500, deadline=None)


def outcome(function, *arguments):
    """What comes out, an error by its type, a KeyError with its key too."""
    try:
        result = function(*arguments)
    except Exception as error:
        return type(error), error.args if isinstance(error, KeyError) else None
    if isinstance(result, tuple):
        labels, strings, tokens = result
        assert tokens.is_contiguous()
        return labels, strings, tokens.tolist(), tokens.dtype, tokens.shape
    return result


def converted(batch, length=None):
    """The same batch from both converters."""
    return [outcome(alphabet.get_batch_converter(length), batch) for alphabet in (OURS, THEIRS)]


def test_every_attribute_and_method_is_there():
    assert vars(OURS) == vars(THEIRS)
    assert len(OURS) == len(THEIRS) == 33
    assert {name for name in dir(THEIRS) if not name.startswith("_")} <= set(dir(OURS))
    ours, theirs = (alphabet.get_batch_converter(7) for alphabet in (OURS, THEIRS))
    assert vars(ours) == {"alphabet": OURS, "truncation_seq_length": 7}
    assert vars(ours).keys() == vars(theirs).keys()
    assert OURS.get_batch_converter().truncation_seq_length is None
    assert OURS.get_batch_converter(truncation_seq_length=7).truncation_seq_length == 7


def test_the_shared_alphabet_names_the_residues():
    assert ALPHABET.all_toks == THEIRS.all_toks
    assert RESIDUE_LETTERS == "LAGVSERTIDPKQNFYMHWCXBUZO"
    assert ALPHABET.residue_ranges[0] == (THEIRS.get_idx("L"), THEIRS.get_idx("O")) == (4, 28)


def test_tokens_and_ids_turn_into_each_other():
    for token in [*THEIRS.all_toks, "J", "l", "", "<MASK>", "MK", None]:
        assert OURS.get_idx(token) == THEIRS.get_idx(token)
    for index in range(-34, 35):
        assert outcome(OURS.get_tok, index) == outcome(THEIRS.get_tok, index)
    assert OURS.get_tok(torch.tensor(5)) == THEIRS.get_tok(torch.tensor(5))
    assert OURS.get_tok(ind=5) == OURS.get_tok(OURS.get_idx(tok="A")) == "A"
    assert OURS.to_dict() == THEIRS.to_dict()
    assert OURS.to_dict() is not OURS.tok_to_idx


@MANY
@given(ANYTHING)
def test_any_string_is_parted_as_fair_esm_parts_it(text):
    assert OURS.tokenize(text) == THEIRS.tokenize(text)
    assert outcome(OURS.encode, text) == outcome(THEIRS.encode, text)


@MANY
@given(KNOWN)
def test_strings_of_tokens_and_whitespace_have_fair_esms_ids(text):
    assert OURS.encode(text) == THEIRS.encode(text)


@pytest.mark.parametrize(
    "text",
    [Seq("MK<mask>V"), MutableSeq("MKV"), np.str_("MK V"), "", "  ", "A" * 3000],
    ids=lambda text: type(text).__name__ + str(len(text)),
)
def test_whatever_behaves_as_a_string_is_read(text):
    assert OURS.tokenize(text, unused=1) == THEIRS.tokenize(text, unused=1)
    assert outcome(OURS.encode, text) == outcome(THEIRS.encode, text)
    assert converted([("a", text), ("b", "MK")])[0] == converted([("a", text), ("b", "MK")])[1]


@pytest.mark.parametrize("text", [None, 5, float("nan"), b"MK", ["M", "K"], ("M",)], ids=repr)
def test_what_is_no_string_is_refused_with_the_same_error(text):
    ours, theirs = outcome(OURS.encode, text), outcome(THEIRS.encode, text)
    assert ours == theirs
    assert ours[0] in (AttributeError, TypeError)
    assert converted([("a", text)])[0] == converted([("a", text)])[1] == theirs


@MANY
@given(st.lists(st.tuples(st.text(max_size=3) | st.integers() | st.none(), KNOWN), max_size=5), LENGTHS)
def test_batches_are_those_of_fair_esm(batch, length):
    ours, theirs = converted(batch, length)
    assert ours == theirs


@MANY
@given(st.lists(st.tuples(st.text(max_size=3), ANYTHING), min_size=1, max_size=3), LENGTHS)
def test_batches_at_which_fair_esm_fails_are_read_as_everywhere_here_or_refused(batch, length):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = converted(batch, length)
    if theirs[0] is not KeyError:
        assert ours == theirs
    elif ours[0] is not ValueError:
        signs = {sign for _, text in batch for sign in text if not sign.isspace()}
        assert signs <= READABLE
        spelled = ["".join(map(OURS.get_tok, row[1:])).rpartition("<eos>")[0] for row in ours[2]]
        again = converted([(label, text) for (label, _), text in zip(batch, spelled, strict=True)])
        assert again[1][2] == ours[2]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("mkv", "MKV"),
        ("MKV*", "MKV"),
        ("MK*V", "MKXV"),
        ("MJ", "MX"),
        ("mk-v.", "MK-V."),
        ("m<mask>k*", "M<mask>K"),
    ],
)
@pytest.mark.filterwarnings("ignore:letters that are no residue", "ignore:sequences whose")
def test_letters_at_which_fair_esm_fails_are_read_as_embed_reads_them(text, read):
    assert (
        OURS.get_batch_converter()([("a", text)])[2].tolist()
        == THEIRS.get_batch_converter()([("a", read)])[2].tolist()
    )


def test_changes_are_counted_in_one_warning():
    with pytest.warns(
        UserWarning, match="was dropped: 2; letters that are no residue, read as X: 1"
    ) as caught:
        OURS.get_batch_converter()([("a", "mkv*"), ("b", "MJ*"), ("c", "MK")])
    assert len(caught) == 1


@pytest.mark.parametrize(
    "batch",
    [
        [], (), iter([("a", "M")]), None, [("a",)], [("a", "M", 1)], [("a", "M"), ("b",)], [[]],
        [("a", "M", 1), ("b", "K")], [["a", "M"]], (("a", "M"),), [1],
    ],
    ids=lambda batch: type(batch).__name__ if hasattr(batch, "__next__") else str(batch),
)  # fmt: skip
def test_batches_of_another_form_come_out_alike(batch):
    ours, theirs = converted(batch)
    assert ours == theirs


def test_wrong_input_is_said_in_a_sentence():
    with pytest.raises(ValueError, match="expected at least one pair of label and sequence, got 0 items of"):
        OURS.get_batch_converter()([])
    with pytest.raises(ValueError, match="pair of label and sequence, got 2 items of 3 parts"):
        OURS.get_batch_converter()([("a", "M", 1), ("b", "K", 2)])
    for strings in ("ab", ["aM", "bK"], {"aM": 1, "bK": 2}):  # which fair-esm parts into labels and letters
        with pytest.raises(ValueError, match="expected pairs of label and sequence, got .* of strings"):
            OURS.get_batch_converter()(strings)
    for name in ("ESM-1", "MSA Transformer", "nothing", None):
        with pytest.raises(ValueError, match=r"ESM-2's alphabet, ESM-1b or roberta_large, got .*no other"):
            Alphabet.from_architecture(name)


@pytest.mark.parametrize("name", ["ESM-1b", "roberta_large"])
def test_architectures_of_this_alphabet_are_told_by_name(name):
    assert vars(Alphabet.from_architecture(name)) == vars(FairAlphabet.from_architecture(name))


def test_a_subclass_makes_its_own_kind():
    class Other(Alphabet):
        pass

    assert type(Other.from_architecture("ESM-1b")) is Other


@pytest.mark.parametrize("prepend_bos", [False, True])
@pytest.mark.parametrize("append_eos", [False, True])
def test_special_tokens_are_set_as_the_alphabet_says(prepend_bos, append_eos):
    results = []
    for alphabet in (Alphabet(), FairAlphabet.from_architecture("ESM-1b")):
        alphabet.prepend_bos, alphabet.append_eos = prepend_bos, append_eos
        converter = alphabet.get_batch_converter()
        results.append([outcome(converter, batch) for batch in ([("a", "MKV"), ("b", "")], [("a", "")])])
    assert results[0] == results[1]


def test_copies_and_pickles_do_the_same():
    batch = [("a", "MK<mask>"), ("b", "V")]
    converter = OURS.get_batch_converter(2)
    for again in (copy.deepcopy(converter), pickle.loads(pickle.dumps(converter)), copy.copy(converter)):
        assert outcome(again, batch) == outcome(converter, batch)
        assert vars(again.alphabet) == vars(OURS)
    for again in (copy.deepcopy(OURS), pickle.loads(pickle.dumps(OURS))):
        assert vars(again) == vars(OURS)
        assert again.unique_no_split_tokens is again.all_toks


def test_a_data_loader_collates_with_it_in_other_processes():
    proteins = [("a", "MKV"), ("b", "M<mask>"), ("c", "")]
    converter = OURS.get_batch_converter()
    options = {"batch_size": 2, "collate_fn": converter, "num_workers": 1, "multiprocessing_context": "spawn"}
    batches = [outcome(lambda batch=batch: tuple(batch)) for batch in DataLoader(proteins, **options)]
    assert batches == [outcome(converter, proteins[:2]), outcome(converter, proteins[2:])]


def test_tokens_are_made_on_the_default_device():
    with torch.device("meta"):
        tokens = [alphabet.get_batch_converter()([("a", "MKV")])[2] for alphabet in (OURS, THEIRS)]
    assert {batch.device.type for batch in tokens} == {"meta"}
