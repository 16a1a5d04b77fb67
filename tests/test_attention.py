"""Every kernel of attention against float64, and the promises of the model on every path."""

from itertools import pairwise

import pytest
import torch
from helpers import SHAPES, random_sequence, small_model, tokens_of

from rd_torch import hardware
from rd_torch.backbone import attention
from rd_torch.backbone.attention import attend, attend_varlen
from rd_torch.backbone.packing import Packing

pytestmark = pytest.mark.capability

SEQUENCES = ("M", random_sequence(70, 1), "MK<mask>VL", random_sequence(68, 2), random_sequence(33, 3))
LENGTHS = {"one token": [1], "alike": [40, 39, 38], "unlike": [130, 64, 63, 3, 1], "equal": [17] * 4}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}

each_lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=[*LENGTHS])
cuda = pytest.mark.cuda


def heads(lengths, dtype, size=16, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shape = (3, sum(lengths), 5, size)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).unbind()


def packing_of(lengths, device="cpu"):
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Packing.of(real.to(device))


def exact(q, k, v, lengths):
    """Attention one sequence at a time, in float64."""
    q, k, v = (part.double().cpu() for part in (q, k, v))
    rows = []
    for start, stop in pairwise(torch.tensor([0, *lengths]).cumsum(0).tolist()):
        here = (slice(start, stop), slice(None))
        scores = torch.einsum("ihd,jhd->hij", q[here], k[here]) / q.shape[-1] ** 0.5
        rows.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[here]))
    return torch.cat(rows)


def reference_varlen(q, k, v, edges, _, longest, __):
    """What `varlen_attn` computes, so that the path to it can be walked without a GPU."""
    lengths = edges.diff().tolist()
    assert edges.dtype == torch.int32
    assert max(lengths) <= longest
    assert edges[-1] == len(q)
    return exact(q, k, v, lengths).to(q.dtype)


@pytest.fixture(params=["buckets", "blocks", "varlen"])
def path(request, monkeypatch):
    """Attention forced through one kernel, on CPU tensors of any dtype."""
    blocks = request.param == "blocks"
    monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda _: blocks)
    monkeypatch.setattr(hardware, "has_varlen", lambda *_: request.param == "varlen")
    monkeypatch.setattr(hardware, "varlen_attn", lambda: reference_varlen)
    if blocks:
        monkeypatch.setattr(attention, "BLOCK", 600)  # few heads, and few rows of the longest
    return request.param


@each_lengths
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attention_is_the_formula(path, lengths, dtype):
    q, k, v = heads(lengths, dtype)
    with torch.no_grad():
        out = attend(q, k, v, packing_of(lengths))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact(q, k, v, lengths), atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("size", [16, 24, 32, 64])
@pytest.mark.parametrize("block", [1, 100, 5_000, 10**9])
def test_blocks_of_any_size_give_the_same(monkeypatch, size, block):
    lengths = [90, 41, 2]
    q, k, v = heads(lengths, torch.bfloat16, size)
    whole = attention._attend_by_blocks(q, k, v, packing_of(lengths))
    monkeypatch.setattr(attention, "BLOCK", block)
    torch.testing.assert_close(
        attention._attend_by_blocks(q, k, v, packing_of(lengths)), whole, atol=1e-2, rtol=0
    )
    torch.testing.assert_close(whole.double(), exact(q, k, v, lengths), atol=3e-2, rtol=0)


