"""Distributions over the alphabet in place of token ids, and gradients to them."""

import copy

import pytest
import torch
from helpers import random_esm2, random_sequence, require_one_graph, small_model, tokens_of
from torch import nn
from torch.nn import functional

from rd_torch import ESM2, RDModel
from rd_torch.backbone.esm2 import token_dropout
from rd_torch.backbone.packing import Packing
from rd_torch.backbone.tokens import is_real, token_ids
from rd_torch.levels import ALPHABET

PAD, MASK, SIZE = ALPHABET.padding_idx, ALPHABET.mask_idx, len(ALPHABET)
RESIDUES = slice(4, 29)

BATCHES = {
    "unequal lengths and masks": ["MKTAYIAKQR<mask>QISFVK<mask>", "M", "XBUZO", "ACDEFGHIKLMNPQRSTVWY"],
    "only masks": ["<mask>" * 9, "MKV"],
    "one residue": ["M"],
}

each_batch = pytest.mark.parametrize("sequences", BATCHES.values(), ids=[*BATCHES])


def one_hot(tokens, dtype=torch.float32):
    return functional.one_hot(tokens, SIZE).to(dtype)


def soft_tokens(*sequences, dtype=torch.float32, seed=0, temperature=1.0):
    """Random distributions where residues and masks stand; `<cls>`, `<eos>` and padding as they are."""
    tokens = tokens_of(*sequences)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*tokens.shape, SIZE, dtype=dtype, generator=generator) / temperature
    changed = (tokens >= 4)[..., None]
    return torch.where(changed, logits.softmax(-1), one_hot(tokens, dtype))


