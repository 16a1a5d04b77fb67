"""PEFT, Lightning, transformers' Trainer and accelerate around a chain: nothing but what they do anyway."""

import copy
import itertools
import warnings

import accelerate
import lightning
import pytest
import torch
import transformers
from helpers import random_sequence, small_model, tokens_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader, IterableDataset

from rd_torch import Predictor, RDModel, SequenceHead

SIZE, STEPS, RATE = 2, 5, 1e-3
PROTEINS = [
    {"sequence": random_sequence(5 + 3 * k, k), "label": (-1.0) ** k + 0.1 * k} for k in range(SIZE * STEPS)
]
EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def collate(proteins):
    return {
        "tokens": tokens_of(*(each["sequence"] for each in proteins)),
        "labels": torch.tensor([each["label"] for each in proteins]),
    }


def loader():
    return DataLoader(PROTEINS, SIZE, collate_fn=collate)


def predictor():
    torch.manual_seed(0)
    return Predictor(small_model().train(), SequenceHead(64, 1, task="regression"))


def optimizer_of(module):
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=RATE)


@pytest.fixture(scope="module")
def expected():
    """Parameters after five steps of a plain loop."""
    module = predictor()
    before = copy.deepcopy(module.state_dict())
    optimizer = optimizer_of(module)
    for batch in loader():
        optimizer.zero_grad()
        module(**batch)["loss"].backward()
        optimizer.step()
    after = module.state_dict()
    assert (after["head.out.weight"] - before["head.out.weight"]).abs().max() > RATE
    return after


def assert_equal(module, expected):
    assert module.state_dict().keys() == expected.keys()
    for name, tensor in module.state_dict().items():
        assert (tensor - expected[name]).abs().max() <= 1e-6, name


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Lit(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.predictor = predictor()

    def training_step(self, batch):
        return self.predictor(**batch)["loss"]

    def configure_optimizers(self):
        return optimizer_of(self)


def test_lightning_trains_as_a_plain_loop(expected):
    module = Lit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few workers, short epochs
        lightning.Trainer(max_steps=STEPS, **QUIET).fit(module, loader())
    assert_equal(module.predictor, expected)


class InOrder(IterableDataset):
    """The proteins in their order, which Trainer shuffles otherwise."""

    def __iter__(self):
        return iter(PROTEINS)


def arguments(folder, **options):
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=SIZE,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_of_transformers_trains_as_a_plain_loop(expected, tmp_path, checkpointing):
    module = predictor()
    trainer = transformers.Trainer(
        module,
        arguments(tmp_path, save_strategy="no", gradient_checkpointing=checkpointing),
        train_dataset=InOrder(),
        data_collator=collate,
        optimizers=(optimizer_of(module), None),
    )
    trainer.train()
    assert module.model.is_gradient_checkpointing == checkpointing
    assert_equal(module, expected)


def test_the_trainer_saves_evaluates_and_goes_on(expected, tmp_path):
    def trainer(module):
        return transformers.Trainer(
            module,
            arguments(tmp_path, save_strategy="steps", save_steps=3),
            train_dataset=InOrder(),
            eval_dataset=PROTEINS[:4],
            data_collator=collate,
            optimizers=(optimizer_of(module), None),
        )

    trainer(predictor()).train()
    again = predictor()
    resumed = trainer(again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal(again, expected)
    assert resumed.evaluate()["eval_loss"] > 0


def test_accelerate_trains_as_a_plain_loop(expected, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    module = predictor()
    module, optimizer, batches = accelerator.prepare(module, optimizer_of(module), loader())
    for batch in batches:
        optimizer.zero_grad()
        accelerator.backward(module(**batch)["loss"])
        optimizer.step()
    assert_equal(accelerator.unwrap_model(module), expected)
    accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        module.head.out.weight.zero_()
    accelerator.load_state(str(tmp_path))
    assert_equal(accelerator.unwrap_model(module), expected)


LORA = {
    "two projections of one level": {
        "target_modules": r"backbones\.c\..*\.(q_proj|v_proj)",
        "count": 2 * 3,
    },
    "two projections everywhere": {"target_modules": ["q_proj", "v_proj"], "count": 2 * 7},
    "every linear layer": {"target_modules": EVERY_LINEAR, "count": 6 * 7},
    "the top layer of two levels": {
        "target_modules": r"backbones\.(b\.layers\.1|c\.layers\.2)\..*(q|v)_proj",
        "count": 4,
    },
}


def with_lora(target_modules, **options):
    torch.manual_seed(1)
    return get_peft_model(small_model(), LoraConfig(r=4, target_modules=target_modules, **options))


def train_some(model, tokens):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens).embeddings.square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("case", LORA.values(), ids=[*LORA])
def test_lora_trains_what_an_ordinary_config_names_and_merges(case, tokens, tmp_path):
    model = with_lora(case["target_modules"], lora_dropout=0.1)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 2 * case["count"]
    assert all(".lora_" in name for name in names)
    before = small_model()(tokens).embeddings.detach()
    train_some(model, tokens)
    with torch.no_grad():
        after = model(tokens).embeddings
    assert (after - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(small_model(), tmp_path / "adapter")
    merged = model.merge_and_unload()
    assert type(merged) is RDModel
    assert merged.state_dict().keys() == small_model().state_dict().keys()
    merged.save_pretrained(tmp_path / "merged")
    again = RDModel.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        for each in (loaded, merged, again):
            torch.testing.assert_close(each(tokens).embeddings, after, rtol=0, atol=2e-5)


def test_a_merged_model_compiles_as_one_graph(tokens):
    model = train_some(with_lora(EVERY_LINEAR), tokens)
    with torch.no_grad():
        after = model(tokens).embeddings
        compiled = torch.compile(model.merge_and_unload(), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(tokens).embeddings, after, rtol=0, atol=2e-5)


def test_lora_of_one_level_leaves_the_prefixes_below_it(tokens):
    model = train_some(with_lora(LORA["two projections of one level"]["target_modules"]), tokens)
    before = small_model()(tokens).embeddings
    after = model(tokens).embeddings
    assert torch.equal(after[..., :48], before[..., :48])
    assert (after[..., 48:] - before[..., 48:]).abs().max() > 1e-3


def test_lora_on_half_precision_backbones_trains_in_float32(tokens):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(small_model().to(torch.bfloat16), config)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    before = model(tokens).embeddings.detach()
    train_some(model, tokens)
    assert (model(tokens).embeddings - before).abs().max() > 1e-2


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match=r"Target modules .*qproj.* not found in the base model"):
        with_lora(["qproj"])


def test_a_predictor_around_peft_trains_adapters_and_head_alone(tokens):
    model = with_lora(["q_proj", "v_proj"])
    module = Predictor(model, SequenceHead(64, 1, task="regression"))
    labels = torch.arange(len(tokens), dtype=torch.float32)
    module(tokens, labels)["loss"].backward()
    trained = {name for name, p in module.named_parameters() if p.grad is not None}
    assert all(".lora_" in name or name.startswith("head.") for name in trained)
    assert len(trained) == 2 * 2 * 7 + 2
    narrow = Predictor(model, SequenceHead(48, 1, task="regression"))
    narrow(tokens, labels)["loss"].backward()
    assert not any("backbones.c" in name for name, _ in narrow.named_parameters())


def test_batches_reach_every_framework_in_the_same_order():
    batches = list(loader())
    assert len(batches) == STEPS
    first = list(itertools.chain.from_iterable(batch["labels"].tolist() for batch in batches))
    assert first == pytest.approx([each["label"] for each in PROTEINS])
