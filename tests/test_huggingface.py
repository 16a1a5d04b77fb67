"""Code for transformers' ESM-2 runs on a chain; the line that makes the model is all that differs."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
import transformers
from files import transformers_model
from helpers import random_esm2, random_sequence, small_model, tokens_of
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers.modeling_outputs import ModelOutput

import rd_torch
from rd_torch import (
    RDModel,
    TransformersEncoder,
    TransformersForMaskedLM,
    TransformersForSequenceClassification,
    TransformersForTokenClassification,
)

SEQUENCES = [random_sequence(length, length) for length in (12, 30, 5, 21, 17, 9, 26, 14)]
TOKENS = tokens_of(*SEQUENCES[:3])
MASK = (TOKENS != 1).long()

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step"),
]


def esm_config(**options):
    return transformers.EsmConfig(
        vocab_size=33, pad_token_id=1, mask_token_id=32, hidden_size=64, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=128, max_position_embeddings=1026, layer_norm_eps=1e-5,
        position_embedding_type="rotary", token_dropout=True, emb_layer_norm_before=False,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager", **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    vocabulary = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    vocabulary.write_text("\n".join(RDModel.alphabet.all_toks) + "\n")
    return transformers.EsmTokenizer(str(vocabulary))


# The line that makes the model, on both sides.
ENCODER = {
    "transformers": lambda **options: transformers.EsmModel(esm_config(**options), add_pooling_layer=False),
    "ours": lambda **options: TransformersEncoder(small_model(), **options),
}
SEQUENCE = {
    "transformers": lambda **options: transformers.EsmForSequenceClassification(esm_config(**options)),
    "ours": lambda **options: TransformersForSequenceClassification(small_model(), **options),
}
TOKEN = {
    "transformers": lambda **options: transformers.EsmForTokenClassification(esm_config(**options)),
    "ours": lambda **options: TransformersForTokenClassification(small_model(), **options),
}
MASKED = {
    "transformers": lambda **options: transformers.EsmForMaskedLM(esm_config(**options)),
    "ours": lambda **options: TransformersForMaskedLM(small_model(), **options),
}


def both_sides(makers):
    return pytest.mark.parametrize("make", makers.values(), ids=[*makers])


# Numbers


@pytest.fixture(scope="module")
def pair():
    """One backbone here and there."""
    module = random_esm2(3, 64, 4)
    return RDModel({"one": copy.deepcopy(module)}, []).eval(), transformers_model(module)


def test_the_encoder_of_one_backbone_is_esm_model(pair):
    model, theirs = pair
    encoder = TransformersEncoder(model).eval()
    for tokens, mask in ((TOKENS, MASK), (TOKENS.flip(0), MASK.flip(0)), (TOKENS[:1, :14], None)):
        given = {"input_ids": tokens, "output_attentions": True}
        out = encoder(**given, attention_mask=mask)
        expected = theirs.esm(**given, attention_mask=torch.ones_like(tokens) if mask is None else mask)
        real = tokens != 1
        torch.testing.assert_close(
            out.last_hidden_state[real], expected.last_hidden_state[real], rtol=1e-4, atol=2e-4
        )
        assert len(out.attentions) == len(expected.attentions) == 3
        for ours, other in zip(out.attentions, expected.attentions, strict=True):
            assert ours.shape == other.shape
            rows = real[:, None, :, None].expand_as(ours)
            torch.testing.assert_close(ours[rows], other[rows], rtol=1e-4, atol=1e-5)
    contacts = encoder.predict_contacts(TOKENS[:1], MASK[:1])
    torch.testing.assert_close(contacts, theirs.predict_contacts(TOKENS[:1], MASK[:1]), rtol=1e-4, atol=1e-4)


def test_masked_lm_of_one_backbone_is_esm_for_masked_lm(pair):
    model, theirs = pair
    ours = TransformersForMaskedLM(model).eval()
    tokens = TOKENS.masked_fill((torch.arange(TOKENS.shape[1]) % 5 == 2) & (TOKENS > 3), 32)
    labels = torch.where(tokens == 32, TOKENS, -100)
    out, expected = (each(input_ids=tokens, attention_mask=MASK, labels=labels) for each in (ours, theirs))
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-4, atol=1e-4)
    real = MASK.bool()
    torch.testing.assert_close(out.logits[real], expected.logits[real], rtol=1e-3, atol=1e-3)
    out.loss.backward()
    expected.loss.backward()
    gradient = model.backbones["one"].embed_tokens.weight.grad
    wanted = theirs.esm.embeddings.word_embeddings.weight.grad
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)
    assert model.backbones["one"].lm_head.dense.weight.grad is not None
    model.zero_grad(), theirs.zero_grad()


@pytest.mark.parametrize(
    ("num_labels", "labels"),
    [
        (1, torch.tensor([0.5, -1.0, 2.0])),
        (1, torch.tensor([[0.5], [-1.0], [2.0]])),
        (3, torch.tensor([0, 2, 1])),
        (2, torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])),
    ],
)
def test_sequence_classification_of_one_backbone_is_theirs(pair, num_labels, labels):
    model, masked = pair
    config = copy.deepcopy(masked.config)
    config.num_labels, config.hidden_dropout_prob = num_labels, 0.0
    theirs = transformers.EsmForSequenceClassification(config).eval()
    theirs.esm.load_state_dict(masked.esm.state_dict())
    ours = TransformersForSequenceClassification(model, num_labels=num_labels).eval()
    assert ours.classifier.state_dict().keys() == theirs.classifier.state_dict().keys()
    ours.classifier.load_state_dict(theirs.classifier.state_dict())
    out, expected = (each(input_ids=TOKENS, attention_mask=MASK, labels=labels) for each in (ours, theirs))
    assert type(out) is type(expected)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-4, atol=1e-4)
    assert ours.config.problem_type == theirs.config.problem_type


def test_token_classification_of_one_backbone_is_theirs(pair):
    model, masked = pair
    config = copy.deepcopy(masked.config)
    config.num_labels, config.hidden_dropout_prob = 3, 0.0
    theirs = transformers.EsmForTokenClassification(config).eval()
    theirs.esm.load_state_dict(masked.esm.state_dict())
    ours = TransformersForTokenClassification(model, num_labels=3).eval()
    ours.classifier.load_state_dict(theirs.classifier.state_dict())
    labels = torch.where(TOKENS > 3, TOKENS % 3, -100)
    out, expected = (each(input_ids=TOKENS, attention_mask=MASK, labels=labels) for each in (ours, theirs))
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.logits[MASK == 1], expected.logits[MASK == 1], rtol=1e-3, atol=1e-3)


# Calls


@both_sides(ENCODER)
def test_an_output_is_a_model_output_in_all_its_ways(make):
    encoder = make().eval()
    out = encoder(TOKENS, MASK)
    assert isinstance(out, ModelOutput)
    hidden = out.last_hidden_state
    assert hidden.shape == (*TOKENS.shape, 64)
    for same in (
        out[0],
        out["last_hidden_state"],
        out.get("last_hidden_state"),
        out.to_tuple()[0],
        next(iter(out.values())),
    ):
        assert same is hidden
    assert list(out) == list(out.keys()) == ["last_hidden_state"]
    assert "last_hidden_state" in out
    assert "attentions" not in out
    assert out.attentions is None
    assert out.pooler_output is None
    assert dict(**out)["last_hidden_state"] is hidden
    (first, *rest) = encoder(TOKENS, MASK, return_dict=False)
    assert torch.equal(first, hidden)
    assert not rest
    assert len(encoder(TOKENS, MASK, output_attentions=True).attentions) == 3
    assert torch.equal(pickle.loads(pickle.dumps(out)).last_hidden_state, hidden)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (TransformersEncoder, transformers.EsmModel),
        (TransformersForSequenceClassification, transformers.EsmForSequenceClassification),
        (TransformersForTokenClassification, transformers.EsmForTokenClassification),
        (TransformersForMaskedLM, transformers.EsmForMaskedLM),
    ],
)
def test_every_argument_has_its_name(ours, theirs):
    taken = inspect.signature(ours.forward).parameters
    wanted = [
        name
        for name, each in inspect.signature(theirs.forward).parameters.items()
        if each.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    assert set(wanted) <= set(taken)
    assert {"output_attentions", "output_hidden_states", "return_dict", "head_mask"} <= set(taken)
    assert [name for name in taken if name in wanted][:4] == wanted[:4]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"inputs_embeds": torch.zeros(3, 32, 64)}, "every backbone has embeddings of its own"),
        ({"encoder_hidden_states": torch.zeros(1)}, "is an encoder"),
        ({"encoder_attention_mask": torch.zeros(1)}, "is an encoder"),
        ({"past_key_values": ()}, "keeps nothing from call to call"),
        ({"use_cache": True}, "keeps nothing from call to call"),
        ({"head_mask": torch.ones(2, 4)}, "heads cannot be left out"),
        ({"output_hidden_states": True}, "only last layers have a reverse-distilled form"),
        ({"position_ids": torch.arange(TOKENS.shape[1])[None] + 2}, "expected position_ids 0, 1, 2"),
        ({"position_ids": torch.arange(TOKENS.shape[1] - 1)[None]}, "expected position_ids 0, 1, 2"),
        ({"attention_mask": MASK[:, 1:]}, "expected an attention_mask of shape"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_what_cannot_be_given_is_refused_by_a_sentence(given, reason):
    for model in (TransformersEncoder(small_model()), TransformersForTokenClassification(small_model())):
        with pytest.raises((ValueError, TypeError), match=f"{reason}|unexpected keyword argument"):
            model(**{"input_ids": TOKENS, **given})
    with pytest.raises(ValueError, match=reason):
        TransformersEncoder(small_model())(**{"input_ids": TOKENS, **given})


def test_what_says_nothing_is_taken():
    encoder = TransformersEncoder(small_model()).eval()
    expected = encoder(TOKENS).last_hidden_state
    out = encoder(
        TOKENS,
        MASK,
        position_ids=torch.arange(TOKENS.shape[1])[None],
        use_cache=False,
        output_hidden_states=False,
    )
    assert torch.equal(out.last_hidden_state, expected)
    soft = nn.functional.one_hot(TOKENS, 33).float()
    torch.testing.assert_close(encoder(soft, MASK).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="expected input_ids, got none"):
        encoder(attention_mask=MASK)


@both_sides(ENCODER)
def test_attributes_that_training_code_reads(make):
    encoder = make()
    config = encoder.config
    assert (config.hidden_size, config.vocab_size, config.num_hidden_layers) == (64, 33, 3)
    assert (config.num_attention_heads, config.pad_token_id, config.mask_token_id) == (4, 1, 32)
    assert config.to_dict()["hidden_size"] == 64
    assert encoder.device == torch.device("cpu")
    assert encoder.dtype == torch.float32
    assert encoder.num_parameters() == sum(p.numel() for p in encoder.parameters())
    assert encoder.get_input_embeddings().weight.shape[0] == 33
    assert encoder.base_model is encoder
    assert encoder.main_input_name == "input_ids"
    assert encoder.supports_gradient_checkpointing
    assert not encoder.is_gradient_checkpointing
    encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert encoder.is_gradient_checkpointing
    encoder.train()(TOKENS, MASK).last_hidden_state.sum().backward()
    encoder.gradient_checkpointing_disable()
    assert not encoder.is_gradient_checkpointing
    assert "layers" in str(encoder) or "layer" in str(encoder)
    assert make(num_labels=5).config.num_labels == 5


def test_other_sizes_of_the_alphabet_are_refused():
    encoder = TransformersEncoder(small_model())
    assert encoder.resize_token_embeddings(33) is encoder.get_input_embeddings()
    with pytest.raises(ValueError, match="expected the 33 tokens that every backbone has, got 40"):
        encoder.resize_token_embeddings(40)


# The first script: a class a sequence


def rows_of(tokenizer, labels):
    encoded = tokenizer(SEQUENCES)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": label, "sequence": "a column that nobody reads"}
        for ids, mask, label in zip(encoded["input_ids"], encoded["attention_mask"], labels, strict=True)
    ]


def arguments_for(folder, **options):
    return transformers.TrainingArguments(
        str(folder),
        learning_rate=2e-3,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        weight_decay=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"num_train_epochs": 4, "eval_strategy": "epoch", "save_strategy": "epoch", **options},
    )


def accuracy(answers):
    predictions, labels = answers
    chosen = np.argmax(predictions, axis=-1)
    counted = labels != -100
    return {"accuracy": float((chosen == labels)[counted].mean())}


def losses_of(trainer):
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


@both_sides(SEQUENCE)
def test_a_script_for_classes_of_sequences(make, tokenizer, tmp_path):
    rows = rows_of(tokenizer, [sequence.count("A") % 2 for sequence in SEQUENCES])
    torch.manual_seed(0)
    model = make(num_labels=2, id2label={0: "out", 1: "in"}, label2id={"out": 0, "in": 1})
    trainer = transformers.Trainer(
        model,
        arguments_for(tmp_path, load_best_model_at_end=True, metric_for_best_model="accuracy"),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < losses[0]
    assert trainer.evaluate()["eval_accuracy"] == trainer.state.best_metric
    logits = trainer.predict(rows).predictions
    assert logits.shape == (8, 2)
    trainer.save_model(tmp_path / "final")
    again = type(model).from_pretrained(tmp_path / "final").eval()
    assert again.config.id2label == {0: "out", 1: "in"}
    batch = tokenizer(SEQUENCES, return_tensors="pt", padding=True)
    with torch.no_grad():
        np.testing.assert_allclose(again(**batch).logits.numpy(), logits, atol=1e-4)
    resumed = transformers.Trainer(
        make(num_labels=2),
        arguments_for(tmp_path, num_train_epochs=5),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-16")
    assert resumed.state.global_step == 20
    auto = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    assert type(auto) is type(model)


# The second: a class a residue


@both_sides(TOKEN)
def test_a_script_for_classes_of_residues(make, tokenizer, tmp_path):
    labels = [[-100, *(int(letter in "AVILMFYW") for letter in sequence), -100] for sequence in SEQUENCES]
    rows = rows_of(tokenizer, labels)
    torch.manual_seed(0)
    model = make(num_labels=2)
    trainer = transformers.Trainer(
        model,
        arguments_for(tmp_path, gradient_checkpointing=True),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorForTokenClassification(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < 0.9 * losses[0]
    assert trainer.predict(rows).predictions.shape == (8, 32, 2)
    auto = transformers.AutoModelForTokenClassification.from_pretrained(f"{tmp_path}/checkpoint-16")
    assert type(auto) is type(model)
    with torch.no_grad():
        got, expected = (each.eval()(TOKENS, MASK).logits for each in (auto, trainer.model))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# The third: LoRA


class Weighted(transformers.Trainer):
    """Binding sites are rare: a loss of the script's own."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        weight = torch.tensor([0.4, 1.6])
        loss = nn.functional.cross_entropy(outputs.logits.view(-1, 2), labels.view(-1), weight=weight)
        return (loss, outputs) if return_outputs else loss


