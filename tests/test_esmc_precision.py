"""What no half type may touch in an ESM-C: angles, maps and the residual stream."""

import pytest
import torch
from esmc import SHAPES, WIDTHS, our_esmc, small_esmc, tokens_of
from helpers import random_sequence

from rd_torch import ESMC, RDModel
from rd_torch.backbone.attention import inverse_frequencies
from rd_torch.backbone.preparing import LIMITS, PROBES
from rd_torch.levels import ESMC_ALPHABET, ESMC_LEVELS

PAD = ESMC_ALPHABET.padding_idx
SEQUENCES = ("MKTAYIAKQR<mask>QISFVK<mask>", "M", "XBUZO|MK|", "<mask><mask>", random_sequence(41))


@pytest.fixture
def tokens():
    return tokens_of(*SEQUENCES)


def angles_of(model):
    return [backbone.rotary_emb.inv_freq for backbone in model.backbones.values()]


def streams(model, tokens):
    """Dtypes of the residual stream after every layer."""
    found = set()
    for backbone in model.backbones.values():
        for layer in backbone.layers:
            layer.register_forward_hook(lambda *call: found.add(call[-1].dtype))
    with torch.no_grad():
        model(tokens)
    return found


HALVES = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to": lambda model: model.to(torch.float16),
    "to the CPU": lambda model: model.to("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("convert", HALVES.values(), ids=[*HALVES])
def test_what_no_half_type_may_touch_keeps_its_bits(convert, tokens):
    expected, model = small_esmc(), convert(small_esmc())
    dtype = model.dtype
    assert dtype in (torch.float16, torch.bfloat16)
    assert {p.dtype for p in model.backbones.parameters()} == {dtype}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    for (name, ours), (_, theirs) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert streams(model, tokens) == {torch.float32}
    back = model.float()
    assert all(map(torch.equal, angles_of(back), angles_of(expected)))
    double = back.double()
    assert {b.dtype for b in double.buffers()} == {torch.float64}
    assert all(
        torch.equal(ours.float(), theirs)
        for ours, theirs in zip(angles_of(double), angles_of(expected), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_loading_with_a_half_type_is_converting_what_was_loaded(dtype, tokens, tmp_path):
    small_esmc().save_pretrained(tmp_path)
    loaded, converted = RDModel.from_pretrained(tmp_path, dtype=dtype), small_esmc().to(dtype)
    assert {b.dtype for b in loaded.buffers()} == {torch.float32}
    for (name, ours), (_, theirs) in zip(loaded.named_buffers(), converted.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    with torch.no_grad():
        assert torch.equal(loaded(tokens).embeddings, converted(tokens).embeddings)
    double = RDModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert {b.dtype for b in double.buffers()} == {torch.float64}
    assert streams(loaded, tokens) == {torch.float32}


@pytest.mark.parametrize("size", [16, 24, 64])
def test_angles_are_what_float32_gives_on_any_device_in_any_default(size):
    torch.set_default_dtype(torch.float64)
    try:
        angles = inverse_frequencies(size)
    finally:
        torch.set_default_dtype(torch.float32)
    assert angles.dtype == torch.float32
    assert torch.equal(angles, inverse_frequencies(size))
    with torch.device("meta"):
        assert torch.equal(ESMC(1, 2 * size, 2).rotary_emb.inv_freq, angles)


def test_a_chain_that_is_made_without_memory_gets_its_angles_with_it(tokens):
    """As FSDP2's users do: no state dict holds the angles."""
    model = small_esmc().to("meta")
    assert all(each.is_meta for each in angles_of(model))
    model.to_empty(device="cpu")
    model.load_state_dict(small_esmc().state_dict())
    assert all(map(torch.equal, angles_of(model), angles_of(small_esmc())))
    with torch.no_grad():
        assert torch.equal(model(tokens).embeddings, small_esmc()(tokens).embeddings)


def test_moving_to_where_it_is_keeps_the_very_tensors():
    model = small_esmc()
    before = angles_of(model)
    assert all(
        ours is theirs for ours, theirs in zip(angles_of(model.to("cpu").float()), before, strict=True)
    )


SIZES = {**SHAPES, "6B's 80 layers, narrow": (80, 64, 4)}
WHOLE = {name: level.shape for name, level in ESMC_LEVELS.items() if name != "6B"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [*SIZES.values(), *(pytest.param(shape, marks=pytest.mark.slow) for shape in WHOLE.values())],
    ids=[*SIZES, *WHOLE],
)
@torch.no_grad()
def test_half_precision_is_within_the_tables_limits(shape, dtype):
    model = RDModel({"x": our_esmc(*shape)}, [])
    batches = [tokens_of(*probe) for probe in PROBES]
    expected = [model(tokens).embeddings[tokens != PAD] for tokens in batches]
    model.to(dtype)
    errors = []
    for tokens, exact in zip(batches, expected, strict=True):
        got = model(tokens).embeddings[tokens != PAD]
        errors.append(float((got - exact).abs().mean() / exact.var(0).mean().sqrt()))
    assert 0 < max(errors) <= LIMITS[dtype].error, errors


@torch.no_grad()
def test_autocast_keeps_stream_and_maps_in_float32(tokens):
    model = small_esmc()
    expected = model(tokens).embeddings
    with torch.autocast("cpu", torch.bfloat16):
        assert streams(model, tokens) == {torch.float32}
        out = model(tokens)
    assert out.embeddings.dtype == torch.float32
    error = (out.embeddings - expected)[tokens != PAD].abs().mean() / expected[tokens != PAD].std()
    assert 0 < error < LIMITS[torch.bfloat16].error
    with torch.autocast("cpu", torch.bfloat16):
        for width in WIDTHS.values():
            assert torch.equal(model(tokens, width=width).embeddings, out.embeddings[..., :width])
