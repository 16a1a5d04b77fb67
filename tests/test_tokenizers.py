"""Tokenizers of transformers' in the place of an alphabet."""

import copy
import pickle

import pytest
import torch
from foreign import (
    bert_tokenizer,
    bpe_tokenizer,
    esm_tokenizer,
    fast_tokenizer,
    gpt_tokenizer,
    kmer_tokenizer,
    t5_tokenizer,
    tokenizers,
    transformers,
)

from rd_torch.backbone import TokenizerAlphabet, is_real, is_residue, tokenize
from rd_torch.backbone.tokens import find_difference
from rd_torch.letters import RESIDUE_LETTERS
from rd_torch.levels import ALPHABET

PROTEINS = ["MQIFVKTLTGK", "M", "XBUZOLAGV"]
GENES = ["ACGTTGCAAGCTA", "A", "NACGNT"]


@pytest.fixture
def made(tmp_path):
    """Tokenizers by shape, each with sequences, as its own code wants them, and numbers of tokens around."""
    spaced = [" ".join(each) for each in PROTEINS]
    return {
        "bert": (bert_tokenizer(tmp_path / "bert"), PROTEINS, spaced, (1, 1)),
        "t5": (t5_tokenizer(), PROTEINS, spaced, (0, 1)),
        "esm": (esm_tokenizer(tmp_path / "esm"), PROTEINS, PROTEINS, (1, 1)),
        "kmers": (kmer_tokenizer(tmp_path / "kmers"), GENES, GENES, (1, 0)),
        "bpe": (bpe_tokenizer(letters="ACGTN"), GENES, GENES, (1, 1)),
        "bytes": (transformers.ByT5Tokenizer(), PROTEINS, PROTEINS, (0, 1)),
        "gpt": (gpt_tokenizer(), PROTEINS, PROTEINS, (0, 0)),
    }


SHAPES = ("bert", "t5", "esm", "kmers", "bpe", "bytes", "gpt")


@pytest.mark.parametrize("shape", SHAPES)
def test_ids_are_the_tokenizers_own(made, shape):
    tokenizer, sequences, texts, _ = made[shape]
    alphabet = TokenizerAlphabet(tokenizer)
    expected = [tokenizer(text)["input_ids"] for text in texts]
    assert [alphabet.ids_of(sequence) for sequence in sequences] == expected
    tokens = tokenize(sequences, alphabet)
    assert [
        row[real].tolist() for row, real in zip(tokens, is_real(tokens, alphabet), strict=True)
    ] == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_residues_are_what_is_not_special(made, shape):
    tokenizer, sequences, texts, (before, after) = made[shape]
    alphabet = TokenizerAlphabet(tokenizer)
    assert (alphabet.prepend_bos, alphabet.append_eos) == (bool(before), bool(after))
    tokens = tokenize(sequences, alphabet)
    inner = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    expected = torch.zeros_like(tokens, dtype=torch.bool)
    for row, ids in zip(expected, inner, strict=True):
        row[before : before + len(ids)] = True
    assert torch.equal(is_residue(tokens, alphabet), expected)
    per_letter = {"bert", "t5", "esm", "bytes"}
    assert alphabet.is_per_letter == (shape in per_letter)
    if alphabet.is_per_letter:
        assert [len(ids) for ids in inner] == [len(sequence) for sequence in sequences]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_batch_converter_gives_the_same_ids(made, shape):
    tokenizer, sequences, *_ = made[shape]
    alphabet = TokenizerAlphabet(tokenizer)
    labels, strings, tokens = alphabet.get_batch_converter()(list(zip("abc", sequences, strict=True)))
    assert (labels, strings) == (["a", "b", "c"], sequences)
    assert torch.equal(tokens, tokenize(sequences, alphabet))
    short = alphabet.get_batch_converter(truncation_seq_length=2)([("a", sequences[0])])[2]
    assert short.shape[1] == 2 + alphabet.prepend_bos + alphabet.append_eos


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_are_the_same(made, shape, copied):
    alphabet = TokenizerAlphabet(made[shape][0])
    again = copied(alphabet)
    assert find_difference(alphabet, again) is None
    assert again.digest == alphabet.digest
    assert (again.kind, again.residue_ranges) == (alphabet.kind, alphabet.residue_ranges)
    lower = [("a", made[shape][1][0].lower())]
    assert torch.equal(alphabet.get_batch_converter()(lower)[2], again.get_batch_converter()(lower)[2])


