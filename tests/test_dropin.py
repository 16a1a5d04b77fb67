"""Code as fair-esm's users write it, run on an `esm.ESM2` object and on an `RDModel` around that object."""

import copy
import pickle

import esm
import numpy as np
import pytest
import torch
from helpers import SHAPES, WIDTHS, random_esm2, random_sequence, random_stages, small_model, tokens_of
from torch import nn
from torch.utils.data import DataLoader

from rd_torch import RDModel

PROTEINS = [
    ("long", random_sequence(41)),
    ("masked", "MKTAYIAKQR<mask>QISFVK<mask>"),
    ("single", "M"),
    ("rare", "XBUZO"),
    ("blank", "<mask><mask>"),
]
MODELS = ("esm.ESM2", "RDModel")
TOLERANCE = 1e-4


# What users wrote: it takes a model and its alphabet, and knows nothing of rd_torch.


def embed_batch(model, alphabet, proteins):
    """Of each protein by label: residues, their mean, contacts, and logits of all real tokens."""
    convert = alphabet.get_batch_converter()
    model.eval()  # disables dropout
    labels, _, batch_tokens = convert(proteins)
    batch_lens = (batch_tokens != alphabet.padding_idx).sum(1)
    with torch.no_grad():
        results = model(batch_tokens, repr_layers=[model.num_layers], return_contacts=True)
    token_representations = results["representations"][model.num_layers]
    found = {}
    for i, tokens_len in enumerate(batch_lens):
        residues = token_representations[i, 1 : tokens_len - 1]
        found[labels[i]] = {
            "residues": residues,
            "mean": residues.mean(0),
            "contacts": results["contacts"][i, : tokens_len - 2, : tokens_len - 2],
            "logits": results["logits"][i, :tokens_len],
        }
    return found


def extract_to_files(model, alphabet, fasta, folder, *, layers=(-1,), longest=1022, toks_per_batch=64):
    """A file a protein, `<label>.pt`, with what users keep of a forward pass."""
    model.eval()
    device = next(model.parameters()).device
    dataset = esm.FastaBatchedDataset.from_file(fasta)
    batches = dataset.get_batch_indices(toks_per_batch, extra_toks_per_seq=1)
    loader = DataLoader(dataset, collate_fn=alphabet.get_batch_converter(longest), batch_sampler=batches)
    assert all(-(model.num_layers + 1) <= i <= model.num_layers for i in layers)
    repr_layers = [(i + model.num_layers + 1) % (model.num_layers + 1) for i in layers]
    with torch.no_grad():
        for labels, strings, tokens in loader:
            tokens = tokens.to(device, non_blocking=True)
            out = model(tokens, repr_layers=repr_layers, return_contacts=True)
            logits, contacts = (out[key].to("cpu") for key in ("logits", "contacts"))
            per_layer = {layer: t.to("cpu") for layer, t in out["representations"].items()}
            for i, label in enumerate(labels):
                length = min(longest, len(strings[i]))
                kept = {
                    "label": label,
                    "per_tok": {layer: t[i, 1 : length + 1].clone() for layer, t in per_layer.items()},
                    "mean": {layer: t[i, 1 : length + 1].mean(0).clone() for layer, t in per_layer.items()},
                    "bos": {layer: t[i, 0].clone() for layer, t in per_layer.items()},
                    "contacts": contacts[i, :length, :length].clone(),
                    "logits": logits[i, 1 : length + 1].clone(),
                }
                torch.save(kept, folder / f"{label}.pt")
    return {path.stem: torch.load(path) for path in sorted(folder.glob("*.pt"))}


def attend(model, alphabet, proteins, cut=None):
    """Attention maps and contacts of a padded batch, the tokens cut at the right as older scripts do."""
    _, _, tokens = alphabet.get_batch_converter()(proteins)
    tokens = tokens[:, :cut]
    with torch.no_grad():
        out = model(tokens, need_head_weights=True)
        assert "contacts" not in out
        return out["attentions"], model.predict_contacts(tokens)


def parse(variant):
    return variant[0], int(variant[1:-1]), variant[-1]


def score_variants(model, alphabet, protein, variants, *, masked):
    """Log odds of variants such as `K2R`, with the site masked or shown; other lengths pad the batch."""
    _, _, tokens = alphabet.get_batch_converter()([("protein", protein), ("other", protein + "KLV<mask>")])
    scores = []
    for variant in variants:
        wild, site, mutant = parse(variant)
        assert protein[site - 1] == wild
        shown = tokens.clone()
        if masked:
            shown[0, site] = alphabet.mask_idx
        with torch.no_grad():
            log_probs = torch.log_softmax(model(shown)["logits"], dim=-1)[0, site]
        scores.append(log_probs[alphabet.get_idx(mutant)] - log_probs[alphabet.get_idx(wild)])
    return torch.stack(scores)


