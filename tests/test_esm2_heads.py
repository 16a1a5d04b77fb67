"""The two heads against fair-esm's, to the bit: the same tensors, the same operations in the same order."""

import copy

import pytest
import torch
from esm.modules import ContactPredictionHead, RobertaLMHead
from helpers import random_esm2, random_sequence, tokens_of
from torch import nn

from rd_torch import ESM2
from rd_torch.backbone.esm2_heads import ContactHead, LMHead
from rd_torch.levels import ALPHABET

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
BATCHES = {
    "one residue": ["M"],
    "none": ["", ""],
    "unequal lengths": [random_sequence(23), "M", random_sequence(40, 1), "MK<mask>V"],
    "<eos> within": ["MK<eos>VL<pad>A", "MKV"],
}


def assert_same_bits(ours, theirs):
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


def lm_heads(width, dtype):
    """Both heads around the same random tensors."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(33, width))
    ours, theirs = LMHead(width, 33, weight=weight), RobertaLMHead(width, 33, weight=weight)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def contact_heads(features, dtype, prepend_bos=True, append_eos=True, bias=True):
    """The same of contacts."""
    torch.manual_seed(0)
    options = {"bias": bias, "eos_idx": ALPHABET.eos_idx}
    theirs = ContactPredictionHead(features, prepend_bos, append_eos, **options).to(dtype)
    ours = ContactHead(features, prepend_bos, append_eos, **options).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 32), (2, 7, 320), (0, 64), (128,)], ids=str)
def test_logits_are_fair_esms_to_the_bit(shape, dtype):
    ours, theirs = lm_heads(shape[-1], dtype)
    hidden = (3 * torch.randn(shape)).to(dtype)
    assert_same_bits(ours(hidden), theirs(hidden))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [tokens_of(*batch) for batch in BATCHES.values()], ids=[*BATCHES])
@pytest.mark.parametrize(("prepend_bos", "append_eos"), [(True, True), (True, False), (False, True)])
def test_contacts_are_fair_esms_to_the_bit(tokens, dtype, prepend_bos, append_eos):
    ours, theirs = contact_heads(3 * 4, dtype, prepend_bos, append_eos, bias=prepend_bos)
    rows, time = tokens.shape
    attentions = torch.randn(rows, 3, 4, time, time).softmax(-1).to(dtype)
    given = attentions.clone()
    assert_same_bits(ours(tokens, attentions), theirs(tokens, attentions))
    assert torch.equal(attentions, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_are_fair_esms_to_the_bit(dtype):
    tokens, gradients = tokens_of("MKTAYIAKQR", "MKV"), []
    attentions = torch.randn(2, 3, 4, 12, 12, dtype=dtype).softmax(-1)
    hidden = torch.randn(2, 12, 32, dtype=dtype)
    for lm_head, contact_head in zip(lm_heads(32, dtype), contact_heads(12, dtype), strict=True):
        inputs = [hidden.clone().requires_grad_(), attentions.clone().requires_grad_()]
        loss = lm_head(inputs[0]).square().sum() + contact_head(tokens, inputs[1]).square().sum()
        wanted = [*inputs, *lm_head.parameters(), *contact_head.parameters()]
        gradients.append(torch.autograd.grad(loss, wanted))
    for ours, theirs in zip(*gradients, strict=True):
        assert_same_bits(ours, theirs)


def test_state_dicts_and_attributes_are_fair_esms():
    for ours, theirs in (lm_heads(32, torch.float32), contact_heads(12, torch.float32)):
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert [*dict(ours.named_children())] == [*dict(theirs.named_children())]
        theirs.load_state_dict(ours.state_dict())
    for name in ("in_features", "prepend_bos", "append_eos", "eos_idx"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_an_alphabet_that_ends_sequences_needs_the_id_of_the_end():
    with pytest.raises(ValueError, match="expected eos_idx, the id of <eos>, with append_eos, got none"):
        ContactHead(12, True, True)
    assert ContactHead(12, True, False).eos_idx is None


def test_a_shared_backbone_keeps_its_heads():
    theirs = random_esm2(3, 32, 4)
    ours, tokens = ESM2.sharing(theirs), tokens_of(random_sequence(30), "MK<mask>A")
    with torch.no_grad():
        expected = theirs(tokens, repr_layers=[3], return_contacts=True)
        assert_same_bits(ours.lm_head(expected["representations"][3]), expected["logits"])
        assert_same_bits(ours.contact_head(tokens, expected["attentions"]), expected["contacts"])
    assert ours.lm_head.weight is ours.embed_tokens.weight
    assert copy.deepcopy(ours).lm_head.dense.weight.equal(theirs.lm_head.dense.weight)
