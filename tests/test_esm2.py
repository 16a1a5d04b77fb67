"""The oracle is fair-esm 2.0.0 in float32 with random weights, the same tensors on both sides."""

import pytest
import torch
from helpers import random_esm2, random_sequence, tokens_of
from torch import nn
from torch.nn import functional

from rd_torch import ESM2, ESM2_LEVELS, Level, RDModel, hardware
from rd_torch.backbone import linear as layers
from rd_torch.backbone.attention import RotaryEmbedding
from rd_torch.backbone.linear import project
from rd_torch.backbone.packing import Packing
from rd_torch.levels import ALPHABET

TOLERANCE = 2e-5
PAD, MASK = ALPHABET.padding_idx, ALPHABET.mask_idx
SHAPES = {name: (level.num_layers, level.width, level.attention_heads) for name, level in ESM2_LEVELS.items()}
SHAPES |= {f"{name}, two layers": (2, *SHAPES[name][1:]) for name in ("3B", "15B")}
SHAPES["15B, one layer"] = (1, *SHAPES["15B"][1:])
SMALL = (3, 32, 4)

BATCHES = {
    "one residue": ["M"],
    "unequal lengths": [random_sequence(length, length) for length in (23, 41, 1, 40, 7)],
    "several masks": ["MK<mask>AY<mask><mask>A", "<mask>" + random_sequence(30), "MKTAYIAK"],
    "only masks": ["<mask>" * 9, "MKV"],
    "rare residues": ["MXBUZOXXA", "OUZ", "B"],
}
LONG = {"1,500 residues": [random_sequence(1500)], "long and short": [random_sequence(1500, 1), "MKTAYIA"]}
TALL = {"256 residues": [random_sequence(256)], "unequal lengths": [random_sequence(90), "MKT<mask>XBA"]}


def sizes(*fast, slow=()):
    params = [*fast, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]
    return pytest.mark.parametrize("reference", params, indirect=True, scope="module")


def batches(cases):
    return pytest.mark.parametrize("tokens", [tokens_of(*case) for case in cases.values()], ids=[*cases])


@pytest.fixture(scope="module")
def reference(request):
    return random_esm2(*SHAPES[request.param])


def states(module, run, take):
    """What every layer and the last LayerNorm return, each as `take` makes it of the output."""
    taken = []
    parts = (*module.layers, module.emb_layer_norm_after)
    hooks = [part.register_forward_hook(lambda *call: taken.append(take(call[-1]))) for part in parts]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return taken


def states_of_fair_esm(module, tokens):
    """At real tokens, `(tokens, width)`."""
    real = tokens != PAD

    def rows_first(out):
        return (out[0] if isinstance(out, tuple) else out).transpose(0, 1)[real]

    return states(module, lambda: module(tokens), rows_first)


def states_of_ours(module, tokens, make=Packing.of):
    real = tokens != PAD
    packing = make(real)
    return states(module, lambda: module(tokens, packing), lambda out: packing.unpack(out)[real])


def embed(module, tokens):
    """`(batch, time, width)` final hidden states."""
    packing = Packing.of(tokens != PAD)
    return packing.unpack(module(tokens, packing))


def error(ours, theirs):
    """Largest difference in standard deviations of the oracle."""
    return ((ours - theirs).abs().max() / theirs.std()).item()


def assert_every_layer_agrees(reference, tokens, **options):
    ours, theirs = (
        states_of_ours(ESM2.sharing(reference), tokens, **options),
        states_of_fair_esm(reference, tokens),
    )
    errors = [error(mine, other) for mine, other in zip(ours, theirs, strict=True)]
    assert len(errors) == reference.num_layers + 1
    assert max(errors) < TOLERANCE, errors


@batches(BATCHES)
@sizes("8M", "3B, two layers", "15B, one layer", slow=["35M", "150M", "650M", "15B, two layers"])
def test_every_hidden_state_is_fair_esms(reference, tokens):
    assert_every_layer_agrees(reference, tokens)


@batches(LONG)
@sizes("8M", slow=["35M", "150M", "650M", "3B, two layers", "15B, two layers"])
def test_every_hidden_state_of_long_sequences_is_fair_esms(reference, tokens):
    assert_every_layer_agrees(reference, tokens)