def pseudo_log_likelihood(model, alphabet, protein):
    """Mean log probability of each residue where it alone is masked, all sites in one batch."""
    _, _, tokens = alphabet.get_batch_converter()([("protein", protein)])
    sites = torch.arange(1, tokens.size(1) - 1)
    masked = tokens.repeat(len(sites), 1)
    masked[torch.arange(len(sites)), sites] = model.alphabet.mask_idx
    with torch.no_grad():
        log_probs = model(masked)["logits"].log_softmax(-1)[torch.arange(len(sites)), sites]
    return log_probs.gather(1, tokens[0, sites, None]).mean()


class Classifier(nn.Module):
    """A head on the mean of the residues; the language model trains along."""

    def __init__(self, model, classes):
        super().__init__()
        self.model = model
        self.head = nn.Linear(model.embed_dim, classes)

    def forward(self, tokens):
        last = self.model.num_layers
        x = self.model(tokens, repr_layers=[last])["representations"][last]
        special = [getattr(self.model, f"{name}_idx") for name in ("padding", "cls", "eos", "mask")]
        kept = ~torch.isin(tokens, torch.tensor(special))
        return self.head((x * kept.unsqueeze(-1)).sum(1) / kept.sum(1, keepdim=True).clamp(min=1))


# What must come out of it.


@pytest.fixture(scope="module")
def family():
    return {name: random_esm2(*shape, seed=k) for k, (name, shape) in enumerate(SHAPES.items())}


@pytest.fixture(scope="module")
def theirs(family):
    return family["c"]


@pytest.fixture(scope="module")
def ours(family):
    return RDModel(family, random_stages())


@pytest.fixture(scope="module", params=MODELS)
def model(request, theirs, ours):
    return theirs if request.param == "esm.ESM2" else ours


@pytest.fixture(scope="module")
def alone(theirs):
    """What fair-esm's own model makes of each protein without padding."""
    return {label: embed_batch(theirs, theirs.alphabet, [(label, s)])[label] for label, s in PROTEINS}


@pytest.fixture
def fasta(tmp_path):
    """Three unequal proteins and one residue, over several lines; `P1` is cut where 30 is the longest."""
    first = random_sequence(45)
    path = tmp_path / "few.fasta"
    path.write_text(f">P1\n{first[:40]}\n{first[40:]}\n>P2\nMKVLAT\n>P3\nM\n>P4\n{random_sequence(20, 1)}\n")
    return path


def assert_agrees(found, expected):
    assert found.shape == expected.shape
    assert found.isfinite().all()
    scale = expected.std(correction=0).item() if expected.numel() > 1 else 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * max(scale, 1.0))


def sizes(proteins, alphabet):
    return {label: len(alphabet.tokenize(sequence)) for label, sequence in proteins}


def test_the_readme_idiom_gives_means_contacts_and_logits_of_each_protein(model, alone):
    found = embed_batch(model, model.alphabet, PROTEINS)
    assert found.keys() == dict(PROTEINS).keys()
    for label, length in sizes(PROTEINS, model.alphabet).items():
        protein = found[label]
        assert protein["residues"].shape == (length, model.embed_dim)
        assert protein["mean"].shape == (model.embed_dim,)
        assert protein["residues"].isfinite().all()
        assert protein["residues"].std() > 0.1
        assert protein["contacts"].shape == (length, length)
        for key in ("contacts", "logits"):
            assert_agrees(protein[key], alone[label][key])


def test_batch_of_one_and_batch_of_many_give_the_same_representations(model):
    together = embed_batch(model, model.alphabet, PROTEINS)
    for label, sequence in PROTEINS:
        by_itself = embed_batch(model, model.alphabet, [(label, sequence)])[label]
        assert_agrees(together[label]["residues"], by_itself["residues"])
        assert_agrees(together[label]["mean"], by_itself["mean"])


@pytest.mark.parametrize("level", ["a", "b"])
def test_prefixes_are_what_the_same_code_gives_on_a_truncated_model(ours, level):
    whole = embed_batch(ours, ours.alphabet, PROTEINS)
    small = ours.truncate(level)
    for label, protein in embed_batch(small, small.alphabet, PROTEINS).items():
        assert protein["residues"].shape[-1] == small.embed_dim == WIDTHS[level]
        assert torch.equal(whole[label]["residues"][:, : WIDTHS[level]], protein["residues"])


def test_the_first_features_are_those_of_fair_esms_smallest_model(family, ours):
    whole, smallest = (embed_batch(each, each.alphabet, PROTEINS) for each in (ours, family["a"]))
    for label in dict(PROTEINS):
        for key in ("residues", "mean"):
            assert_agrees(whole[label][key][..., : WIDTHS["a"]], smallest[label][key])


