"""Other people's modules around a chain are saved, loaded, sharded and offloaded as any module is."""

import copy
import pickle

import accelerate
import pytest
import safetensors.torch
import torch
import transformers
from helpers import loaded_by_a_map, random_esm2, random_sequence, small_model, tokens_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrize

import rd_torch
from rd_torch import ESM2

TOKENS = tokens_of(random_sequence(12, 1), "MK<mask>VL", random_sequence(7, 2))
LABELS = torch.tensor([0.5, -1.0, 2.0])


class Theirs(nn.Module):
    """What a user writes: a chain, layers of their own, a loss; the widest level's letters take part."""

    def __init__(self, model=None, *, letters=True):
        super().__init__()
        torch.manual_seed(3)
        self.encoder = small_model() if model is None else model
        self.middle = nn.Sequential(nn.Linear(64, 8), nn.GELU(), nn.Dropout(0.0))
        self.scorer = nn.Linear(8, 1)
        self.letters = letters

    def forward(self, tokens, labels=None):
        out = self.encoder(tokens)
        mask = out.residue_mask[..., None]
        means = (out.embeddings * mask).sum(1) / mask.sum(1)
        answer = {"scores": self.scorer(self.middle(means))[:, 0]}
        if self.letters:
            answer["letters"] = out.logits
        if labels is not None:
            answer["loss"] = (answer["scores"] - labels).square().mean()
            if self.letters:
                answer["loss"] = answer["loss"] + nn.functional.cross_entropy(out.logits[:, 1], TOKENS[:, 1])
        return answer


def answers(module):
    with torch.no_grad():
        answer = module(TOKENS)
    return torch.cat((answer["scores"], answer["letters"].flatten()))


def shaken(module):
    """The module with every number changed, as training does."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def by_safetensors(state, folder):
    safetensors.torch.save_file(state, folder / "model.safetensors")
    return safetensors.torch.load_file(folder / "model.safetensors")


def by_torch(state, folder):
    torch.save(state, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=True)


CONTAINERS = [by_safetensors, by_torch]


def compiled(module):
    return torch.compile(module, backend="eager")


def data_parallel(module):
    return nn.DataParallel(module)


def averaged(module):
    return torch.optim.swa_utils.AveragedModel(module)


def copied(module):
    return copy.deepcopy(module)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def nested(module):
    return nn.ModuleDict({"first": nn.ModuleList([module])})


def swapped(module):
    """Converted by exchanging tensors in place, as newer code does, and back again."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return module.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


WRAPPERS = [lambda module: module, compiled, data_parallel, averaged, copied, pickled, nested, swapped]


def inner(module):
    """The user's module in a wrapper."""
    return next(part for part in module.modules() if isinstance(part, Theirs))


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
def test_a_module_around_a_chain_is_saved_and_loaded_in_any_wrapper(wrap, container, tmp_path):
    module = wrap(shaken(Theirs()))
    expected = answers(inner(module))
    again = wrap(Theirs().eval())
    assert not torch.equal(answers(inner(again)), expected)
    again.load_state_dict(container(module.state_dict(), tmp_path))
    assert torch.equal(answers(inner(again)), expected)


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
def test_the_tie_survives_a_step_in_any_wrapper(wrap):
    """Letters and embeddings read one table, which gets the gradients of both."""
    module = wrap(Theirs().eval())
    theirs = inner(module)
    theirs(TOKENS, LABELS)["loss"].backward()
    reference = Theirs().eval()
    reference(TOKENS, LABELS)["loss"].backward()
    for (name, ours), (_, wanted) in zip(
        theirs.named_parameters(), reference.named_parameters(), strict=True
    ):
        if wanted.grad is not None:
            torch.testing.assert_close(ours.grad, wanted.grad, msg=name)
    for backbone in theirs.encoder.backbones.values():
        assert backbone.lm_head.weight is backbone.embed_tokens.weight
        assert len({id(p) for p in backbone.parameters()}) == len(list(backbone.parameters()))
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    largest = theirs.encoder.backbones["c"]
    hidden = torch.randn(4, largest.embed_dim)
    fair_esm = random_esm2(largest.num_layers, largest.embed_dim, largest.attention_heads)
    assert not fair_esm.load_state_dict(largest.state_dict(), strict=False).unexpected_keys
    with torch.no_grad():
        assert torch.equal(largest.lm_head(hidden), fair_esm.lm_head(hidden))


def test_gradients_of_the_shared_table_are_fair_esms_in_every_row():
    fair_esm = random_esm2(2, 32, 4)
    ours = ESM2.sharing(copy.deepcopy(fair_esm))
    model = rd_torch.RDModel({"one": ours}, [])
    fair_esm(TOKENS)["logits"][:, :4].square().sum().backward()
    model(TOKENS).logits[:, :4].square().sum().backward()
    gradient = ours.embed_tokens.weight.grad
    assert gradient[model.padding_idx].abs().max() > 0, "the head's, for no padding is embedded"
    torch.testing.assert_close(gradient, fair_esm.embed_tokens.weight.grad, rtol=1e-4, atol=1e-4)


