"""Files that run without the package give the model's embeddings; what cannot be one is refused before."""

import copy
import json
import subprocess
import sys
import textwrap

import accelerate
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import any_size, random_sequence, small_model, tiny_model, tokens_of
from peft import LoraConfig, get_peft_model

import rd_torch
from rd_torch import exporting, hardware
from rd_torch.cli import main

onnxruntime = pytest.importorskip("onnxruntime")
if hardware.is_older(torch.__version__, exporting.OLDEST_EXPORTER):
    pytest.skip("this PyTorch is refused", allow_module_level=True)

BATCHES = (
    [random_sequence(40, 1), "M", random_sequence(17, 2)],
    ["MKTAYIAKQRQISFVK"],
    ["MXBUZO", "GG", "AAAA", random_sequence(300, 3), "ACDEFGHIKLMNPQRSTVWY"],
)

WITHOUT_TORCH = """
    import json, sys
    sys.modules["torch"] = sys.modules["rd_torch"] = None  # importing them fails
    import numpy as np
    import onnxruntime

    path, batches, answers = sys.argv[1:]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    ids = {token: place for place, token in enumerate(json.loads(facts["rd_torch.tokens"]))}
    special = json.loads(facts["rd_torch.special"])
    found = {}
    for number, sequences in enumerate(json.loads(batches)):
        time = max(map(len, sequences)) + 2
        tokens = np.full((len(sequences), time), special["<pad>"])
        for row, sequence in zip(tokens, sequences):
            row[: len(sequence) + 2] = [special["<cls>"], *map(ids.get, sequence), special["<eos>"]]
        embeddings, mask = session.run(["embeddings", "residue_mask"], {"tokens": tokens})
        assert mask.sum(1).tolist() == list(map(len, sequences))
        found[str(number)] = embeddings
    np.savez(answers, facts=json.dumps(facts), **found)
"""


def command(*arguments):
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def model_of(level):
    return rd_torch.RDModel.from_pretrained("esm2-rd-mini", level=level)


def assert_near(got, model, tokens):
    with torch.no_grad():
        expected = model.encode(tokens)
    assert got.shape == expected.shape
    assert (torch.as_tensor(got) - expected).abs().max() <= 1e-4 * expected[tokens != 1].std()