@pytest.mark.parametrize("longest", [1022, 30])
def test_bulk_extraction_writes_what_it_writes_for_fair_esms_model(model, theirs, fasta, tmp_path, longest):
    found = extract_to_files(model, model.alphabet, fasta, tmp_path, longest=longest)
    assert {label: len(kept["logits"]) for label, kept in found.items()} == {
        "P1": min(45, longest),
        "P2": 6,
        "P3": 1,
        "P4": 20,
    }
    sequences = dict(esm.data.read_fasta(fasta))
    for label, kept in found.items():
        length, last = len(kept["logits"]), model.num_layers
        alone = embed_batch(theirs, theirs.alphabet, [(label, sequences[label][:longest])])[label]
        assert kept["label"] == label
        assert_agrees(kept["contacts"], alone["contacts"])
        assert_agrees(kept["logits"], alone["logits"][1:-1])
        assert [*kept["per_tok"]] == [*kept["mean"]] == [*kept["bos"]] == [last]
        assert kept["per_tok"][last].shape == (length, model.embed_dim)
        assert kept["bos"][last].shape == (model.embed_dim,)
        assert kept["bos"][last].isfinite().all()
        assert kept["bos"][last].std() > 0.1
        assert_agrees(kept["mean"][last], kept["per_tok"][last].mean(0))


@pytest.mark.parametrize("level", ["a", "b"])
def test_extracted_files_hold_the_files_of_a_truncated_model_as_prefixes(ours, fasta, tmp_path, level):
    small, width = ours.truncate(level), WIDTHS[level]
    folders = [tmp_path / name for name in ("whole", "small")]
    for folder in folders:
        folder.mkdir()
    whole, cut = (
        extract_to_files(each, each.alphabet, fasta, folder)
        for each, folder in zip((ours, small), folders, strict=True)
    )
    assert whole.keys() == cut.keys()
    for label, kept in cut.items():
        for key in ("per_tok", "bos"):
            prefix = whole[label][key][ours.num_layers][..., :width]
            assert torch.equal(prefix, kept[key][small.num_layers])


@pytest.mark.parametrize("layers", [(0,), (0, -1), (-2,), range(4)])
def test_code_that_asks_for_hidden_layers_is_told_that_they_have_no_such_form(
    theirs, ours, fasta, tmp_path, layers
):
    with pytest.raises(ValueError, match="no levels of this chain, and have no reverse-distilled form"):
        extract_to_files(ours, ours.alphabet, fasta, tmp_path, layers=layers)
    assert not [*tmp_path.glob("*.pt")]
    assert len(extract_to_files(theirs, theirs.alphabet, fasta, tmp_path, layers=layers)) == 4


@pytest.mark.parametrize("cut", [None, 12])
def test_attentions_and_contacts_are_fair_esms_own(model, theirs, cut):
    attentions, contacts = attend(model, model.alphabet, PROTEINS, cut)
    batch, time = len(PROTEINS), cut or 43
    assert attentions.shape == (batch, model.num_layers, model.attention_heads, time, time)
    for row, (label, sequence) in enumerate(PROTEINS):
        real = min(len(model.alphabet.tokenize(sequence)) + 2, time)
        own_attentions, own_contacts = attend(theirs, theirs.alphabet, [(label, sequence)], cut)
        assert_agrees(attentions[row, ..., :real, :real], own_attentions[0])
        # The contact head drops the last column of a batch, which in a cut sequence is a residue.
        assert_agrees(contacts[row, : real - 2, : real - 2], own_contacts[0])


def test_everything_may_be_asked_for_by_position(model, alone):
    labels, _, tokens = model.alphabet.get_batch_converter()(PROTEINS)
    with torch.no_grad():
        out = model(tokens, [model.num_layers], True, True)
    assert {"logits", "representations", "attentions", "contacts"} <= set(out.keys())
    for label, contacts in zip(labels, out["contacts"], strict=True):
        length = len(alone[label]["contacts"])
        assert_agrees(contacts[:length, :length], alone[label]["contacts"])


PROTEIN = "MKTAYIAKQRW"
VARIANTS = ["M1A", "K2R", "Y5F", "W11X"]


@pytest.mark.parametrize("masked", [True, False], ids=["masked marginals", "wild-type marginals"])
def test_variants_score_as_with_fair_esms_model(model, theirs, masked):
    found = score_variants(model, model.alphabet, PROTEIN, VARIANTS, masked=masked)
    for score, variant in zip(found, VARIANTS, strict=True):
        wild, site, mutant = parse(variant)
        shown = PROTEIN[: site - 1] + ("<mask>" if masked else wild) + PROTEIN[site:]
        logits = embed_batch(theirs, theirs.alphabet, [("", shown)])[""]["logits"][site]
        # The normaliser of the softmax is the same for both residues.
        expected = logits[theirs.alphabet.get_idx(mutant)] - logits[theirs.alphabet.get_idx(wild)]
        assert_agrees(score, expected)
    assert found.std() > 0.1