def test_state_dicts_of_fair_esm_load_and_untied_ones_are_refused():
    fair_esm = random_esm2(2, 32, 4)
    ours = ESM2(2, 32, 4)
    ours.load_state_dict(fair_esm.state_dict())
    assert torch.equal(ours.lm_head.weight, fair_esm.lm_head.weight)
    state = fair_esm.state_dict()
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(RuntimeError, match="expected lm_head.weight to be embed_tokens.weight"):
        ours.load_state_dict(state)
    ours.load_state_dict(fair_esm.state_dict(), assign=True)
    assert ours.lm_head.weight is ours.embed_tokens.weight


class Tripled(nn.Module):
    def forward(self, weight):
        return 3 * weight


def test_a_parametrized_table_acts_on_letters_too(tmp_path):
    module = Theirs().eval()
    for backbone in module.encoder.backbones.values():
        parametrize.register_parametrization(backbone.embed_tokens, "weight", Tripled())
    expected = Theirs().eval()
    with torch.no_grad():
        for backbone in expected.encoder.backbones.values():
            backbone.embed_tokens.weight.mul_(3)
    torch.testing.assert_close(answers(module), answers(expected))
    state = by_safetensors(shaken(module).state_dict(), tmp_path)
    again = Theirs().eval()
    for backbone in again.encoder.backbones.values():
        parametrize.register_parametrization(backbone.embed_tokens, "weight", Tripled())
    again.load_state_dict(state)
    assert torch.equal(answers(again), answers(module))


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, place):
        return {"tokens": TOKENS[place % 3], "labels": LABELS[place % 3]}


def test_the_trainer_saves_such_a_module_goes_on_and_loads_the_best(tmp_path):
    arguments = transformers.TrainingArguments(
        tmp_path,
        per_device_train_batch_size=2,
        num_train_epochs=2,
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        label_names=["labels"],
    )
    module = Theirs(letters=False)
    trainer = transformers.Trainer(module, arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    best = trainer.state.best_model_checkpoint
    state = safetensors.torch.load_file(f"{best}/model.safetensors")
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in state.items())
    again = transformers.Trainer(Theirs(letters=False), arguments, train_dataset=Rows(), eval_dataset=Rows())
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    for name, tensor in again.model.state_dict().items():
        torch.testing.assert_close(tensor, module.state_dict()[name], msg=name)


PEFT_WAYS = {
    "adapters": {"target_modules": ["q_proj", "v_proj"]},
    "adapters and layers trained whole": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["middle", "scorer"],
    },
    "the table trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "scorer"]},
    "adapters on the table": {"target_modules": ["embed_tokens", "fc1"]},
    "every linear layer": {"target_modules": "all-linear"},
    "with biases": {"target_modules": ["k_proj"], "bias": "all"},
}


@pytest.mark.filterwarnings("ignore:.*embedding")
@pytest.mark.parametrize("options", PEFT_WAYS.values(), ids=[*PEFT_WAYS])
def test_peft_saves_loads_and_merges_such_a_module_in_all_its_ways(options, tmp_path):
    module = get_peft_model(Theirs(), LoraConfig(r=4, **options))
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.05)
    before = answers(Theirs().eval())
    for _ in range(2):
        optimizer.zero_grad()
        module(TOKENS, LABELS)["loss"].backward()
        optimizer.step()
    module.eval()
    expected = answers(module)
    assert (expected - before).abs().max() > 1e-3
    module.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Theirs(), tmp_path).eval()
    assert torch.equal(answers(again), expected)
    merged = module.merge_and_unload()
    torch.testing.assert_close(answers(merged), expected, rtol=1e-4, atol=1e-4)
    final = Theirs().eval()
    final.load_state_dict(by_safetensors(merged.state_dict(), tmp_path))
    torch.testing.assert_close(answers(final), expected, rtol=1e-4, atol=1e-4)


def cpu_offloaded(module, folder):
    return accelerate.cpu_offload(module, execution_device="cpu")


def with_buffers_offloaded(module, folder):
    return accelerate.cpu_offload(module, execution_device="cpu", offload_buffers=True)


def disk_offloaded(module, folder):
    return accelerate.disk_offload(module, folder, execution_device="cpu", offload_buffers=True)


def dispatched(module, folder):
    """One level, the maps and the user's own layers on disk, the others in memory."""
    places = {name: "cpu" for name, _ in module.named_children() if name != "encoder"}
    places |= {"encoder.backbones.a": "cpu", "encoder.backbones.b": "disk", "encoder.stages": "disk"}
    places |= {"encoder.backbones.c": "cpu", "middle": "disk"}
    return accelerate.dispatch_model(module, places, offload_dir=folder)