@batches(TALL)
@sizes("8M", "3B, two layers", slow=["35M", "150M", "650M"])
def test_logits_attentions_and_contacts_are_fair_esms(reference, tokens):
    with torch.no_grad():
        theirs = reference(tokens, return_contacts=True)
        ours = RDModel({"only": reference}, []).eval()(tokens, return_contacts=True)
    real = tokens != PAD
    assert error(ours.logits[real], theirs["logits"][real]) < TOLERANCE
    torch.testing.assert_close(ours.attentions, theirs["attentions"], rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.contacts, theirs["contacts"], rtol=0, atol=TOLERANCE)
    assert theirs["contacts"].std() > 0.02


def padded_at(place, sequences, time):
    """`(batch, time)` tokens whose padding stands at the left, at the right, or anywhere."""
    tokens = torch.full((len(sequences), time), PAD)
    for row, sequence in zip(tokens, sequences, strict=True):
        ids = tokens_of(sequence)[0]
        shuffled = torch.randperm(time, generator=torch.Generator().manual_seed(len(ids)))
        columns = {"right": torch.arange(time), "left": torch.arange(time).flip(0), "inside": shuffled}[place]
        row[columns[: len(ids)].sort().values] = ids
    return tokens


@pytest.mark.parametrize("make", [Packing.of, Packing.padded], ids=["packed", "padded"])
@pytest.mark.parametrize("place", ["left", "inside", "right"])
def test_padding_may_stand_anywhere(place, make):
    tokens = padded_at(place, [random_sequence(25), "MK<mask>", random_sequence(38)], 40)
    assert_every_layer_agrees(random_esm2(*SMALL), tokens, make=make)


@sizes("8M", slow=["150M"])
def test_an_embedding_does_not_depend_on_its_batch(reference):
    module = ESM2.sharing(reference)
    sequences = ["M", random_sequence(70), "MK<mask>AYIAK<mask>", random_sequence(69), random_sequence(200)]
    with torch.no_grad():
        together = embed(module, tokens_of(*sequences))
        for row, sequence in zip(together, sequences, strict=True):
            alone = embed(module, tokens_of(sequence))[0]
            assert error(row[: len(alone)], alone) < TOLERANCE
            assert not row[len(alone) :].any()