def test_pseudo_log_likelihood_is_that_of_fair_esms_model(model, theirs):
    expected = []
    for site, residue in enumerate(PROTEIN, start=1):
        shown = PROTEIN[: site - 1] + "<mask>" + PROTEIN[site:]
        logits = embed_batch(theirs, theirs.alphabet, [("", shown)])[""]["logits"][site]
        expected.append(logits.log_softmax(-1)[theirs.alphabet.get_idx(residue)])
    assert_agrees(pseudo_log_likelihood(model, model.alphabet, PROTEIN), torch.stack(expected).mean())


def test_attributes_are_those_that_code_for_fair_esm_reads(model, theirs):
    names = (
        "num_layers attention_heads alphabet_size padding_idx mask_idx cls_idx eos_idx prepend_bos append_eos"
    )
    for name in names.split():
        assert getattr(model, name) == getattr(theirs, name)
    assert model.embed_dim == embed_batch(model, model.alphabet, PROTEINS)["long"]["mean"].shape[0] == 64
    assert model.alphabet.to_dict() == theirs.alphabet.to_dict()
    assert model.alphabet_size == len(model.alphabet)


def test_embed_dim_is_the_nested_width_where_that_is_not_the_largest_backbones(family):
    wider = RDModel(family, random_stages(added=[30, 20]))
    found = embed_batch(wider, wider.alphabet, PROTEINS)
    assert wider.embed_dim == 32 + 30 + 20
    assert {protein["residues"].shape[-1] for protein in found.values()} == {wider.embed_dim}


def test_the_model_switches_modes_and_moves_as_modules_do(model):
    copied = copy.deepcopy(model)
    assert copied.train().training
    assert copied.eval() is copied
    assert not any(part.training for part in copied.modules())
    device = next(copied.parameters()).device
    assert copied.to(device) is copied
    assert {part.device for part in (*copied.parameters(), *copied.buffers())} == {device}
    moved, found = (embed_batch(each, each.alphabet, PROTEINS)["long"] for each in (copied, model))
    assert torch.equal(moved["residues"], found["residues"])


def test_state_dicts_that_were_saved_or_pickled_restore_all_outputs(model, tmp_path):
    expected = embed_batch(model, model.alphabet, PROTEINS)["long"]
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    pickled = pickle.loads(pickle.dumps(model.state_dict()))
    for state in (torch.load(tmp_path / "weights.pt", map_location="cpu"), pickled):
        other = copy.deepcopy(model)
        for part in (*other.parameters(), *other.buffers()):
            part.data.fill_(0.5)
        assert not torch.equal(embed_batch(other, other.alphabet, PROTEINS)["long"]["mean"], expected["mean"])
        other.load_state_dict(state)
        restored = embed_batch(other, other.alphabet, PROTEINS)["long"]
        assert all(torch.equal(restored[key], expected[key]) for key in expected)


def test_a_classifier_on_top_learns_with_the_language_model(model):
    torch.manual_seed(0)
    classifier = Classifier(copy.deepcopy(model), 3).train()
    _, _, tokens = model.alphabet.get_batch_converter()(PROTEINS)
    optimizer = torch.optim.AdamW([p for p in classifier.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(classifier(tokens), torch.arange(len(PROTEINS)) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    gradients = {name: p.grad for name, p in classifier.named_parameters() if p.grad is not None}
    assert all(grad.isfinite().all() for grad in gradients.values())
    assert any("layers.0." in name and grad.abs().max() > 0 for name, grad in gradients.items())


@pytest.mark.parametrize("kind", [list, tuple, iter, set, np.array], ids=lambda kind: kind.__name__)
def test_layers_are_listed_once_whatever_holds_them(kind):
    model = small_model()
    tokens = tokens_of("MKTAYIAK")
    layer = model.num_layers
    listed = model(tokens, repr_layers=kind([layer, layer]))["representations"]
    assert list(listed) == [layer]
    assert list(model(tokens, repr_layers=kind([]))["representations"]) == []
    with pytest.raises(ValueError, match=r"expected repr_layers among \[3\] or none, got \[0\]"):
        model(tokens, repr_layers=kind([0]))


def test_a_model_without_token_dropout_stays_without():
    module = random_esm2(2, 32, 4)
    module.token_dropout = False
    tokens = tokens_of("MKT<mask>YIAK<mask>", "MKV", "<mask>")
    with torch.no_grad():
        ours = RDModel({"a": module}, [])(tokens).embeddings
        theirs = module(tokens, repr_layers=[2])["representations"][2]
    real = tokens != 1
    assert (ours - theirs)[real].abs().max() < 2e-5 * theirs[real].std()