def by_whole_layers(module, folder):
    """Layers are fetched as a whole, as whoever names them as blocks has it."""
    return accelerate.cpu_offload(
        module, execution_device="cpu", preload_module_classes=["TransformerLayer", "LMHead"]
    )


def placed_by_a_map(module, folder):
    return loaded_by_a_map(module, folder, Theirs, ["TransformerLayer"])


def fetched_by_hooks(module, folder):
    """Whoever writes such hooks by hand: weights are there within a module's own call, and nowhere else."""
    for part in list(module.modules()):
        kept = dict(part._parameters)
        if not kept:
            continue

        def fetch(part, _, kept=kept):
            part._parameters.update(kept)

        def drop(part, *_, kept=kept):
            part._parameters.update(
                {
                    name: nn.Parameter(each.detach().to("meta"))
                    for name, each in kept.items()
                    if each is not None
                }
            )

        part.register_forward_pre_hook(fetch)
        part.register_forward_hook(drop)
        drop(part)
    return module


OFFLOADED = [
    cpu_offloaded,
    with_buffers_offloaded,
    disk_offloaded,
    dispatched,
    by_whole_layers,
    placed_by_a_map,
    fetched_by_hooks,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offload", OFFLOADED, ids=lambda offload: offload.__name__)
def test_weights_that_are_fetched_for_each_call_give_the_same_bits(offload, dtype, tmp_path):
    module = shaken(Theirs())
    if offload is not placed_by_a_map:
        module.encoder.to(dtype)
    soft = nn.functional.one_hot(TOKENS, 33).float()
    expected = answers(module)
    with torch.no_grad():  # as below, for a CPU that multiplies in bfloat16 has a kernel for inference alone
        contacts = module.encoder.predict_contacts(TOKENS)
        softly = module.encoder(soft, width=48).embeddings
    module = offload(module, tmp_path)
    assert any(parameter.is_meta for parameter in module.parameters())
    assert torch.equal(answers(module), expected)
    with torch.no_grad():
        assert torch.equal(module.encoder.predict_contacts(TOKENS), contacts)
        assert torch.equal(module.encoder(soft, width=48).embeddings, softly)


@pytest.mark.parametrize("offload", [cpu_offloaded, disk_offloaded])
def test_one_load_of_a_layer_serves_the_whole_batch(offload, tmp_path, monkeypatch):
    """Although without hooks a layer runs chunk by chunk."""
    monkeypatch.setattr("rd_torch.backbone.packing.CHUNK_TOKENS", 8)
    monkeypatch.setattr("rd_torch.backbone.packing.CHUNK_FEATURES", 8)
    calls = []

    def counted(linear):
        forward = linear.forward
        linear.forward = lambda x: calls.append(1) or forward(x)  # before accelerate puts its own around

    module = shaken(Theirs())
    with torch.no_grad():
        expected = module.encoder(TOKENS).embeddings
    for layer in module.encoder.backbones["c"].layers:
        counted(layer.fc1)
    with torch.no_grad():
        module.encoder(TOKENS)
    layers = len(module.encoder.backbones["c"].layers)
    assert len(calls) > layers, "chunk by chunk"
    calls.clear()
    module = offload(module, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(module.encoder(TOKENS).embeddings, expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == layers


@pytest.mark.parametrize("offload", [cpu_offloaded, with_buffers_offloaded, disk_offloaded, by_whole_layers])
def test_an_offloaded_chain_embeds_is_saved_and_fitted_as_any(offload, tmp_path):
    whole = small_model()
    proteins = {f"P{k}": random_sequence(5 + 3 * k, k) for k in range(9)}
    expected = rd_torch.embed(whole, list(proteins.values()))
    chain = offload(small_model(), tmp_path / "offloaded")
    assert chain.fingerprint() == whole.fingerprint()
    assert all(
        (ours == theirs).all()
        for ours, theirs in zip(rd_torch.embed(chain, list(proteins.values())), expected, strict=True)
    )
    rd_torch.embed_to_store(chain, proteins.items(), tmp_path / "out.h5", pool="none")
    rd_torch.embed_to_store(whole, proteins.items(), tmp_path / "out.h5", pool="none")  # done is done
    chain.save_pretrained(tmp_path / "saved")
    again = rd_torch.RDModel.from_pretrained(tmp_path / "saved")
    assert again.fingerprint() == whole.fingerprint()
    levels = {"a": 32, "b": 48}
    fitted = [
        rd_torch.fit({name: model.backbones[name] for name in levels}, list(proteins.values()))
        for model in (chain, whole)
    ]
    for ours, theirs in zip(fitted[0].stages.buffers(), fitted[1].stages.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_chain_without_numbers_says_so():
    chain = small_model().to("meta")
    with pytest.raises(ValueError, match="expected a module with numbers, got .* on the meta device"):
        chain.fingerprint()
