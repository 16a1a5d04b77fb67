"""Two processes on the CPU against one: DistributedDataParallel and FSDP2."""

import os

import pytest
import torch
from esmc import small_esmc
from helpers import layered_model, random_sequence, small_model, tokens_of
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rd_torch import Predictor, SequenceHead

WORLD = 2
SEQUENCES = [random_sequence(length, length) for length in (12, 30, 5, 21)]
LABELS = torch.tensor([0.5, -1.0, 2.0, 0.1])


class Direct(nn.Module):
    """A user's own module; with letters its loss has the logits in it too."""

    def __init__(self, model, letters=False):
        super().__init__()
        self.model = model
        self.letters = letters

    def forward(self, tokens, labels):
        out = self.model(tokens)
        means = (out.embeddings * out.residue_mask[..., None]).sum((1, 2)) / out.residue_mask.sum(1)
        loss = (means - labels).square().mean()
        if self.letters:
            loss = loss + nn.functional.cross_entropy(out.logits[:, 1], tokens[:, 1])
        return {"loss": loss}


def build(kind):
    """The same module in every process: a chain and a head, a narrower one, one with frozen levels."""
    torch.manual_seed(0)
    model = (small_esmc() if kind.startswith("ESM-C") else small_model()).train()
    if kind == "layers":
        return Direct(layered_model(("a", "b@2", "b@4")).train())
    if kind in ("bare", "letters", "ESM-C"):
        return Direct(model, letters=kind == "letters")
    if kind == "partly frozen":
        model.freeze_backbones("a").freeze_backbones("b", except_top=1)
    if "checkpointed" in kind:
        model.gradient_checkpointing_enable()
    width = 48 if "narrower" in kind else 64
    return Predictor(model, SequenceHead(width, 1, task="regression", pool="attention"))


# In PyTorch 2.6 FSDP2 asks streams of a CPU for what they do not have: it is for GPUs there.
WAYS = ["DDP", "FSDP2"] if hasattr(torch.cpu.Stream, "record_event") else ["DDP"]
KINDS = ["bare", "letters", "whole", "narrower", "partly frozen", "checkpointed"]
KINDS += ["ESM-C", "ESM-C, narrower and checkpointed", "layers"]


def step(module, part):
    """Loss and whole gradients of a part of the batch."""
    tokens = tokens_of(*SEQUENCES)[part]
    loss = module(tokens, LABELS[part])["loss"]
    loss.backward()
    gradients = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            gradients[name.removeprefix("module.")] = gradient.clone()
    return loss.detach(), gradients


def shard(module):
    """FSDP2 as its documentation has it: each layer, then the rest; tables by themselves too."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for backbone in module.model.backbones.values():
        for layer in [backbone.embed_tokens, *backbone.layers]:
            fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def scale_of_fsdp(rank):
    """How much larger FSDP2 makes the gradients of a plain layer: PyTorch 2.8 adds them up on a CPU."""
    torch.manual_seed(0)
    plain, x = torch.nn.Linear(4, 4), torch.randn(2 * WORLD, 4)
    plain(x).square().mean().backward()
    expected = plain.weight.grad.clone()
    plain.zero_grad()
    sharded = fully_shard(plain, mesh=init_device_mesh("cpu", (WORLD,)))
    sharded(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    return (sharded.weight.grad.full_tensor() / expected).mean()


def work(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    rows = slice(rank * len(SEQUENCES) // WORLD, (rank + 1) * len(SEQUENCES) // WORLD)
    results = {"DDP": torch.ones(())}
    if "FSDP2" in WAYS:
        results["FSDP2"] = scale_of_fsdp(rank)
    for kind in KINDS:
        for way in WAYS:
            wrap = shard if way == "FSDP2" else DistributedDataParallel
            module = wrap(build(kind))
            loss, gradients = step(module, rows)
            distributed.all_reduce(loss)
            state = get_model_state_dict(
                module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
            )
            results[way, kind] = loss / WORLD, gradients, state
            if kind == "bare" and way == "FSDP2":
                results["fingerprint"] = module.model.fingerprint()
                with pytest.raises(ValueError, match=r"got embed_tokens.weight of level a as a .*DTensor"):
                    module.model.save_pretrained(folder / "sharded")
    if rank == 0:
        torch.save(results, folder / "results.pt")
    distributed.barrier()
    distributed.destroy_process_group()
    # Gloo's threads may still let go of tensors while an interpreter ends, and abort it then: end without it.
    os._exit(0)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (folder,), nprocs=WORLD)
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_loss_and_the_gradients_of_one(results, way, kind):
    loss, gradients, _ = results[way, kind]
    expected, alone = step(build(kind), slice(None))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert gradients.keys() == alone.keys()
    for name, gradient in gradients.items():
        scale = alone[name].abs().max().clamp(min=1e-4)
        assert (gradient / results[way] - alone[name]).abs().max() <= 2e-4 * scale, name


@pytest.mark.skipif("FSDP2" not in WAYS, reason="FSDP2 is for GPUs in PyTorch 2.6")
def test_a_sharded_chain_has_the_fingerprint_of_the_whole(results):
    assert results["fingerprint"] == build("bare").model.fingerprint()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_save_what_one_saves(results, way, kind, tmp_path):
    *_, state = results[way, kind]
    save_file(state, tmp_path / "model.safetensors")
    module = build(kind)
    expected = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for parameter in module.parameters():
        parameter.data.zero_()
    module.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in module.state_dict().items())
