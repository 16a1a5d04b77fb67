"""Training an ESM-C: gradients by every way, freezing, checkpointing, PEFT, heads, compilers."""

import pytest
import torch
from esmc import WIDTHS, our_esmc, small_esmc, tokens_of
from helpers import random_sequence, random_stages
from peft import LoraConfig, PeftModel, get_peft_model
from test_training import assert_same, gradients, saved_bytes, trainable, weighted
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from rd_torch import MatryoshkaHead, Predictor, RDModel, ResidueHead, SequenceHead, hardware
from rd_torch.backbone import esmc
from rd_torch.backbone.packing import Packing
from rd_torch.levels import ESMC_ALPHABET

PAD = ESMC_ALPHABET.padding_idx
TOKENS = tokens_of("MKTAYIAKQR<mask>QISFVK<mask>", "M", "XBUZO|MK", random_sequence(41))
EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = 7


def loss_of(model, tokens=TOKENS):
    return weighted(model(tokens).embeddings, tokens != PAD)


def gradients_of(model, tokens=TOKENS):
    model.zero_grad()
    loss_of(model, tokens).backward()
    return gradients(model)


@pytest.mark.capability
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_packed_and_padded_batches_have_the_same_gradients(monkeypatch, dtype):
    model = small_esmc().to(dtype)
    packed = gradients_of(model)
    monkeypatch.setattr(Packing, "of", Packing.padded)
    within = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    assert_same(packed, gradients_of(model), within)


def test_every_parameter_but_those_of_heads_has_a_gradient():
    model = small_esmc()
    assert gradients_of(model).keys() == trainable(model)
    assert {name for name, _ in model.named_parameters()} - trainable(model) == {
        name for name, _ in model.named_parameters() if ".lm_head." in name
    }


def test_checkpointing_changes_no_gradient_and_keeps_less():
    model = small_esmc().train()
    outputs, gradient, kept = {}, {}, {}
    for on in (False, True):
        (model.gradient_checkpointing_enable if on else model.gradient_checkpointing_disable)()
        held = []
        kept[on] = saved_bytes(lambda held=held: held.append(model(TOKENS)))
        outputs[on] = held[0].embeddings.detach()
        gradient[on] = gradients_of(model)
    assert torch.equal(outputs[True], outputs[False])
    assert_same(gradient[True], gradient[False], 1e-6)
    assert kept[True] < 0.5 * kept[False]


def test_what_is_computed_again_is_what_would_have_been_kept(monkeypatch):
    model, again = small_esmc(), []
    silu = functional.silu
    monkeypatch.setattr(functional, "silu", lambda x: again.append(1) or silu(x))
    mlp = model.backbones["a"].layers[0].mlp
    weights = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]

    def steps():
        """First and second gradients of a loss by one layer's feed-forward weights."""
        again.clear()
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second gradients
            loss = weighted(model(TOKENS, width=32).embeddings, TOKENS != PAD)
            first = torch.autograd.grad(loss, weights, create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in first), weights)
        return len(again), first, second

    count, *ours = steps()
    assert (count > 2) == hardware.may_replace_saved_tensors()

    def keep(tensor, compute):
        return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)

    monkeypatch.setattr(esmc, "recompute", keep)
    count, *kept = steps()
    assert count == 2
    for mine, theirs in zip(ours, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_functional_calls_and_tensors_saved_on_the_cpu_give_the_same_gradients():
    model = small_esmc()
    expected = {name: each.clone() for name, each in gradients_of(model).items()}
    model.zero_grad()
    with torch.autograd.graph.save_on_cpu():
        loss_of(model).backward()
    assert_same(gradients(model), expected, 1e-6)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    got = torch.func.grad(
        lambda chosen: weighted(functional_call(model, chosen, (TOKENS,)).embeddings, TOKENS != PAD)
    )(parameters)
    assert_same(got, expected, 1e-5)


def test_backbones_freeze_by_level_and_by_layer():
    before = trainable(small_esmc())
    assert trainable(small_esmc().freeze_backbones("a", "c")) == {
        name for name in before if name.startswith("backbones.b.")
    }
    model = small_esmc().freeze_backbones("c", except_top=1)
    kept = ("backbones.a.", "backbones.b.", "backbones.c.layers.2.", "backbones.c.norm.")
    assert trainable(model) == {name for name in before if name.startswith(kept)}
    assert "backbones.c.norm.weight" in trainable(model)
    assert gradients_of(model).keys() == trainable(model)
    assert not trainable(small_esmc().freeze_backbones())
    with pytest.raises(ValueError, match="expected except_top from 0 to 2, the layers of level a, got 3"):
        model.freeze_backbones(except_top=3)


def test_frozen_backbones_keep_no_activations_and_prefixes_below_stay():
    model = small_esmc()
    everything, before = saved_bytes(lambda: model(TOKENS)), model(TOKENS).embeddings.detach()
    model.freeze_backbones("a", "b").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    after = model(TOKENS).embeddings.detach()
    assert torch.equal(after[..., :48], before[..., :48])
    assert (after[..., 48:] - before[..., 48:]).abs().max() > 0.1
    model.freeze_backbones(except_top=1)
    assert saved_bytes(lambda: model(TOKENS)) < 0.6 * everything


# PEFT


def with_lora(targets=EVERY_LINEAR, **options):
    torch.manual_seed(1)
    return get_peft_model(small_esmc(), LoraConfig(r=4, target_modules=targets, **options))


def train_some(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(TOKENS).embeddings.square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    ("targets", "count"),
    [(EVERY_LINEAR, 7 * LAYERS), (["q_proj", "v_proj"], 2 * LAYERS), (r".*\.c\..*\.gate_proj", 3)],
    ids=["every linear layer", "two", "one of a level"],
)
def test_lora_trains_what_an_ordinary_config_names_and_merges(targets, count, tmp_path):
    model = with_lora(targets)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 2 * count
    assert all(".lora_" in name for name in names)
    with torch.no_grad():
        before = small_esmc()(TOKENS).embeddings
        assert torch.equal(model(TOKENS).embeddings, before)
    train_some(model)
    with torch.no_grad():
        after = model(TOKENS).embeddings
    assert (after - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(small_esmc(), tmp_path / "adapter").eval()
    merged = model.merge_and_unload()
    assert type(merged) is RDModel
    merged.save_pretrained(tmp_path / "merged")
    again = RDModel.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).embeddings, after)
        for each in (merged, again):
            torch.testing.assert_close(each(TOKENS).embeddings, after, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:.*embedding")
def test_the_table_takes_adapters_and_may_be_trained_whole(tmp_path):
    before = small_esmc()(TOKENS).embeddings.detach()
    for number, options in enumerate(({"targets": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]})):
        model = train_some(with_lora(**options))
        with torch.no_grad():
            after = model(TOKENS).embeddings
            soft = functional.one_hot(TOKENS, len(ESMC_ALPHABET)).float()
            torch.testing.assert_close(model(soft).embeddings, after, rtol=0, atol=2e-5)
        assert (after - before).abs().max() > 1e-3
        model.save_pretrained(tmp_path / str(number))
        again = PeftModel.from_pretrained(small_esmc(), tmp_path / str(number)).eval()
        with torch.no_grad():
            assert torch.equal(again(TOKENS).embeddings, after)
            merged = model.merge_and_unload()
            torch.testing.assert_close(merged(TOKENS).embeddings, after, rtol=0, atol=5e-5)


