"""Gradients, freezing, checkpointing: what a training loop relies on."""

import copy
from contextlib import nullcontext

import pytest
import torch
from helpers import SHAPES, random_esm2, random_sequence, random_stages, small_model, tokens_of
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from rd_torch import RDModel, hardware
from rd_torch.backbone import esm2
from rd_torch.backbone.packing import Packing
from rd_torch.levels import ALPHABET

PAD = ALPHABET.padding_idx
LEVELS = [*SHAPES]

each_source = pytest.mark.parametrize("predict_from", ["nested", "previous"])


def gradients(model):
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_same(ours, theirs, within):
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        scale = theirs[name].abs().max().clamp(min=1e-3)
        assert (gradient - theirs[name]).abs().max() <= within * scale, name


def weighted(embeddings, real):
    """A loss that weighs every feature of every real token differently."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(embeddings.shape, dtype=torch.float64, generator=generator).to(embeddings.dtype)
    return (embeddings * weights)[real].sum() + (embeddings[real] ** 2).mean()


@pytest.fixture
def exact_softmax(monkeypatch):
    """fair-esm's own softmax is float32 even in a float64 model."""
    monkeypatch.setattr(
        "esm.multihead_attention.utils_softmax", lambda scores, dim, onnx_trace=False: scores.softmax(dim)
    )


@each_source
def test_gradients_are_those_of_the_formula_on_fair_esms_encoders(exact_softmax, predict_from, tokens):
    backbones = {name: random_esm2(*shape, seed=k).double() for k, (name, shape) in enumerate(SHAPES.items())}
    stages = random_stages(predict_from)
    model = RDModel(copy.deepcopy(backbones), stages, predict_from=predict_from)
    nested = previous = None
    for (_, backbone), stage in zip(backbones.items(), [None, *stages], strict=True):
        last = backbone.num_layers
        raw = backbone(tokens, repr_layers=[last])["representations"][last]
        if stage is None:
            nested = raw
        else:
            source = nested if predict_from == "nested" else previous
            added = (raw - (source @ stage.W + stage.b) - stage.m) @ stage.V
            nested = torch.cat((nested, added), dim=-1)
        previous = raw
    real = tokens != PAD
    weighted(nested, real).backward()
    theirs = {
        f"backbones.{level}.{name}": parameter.grad
        for level, backbone in backbones.items()
        for name, parameter in backbone.named_parameters()
        if parameter.grad is not None
    }
    weighted(model(tokens).embeddings, real).backward()
    assert_same(gradients(model), theirs, 1e-10)