def test_an_onnx_file_runs_without_pytorch(tmp_path):
    result = command("28K", "-o", tmp_path / "model.onnx")
    assert result.exit_code == 0, result.output
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]
    code = [sys.executable, "-c", textwrap.dedent(WITHOUT_TORCH)]
    arguments = [tmp_path / "model.onnx", json.dumps(BATCHES), tmp_path / "answers.npz"]
    ran = subprocess.run([*code, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    answers, model = np.load(tmp_path / "answers.npz"), model_of("28K")
    for number, sequences in enumerate(BATCHES):
        assert_near(answers[str(number)], model, tokens_of(*sequences))
    facts = json.loads(str(answers["facts"]))
    assert json.loads(facts["rd_torch.levels"]) == {"28K": 32}
    assert json.loads(facts["rd_torch.tokens"]) == model.alphabet.all_toks
    assert facts["rd_torch.fingerprint"] == model.fingerprint()


@pytest.mark.slow
def test_a_compiled_package_gives_the_models_embeddings(tmp_path):
    result = command("90K", "-o", tmp_path / "model.pt2")
    assert result.exit_code == 0, result.output
    run, model = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2")), model_of("90K")
    for sequences in BATCHES:
        tokens = tokens_of(*sequences)
        embeddings, mask = run(tokens)
        assert_near(embeddings, model, tokens)
        assert torch.equal(mask, (tokens > 3) & (tokens < 29))
    assert json.loads(run.get_metadata()["rd_torch.levels"]) == {"28K": 32, "90K": 48}


def naive():
    moments = rd_torch.RunningMoments(40)
    moments.update(torch.randn(200, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    stages = rd_torch.concat_pca(moments, {"a": 16, "b": 24})
    return rd_torch.RDModel(tiny_model().backbones, stages).eval()


KINDS = {
    "larger rows": lambda: small_model(special_rows="larger"),
    "previous": lambda: small_model("previous"),
    "naive": naive,
}


@pytest.mark.slow
@pytest.mark.parametrize("make", KINDS.values(), ids=[*KINDS])
def test_every_kind_of_chain_is_written(make, tmp_path):
    model = make()
    rd_torch.export(model.train(), tmp_path / "model.onnx")
    assert model.training
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for sequences in BATCHES:
        tokens = tokens_of(*sequences)
        assert_near(session.run(None, {"tokens": tokens.numpy()})[0], model.eval(), tokens)
    levels = json.loads(session.get_modelmeta().custom_metadata_map["rd_torch.levels"])
    assert levels[model.config.levels[-1].name] == model.embed_dim
    assert (len(levels) == 1) == (model.config.method == "naive")


@pytest.mark.slow
def test_weights_too_large_for_one_file_lie_beside_it(tmp_path, monkeypatch):
    save = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(
        torch.onnx.ONNXProgram, "save", lambda program, path: save(program, path, external_data=True)
    )
    model = tiny_model()
    rd_torch.export(model, tmp_path / "model.onnx")
    assert {each.name for each in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    tokens = tokens_of(*BATCHES[0])
    assert_near(session.run(None, {"tokens": tokens.numpy()})[0], model, tokens)


@pytest.mark.slow
def test_what_torch_onnx_makes_of_a_plain_model_runs_too(tmp_path):
    """With all that a forward pass answers: names and numbers are no tensors, and none comes twice."""
    model = tiny_model()
    shapes = {"tokens": {0: any_size("batch"), 1: any_size("time")}}
    written = torch.onnx.export(
        model, (tokens_of(*BATCHES[0]),), dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    written.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for sequences in BATCHES:
        tokens = tokens_of(*sequences)
        embeddings, logits, mask = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
        assert_near(embeddings, model, tokens)
        with torch.no_grad():
            out = model(tokens)
        np.testing.assert_allclose(logits, out.logits, atol=1e-4 * float(out.logits.std()))
        assert np.array_equal(mask, out.residue_mask)


def hooked(model):
    model.backbones["a"].layers[0].register_forward_hook(lambda module, given, out: 2 * out)
    return model


def adapted(model):
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    return model


def quantised(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


WRONG = {
    "half": (
        lambda model: model.bfloat16(),
        "expected a chain in float32 to export, got bfloat16: .*float()",
    ),
    "double": (lambda model: model.double(), "expected a chain in float32 to export, got float64"),
    "hooks": (hooked, "got one in which a.layers.0 has hooks"),
    "adapters": (adapted, "got one in which a.layers.0.self_attn.q_proj is a peft"),
    "int8": (quantised, "got one in which backbones.a.layers.0.self_attn.q_proj.weight is quantised"),
    "offloaded": (
        lambda model: accelerate.cpu_offload(model, execution_device="cpu"),
        "got one in which a.embed_tokens has hooks|is kept elsewhere|not one of the family's own modules",
    ),
    "no numbers": (lambda model: model.to("meta"), "expected a chain on cpu to export, got meta"),
}


@pytest.fixture
def never(monkeypatch):
    """Nothing may be traced."""

    def traced(*_, **__):
        raise AssertionError("it was traced")

    monkeypatch.setattr(torch.export, "export", traced)
    monkeypatch.setattr(torch.onnx, "export", traced)


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=[*WRONG])
def test_a_chain_that_cannot_be_written_is_refused_before(change, message, never, tmp_path):
    model = change(copy.deepcopy(tiny_model()))
    with pytest.raises(ValueError, match=message):
        rd_torch.export(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def without(package):
    find = exporting.find_spec
    return lambda name: None if name == package else find(name)


def test_what_is_missing_here_is_said_before(never, tmp_path, monkeypatch):
    model = tiny_model()
    for name in ("model.h5", "model", "onnx"):
        with pytest.raises(ValueError, match=r"expected a file name that ends in .onnx or .pt2, got .*"):
            rd_torch.export(model, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="expected a folder for .*model.onnx, got none at"):
        rd_torch.export(model, tmp_path / "nowhere" / "model.onnx")
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "find_spec", without("onnxscript"))
        with pytest.raises(ImportError, match=r"got no onnxscript: pip install rd_torch\[export\]"):
            rd_torch.export(model, tmp_path / "model.onnx")
        result = command("28K", "-o", tmp_path / "model.onnx")
        assert result.exit_code == 1
        assert result.output.splitlines()[-1].startswith("Error: expected the packages onnx, onnxscript")
    with monkeypatch.context() as patch:
        patch.setattr("rd_torch.hardware.has_compiler", lambda language: language != "C++")
        with pytest.raises(OSError, match="expected a C.. compiler to write .pt2, got none: install g.."):
            rd_torch.export(model, tmp_path / "model.pt2")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.7.1+cpu")
        with pytest.raises(ImportError, match="expected torch 2.8 or newer to export, got torch 2.7.1"):
            rd_torch.export(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_is_no_chain_is_refused(never, tmp_path):
    predictor = rd_torch.Predictor(tiny_model(), rd_torch.SequenceHead(24, 1, task="regression"))
    for model in (predictor, torch.compile(tiny_model()), None):
        with pytest.raises(TypeError, match=r"expected an RDModel to export, got .*: export the chain in it"):
            rd_torch.export(model, tmp_path / "model.onnx")


def test_a_file_of_other_numbers_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_text("an older one")

    def write(encoder, path, facts):
        path.write_text("a newer one")

    def load(path):
        assert path.read_text() == "a newer one"
        return lambda tokens: (tiny_model().encode(tokens) + 1e-3, (tokens > 3) & (tokens < 29))

    monkeypatch.setitem(exporting.EXPORTERS, ".onnx", exporting.Exporter((), ("cpu",), write, load))
    with pytest.raises(RuntimeError, match="got one that is off by 0.00.* for a batch of 6; it was not kept"):
        rd_torch.export(tiny_model(), path)
    result = command("28K", "-o", path)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(
        "Error: expected a file within 0.0001 standard deviations"
    )
    assert path.read_text() == "an older one"
    assert list(tmp_path.iterdir()) == [path]