@pytest.mark.parametrize("shape", ["bert", "t5", "bytes", "gpt"])
def test_strings_are_read_as_at_every_door(made, shape):
    tokenizer, *_ = made[shape]
    alphabet = TokenizerAlphabet(tokenizer)
    converter = alphabet.get_batch_converter()
    with pytest.warns(UserWarning, match="dropped: 1; letters that are no residue, read as X: 2"):
        tokens = converter([("a", "mkv*"), ("b", "M K\nV"), ("c", "MJKV"), ("d", "M*V")])[2]
    expected = tokenize(["MKV", "MKV", "MXKV", "MXV"], alphabet)
    assert torch.equal(tokens, expected)
    if shape != "bytes":  # for which every character is a token
        with pytest.warns(UserWarning, match="read as X: 2"):
            assert torch.equal(converter([("a", "M-.V")])[2], tokenize(["MXXV"], alphabet))
    with pytest.raises(ValueError, match="expected letters, '-', '.' or '\\*', got '1' at position 2 of"):
        converter([("a", "M1")])
    with pytest.raises(ValueError, match="expected the sequence of a protein, got 48 letters"):
        converter([("a", "acgtta" * 8)])


def test_a_mark_by_itself_is_no_residue():
    """As byte-level tokenizers put it before the first letter, where they have no token of both."""
    names = {name: index for index, name in enumerate(["<pad>", "</s>", "<unk>", "Ġ", *RESIDUE_LETTERS])}
    prepare = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = TokenizerAlphabet(
        fast_tokenizer(tokenizers.models.BPE(names, []), after="</s>", prepare=prepare, add_prefix_space=True)
    )
    ids = alphabet.ids_of("MKV")
    assert [alphabet.get_tok(index) for index in ids] == ["Ġ", "M", "K", "V", "</s>"]
    assert is_residue(torch.tensor([ids]), alphabet).tolist() == [[False, True, True, True, False]]


def test_masks_are_tokens_where_there_are_any(made):
    tokenizer, *_ = made["bert"]
    alphabet = TokenizerAlphabet(tokenizer)
    tokens = alphabet.get_batch_converter()([("a", "MK[MASK]V")])[2]
    assert tokens.tolist() == [tokenizer("M K [MASK] V")["input_ids"]]
    assert alphabet.mask_idx == tokenizer.mask_token_id
    assert is_residue(tokens, alphabet).tolist() == [[False, True, True, False, True, False]]
    assert alphabet.tokenize("MK[MASK]V") == ["M", "K", "[MASK]", "V"]
    assert TokenizerAlphabet(made["t5"][0]).mask_idx is None


def test_esms_tokenizer_is_esm2s_alphabet(made):
    alphabet = TokenizerAlphabet(made["esm"][0])
    assert find_difference(alphabet, ALPHABET) is find_difference(ALPHABET, alphabet) is None
    for name in (
        "all_toks", "tok_to_idx", "padding_idx", "cls_idx", "eos_idx", "mask_idx", "unk_idx", "prepend_bos",
        "append_eos", "residue_ranges", "gaps", "kind", "is_per_letter",
    ):  # fmt: skip
        assert getattr(alphabet, name) == getattr(ALPHABET, name), name
    batch = [("a", "MK<mask>V-A.X"), ("b", "mkjv"), ("c", "M K")]
    with pytest.warns(UserWarning, match="read as X: 1"):
        assert torch.equal(alphabet.get_batch_converter()(batch)[2], ALPHABET.get_batch_converter()(batch)[2])


def test_alphabets_that_differ_are_told_apart(made):
    alphabets = {shape: TokenizerAlphabet(tokenizer) for shape, (tokenizer, *_) in made.items()}
    for one, first in alphabets.items():
        for two, second in alphabets.items():
            assert (find_difference(first, second) is None) == (one == two)
    assert len({each.digest for each in alphabets.values()}) == len(alphabets)


def test_nucleic_acids_are_read_as_such(made):
    for shape in ("kmers", "bpe"):
        alphabet = TokenizerAlphabet(made[shape][0])
        assert alphabet.kind.name == "DNA"
        converter = alphabet.get_batch_converter()
        with pytest.warns(UserWarning, match="no nucleotide, read as N: 2"):
            tokens = converter([("a", "acgu" * 12), ("b", "ACRYT")])[2]
        assert torch.equal(tokens, tokenize(["ACGT" * 12, "ACNNT"], alphabet))
        with pytest.raises(
            ValueError, match="expected the sequence of DNA, got 'F' at position 3, which stands"
        ):
            converter([("a", "MKFV")])
    rna = TokenizerAlphabet(bpe_tokenizer(letters="ACGUN", merges=[("A", "C")]))
    assert rna.kind.name == "RNA"
    assert torch.equal(rna.get_batch_converter()([("a", "ACGT")])[2], tokenize(["ACGU"], rna))


def test_what_is_stored_of_truncation_and_padding_does_not_count(tmp_path):
    tokenizer = bert_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=12)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    alphabet = TokenizerAlphabet(again)
    assert len(alphabet.ids_of("MQIFVKTL")) == 10
    assert len(alphabet.ids_of("MQ")) == 4


