"""Tiny tokenizers and models of transformers', shaped as those that people use, for tests without network."""

import itertools

import pytest
import torch

from rd_torch.letters import RESIDUE_LETTERS
from rd_torch.levels import ALPHABET

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


def bert_tokenizer(folder):
    """As ProtBert's: letters with spaces between them, special tokens at both ends."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *RESIDUE_LETTERS]
    (folder / "vocab.txt").write_text("\n".join(names) + "\n")
    return transformers.BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=False)


def fast_tokenizer(model, *, before=None, after=None, prepare=None, normalizer=None, **named):
    """A tokenizer around a model of the library that transformers' own are made of.

    `before` and `after` are the special tokens around a sequence; `named` gives tokens their roles.
    """
    inner = tokenizers.Tokenizer(model)
    if prepare is not None:
        inner.pre_tokenizer = prepare
    if normalizer is not None:
        inner.normalizer = normalizer
    around = [(name, inner.token_to_id(name)) for name in (before, after) if name]
    if around:
        template = " ".join(filter(None, [before, "$A", after]))
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=around
        )
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"} | named
    named = {name: token for name, token in named.items() if token is not None}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **named)


def t5_tokenizer():
    """As ProtT5's: letters behind the mark of a word, `</s>` alone at the end, many special tokens."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    pieces += [(f"▁{letter}", -2.0) for letter in RESIDUE_LETTERS]
    others = [f"<extra_id_{number}>" for number in range(100)]
    pieces += [(name, 0.0) for name in others]
    prepare = tokenizers.pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    return fast_tokenizer(
        tokenizers.models.Unigram(pieces, unk_id=2), after="</s>", prepare=prepare,
        additional_special_tokens=others,
    )  # fmt: skip


def esm_tokenizer(folder):
    """ESM's own, whose 33 tokens are ESM-2's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(ALPHABET.all_toks))
    return transformers.EsmTokenizer(str(folder / "vocab.txt"))


def kmer_tokenizer(folder, k=3):
    """As the Nucleotide Transformer's: words of k letters, single letters for the rest, `<cls>` alone."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["".join(each) for each in itertools.product("ATCG", repeat=k)]
    names = ["<unk>", "<pad>", "<mask>", "<cls>", *words, *"ATCGN"]
    (folder / "vocab.txt").write_text("\n".join(names))
    return transformers.EsmTokenizer(str(folder / "vocab.txt"), eos_token=None)


def bpe_tokenizer(letters="ACGT", merges=(("A", "C"), ("AC", "G"), ("T", "T")), **options):
    """As DNABERT-2's: pairs of letters that are frequent become tokens of their own."""
    names = ["<pad>", "</s>", "<unk>", "<mask>", "<cls>", *letters, *map("".join, merges)]
    vocabulary = {name: index for index, name in enumerate(names)}
    model = tokenizers.models.BPE(vocabulary, list(merges), unk_token="<unk>")
    return fast_tokenizer(
        model, before="<cls>", after="</s>", cls_token="<cls>", mask_token="<mask>", **options
    )


def gpt_tokenizer():
    """As GPT-2's in use for proteins: no token is added, and the one for padding is the one for the end."""
    names = ["<|endoftext|>", *RESIDUE_LETTERS, "LA", "GV"]
    vocabulary = {name: index for index, name in enumerate(names)}
    model = tokenizers.models.BPE(vocabulary, [("L", "A"), ("G", "V")])
    end = "<|endoftext|>"
    return fast_tokenizer(model, pad_token=end, unk_token=end, eos_token=end, bos_token=end)


def bert(folder=None, *, vocab=30, width=32, layers=2, heads=2, seed=0, tokenizer=None, **options):
    """A small random BERT, and its tokenizer; saved where a folder is given."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=2 * width, **options,
    )  # fmt: skip
    model = livened(transformers.BertModel(config))
    return save(model, tokenizer, folder)


def t5(folder=None, *, whole=False, width=24, layers=2, seed=0, tokenizer=None, **options):
    """A small random T5 whose heads have together another size than its width."""
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=128, d_model=width, d_kv=8, num_heads=4, num_layers=layers, d_ff=48,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **options,
    )  # fmt: skip
    kind = transformers.T5ForConditionalGeneration if whole else transformers.T5EncoderModel
    return save(livened(kind(config)), tokenizer, folder)


def esm(folder=None, *, width=32, layers=2, heads=4, seed=0, tokenizer=None, **options):
    """A small random ESM of transformers' own."""
    torch.manual_seed(seed)
    defaults = {"position_embedding_type": "rotary", "token_dropout": True, "emb_layer_norm_before": False}
    config = transformers.EsmConfig(
        vocab_size=33, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, pad_token_id=1, mask_token_id=32, max_position_embeddings=1026,
        layer_norm_eps=1e-5, **(defaults | options),
    )  # fmt: skip
    return save(livened(transformers.EsmForMaskedLM(config)), tokenizer, folder)


def roberta(*, positions=20, seed=0):
    """A small random RoBERTa: absolute positions, counted from behind the id for padding."""
    torch.manual_seed(seed)
    config = transformers.RobertaConfig(
        vocab_size=33, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        pad_token_id=1, max_position_embeddings=positions, type_vocab_size=1,
    )  # fmt: skip
    return livened(transformers.RobertaModel(config))


def livened(model):
    """The model with larger weights, so that attention and every layer matter, in `eval` mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save(model, tokenizer, folder):
    """The model, written with its tokenizer where a folder is given."""
    if folder is not None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model
