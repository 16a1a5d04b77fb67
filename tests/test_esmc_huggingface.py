"""The classes in transformers' idiom around a chain of ESM-C."""

import pytest
import torch
import transformers
from esmc import SHAPES, oracle, our_esmc, ours_of, random_esmc, small_esmc, tokens_of
from helpers import random_sequence
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

from rd_torch import (
    ESMC,
    Level,
    RDModel,
    TransformersEncoder,
    TransformersForMaskedLM,
    TransformersForSequenceClassification,
    TransformersForTokenClassification,
)
from rd_torch.backbone.attention import inverse_frequencies

SEQUENCES = [random_sequence(length, length) for length in (12, 30, 5, 21, 17, 9, 26, 14)]
TOKENS = tokens_of(*SEQUENCES[:3])
MASK = (TOKENS != 1).long()

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step"),
]

CLASSES = {
    "encoder": (TransformersEncoder, {}),
    "sequences": (TransformersForSequenceClassification, {"num_labels": 3}),
    "tokens": (TransformersForTokenClassification, {"num_labels": 3}),
    "letters": (TransformersForMaskedLM, {}),
}

each_class = pytest.mark.parametrize(("kind", "options"), CLASSES.values(), ids=[*CLASSES])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def require_exact_angles(model):
    """Every backbone has the angles that its heads' size gives, whatever transformers did while loading."""
    for backbone in model.chain.backbones.values():
        angles = backbone.rotary_emb.inv_freq
        assert angles.dtype == torch.float32
        assert torch.equal(angles, inverse_frequencies(backbone.embed_dim // backbone.attention_heads))


@each_dtype
@each_class
def test_a_model_is_saved_and_loaded_to_the_bit(kind, options, dtype, tmp_path):
    model = kind(small_esmc().to(dtype), **options).eval()
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path, torch_dtype="auto")
    assert not again.training
    require_exact_angles(again)
    state = again.state_dict()
    assert not any("inv_freq" in name for name in state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert again.chain.fingerprint() == model.chain.fingerprint()
    with torch.no_grad():
        assert torch.equal(again(TOKENS, MASK)[0], model(TOKENS, MASK)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loading_in_another_type_keeps_the_angles(dtype, tmp_path):
    TransformersEncoder(small_esmc()).save_pretrained(tmp_path)
    loaded = TransformersEncoder.from_pretrained(tmp_path, torch_dtype=dtype)
    require_exact_angles(loaded)
    with torch.no_grad():
        expected = small_esmc().to(dtype)(TOKENS).embeddings
        assert torch.equal(loaded(TOKENS, MASK).last_hidden_state, expected)
    auto = transformers.AutoModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert type(auto) is TransformersEncoder
    require_exact_angles(auto)


@pytest.mark.filterwarnings("ignore:.*meta device")
@pytest.mark.parametrize("places", ["cpu", "auto"])
def test_maps_of_devices_keep_the_angles(places, tmp_path):
    TransformersEncoder(small_esmc()).save_pretrained(tmp_path / "saved")
    small_esmc().save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        expected = small_esmc()(TOKENS).embeddings
        for folder in ("saved", "ours"):
            options = {"device_map": places, "offload_folder": str(tmp_path / "off")}
            model = TransformersEncoder.from_pretrained(tmp_path / folder, **options)
            assert torch.equal(model(TOKENS, MASK).last_hidden_state, expected), folder


@pytest.mark.filterwarnings("ignore:.*meta device")
def test_a_model_without_room_is_spread_to_the_disk(tmp_path):
    small_esmc().save_pretrained(tmp_path / "ours")
    model = TransformersEncoder.from_pretrained(
        tmp_path / "ours",
        device_map="auto",
        max_memory={"cpu": "900KB"},
        offload_folder=tmp_path / "off",
    )
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    with torch.no_grad():
        assert torch.equal(model(TOKENS, MASK).last_hidden_state, small_esmc()(TOKENS).embeddings)


def test_the_config_says_what_code_reads():
    model = TransformersEncoder(small_esmc())
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 3, 4)
    assert (config.vocab_size, config.mask_token_id, config.pad_token_id) == (64, 32, 1)
    assert config.intermediate_size == 256
    assert model.get_input_embeddings().weight.shape == (64, 64)
    assert model.resize_token_embeddings(64) is model.get_input_embeddings()
    with pytest.raises(ValueError, match="expected the 64 tokens that every backbone has, got 33"):
        model.resize_token_embeddings(33)


def test_another_feed_forward_width_is_in_the_config(tmp_path):
    chain = RDModel({"narrow": ESMC(2, 32, 2, hidden_dim=96)}, []).eval()
    TransformersEncoder(chain).save_pretrained(tmp_path)
    again = TransformersEncoder.from_pretrained(tmp_path)
    assert again.config.intermediate_size == 96
    with torch.no_grad():
        assert torch.equal(again(TOKENS).last_hidden_state, chain(TOKENS).embeddings)


def test_the_encoder_of_one_backbone_is_esmc_model():
    reference = random_esmc(3, 64, 4)
    reference.set_attn_implementation("eager")
    encoder = TransformersEncoder(RDModel({"one": ours_of(reference)}, [])).eval()
    left = TOKENS.flip(1), MASK.flip(1)
    with torch.no_grad():
        for tokens, mask in ((TOKENS, MASK), left):
            out = encoder(tokens, mask, output_attentions=True)
            expected = reference.esmc(tokens, mask, output_attentions=True)
            real = mask.bool()
            torch.testing.assert_close(
                out.last_hidden_state[real], expected.last_hidden_state[real], rtol=0, atol=5e-5
            )
            for ours, other in zip(out.attentions, expected.attentions, strict=True):
                rows = real[:, None, :, None].expand_as(ours)
                torch.testing.assert_close(ours[rows], other[rows], rtol=0, atol=1e-5)


def test_contacts_and_a_missing_head_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(RuntimeError, match="expected a backbone with a contact head, got one of esmc"):
        TransformersEncoder(small_esmc()).predict_contacts(TOKENS, MASK)
    tensors = {
        name: each for name, each in our_esmc(*SHAPES["a"]).state_dict().items() if "lm_head" not in name
    }
    backbone = ESMC.from_tensors(Level("one", *SHAPES["a"], family="esmc"), tensors)
    encoder = TransformersEncoder(RDModel({"one": backbone}, []).eval())
    encoder.save_pretrained(tmp_path)
    again = TransformersEncoder.from_pretrained(tmp_path)
    assert torch.equal(again(TOKENS).last_hidden_state, encoder(TOKENS).last_hidden_state)
    assert again.chain(TOKENS).logits is None
    with pytest.raises(ValueError, match="expected a backbone with a language-model head, got one without"):
        TransformersForMaskedLM(encoder.model)


def rows_of(labels):
    return [
        {
            "input_ids": tokens_of(sequence)[0].tolist(),
            "attention_mask": [1] * (len(sequence) + 2),
            "labels": label,
        }
        for sequence, label in zip(SEQUENCES, labels, strict=True)
    ]


def collate(rows):
    length = max(len(row["input_ids"]) for row in rows)

    def padded(name, filling):
        return torch.tensor([row[name] + [filling] * (length - len(row[name])) for row in rows])

    labels = [row["labels"] for row in rows]
    return {
        "input_ids": padded("input_ids", 1),
        "attention_mask": padded("attention_mask", 0),
        "labels": torch.tensor(labels) if isinstance(labels[0], int) else padded("labels", -100),
    }


def arguments_for(folder, **options):
    return transformers.TrainingArguments(
        str(folder), learning_rate=2e-3, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        disable_tqdm=True, num_train_epochs=3, save_strategy="epoch", logging_steps=4, **options,
    )  # fmt: skip


LETTERS = [tokens_of(sequence)[0].tolist() for sequence in SEQUENCES]
SCRIPTS = {
    "sequences": (
        TransformersForSequenceClassification,
        [len(each) % 2 for each in SEQUENCES],
        {"num_labels": 2},
    ),
    "tokens": (
        TransformersForTokenClassification,
        [[k % 2 for k in each] for each in LETTERS],
        {"num_labels": 2},
    ),
    "letters": (TransformersForMaskedLM, LETTERS, {}),
}


@pytest.mark.parametrize(("kind", "labels", "options"), SCRIPTS.values(), ids=[*SCRIPTS])
def test_the_trainer_trains_saves_and_loads_it(kind, labels, options, tmp_path):
    torch.manual_seed(0)
    model = kind(small_esmc(), **options)
    rows = rows_of(labels)
    trainer = transformers.Trainer(
        model,
        arguments_for(tmp_path, gradient_checkpointing=kind is not TransformersForMaskedLM),
        train_dataset=rows,
        data_collator=collate,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    again = kind.from_pretrained(tmp_path / "checkpoint-12")
    require_exact_angles(again)
    with torch.no_grad():
        assert torch.equal(again(TOKENS, MASK).logits, model.eval()(TOKENS, MASK).logits)


@pytest.mark.parametrize(
    ("targets", "count"),
    [(["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 5), ("all-linear", 7)],
    ids=["by name", "all-linear"],
)
def test_lora_for_features_takes_transformers_names(targets, count, tmp_path):
    model = small_esmc()
    before = model(TOKENS).embeddings.detach()
    config = LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=4, target_modules=targets)
    encoder = get_peft_model(TransformersEncoder(model), config)
    adapters = [name for name, p in encoder.named_parameters() if p.requires_grad and ".layers." in name]
    assert len(adapters) == 2 * count * 7
    torch.testing.assert_close(encoder(input_ids=TOKENS, attention_mask=MASK)[0], before)
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        encoder(input_ids=TOKENS, attention_mask=MASK)[0].square().mean().backward()
        optimizer.step()
    merged = encoder.merge_and_unload()
    assert type(merged) is TransformersEncoder
    after = merged(TOKENS).last_hidden_state
    assert (after - before).abs().max() > 1e-3
    merged.model.save_pretrained(tmp_path)
    torch.testing.assert_close(RDModel.from_pretrained(tmp_path)(TOKENS).embeddings, after)
    assert type(merged.model.backbones["a"].layers[0].self_attn.q_proj) is nn.Linear


def test_the_tokenizer_of_esmc_feeds_a_chain():
    tokenizer = oracle().EsmcTokenizer()
    encoder = TransformersEncoder(small_esmc()).eval()
    extract = transformers.pipeline("feature-extraction", model=encoder, tokenizer=tokenizer, device="cpu")
    with torch.no_grad():
        features = extract(["MKTAY|IAKQR"], return_tensors=True)
        expected = encoder(tokens_of("MKTAY|IAKQR")).last_hidden_state
    torch.testing.assert_close(features[0], expected, rtol=1e-4, atol=1e-4)


def test_the_encoder_compiles_as_one_graph():
    encoder = TransformersEncoder(small_esmc()).eval()
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = encoder(TOKENS, MASK).last_hidden_state
        torch.testing.assert_close(compiled(TOKENS, MASK).last_hidden_state, expected, rtol=0, atol=2e-5)