TARGETS = [
    ["query", "key", "value"],
    ["query", "value", "dense"],
    r".*\.attention\.self\.(query|value)",
]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@both_sides(TOKEN)
def test_a_script_for_lora(make, targets, tokenizer, tmp_path):
    labels = [[-100, *(int(letter in "DE") for letter in sequence), -100] for sequence in SEQUENCES]
    rows = rows_of(tokenizer, labels)
    torch.manual_seed(0)
    config = LoraConfig(
        task_type=TaskType.TOKEN_CLS,
        inference_mode=False,
        r=4,
        lora_alpha=8,
        target_modules=targets,
        lora_dropout=0.1,
    )
    base = make(num_labels=2)
    frozen = copy.deepcopy(base)
    model = get_peft_model(base, config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name or ".classifier.modules_to_save" in name for name in trained)
    per_layer = {"['query', 'key', 'value']": 3, "['query', 'value', 'dense']": 5}
    count = per_layer.get(str(targets), 2)
    layers = sum(type(module).__name__ in ("TransformerLayer", "EsmLayer") for module in base.modules())
    assert (
        sum(name.endswith("lora_A.default.weight") and "layer" in name for name in trained) == count * layers
    )
    trainer = Weighted(
        model,
        arguments_for(tmp_path, num_train_epochs=3),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorForTokenClassification(tokenizer),
    )
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < losses[0]
    trainer.save_model(tmp_path / "adapter")
    again = PeftModel.from_pretrained(frozen, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = model.eval()(TOKENS, MASK).logits
        assert torch.equal(again(TOKENS, MASK).logits, expected)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(TOKENS, MASK).logits, expected, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            assert (model(TOKENS, MASK).logits - expected).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("targets", "count"),
    [(["q_proj", "v_proj"], 2), (["query", "value"], 2), ("all-linear", 6), (["dense"], 3)],
    ids=str,
)
def test_lora_for_features_takes_names_of_both_kinds(targets, count, tmp_path):
    model = small_model()
    config = LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules=targets)
    encoder = get_peft_model(TransformersEncoder(model), config)
    before = model(TOKENS).embeddings.detach()
    out = encoder(input_ids=TOKENS, attention_mask=MASK)
    torch.testing.assert_close(out.last_hidden_state, before)
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        encoder(input_ids=TOKENS, attention_mask=MASK)[0].square().mean().backward()
        optimizer.step()
    encoder.save_pretrained(tmp_path)
    adapters = [name for name, p in encoder.named_parameters() if p.requires_grad and ".layers." in name]
    assert len(adapters) == 2 * count * 7
    merged = encoder.merge_and_unload()
    assert type(merged) is TransformersEncoder
    after = merged(TOKENS).last_hidden_state
    assert (after - before).abs().max() > 1e-3
    merged.model.save_pretrained(tmp_path / "chain")
    again = RDModel.from_pretrained(tmp_path / "chain")
    torch.testing.assert_close(again(TOKENS).embeddings, after)
    assert type(merged.model.backbones["a"].layers[0].self_attn.q_proj) is nn.Linear


