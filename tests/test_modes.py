"""Whatever embeds, fits or measures runs in `eval` and without gradients, and puts every mode back."""

import numpy as np
import pytest
import torch
from helpers import tiny_model
from peft import LoraConfig, get_peft_model

import rd_torch
from rd_torch.store import open_store
from rd_torch.verifying import verify_chain

SEQUENCES = ["MQIFVKTLTGKTITLEVEPS", "MKTAYIAKQRQISFVKSHFS", "GSHMLEDPV"]
PROTEINS = [(f"p{k}", sequence) for k, sequence in enumerate(SEQUENCES)]


def with_dropout():
    """A chain in training, with the dropout of LoRA in it, and layers in modes of their own."""
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_model(),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False),
    ).base_model.model
    model.train()
    model.backbones["a"].layers[0].eval()
    return model


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


DOORS = {
    "embed": lambda model, folder: rd_torch.embed(model, SEQUENCES),
    "residues": lambda model, folder: np.concatenate(rd_torch.embed(model, SEQUENCES, pool="none")),
    "windows": lambda model, folder: rd_torch.embed(model, SEQUENCES, windows=8),
    "store": lambda *given: stored(*given),  # noqa: PLW0108  # is below
    "fit": lambda model, folder: np.concatenate(
        [
            tensor.detach().numpy().ravel()
            for tensor in rd_torch.fit(dict(model.backbones.items()), SEQUENCES).stages["b"].buffers()
        ]
    ),
}


def stored(model, folder):
    path = folder / f"{len(list(folder.iterdir()))}.h5"
    rd_torch.embed_to_store(model, PROTEINS, path)
    with open_store(path) as store:
        return store[:]


@pytest.mark.parametrize("door", DOORS)
def test_dropout_is_off_and_every_mode_is_put_back(door, tmp_path):
    model = with_dropout()
    before = modes(model)
    assert len(set(before.values())) == 2
    first, second = (DOORS[door](model, tmp_path) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert modes(model) == before
    model.eval()
    np.testing.assert_array_equal(DOORS[door](model, tmp_path), first)


@pytest.mark.parametrize("door", DOORS)
def test_modes_are_put_back_after_an_error_too(door, tmp_path, monkeypatch):
    model = with_dropout()
    before = modes(model)
    seen = []

    def fails(*_, **__):
        seen.append(model.backbones["b"].training)
        raise RuntimeError("in the middle")

    monkeypatch.setattr(rd_torch.ESM2, "forward", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        DOORS[door](model, tmp_path)
    assert seen == [False]
    assert modes(model) == before


def test_no_gradient_is_recorded(tmp_path, monkeypatch):
    model = with_dropout()
    forward, recorded = rd_torch.ESM2.forward, []

    def watched(self, *arguments, **options):
        recorded.append(torch.is_grad_enabled())
        return forward(self, *arguments, **options)

    monkeypatch.setattr(rd_torch.ESM2, "forward", watched)
    for door in DOORS.values():
        door(model, tmp_path)
    assert recorded
    assert not any(recorded)


def test_a_store_begun_in_training_goes_on_to_the_same_vectors(tmp_path):
    model = with_dropout()

    def interrupted(residues, before):
        raise KeyboardInterrupt

    path = tmp_path / "out.h5"
    with pytest.raises(KeyboardInterrupt):
        rd_torch.embed_to_store(model, PROTEINS * 4, path, tokens_per_batch=2, progress=interrupted)
    rd_torch.embed_to_store(model, PROTEINS * 4, path, tokens_per_batch=2)
    rd_torch.embed_to_store(model.eval(), PROTEINS * 4, tmp_path / "whole.h5", tokens_per_batch=2)
    with open_store(path) as store, open_store(tmp_path / "whole.h5") as whole:
        np.testing.assert_array_equal(store[:], whole[:])


def test_verifying_runs_in_eval(monkeypatch):
    load = rd_torch.RDModel.from_pretrained
    seen = []
    monkeypatch.setattr(
        "rd_torch.verifying.RDModel.from_pretrained",
        lambda *a, **k: seen.append(load(*a, **k).train()) or seen[-1],
    )
    assert all(check.passed for check in verify_chain("esm2-rd-mini", "28K"))
    assert not seen[0].training