def test_token_dropout_zeroes_masks_and_scales_the_rest_by_the_share_kept():
    module = ESM2.sharing(random_esm2(*SMALL)).double()
    tokens = tokens_of("MK<mask>AY<mask>", "ACDEFGHIKL", "<mask>")
    entered = []
    module.layers[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    packing = Packing.of(tokens != PAD)
    module(tokens, packing)
    shares_masked = torch.tensor([2 / 8, 0, 1 / 3], dtype=torch.float64)
    expected = module.embed_tokens.weight[tokens] * 0.88 / (1 - shares_masked)[:, None, None]
    expected[(tokens == MASK) | (tokens == PAD)] = 0
    torch.testing.assert_close(packing.unpack(entered[0]), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("make", [Packing.of, Packing.padded], ids=["packed", "padded"])
def test_a_row_of_only_masks_enters_as_zeros_and_stays_finite(make):
    module = ESM2.sharing(random_esm2(*SMALL))
    tokens = torch.tensor([[MASK] * 6, [0, 5, 6, 2, PAD, PAD], [PAD] * 6])
    packing, entered = make(tokens != PAD), []
    module.layers[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    out = packing.unpack(module(tokens, packing))
    assert not packing.unpack(entered[0])[0].any()
    assert out.isfinite().all()
    assert not out[2].any()


def test_inv_freq_comes_from_the_checkpoint():
    tokens = tokens_of(random_sequence(300))
    published, fresh = random_esm2(*SMALL), random_esm2(*SMALL)
    for layer in fresh.layers:
        layer.self_attn.rot_emb = type(layer.self_attn.rot_emb)(8)
    assert_every_layer_agrees(published, tokens)
    assert_every_layer_agrees(fresh, tokens)
    outs = [states_of_ours(ESM2.sharing(module), tokens)[-1] for module in (published, fresh)]
    assert error(*outs) > 50 * TOLERANCE


def test_layers_that_disagree_on_inv_freq_are_refused():
    tensors = random_esm2(*SMALL).state_dict()
    tensors["layers.1.self_attn.rot_emb.inv_freq"] = tensors["layers.1.self_attn.rot_emb.inv_freq"] * 1.01
    with pytest.raises(ValueError, match="expected one inv_freq for all layers of level tiny, got several"):
        ESM2.from_tensors(Level("tiny", *SMALL), tensors)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_inv_freq_never_passes_through_a_half_type(half):
    module = ESM2.sharing(random_esm2(*SMALL))
    exact = 10_000.0 ** -(torch.arange(4) / 4 + 0.01)
    for layer in module.layers:
        layer.self_attn.rot_emb.inv_freq = exact.clone()
    for converted in (module.to(half), module.half(), module.float()):
        assert all(torch.equal(layer.self_attn.rot_emb.inv_freq, exact) for layer in converted.layers)
    assert module.embed_tokens.weight.dtype == torch.float32


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_tensors_that_come_in_half_precision_have_their_angles_in_float32(half):
    module = ESM2.sharing(random_esm2(*SMALL).to(half))
    cos, _ = module.layers[0].self_attn.rot_emb(torch.arange(1502))
    assert cos.dtype == torch.float32
    assert len(cos.flatten(1).unique(dim=0)) == 1502


def test_a_double_model_equals_fair_esms_in_float64(monkeypatch):

    def exact(scores, dim, onnx_trace=False):
        return scores.softmax(dim)

    monkeypatch.setattr("esm.multihead_attention.utils_softmax", exact)  # its own is always float32
    reference = random_esm2(*SMALL).double()
    tokens = tokens_of(random_sequence(50), "MK<mask>A", "M")
    layers = zip(
        states_of_ours(ESM2.sharing(reference), tokens), states_of_fair_esm(reference, tokens), strict=True
    )
    assert max(error(ours, theirs) for ours, theirs in layers) < 1e-12


def test_layers_that_share_one_inv_freq_tensor_can_be_saved(tmp_path):
    tensors = random_esm2(*SMALL).state_dict()
    one = tensors["layers.0.self_attn.rot_emb.inv_freq"]
    shared = {name: one if name.endswith("inv_freq") else part for name, part in tensors.items()}
    RDModel({"tiny": ESM2.from_tensors(Level("tiny", *SMALL), shared)}, []).save_pretrained(tmp_path)
    again = RDModel.from_pretrained(tmp_path).backbones["tiny"]
    assert all(torch.equal(layer.self_attn.rot_emb.inv_freq, one) for layer in again.layers)


def test_a_state_dict_that_is_assigned_leaves_the_head_tied():
    module, other = ESM2(*SMALL), ESM2(*SMALL)
    module.load_state_dict(other.state_dict(), assign=True)
    assert module.lm_head.weight is module.embed_tokens.weight


def test_a_double_model_has_its_angles_in_float64():
    rotary = RotaryEmbedding(16).double()
    assert rotary.inv_freq.dtype == torch.float64
    positions = torch.tensor([0, 1, 2**24 + 1])
    cos, sin = rotary(positions)
    angles = positions[:, None, None].double() * rotary.inv_freq
    assert torch.equal(cos, torch.cat((angles.cos(), angles.cos()), -1))
    assert torch.equal(sin, torch.cat((-angles.sin(), angles.sin()), -1))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_half_model_tells_1500_positions_apart(half):
    module = ESM2.sharing(random_esm2(*SMALL)).to(half)
    cos, sin = module.layers[0].self_attn.rot_emb(torch.arange(1502))
    assert cos.dtype == sin.dtype == torch.float32
    assert not torch.equal(cos[1023], cos[1024])
    assert len(torch.cat((cos, sin), -1).flatten(1).unique(dim=0)) == 1502
    out = embed(module, tokens_of("A" * 1500))
    assert out.dtype == torch.float32
    assert out.isfinite().all()


def test_sharing_shares_storage_and_keeps_what_is_trainable():
    reference = random_esm2(*SMALL)
    reference.layers[0].requires_grad_(False)
    reference.contact_head.requires_grad_(False)
    trainable = {name: parameter.requires_grad for name, parameter in reference.named_parameters()}
    ours, theirs = ESM2.sharing(reference), reference.state_dict()
    assert theirs.pop("lm_head.weight") is not None  # the embeddings' second name
    assert ours.state_dict().keys() == theirs.keys()
    assert all(ours.state_dict()[name].data_ptr() == theirs[name].data_ptr() for name in theirs)
    assert {name: parameter.requires_grad for name, parameter in ours.named_parameters()} == trainable
    assert {name: parameter.requires_grad for name, parameter in reference.named_parameters()} == trainable
    assert not ours.training
    assert ESM2.sharing(reference.train()).training
    assert ESM2.sharing(ours) is ours


def test_tensors_name_the_tied_weight_once_and_build_the_same_module():
    module = ESM2.sharing(random_esm2(*SMALL))
    tensors = module.tensors()
    again = ESM2.from_tensors(Level("tiny", *SMALL), tensors)
    assert "lm_head.weight" not in tensors
    assert again.lm_head.weight is again.embed_tokens.weight
    assert all(torch.equal(part, module.state_dict()[name]) for name, part in again.state_dict().items())


def test_another_kind_of_module_is_refused():
    with pytest.raises(TypeError, match=r"expected a backbone of rd_torch or an esm.ESM2, got Linear"):
        ESM2.sharing(nn.Linear(2, 2))


def test_a_subclass_of_fair_esms_is_shared_and_a_namesake_is_refused():
    reference = random_esm2(*SMALL)
    parent = type(reference)
    reference.__class__ = type("Tuned", (parent,), {"__module__": "elsewhere"})
    assert ESM2.sharing(reference).embed_tokens.weight is reference.embed_tokens.weight
    namesake = type("ESM2", (nn.Module,), {"__module__": "esm.models.esmc"})()
    with pytest.raises(TypeError, match=r"expected a backbone of rd_torch or an esm.ESM2, got ESM2"):
        ESM2.sharing(namesake)


@pytest.mark.parametrize("change", [{"layers.0.fc1.bias": None}, {"layers.0.fc1.bias": 7}, {"surplus": 7}])
def test_tensors_of_another_shape_or_name_are_refused(change):
    tensors = random_esm2(*SMALL).state_dict()
    for name, size in change.items():
        tensors[name] = torch.zeros(size or 0)
        if size is None:
            del tensors[name]
    with pytest.raises(ValueError, match="expected the tensors of level tiny, got others"):
        ESM2.from_tensors(Level("tiny", *SMALL), tensors)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_as_one_graph_equals_eager(backend):
    module = ESM2.sharing(random_esm2(*SMALL))
    tokens = padded_at("right", ["M", random_sequence(20), "MK<mask>", "<mask>" * 5], 24)
    with torch.no_grad():
        compiled = torch.compile(lambda batch: embed(module, batch), fullgraph=True, backend=backend)
        assert error(compiled(tokens), embed(module, tokens)) < TOLERANCE


def test_autocast_to_bfloat16_stays_near_float32():
    module = ESM2.sharing(random_esm2(*SMALL))
    tokens = tokens_of(random_sequence(50), "MK<mask>", "M")
    with torch.no_grad():
        exact = embed(module, tokens)
        with torch.autocast("cpu", torch.bfloat16):
            out = embed(module, tokens)
    assert out.isfinite().all()
    assert 0 < (out - exact).std() / exact.std() < 0.03


ONEDNN, HAS_ONEDNN = torch.ops.mkldnn._linear_pointwise, hardware.onednn_has


def multiply(x, weight, bias, *rest):
    """oneDNN's product; where this CPU has none of the dtype, what stands in for it."""
    return ONEDNN(x, weight, bias, *rest) if HAS_ONEDNN(x.dtype) else functional.linear(x, weight, bias)


@pytest.fixture
def products(monkeypatch):
    """Counts the layers that oneDNN multiplied, on a CPU where it has all products but those of float64."""
    calls = []
    monkeypatch.setattr(hardware, "onednn_has", lambda dtype: dtype != torch.float64)
    monkeypatch.setattr(layers, "SMALL_PRODUCT", 0)
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda *call: calls.append(call[0].dtype) or multiply(*call)
    )
    return calls


with_and_without_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


@pytest.mark.capability
@pytest.mark.parametrize("has_onednn", [True, False], ids=["oneDNN", "PyTorch"])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 300])
@with_and_without_bias
def test_a_linear_layer_is_the_formula_and_so_are_its_gradients(
    products, monkeypatch, bias, tokens, dtype, within, has_onednn
):
    monkeypatch.setattr(hardware, "onednn_has", lambda _: has_onednn)
    layer, x = nn.Linear(64, 48, bias=bias).to(dtype), torch.randn(tokens, 64, dtype=dtype)
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    with torch.no_grad():
        torch.testing.assert_close(project(layer, x).double(), exact, atol=within, rtol=within)
    assert products == has_onednn * [dtype]
    trained = project(layer, x.requires_grad_())
    torch.testing.assert_close(trained.double(), exact, atol=within, rtol=within)
    weights = torch.randn(trained.shape).to(dtype)
    (trained * weights).sum().backward()
    assert products == has_onednn * 4 * [dtype]  # the last two are the gradients
    exact = {
        "x": (x.grad, weights.double() @ layer.weight.double()),
        "weight": (layer.weight.grad, weights.double().T @ x.double()),
    }
    if bias:
        exact["bias"] = (layer.bias.grad, weights.double().sum(0))
    for name, (gradient, expected) in exact.items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(gradient.double(), expected, atol=within * scale, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float32, [False, True]), (torch.bfloat16, [True, True])]
)
@pytest.mark.capability
def test_small_products_in_float32_are_pytorchs(products, monkeypatch, dtype, expected):
    monkeypatch.setattr(layers, "SMALL_PRODUCT", 8 * 64 * 48)
    layer = nn.Linear(64, 48).to(dtype).requires_grad_(False)
    got = []
    for tokens in (7, 8):
        x = torch.randn(tokens, 64, dtype=dtype)
        exact = x.double() @ layer.weight.double().T + layer.bias.double()
        torch.testing.assert_close(project(layer, x).double(), exact, atol=2e-2, rtol=2e-2)
        got.append(bool(products))
        products.clear()
    assert got == [dtype == torch.bfloat16, True]