def unigram(letters, *, alone=True, between="▁"):
    """A tokenizer that knows some letters behind the mark of a word, and the mark itself."""
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", -9.0),
        *((f"{between}{each}", -2.0) for each in letters),
    ]
    pieces += [("▁", -3.0)] if alone else []
    prepare = tokenizers.pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    return fast_tokenizer(tokenizers.models.Unigram(pieces, unk_id=2), after="</s>", prepare=prepare)


def test_letters_of_several_tokens_become_x():
    """Else one letter more, as in U and the mark before it, would move all rows behind it."""
    alphabet = TokenizerAlphabet(unigram(RESIDUE_LETTERS[:21]))  # up to X, and none of BUZO
    assert alphabet.is_per_letter
    assert alphabet.ids_of("MUB") == alphabet.ids_of("MXX")
    assert len(alphabet.ids_of("MUB")) == 4


def test_letters_that_would_be_lost_become_x_or_are_refused():
    letters = RESIDUE_LETTERS[:21]
    model = {name: index for index, name in enumerate(["<pad>", "</s>", *letters])}
    alphabet = TokenizerAlphabet(fast_tokenizer(tokenizers.models.BPE(model, []), unk_token=None))
    assert alphabet.ids_of("MUB") == alphabet.ids_of("MXX")
    assert alphabet.is_per_letter
    model.pop("X")
    model = {name: index for index, name in enumerate(model)}
    with pytest.raises(
        ValueError, match=r"expected a tokenizer with a token for each letter, or for X.*loses B, O"
    ):
        TokenizerAlphabet(fast_tokenizer(tokenizers.models.BPE(model, []), unk_token=None))


def test_unknown_letters_are_not_taken_for_padding():
    """Where one token stands for both, as in GPT-2's in use for proteins, their rows would vanish."""
    end, letters = "<|endoftext|>", RESIDUE_LETTERS[:21]
    names = {name: index for index, name in enumerate([end, *letters])}
    options = dict.fromkeys(("pad_token", "unk_token", "eos_token"), end)
    alphabet = TokenizerAlphabet(fast_tokenizer(tokenizers.models.BPE(names, [], unk_token=end), **options))
    assert alphabet.ids_of("MUB") == alphabet.ids_of("MXX")
    names = {name: index for index, name in enumerate([end, *letters[:20]])}
    with pytest.raises(ValueError, match="which loses B, O, U, X, Z"):
        TokenizerAlphabet(fast_tokenizer(tokenizers.models.BPE(names, [], unk_token=end), **options))


def test_bytes_of_unknown_letters_are_no_letters():
    """Without spaces this tokenizer spells letters as bytes, with spaces it knows them."""
    names = [(f"<0x{byte:02X}>", -5.0) for byte in range(256)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *names]
    pieces += [(f"▁{each}", -2.0) for each in RESIDUE_LETTERS]
    prepare = tokenizers.pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    model = tokenizers.models.Unigram(pieces, unk_id=2, byte_fallback=True)
    alphabet = TokenizerAlphabet(fast_tokenizer(model, after="</s>", prepare=prepare))
    assert [alphabet.get_tok(index) for index in alphabet.ids_of("MK")] == ["▁M", "▁K", "</s>"]


def test_tokenizers_that_join_letters_are_not_per_letter():
    """Also where no pair of the probes is joined."""
    model = {name: index for index, name in enumerate(["<pad>", "</s>", "<unk>", *RESIDUE_LETTERS, "WWM"])}
    joined = tokenizers.models.WordPiece({**model, "##W": 40}, unk_token="<unk>")
    longer = tokenizers.models.Unigram([(name, -1.0) for name in model], unk_id=2)
    assert not TokenizerAlphabet(fast_tokenizer(longer)).is_per_letter
    with pytest.raises(
        ValueError, match="expected a tokenizer that knows the letters of proteins or of nucleic"
    ):
        TokenizerAlphabet(
            fast_tokenizer(joined, unk_token="<unk>", normalizer=tokenizers.normalizers.Lowercase())
        )


def test_other_tokenizers_are_refused(tmp_path):
    tokenizer = bert_tokenizer(tmp_path)
    words = fast_tokenizer(
        tokenizers.models.WordLevel({"<pad>": 0, "<unk>": 1, "house": 2}, unk_token="<unk>")
    )
    with pytest.raises(
        ValueError, match="knows the letters of proteins or of nucleic acids, got .*, which does not"
    ):
        TokenizerAlphabet(words)
    without = gpt_tokenizer()
    without.pad_token = None
    with pytest.raises(
        ValueError, match="padding that stands in no sequence, got .* without one: set its pad_t"
    ):
        TokenizerAlphabet(without)
    tokenizer.pad_token = "[SEP]"
    with pytest.raises(ValueError, match="padding that stands in no sequence"):
        TokenizerAlphabet(tokenizer)
    twice = bert_tokenizer(tmp_path)
    twice.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] [CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    with pytest.raises(ValueError, match="at most one token before a sequence and one after it"):
        TokenizerAlphabet(twice)