def test_training_takes_a_kernel_that_has_gradients(path):
    lengths = [20, 7]
    q, k, v = (part.requires_grad_() for part in heads(lengths, torch.bfloat16))
    attend(q, k, v, packing_of(lengths)).float().square().sum().backward()
    parts = [part.detach().double().requires_grad_() for part in (q, k, v)]
    exact(*parts, lengths).square().sum().backward()
    for ours, theirs in zip((q, k, v), parts, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=0.2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_prefixes_are_equal_to_the_bit_on_every_path(path, dtype):
    model, tokens = small_model().to(dtype), tokens_of(*SEQUENCES)
    with torch.no_grad():
        whole = model(tokens).embeddings
        for level, width in model.config.widths.items():
            assert torch.equal(model.truncate(level)(tokens).embeddings, whole[..., :width])
            assert torch.equal(model(tokens, width=width - 3).embeddings, whole[..., : width - 3])


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 2e-5), (torch.bfloat16, 0.2)], ids=str)
def test_an_embedding_does_not_depend_on_its_batch_on_any_path(path, dtype, within):
    model = small_model().to(dtype)
    with torch.no_grad():
        together = model(tokens_of(*SEQUENCES)).embeddings
        unit = together.std()
        for row, sequence in enumerate(SEQUENCES):
            alone = model(tokens_of(sequence)).embeddings[0]
            assert (together[row, : len(alone)] - alone).abs().max() < within * unit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_near_float32_on_every_path(path, dtype):
    model, tokens = small_model(), tokens_of(*SEQUENCES)
    with torch.no_grad():
        expected = model(tokens).embeddings
        got = model.to(dtype)(tokens).embeddings
    cosines = torch.cosine_similarity(got, expected, dim=-1)[tokens != model.padding_idx]
    assert cosines.min() > (0.99 if dtype == torch.bfloat16 else 0.9999)


def test_the_residual_stream_of_a_half_model_is_float32():
    backbone, stream = small_model().bfloat16().backbones["c"], []
    for layer in backbone.layers:
        layer.register_forward_hook(lambda *call: stream.append(call[-1].dtype))
    tokens = tokens_of("MKVL")
    assert backbone(tokens, Packing.of(tokens != 1)).dtype == torch.float32
    assert stream == [torch.float32] * SHAPES["c"][0]


def test_a_stream_that_outgrows_half_precision_costs_no_digits():
    model, tokens = small_model(), tokens_of(*SEQUENCES)
    for backbone in model.backbones.values():
        for layer in backbone.layers:
            layer.fc2.bias.data[:4] += 5_000  # rounded to steps of 4 in float16
    with torch.no_grad():
        expected = model(tokens).embeddings
        got = model.half()(tokens).embeddings
    cosines = torch.cosine_similarity(got, expected, dim=-1)[tokens != model.padding_idx]
    assert cosines.min() > 0.999


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_dtype_that_no_backbone_can_have_is_refused(dtype):
    model = small_model().to(dtype)
    assert model.stages["b"].W.dtype == torch.float32
    with pytest.raises(
        TypeError, match="expected a backbone in float16, bfloat16, float32, float64, got float8"
    ):
        model(tokens_of("MKV"))


@cuda
@each_lengths
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [16, 24, 32, 64, 128])
def test_varlen_attention_is_the_formula_and_its_gradients_are_the_reference_paths(lengths, dtype, size):
    parts = heads(lengths, dtype, size, "cuda")
    packing = packing_of(lengths, "cuda")
    assert hardware.has_varlen(parts[0].device, dtype, size)
    grads = []
    for kernel in (
        attention._attend_by_buckets,
        lambda *call: attend_varlen(*call[:3], packing.edge_tensor, packing.longest),
    ):
        q, k, v = (part.clone().requires_grad_() for part in parts)
        out = kernel(q, k, v, packing)
        torch.testing.assert_close(out.cpu().double(), exact(*parts, lengths), atol=TOLERANCE[dtype], rtol=0)
        grads.append(torch.autograd.grad(out.float().square().sum(), (q, k, v)))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=10 * TOLERANCE[dtype], rtol=0.05)


def test_frozen_heads_take_the_blocks_of_inference_in_the_middle_of_training(monkeypatch):
    monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda device: True)
    calls = []
    monkeypatch.setattr(attention, "_attend_by_blocks", lambda q, *_: calls.append(1) or q)
    packing = Packing.of(torch.ones(2, 5, dtype=torch.bool))
    frozen = torch.randn(10, 2, 16, dtype=torch.bfloat16)
    attend(frozen, frozen, frozen, packing)
    assert calls == [1]
    for place in range(3):
        heads = [frozen.clone().requires_grad_(place == other) for other in range(3)]
        attend(*heads, packing).float().sum().backward()
        assert heads[place].grad is not None
    assert calls == [1]