@pytest.mark.parametrize("frozen", ["weight", "bias", "x", "weight and bias"])
def test_a_linear_layer_keeps_what_gradients_need_and_no_more(products, frozen):
    layer, x = nn.Linear(64, 48), torch.randn(7, 64)
    wanted = {"x": x, "weight": layer.weight, "bias": layer.bias}
    for name, tensor in wanted.items():
        tensor.requires_grad_(name not in frozen.split(" and "))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        out = project(layer, x)
    sizes = {"weight": x.numel() * layer.weight.requires_grad, "x": layer.weight.numel() * x.requires_grad}
    assert sum(tensor.numel() for tensor in kept) == sum(sizes.values())
    out.sum().backward()
    assert [name for name, tensor in wanted.items() if tensor.grad is None] == frozen.split(" and ")


@with_and_without_bias
def test_a_linear_layer_has_gradients_of_gradients(products, bias):
    layer, x = nn.Linear(16, 8, bias=bias), torch.randn(5, 16, requires_grad=True)
    slopes = {}
    for name, run in (
        ("ours", lambda x: project(layer, x)),
        ("exact", lambda x: x @ layer.weight.T + (layer.bias if bias else 0)),
    ):
        (first,) = torch.autograd.grad(run(x).tanh().sum(), x, create_graph=True)
        slopes[name] = torch.autograd.grad(first.square().sum(), (x, layer.weight))
    assert products
    torch.testing.assert_close(slopes["ours"], slopes["exact"])


@with_and_without_bias
def test_a_frozen_layer_multiplies_by_onednn_although_gradients_are_on(products, bias):
    layer, x = nn.Linear(64, 48, bias=bias).requires_grad_(False), torch.randn(7, 64)
    out = project(layer, x)
    assert len(products) == 1
    assert not out.requires_grad
    torch.testing.assert_close(out, layer(x))


@pytest.mark.capability
def test_a_frozen_backbone_multiplies_by_onednn_although_others_train(products):
    module = ESM2.sharing(random_esm2(*SMALL)).requires_grad_(False)
    embed(module, tokens_of("MKV"))
    assert len(products) == 6 * SMALL[0]
    with torch.autocast("cpu", torch.bfloat16):
        embed(module, tokens_of("MKV"))
    assert len(products) == 6 * SMALL[0]