@each_batch
@pytest.mark.parametrize("special_rows", ["maps", "larger"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@torch.no_grad()
def test_one_hot_distributions_give_what_ids_give(sequences, special_rows, dtype):
    model, tokens = small_model(special_rows=special_rows).to(dtype), tokens_of(*sequences)
    expected = model(tokens, return_contacts=True)
    for soft in (one_hot(tokens), one_hot(tokens, torch.float64), one_hot(tokens, torch.float16)):
        out = model(soft, return_contacts=True)
        for name in ("embeddings", "logits", "contacts"):
            torch.testing.assert_close(out[name], expected[name], rtol=0, atol=1e-6)
        assert torch.equal(out.residue_mask, expected.residue_mask)
    torch.testing.assert_close(
        model.encode(soft, width=48), model.encode(tokens, width=48), rtol=0, atol=1e-6
    )


class Soft(nn.Module):
    """Stands where fair-esm's embedding table stood: the mean of its rows under the distributions."""

    def __init__(self, table, distributions):
        super().__init__()
        self.table, self.distributions = table, distributions

    def forward(self, _tokens):
        return self.distributions @ self.table


def test_gradients_to_the_distribution_are_fair_esms(monkeypatch):
    """The oracle gets the ids that say which tokens are padding and masks, and mean embeddings."""
    monkeypatch.setattr(
        "esm.multihead_attention.utils_softmax", lambda scores, dim, onnx_trace=False: scores.softmax(dim)
    )
    fair = random_esm2(3, 32, 4).double()
    model = RDModel({"a": copy.deepcopy(fair)}, [])
    sequences = "MKTAYIAKQR", "MKV<mask>A", "M"
    tokens = tokens_of(*sequences)
    soft = soft_tokens(*sequences, dtype=torch.float64)
    soft[..., MASK] = 0
    soft = soft / soft.sum(-1, keepdim=True).clamp(min=1e-9)
    soft = torch.where((tokens == MASK)[..., None], one_hot(tokens, torch.float64), soft)
    ours, theirs = (soft.clone().requires_grad_() for _ in range(2))
    fair.embed_tokens = Soft(fair.embed_tokens.weight, theirs)
    weights = torch.randn(*tokens.shape, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = fair(tokens, repr_layers=[3])["representations"][3]
    real = tokens != PAD
    (out * weights)[real].sum().backward()
    embeddings = model(ours).embeddings
    torch.testing.assert_close(embeddings[real], out[real], rtol=0, atol=1e-10)
    (embeddings * weights)[real].sum().backward()
    counted = (real & (tokens != MASK))[..., None] & (
        torch.arange(SIZE) != MASK
    )  # dropout's own is ours alone
    assert theirs.grad[counted.expand_as(soft)].abs().max() > 0.1
    torch.testing.assert_close(
        ours.grad.masked_fill(~counted, 0), theirs.grad.masked_fill(~counted, 0), rtol=0, atol=1e-9
    )
    assert not ours.grad[~real].any()


def test_what_is_at_mask_enters_as_zeros_and_counts_as_masked():
    module = ESM2.sharing(random_esm2(1, 32, 4)).double()
    soft = soft_tokens("MKTAY", "MK", dtype=torch.float64)
    packing = Packing.of(is_real(soft, ALPHABET))
    embedded = packing.unpack(module.embedded(*token_dropout(soft, packing, torch.float64)))
    for row, length in enumerate((7, 4)):
        p = soft[row, :length]
        rest = p.clone()
        rest[:, MASK] = 0
        scale = 0.88 / (1 - p[:, MASK].sum() / length)
        expected = rest @ module.embed_tokens.weight * scale
        torch.testing.assert_close(embedded[row, :length], expected, rtol=0, atol=1e-12)
    assert not embedded[1, 4:].any()


def test_the_whole_chain_passes_gradcheck():
    model = small_model().truncate("b").double()
    soft = soft_tokens("MKV", dtype=torch.float64).requires_grad_()  # a step at padding would end it
    weights = torch.randn(48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(lambda p: (model.encode(p) * weights).sum(), soft)


def test_gradients_are_finite_where_all_is_masked(model):
    soft = one_hot(tokens_of("<mask>" * 4, "MKV")).requires_grad_()
    model(soft).embeddings.square().sum().backward()
    assert soft.grad.isfinite().all()
    bare = one_hot(torch.full((1, 3), MASK)).requires_grad_()  # without <cls> and <eos> nothing is left
    out = model(bare).embeddings
    torch.testing.assert_close(out, model(torch.full((1, 3), MASK)).embeddings)
    out.square().sum().backward()
    assert bare.grad.isfinite().all()


def test_a_position_is_a_residue_where_residues_have_most_of_it():
    soft = torch.zeros(1, 5, SIZE)
    soft[0, 0, ALPHABET.cls_idx] = 1
    soft[0, 1, RESIDUES] = 0.6 / 25  # 0.024 each, together more than the mask's 0.4
    soft[0, 1, MASK] = 0.4
    soft[0, 2, MASK], soft[0, 2, 7] = 0.6, 0.4
    soft[0, 3, 9], soft[0, 3, 5], soft[0, 3, PAD] = 0.3, 0.25, 0.45
    soft[0, 4, PAD] = 1
    assert token_ids(soft, ALPHABET)[0].tolist() == [ALPHABET.cls_idx, 4, MASK, 9, PAD]
    assert is_real(soft, ALPHABET)[0].tolist() == [True, True, True, True, False]
    assert small_model()(soft).residue_mask[0].tolist() == [False, True, False, True, False]


def test_a_sequence_can_be_designed_by_gradient(model):
    """Gradient descent on logits brings a soft sequence to where a target sequence's embedding is."""
    model.freeze_backbones()
    target = model(tokens_of("MKTAYIAKQR")).embeddings.mean(1).detach()
    logits = torch.zeros(1, 10, 20, requires_grad=True)
    ends = [one_hot(torch.tensor([[idx]])) for idx in (ALPHABET.cls_idx, ALPHABET.eos_idx)]
    optimizer = torch.optim.Adam([logits], lr=0.3)
    losses = []
    for _ in range(15):
        middle = functional.pad(logits.softmax(-1), (4, SIZE - 24))
        loss = (model(torch.cat((ends[0], middle, ends[1]), 1)).embeddings.mean(1) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
def test_softmax_in_half_precision_is_near_enough_to_one(model):
    soft = soft_tokens(random_sequence(300), temperature=4.0)
    expected = model(soft).embeddings
    for half in (torch.bfloat16, torch.float16):
        logits = soft.log().clamp(min=-1e4).to(half)
        rounded = logits.softmax(-1)
        assert (rounded.float().sum(-1) - 1).abs().max() > 0
        assert (model(rounded).embeddings - expected).abs().mean() < 0.1 * expected.std()


BAD = {
    "logits": (
        torch.randn(1, 3, SIZE, generator=torch.Generator().manual_seed(0)),
        "rows sum to 1 within 0.005",
    ),
    "zeros at padding": (
        one_hot(tokens_of("MK")) * torch.tensor([1.0, 1, 1, 0])[:, None],
        "padding probability 1 at <pad>",
    ),
    "a negative entry": (
        one_hot(tokens_of("MK")) + 0.1 * (one_hot(torch.tensor([5])) - one_hot(torch.tensor([6]))),
        "entries from -0.1",
    ),
    "nan": (
        one_hot(tokens_of("MK")).masked_fill(one_hot(tokens_of("MK")) > 0, torch.nan),
        "sums that are off",
    ),
    "ids as floats": (
        tokens_of("MK").float(),
        r"shape \(batch, time, 33\), got \(1, 4\): convert token ids with .long",
    ),
    "another alphabet": (torch.full((1, 4, 20), 0.05), r"\(batch, time, 33\), got \(1, 4, 20\)"),
}


@pytest.mark.parametrize(("soft", "message"), BAD.values(), ids=[*BAD])
def test_what_is_no_distribution_is_refused(model, soft, message):
    with pytest.raises(ValueError, match=message):
        model(soft)


def test_tokens_on_another_device_are_refused(model, tokens):
    elsewhere = copy.deepcopy(model).to("meta")
    with pytest.raises(ValueError, match="expected tokens and backbones on one device, got cpu and meta"):
        elsewhere(tokens)
    model.backbones["b"].to("meta")
    with pytest.raises(ValueError, match=r"got cpu and meta: move them with \.to"):
        model(tokens)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_an_empty_batch_of_distributions_gives_empty_tensors(model, shape):
    assert model(torch.zeros(*shape, SIZE)).embeddings.shape == (*shape, 64)


@torch.no_grad()
def test_a_prepared_model_takes_distributions(model):
    soft = soft_tokens("MKTAYIA", "MK")
    expected = model(soft).embeddings
    assert torch.equal(model.prepare_inference()(soft).embeddings, expected)


def test_distributions_compile_as_one_graph_and_export(model):
    batches = soft_tokens("MKTAYIA", "MK", "M"), soft_tokens("MKTAY<mask>IAKQRW", "MK<mask>AY")
    require_one_graph(model.truncate("b"), *batches)
