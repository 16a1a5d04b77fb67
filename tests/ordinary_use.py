"""What people do with the package, in a process of its own: there may be no `esm`, or another one, beside it.

Writes what `rd-torch verify` says. With `--without-esm` no package is found under that name; with
`--with-transformers` the classes that need transformers are imported too, which takes seconds.
"""

import shlex
import sys
from pathlib import Path

import torch
from click.testing import CliRunner

PROTEINS = [("ubiquitin", "MQIFVKTLTGKTITLEVEPS"), ("short", "MKV"), ("other", "GGSGGMKTAYIAKQRQISFVK")]

COMMANDS = """
embed proteins.fasta -o means.h5
embed proteins.fasta -o means28K.h5 --level 28K
combine 28K=means28K.h5 -o nested.h5
fit proteins.fasta -o fitted --levels 28K,90K
info fitted
"""


class WithoutESM:
    """A finder of modules that finds none called `esm`."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == "esm" else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


def use_from_python():
    import rd_torch

    for name in rd_torch.__all__:
        if "--with-transformers" in sys.argv or not name.startswith("Transformers"):
            assert getattr(rd_torch, name)
    model, alphabet = rd_torch.pretrained.load_model_and_alphabet("esm2-rd-mini")
    labels, strings, tokens = alphabet.get_batch_converter()([*PROTEINS, ("masked", "MK<mask>V")])
    out = model(tokens, return_contacts=True)
    assert out["logits"].shape == (4, 23, 33)
    assert out["contacts"].shape == (4, 21, 21)
    vectors = rd_torch.embed(model, strings[:3])
    rd_torch.embed_to_store(model, PROTEINS, "store.parquet")
    assert (rd_torch.open_store("store.parquet")[labels[0]] == vectors[0]).all()
    widths = {name: backbone.embed_dim for name, backbone in model.backbones.items()}
    assert model.combine({name: torch.zeros(1, width) for name, width in widths.items()}).shape == (1, 128)
    backbones = {name: model.backbones[name] for name in ("28K", "90K")}
    chain = rd_torch.fit(backbones, strings[:3] * 10)
    chain.save_pretrained("chain")
    again = rd_torch.RDModel.from_pretrained("chain")
    assert torch.equal(again(tokens).embeddings, chain(tokens).embeddings)
    head = rd_torch.SequenceHead(48, 1, task="regression")
    rd_torch.Predictor(chain, head)(tokens, torch.zeros(4))["loss"].backward()


def type_commands():
    from rd_torch.cli import main

    Path("proteins.fasta").write_text("".join(f">{name}\n{sequence}\n" for name, sequence in PROTEINS))
    for line in COMMANDS.strip().splitlines():
        result = CliRunner().invoke(main, shlex.split(line))
        assert result.exit_code == 0, (line, result.output)


def verify():
    from rd_torch.cli import main

    result = CliRunner().invoke(main, ["verify", "90K", "--model", "esm2-rd-mini"])
    assert isinstance(result.exception, SystemExit | None), result.exception
    sys.stdout.write(result.output)


if __name__ == "__main__":
    if "--without-esm" in sys.argv:
        sys.meta_path[:] = [WithoutESM(finder) for finder in sys.meta_path]
    use_from_python()
    type_commands()
    assert "esm" not in sys.modules
    verify()
