"""What several test files build: random ESM-2 models of any shape, token batches, a small family."""

import math
import subprocess
import sys

import accelerate
import torch
from esm.model.esm2 import ESM2 as FairESM2

from rd_torch import ESM2, RDModel, RunningMoments, embed_to_store, hardware, solve_stages
from rd_torch.letters import RESIDUE_LETTERS
from rd_torch.levels import ALPHABET

SHAPES = {"a": (2, 32, 4), "b": (2, 48, 4), "c": (3, 64, 4)}
WIDTHS = {name: width for name, (_, width, _) in SHAPES.items()}


def random_esm2(num_layers, width, attention_heads, seed=0):
    """fair-esm's model with weights that keep attention selective and activations of unit size."""
    with torch.device("meta"):
        module = FairESM2(num_layers, width, attention_heads)
    module.to_empty(device="cpu").eval()
    module.lm_head.weight = module.embed_tokens.weight
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        bound = 0.3
        if parameter.ndim == 2:
            gain = 1.4 if "q_proj" in name or "k_proj" in name else 1.0
            bound = gain * math.sqrt(3 / parameter.shape[1])
        if name in ("embed_tokens.weight", "contact_head.regression.weight"):
            bound = math.sqrt(3)
        parameter.data.uniform_(-bound, bound, generator=generator)
        if name.endswith("norm.weight"):
            parameter.data.add_(1)
    size = width // attention_heads
    inv_freq = 10_000.0 ** -(torch.arange(0, size, 2) / size)
    for layer in module.layers:
        layer.self_attn.rot_emb.inv_freq = inv_freq.half().float()  # as the published weights have it
    return module


def random_sequence(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return "".join(RESIDUE_LETTERS[k] for k in torch.randint(20, (length,), generator=generator))


def tokens_of(*sequences):
    """fair-esm's own token batch; `<mask>` may stand in a sequence."""
    return ALPHABET.get_batch_converter()([("", sequence) for sequence in sequences])[2]


def random_stages(predict_from="nested", widths=WIDTHS, seed=0, **options):
    """Stages solved on random moments of full rank, their residual mean moved away from zero."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(widths.values())
    moments = RunningMoments(total)
    mixing = torch.randn(total, total, dtype=torch.float64, generator=generator) / math.sqrt(total)
    moments.update(torch.randn(600, total, dtype=torch.float64, generator=generator) @ mixing + 1)
    stages = solve_stages(moments, widths, predict_from=predict_from, **options)
    for stage in stages:
        stage.m = torch.randn(stage.m.shape, dtype=torch.float64, generator=generator)
    return stages


def tiny_model():
    """A random chain of two levels of one layer, 16 and 24 features wide, in `eval` mode."""
    backbones = {"a": random_esm2(1, 16, 4), "b": random_esm2(1, 24, 4, seed=1)}
    return RDModel(backbones, random_stages(widths={"a": 16, "b": 24})).eval()


def small_model(predict_from="nested", special_rows="maps"):
    """A random family of three levels, the same at every call."""
    backbones = {name: random_esm2(*shape, seed=k) for k, (name, shape) in enumerate(SHAPES.items())}
    stages = random_stages(predict_from)
    return RDModel(backbones, stages, predict_from=predict_from, special_rows=special_rows).eval()


def layered_model(levels=("a", "b@2", "b@4", "b"), **options):
    """A random chain of two backbones of 2 and 5 layers, some of which are levels; the same at every call."""
    modules = {"a": ESM2.sharing(random_esm2(2, 32, 4)), "b": ESM2.sharing(random_esm2(5, 48, 4, seed=1))}
    widths = {name: 32 if name == "a" else 48 for name in levels}
    backbones = {name: modules[name[0]] for name in levels}
    return RDModel(backbones, random_stages(widths=widths, added=16), **options).eval()


def embed_alone(model, folder, suffix="h5", pool="mean", *, proteins, **options):
    """A file of each backbone's own embeddings, as its users hold them, by level."""
    folder.mkdir(exist_ok=True)
    paths = {level: folder / f"{level}.{suffix}" for level in model.backbones}
    for level, path in paths.items():
        embed_to_store(RDModel({level: model.backbones[level]}, []), proteins, path, pool=pool, **options)
    return paths


def loaded_by_a_map(module, folder, make, blocks):
    """`device_map="auto"` on a machine without room: some of the module goes to the disk.

    `make` makes the module anew, to be filled; classes of the names in `blocks` are not taken apart.
    """
    size = sum(p.numel() * 4 for p in module.parameters())
    places = accelerate.infer_auto_device_map(
        module, max_memory={"cpu": size // 2}, no_split_module_classes=blocks
    )
    assert set(places.values()) == {"cpu", "disk"}
    torch.save(module.state_dict(), folder / "state.pt")
    with accelerate.init_empty_weights():
        empty = make()
    return accelerate.load_checkpoint_and_dispatch(
        empty, str(folder / "state.pt"), places, offload_folder=str(folder / "offloaded")
    ).eval()


def share_of_estimate(make, size):
    """The memory that a process takes to embed a full batch, as a share of what `bytes_per_token` says.

    `make` is code that makes `model`; `size` is the batch's rows and tokens.
    """
    code = f"""
import pathlib, re, sys, torch
sys.path.insert(0, "tests")
from rd_torch import RDModel
from rd_torch.batching import bytes_per_token
torch.set_num_threads(1)
{make}
tokens = torch.full({size!r}, 5)
with torch.inference_mode():
    model.encode(tokens[:, :8])
    status = pathlib.Path("/proc/self/status")
    read = lambda name: int(re.search(rf"{{name}}:\\s+(\\d+) kB", status.read_text())[1]) * 1024
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = read("VmRSS")
    model.encode(tokens)
estimate = tokens.numel() * bytes_per_token(model.family().values(), tokens.shape[1])
print((read("VmHWM") - before) / estimate)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(run.stdout)


@torch.no_grad()
def require_one_graph(model, first, other):
    """Require that a chain compiles and exports as one graph of a batch, which holds for another batch.

    The batches are tokens, or distributions, of different sizes.
    """
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    dims = {0: any_size("batch"), 1: any_size("time")}
    program = torch.export.export(model, (first,), dynamic_shapes={"tokens": dims}).module()
    for batch in (first, other):
        expected = model(batch)
        for out in (compiled(batch), program(batch)):
            torch.testing.assert_close(out.embeddings, expected.embeddings, rtol=0, atol=2e-5)
            assert torch.equal(out.residue_mask, expected.residue_mask)


def any_size(name):
    """A dimension of any size for `torch.export`, whose older versions want to know the largest."""
    return torch.export.Dim(name, max=4096 if hardware.is_older(torch.__version__, (2, 8)) else None)