def test_lora_on_half_precision_backbones_trains_in_float32():
    config = LoraConfig(r=4, target_modules=EVERY_LINEAR)
    model = get_peft_model(small_esmc().to(torch.bfloat16), config)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    before = model(TOKENS).embeddings.detach()
    assert (train_some(model)(TOKENS).embeddings - before).abs().max() > 1e-2


# Heads


HEADS = {
    "sequence": (lambda: SequenceHead(64, 1, task="regression"), torch.tensor([0.5, -1.0, 2.0, 0.1])),
    "narrower": (
        lambda: SequenceHead(48, 3, task="classification", pool="attention"),
        torch.tensor([0, 1, 2, 1]),
    ),
    "residues": (
        lambda: ResidueHead(64, 2, task="classification"),
        torch.where(TOKENS > 3, TOKENS % 2, -100),
    ),
    "matryoshka": (
        lambda: MatryoshkaHead([SequenceHead(width, 2, task="classification") for width in WIDTHS.values()]),
        torch.tensor([0, 1, 1, 0]),
    ),
}


@pytest.mark.parametrize(("make", "labels"), HEADS.values(), ids=[*HEADS])
def test_a_predictor_steps_and_has_no_parameter_without_a_gradient(make, labels):
    torch.manual_seed(0)
    module = Predictor(small_esmc().train(), make())
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = module(TOKENS, labels)["loss"]
        loss.backward()
        assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    if make().width == 48:
        assert list(module.model.backbones) == ["a", "b"]


# Compilers


def two_levels():
    backbones = {"a": our_esmc(1, 32, 2), "b": our_esmc(1, 48, 2, seed=1)}
    return RDModel(backbones, random_stages(widths={"a": 32, "b": 48}))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["checkpointing", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_compiled_model_trains_as_one_graph_for_any_length(how, backend):
    model = two_levels().train()
    if how == "checkpointing":
        model.gradient_checkpointing_enable()
    else:
        model.to(torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for batch in (TOKENS, TOKENS[:3, :9].contiguous()):  # a view would be traced anew
        expected = {name: each.clone() for name, each in gradients_of(model, batch).items()}
        model.zero_grad()
        weighted(compiled(batch).embeddings, batch != PAD).backward()
        assert_same(gradients(model), expected, 0.1 if how == "bfloat16" else 2e-4)


@pytest.mark.skipif(not hardware.has_compiler("C++"), reason="needs a C++ compiler")
@torch.no_grad()
def test_a_compiled_layer_adds_the_same_share_of_its_branches():
    """PyTorch's default compiler forgot the alpha of a sum with a matrix product."""
    layer = our_esmc(1, 32, 2).layers[0]
    assert layer.share == 6
    x, mixed = torch.randn(2, 20, 32).unbind()
    mixed = mixed.unflatten(1, (2, 16))
    (got,), (expected,) = torch.compile(layer.finish)(x, mixed), layer.finish(x, mixed)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_every_length_runs_what_was_compiled_once():
    model, counter = two_levels().eval(), torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for batch in (TOKENS, TOKENS[:3, :9].contiguous(), TOKENS.repeat(2, 1)):
            out, expected = compiled(batch), model(batch)
            torch.testing.assert_close(out.embeddings, expected.embeddings, rtol=0, atol=2e-5)
            torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=1e-4)
    assert counter.frame_count == 1