def test_a_stage_passes_gradcheck():
    stage = random_stages()[1]
    shapes = (3, stage.W.shape[0]), (3, stage.W.shape[1])
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(stage, inputs)
    source = torch.randn(3, stage.W.shape[0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stage, (*inputs, source))


@pytest.mark.capability
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_packed_and_padded_batches_have_the_same_gradients(monkeypatch, tokens, dtype):
    model = small_model().to(dtype)
    weighted(model(tokens).embeddings, tokens != PAD).backward()
    packed = gradients(model)
    model.zero_grad()
    monkeypatch.setattr(Packing, "of", Packing.padded)
    weighted(model(tokens).embeddings, tokens != PAD).backward()
    within = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    assert_same(packed, gradients(model), within)


def test_a_sequences_gradients_do_not_depend_on_its_batch():
    sequences = [random_sequence(length, length) for length in (9, 31, 30, 2)]
    model = small_model().double()
    loss = sum(weighted_alone(model(tokens_of(each)).embeddings[0]) for each in sequences)
    loss.backward()
    alone = gradients(model)
    model.zero_grad()
    out = model(tokens_of(*sequences)).embeddings
    sum(weighted_alone(row[: len(each) + 2]) for row, each in zip(out, sequences, strict=True)).backward()
    assert_same(gradients(model), alone, 1e-10)


def weighted_alone(embedding):
    return (embedding * torch.arange(embedding.numel(), dtype=embedding.dtype).view(embedding.shape)).mean()


def saved_bytes(run):
    """Bytes that autograd keeps between forward and backward, each storage once, parameters apart."""
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(kept.values())


def test_checkpointing_changes_no_gradient_and_keeps_less(tokens):
    model = small_model().train()
    outputs, gradient, kept = {}, {}, {}
    for on in (False, True):
        (model.gradient_checkpointing_enable if on else model.gradient_checkpointing_disable)()
        assert model.is_gradient_checkpointing == on
        model.zero_grad()
        held = []
        kept[on] = saved_bytes(lambda held=held: held.append(model(tokens)))
        outputs[on] = held[0].embeddings.detach()
        weighted(held[0].embeddings, tokens != PAD).backward()
        gradient[on] = gradients(model)
    assert torch.equal(outputs[True], outputs[False])
    assert_same(gradient[True], gradient[False], 1e-6)
    assert kept[True] < 0.5 * kept[False]


def test_checkpointing_leaves_attention_maps_and_inference_alone(model, tokens):
    expected = model(tokens, return_contacts=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    out = model(tokens, return_contacts=True)
    assert torch.equal(out.attentions, expected.attentions)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).embeddings, expected.embeddings)
    with pytest.raises(ValueError, match="expected no options but {'use_reentrant': False}, got"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def steps(model, tokens):
    """First and second gradients of a loss by one layer's feed-forward weights."""
    weights = [model.backbones["a"].layers[0].fc1.weight, model.backbones["a"].layers[0].fc2.weight]
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second gradients
        loss = weighted(model(tokens, width=32).embeddings, tokens != PAD)
        first = torch.autograd.grad(loss, weights, create_graph=True)
    return first, torch.autograd.grad(sum(each.square().sum() for each in first), weights)


def test_what_is_computed_again_is_what_would_have_been_kept(monkeypatch, model, tokens):
    again = []
    gelu = functional.gelu
    monkeypatch.setattr(functional, "gelu", lambda x: again.append(1) or gelu(x))
    ours = steps(model, tokens)
    # Two layers of the first backbone, and again in the backward passes where PyTorch can say who else asks.
    assert (len(again) > 2) == hardware.may_replace_saved_tensors()
    monkeypatch.setattr(esm2, "recompute", lambda *_: nullcontext())
    again.clear()
    kept = steps(model, tokens)
    assert len(again) == 2
    for mine, theirs in zip(ours, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_whoever_says_what_is_kept_is_left_to_it(monkeypatch, model, tokens):
    """`save_on_cpu` moves everything, and `torch.func`, which allows no hooks, gets its gradient."""
    kept = saved_bytes(lambda: model(tokens))
    with monkeypatch.context() as patch:
        patch.setattr(esm2, "recompute", lambda *_: nullcontext())
        assert saved_bytes(lambda: model(tokens)) == kept
    weighted(model(tokens).embeddings, tokens != PAD).backward()
    expected = gradients(model)
    model.zero_grad()
    with torch.autograd.graph.save_on_cpu():
        weighted(model(tokens).embeddings, tokens != PAD).backward()
    assert_same(gradients(model), expected, 1e-6)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters):
        return weighted(functional_call(model, parameters, (tokens,)).embeddings, tokens != PAD)

    assert_same(torch.func.grad(loss)(parameters), expected, 1e-5)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_backbones_freeze_by_level_and_by_layer():
    model, before = small_model(), trainable(small_model())
    assert model.freeze_backbones("a", "c") is model
    assert trainable(model) == {name for name in before if name.startswith("backbones.b.")}
    model = small_model().freeze_backbones("c", except_top=1)
    kept = ("backbones.a.", "backbones.b.", "backbones.c.layers.2.", "backbones.c.emb_layer_norm_after.")
    assert trainable(model) == {name for name in before if name.startswith(kept)}
    model = small_model().freeze_backbones(except_top=2)
    assert not any("embed_tokens" in name or "c.layers.0." in name for name in trainable(model))
    assert {"backbones.a.layers.0.fc1.weight", "backbones.c.layers.1.fc1.weight"} <= trainable(model)
    assert not trainable(small_model().freeze_backbones().freeze_backbones(except_top=1))  # never thaws


@pytest.mark.parametrize(
    ("levels", "top", "message"),
    [
        (("d",), 0, "expected level to be one of 'a', 'b', 'c', got 'd'"),
        ((), 3, "expected except_top from 0 to 2, the layers of level a, got 3"),
        (("c",), -1, "expected except_top from 0 to 3, the layers of level c, got -1"),
    ],
)
def test_freezing_what_is_not_there_is_refused(model, levels, top, message):
    with pytest.raises(ValueError, match=message):
        model.freeze_backbones(*levels, except_top=top)


def test_frozen_backbones_keep_no_activations(model, tokens):
    everything = saved_bytes(lambda: model(tokens))
    model.freeze_backbones(except_top=1)
    assert saved_bytes(lambda: model(tokens)) < 0.6 * everything
    model.freeze_backbones()
    head = nn.Linear(64, 1)
    embeddings = []
    kept = saved_bytes(lambda: embeddings.append(model(tokens).embeddings) or head(embeddings[0]))
    assert kept <= embeddings[0].nbytes


def test_prefixes_below_the_only_level_that_trains_stay_the_same_to_the_bit(model, tokens):
    before = model(tokens).embeddings.detach()
    model.freeze_backbones("a", "b").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        weighted(model(tokens).embeddings, tokens != PAD).backward()
        optimizer.step()
    after = model(tokens).embeddings.detach()
    assert torch.equal(after[..., :48], before[..., :48])
    assert (after[..., 48:] - before[..., 48:]).abs().max() > 0.1


def test_training_mode_changes_no_result(model, tokens):
    assert torch.equal(model.train()(tokens).embeddings, model.eval()(tokens).embeddings)
    assert model.training is False
    assert all(not module.training for module in model.modules())


def test_hooks_inside_frozen_backbones_still_train(model, tokens):
    """A steering vector that is added by a hook gets its gradient although all backbones are frozen."""
    model.freeze_backbones()
    vector = torch.zeros(64, requires_grad=True)
    model.backbones["c"].layers[0].register_forward_hook(lambda _module, _arguments, out: out + vector)
    weighted(model(tokens).embeddings, tokens != PAD).backward()
    assert vector.grad.abs().max() > 0


def test_training_biases_alone_reaches_every_one(tokens):
    model = small_model().double().freeze_backbones()
    biases = [p for name, p in model.named_parameters() if name.endswith(".bias") and "_head." not in name]
    for parameter in biases:
        parameter.requires_grad_(True)
    weighted(model(tokens).embeddings, tokens != PAD).backward()
    assert all(parameter.grad is not None for parameter in biases)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "how",
    [
        "checkpointing",  # which trains everything too
        *(pytest.param(how, marks=pytest.mark.slow) for how in ("everything", "partly frozen", "bfloat16")),
    ],
)  # fmt: skip
def test_the_compiled_model_trains_as_one_graph(how, backend, tokens):
    backbones = {"a": random_esm2(1, 32, 4), "b": random_esm2(1, 48, 4, seed=1)}
    model = RDModel(backbones, random_stages(widths={"a": 32, "b": 48})).train()
    if how == "checkpointing":
        model.gradient_checkpointing_enable()
    if how == "partly frozen":
        model.freeze_backbones("a").freeze_backbones("b", except_top=1)
    if how == "bfloat16":
        model.to(torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for batch in (tokens, tokens[:3, :9].contiguous()):  # a view would be traced anew
        model.zero_grad()
        weighted(model(batch).embeddings, batch != PAD).backward()
        expected = gradients(model)
        model.zero_grad()
        weighted(compiled(batch).embeddings, batch != PAD).backward()
        assert_same(gradients(model), expected, 0.1 if how == "bfloat16" else 2e-4)