@both_sides(MASKED)
def test_a_script_for_masked_letters(make, tokenizer, tmp_path):
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in tokenizer(SEQUENCES)["input_ids"]]
    torch.manual_seed(0)
    model = make()
    before = copy.deepcopy(model.state_dict())
    trainer = transformers.Trainer(
        model,
        arguments_for(tmp_path, eval_strategy="no", num_train_epochs=8, logging_steps=4),
        train_dataset=rows,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert min(losses[-3:]) < losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any("lm_head.dense" in name for name in changed)
    again = transformers.AutoModelForMaskedLM.from_pretrained(f"{tmp_path}/checkpoint-32").eval()
    with torch.no_grad():
        got, expected = again(TOKENS, MASK).logits, model.eval()(TOKENS, MASK).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# Doors


@both_sides(ENCODER)
def test_the_pipeline_for_features(make, tokenizer):
    encoder = make().eval()
    extract = transformers.pipeline("feature-extraction", model=encoder, tokenizer=tokenizer, device="cpu")
    features = extract(SEQUENCES[:2], return_tensors=True)
    batch = tokenizer(SEQUENCES[:1], return_tensors="pt")
    with torch.no_grad():
        expected = encoder(**batch).last_hidden_state
    torch.testing.assert_close(features[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_is_saved_and_loaded_to_the_bit_in_its_own_dtypes(dtype, tmp_path):
    model = TransformersForSequenceClassification(small_model().to(dtype), num_labels=3).eval()
    model.save_pretrained(tmp_path)
    again = TransformersForSequenceClassification.from_pretrained(tmp_path, torch_dtype="auto")
    assert not again.training
    for (name, ours), (_, theirs) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert ours.dtype == theirs.dtype, name
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(TOKENS, MASK).logits, model(TOKENS, MASK).logits)
    encoder = transformers.AutoModel.from_pretrained(tmp_path, torch_dtype="auto")
    assert type(encoder) is TransformersEncoder
    assert encoder.model.fingerprint() == model.chain.fingerprint()
    encoder.save_pretrained(tmp_path / "encoder")
    fresh = TransformersForTokenClassification.from_pretrained(
        tmp_path / "encoder", num_labels=4, torch_dtype="auto"
    )
    assert fresh.chain.fingerprint() == model.chain.fingerprint()
    assert fresh.classifier.weight.isfinite().all()
    assert 0.01 < float(fresh.classifier.weight.detach().float().std()) < 0.03


def test_whatever_rd_model_loads_is_loaded():
    model = TransformersForSequenceClassification.from_pretrained(
        "esm2-rd-mini",
        level="90K",
        num_labels=3,
        attn_implementation="sdpa",
        dtype="bfloat16",
        device_map="cpu",
    )
    assert model.config.hidden_size == 48
    assert model.config.num_labels == 3
    assert model.chain.dtype == torch.bfloat16
    assert not model.training
    for options, message in (
        ({"num_label": 3}, "expected options of RDModel.from_pretrained or of a config, got 'num_label'"),
        (
            {"attn_implementation": "flash_attention_2"},
            "expected attn_implementation to be 'eager' or 'sdpa', got",
        ),
        ({"add_pooling_layer": True}, "expected add_pooling_layer to be False, got True"),
        ({"dtype": "floaty"}, "expected a dtype, as torch.float32 or 'float32', got 'floaty'"),
    ):
        with pytest.raises(ValueError, match=message):
            TransformersEncoder.from_pretrained("esm2-rd-mini", **options)
    with pytest.raises(FileNotFoundError, match="esm2-rd-nano"):
        TransformersEncoder.from_pretrained("esm2-rd-nano")


@pytest.mark.filterwarnings("ignore:.*meta device")
def test_a_map_of_devices_spreads_a_model(tmp_path):
    expected = TransformersEncoder.from_pretrained("esm2-rd-mini", level="90K")(TOKENS).last_hidden_state
    model = TransformersEncoder.from_pretrained(
        "esm2-rd-mini",
        level="90K",
        device_map="auto",
        max_memory={"cpu": "150KB"},
        offload_folder=tmp_path,
    )
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    with torch.no_grad():
        assert torch.equal(model(TOKENS).last_hidden_state, expected)


def test_a_backbone_without_heads_stays_so(tmp_path):
    module = random_esm2(2, 32, 4)
    tensors = {name: each for name, each in module.state_dict().items() if "head" not in name}
    backbone = rd_torch.ESM2.from_tensors(rd_torch.Level("one", 2, 32, 4), tensors)
    encoder = TransformersEncoder(RDModel({"one": backbone}, []).eval())
    encoder.save_pretrained(tmp_path)
    again = TransformersEncoder.from_pretrained(tmp_path)
    assert torch.equal(again(TOKENS).last_hidden_state, encoder(TOKENS).last_hidden_state)
    with pytest.raises(ValueError, match="expected a backbone with a language-model head"):
        TransformersForMaskedLM(encoder.model)


def test_the_parameters_are_the_chains_own():
    model = small_model()
    encoder = TransformersEncoder(model)
    assert {id(p) for p in encoder.parameters()} == {id(p) for p in model.parameters()}
    assert len(list(encoder.modules())) == len({id(module) for module in encoder.modules()})
    for name in (
        "layers.1.attention.self.query",
        "layers.0.attention.output.dense",
        "layers.1.intermediate.dense",
    ):
        assert isinstance(encoder.get_submodule(f"model.backbones.b.{name}"), nn.Linear)
    layer = model.backbones["b"].layers[1]
    assert encoder.get_submodule("model.backbones.b.layers.1.output.dense") is layer.fc2
    assert encoder.get_submodule("model.backbones.b.layers.1") is layer
    with pytest.raises(AttributeError):
        encoder.get_submodule("model.backbones.b.layers.1.attention.self.nothing")


def test_the_encoder_compiles(tokenizer):
    encoder = TransformersEncoder(small_model()).eval()
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = encoder(TOKENS, MASK).last_hidden_state
        torch.testing.assert_close(compiled(TOKENS, MASK).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_without_transformers_a_sentence_says_what_to_install(monkeypatch):
    import importlib
    import sys

    for name in [name for name in sys.modules if name.startswith("rd_torch.huggingface")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="expected the package transformers.*pip install transformers"):
        importlib.import_module("rd_torch.huggingface")
