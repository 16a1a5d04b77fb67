"""Heads over residues and sequences, and what counts in their losses."""

import copy

import pytest
import torch
from helpers import random_sequence, small_model, tokens_of
from torch import nn
from torch.nn import functional

from rd_torch import MatryoshkaHead, Predictor, ResidueHead, SequenceHead, align_labels
from rd_torch.levels import ALPHABET

NAN = float("nan")
SEQUENCES = "MKTAYIAKQR", "M", "XBUZO"


@pytest.fixture
def batch():
    """Random embeddings, zeros at padding, and the residue mask of `SEQUENCES`."""
    tokens = tokens_of(*SEQUENCES)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(*tokens.shape, 64, generator=generator) + 1
    real = tokens != ALPHABET.padding_idx
    return embeddings * real[..., None], (tokens >= 4) & (tokens <= 28), tokens


@pytest.mark.parametrize("hidden", [None, 16])
@pytest.mark.parametrize("width", [32, 64])
def test_a_residue_head_is_a_linear_layer_or_two_on_the_first_features(batch, width, hidden):
    embeddings, mask, _ = batch
    head = ResidueHead(width, 3, task="classification", hidden=hidden)
    x = embeddings[..., :width]
    if hidden:
        x = functional.gelu(x @ head.hidden.weight.T + head.hidden.bias)
    expected = x @ head.out.weight.T + head.out.bias
    torch.testing.assert_close(head(embeddings, mask), expected)


@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_a_sequence_head_pools_residues_only(batch, pool):
    embeddings, mask, _ = batch
    head = SequenceHead(32, 2, task="regression", pool=pool)
    if pool == "attention":
        nn.init.normal_(head.score.weight)
    out = head(embeddings, mask)
    for row, here in enumerate(mask):
        residues = embeddings[row, here][:, :32]
        weights = (
            torch.full((len(residues), 1), 1 / len(residues))
            if pool == "mean"
            else (residues @ head.score.weight.T).softmax(0)
        )
        torch.testing.assert_close(out[row], head.out((weights * residues).sum(0)))
    noisy = embeddings.masked_fill(~mask[..., None], 1e3)
    torch.testing.assert_close(head(noisy, mask), out)


def test_attention_begins_as_the_mean(batch):
    embeddings, mask, _ = batch
    mean = SequenceHead(64, 2, task="regression")
    attention = SequenceHead(64, 2, task="regression", pool="attention")
    attention.out.load_state_dict(mean.out.state_dict())
    torch.testing.assert_close(attention(embeddings, mask), mean(embeddings, mask))


@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_a_sequence_without_residues_is_a_vector_of_zeros_and_stays_finite(batch, pool):
    embeddings, mask, _ = batch
    head = SequenceHead(64, 2, task="regression", pool=pool)
    embeddings.requires_grad_()
    none = mask.clone()
    none[1] = False
    out = head(embeddings, none)
    torch.testing.assert_close(out[1], head.out.bias)
    out.sum().backward()
    assert embeddings.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def test_classes_of_residues_count_where_they_are_labelled(batch):
    embeddings, mask, tokens = batch
    head = ResidueHead(64, 3, task="classification")
    labels = align_labels([[0, 1, 2, -100, 0, 1, 2, 0, 1, -100], [2], [0, -100, 1, 2, 0]], tokens)
    predictions = head(embeddings, mask)
    counted = mask & (labels >= 0)
    expected = functional.cross_entropy(predictions[counted], labels[counted])
    torch.testing.assert_close(head.loss(predictions, labels, mask), expected)
    torch.testing.assert_close(
        head.loss(predictions, labels.masked_fill(~mask, 1), mask), expected
    )  # padding of another kind
    labels[0] = -100
    counted = mask & (labels >= 0)
    torch.testing.assert_close(
        head.loss(predictions, labels, mask), functional.cross_entropy(predictions[counted], labels[counted])
    )


@pytest.mark.parametrize("outputs", [1, 2])
def test_numbers_of_residues_count_where_they_are_labelled(batch, outputs):
    embeddings, mask, _ = batch
    head = ResidueHead(64, outputs, task="regression")
    labels = torch.randn(*mask.shape, outputs)
    labels[0, 3] = labels[2, 1, 0] = NAN
    predictions = head(embeddings, mask)
    counted = mask[..., None] & ~labels.isnan()
    expected = (predictions - labels)[counted].square().mean()
    torch.testing.assert_close(head.loss(predictions, labels, mask), expected)
    if outputs == 1:
        torch.testing.assert_close(head.loss(predictions, labels[..., 0], mask), expected)


def test_sequences_count_where_they_are_labelled(batch):
    embeddings, mask, _ = batch
    head = SequenceHead(64, 1, task="regression")
    predictions = head(embeddings, mask)
    labels = torch.tensor([1.5, NAN, -2.0])
    expected = (predictions[[0, 2], 0] - labels[[0, 2]]).square().mean()
    torch.testing.assert_close(head.loss(predictions, labels, mask), expected)
    head = SequenceHead(64, 4, task="classification")
    predictions = head(embeddings, mask)
    expected = functional.cross_entropy(predictions[1:], torch.tensor([3, 0]))
    torch.testing.assert_close(head.loss(predictions, torch.tensor([-100, 3, 0]), mask), expected)


def test_unlabelled_residues_and_padding_get_no_gradient(batch):
    embeddings, mask, tokens = batch
    labels = align_labels([[1.0] * 10, [NAN], [0.5, NAN, 1, 2, 3]], tokens)
    head = ResidueHead(64, 1, task="regression")
    embeddings.requires_grad_()
    head.loss(head(embeddings, mask), labels, mask).backward()
    counted = mask & ~labels.isnan()
    assert not embeddings.grad[~counted].any()
    assert embeddings.grad[counted].any(-1).all()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def test_labels_stand_where_their_residues_do():
    tokens = tokens_of(*SEQUENCES)
    classes = align_labels([range(10), [7], torch.arange(5)], tokens)
    assert classes.dtype == torch.int64
    assert classes[0].tolist() == [-100, *range(10), -100]
    assert classes[1].tolist() == [-100, 7, *[-100] * 10]
    numbers = align_labels([[0.5] * 10, [1.0], [0.1, NAN, 0, 0, 0]], tokens)
    assert numbers[2].isnan().tolist() == [True, False, True, False, False, False, *[True] * 6]


def test_a_matryoshka_head_trains_every_width_by_the_mean_of_their_losses(batch):
    embeddings, mask, _ = batch
    heads = [SequenceHead(width, 1, task="regression", hidden=8) for width in (64, 32, 48)]
    head = MatryoshkaHead(heads)
    labels = torch.tensor([1.0, 2.0, NAN])
    predictions = head(embeddings, mask)
    assert list(predictions) == [32, 48, 64]
    assert head.width == 64
    each = [one.loss(one(embeddings, mask), labels, mask) for one in heads]
    loss = head.loss(predictions, labels, mask)
    torch.testing.assert_close(loss, sum(each) / 3)
    loss.backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


@pytest.mark.parametrize("width", [20, 32, 48, 64])
def test_a_predictor_reads_what_its_head_reads_and_carries_no_more(model, width):
    tokens = tokens_of(*SEQUENCES)
    head = SequenceHead(width, 1, task="regression")
    predictor = Predictor(model, head)
    out = model(tokens)
    expected = head(out.embeddings, out.residue_mask)
    torch.testing.assert_close(predictor(tokens)["predictions"], expected)
    assert len(predictor.model.backbones) == {20: 1, 32: 1, 48: 2, 64: 3}[width]
    labels = torch.tensor([0.0, 1.0, 2.0])
    result = predictor(tokens, labels)
    torch.testing.assert_close(result["loss"], head.loss(expected, labels, out.residue_mask))
    result["loss"].backward()
    silent = [name for name, p in predictor.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent  # what DistributedDataParallel wants


def test_a_predictor_takes_soft_sequences_and_checkpointing(model):
    tokens = tokens_of(*SEQUENCES)
    predictor = Predictor(model, ResidueHead(64, 3, task="classification"))
    expected = predictor(tokens)["predictions"]
    soft = functional.one_hot(tokens, 33).float()
    torch.testing.assert_close(predictor(soft)["predictions"], expected, rtol=0, atol=1e-5)
    predictor.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing


def test_one_trained_chain_can_be_probed_at_every_prefix():
    """A signal that only the added block of the last level has is found there and not before."""
    model = small_model().freeze_backbones()
    sequences = [random_sequence(12, seed) for seed in range(64)]
    tokens = tokens_of(*sequences)
    out = model(tokens)
    mean = (out.embeddings * out.residue_mask[..., None]).sum(1) / 12
    labels = mean[:, 60]
    labels = (labels - labels.mean()) / labels.std()
    losses = {}
    for width in (32, 48, 64):
        torch.manual_seed(0)
        head = SequenceHead(width, 1, task="regression")
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure(head=head, optimizer=optimizer):
            optimizer.zero_grad()
            loss = head.loss(head(out.embeddings, out.residue_mask), labels, out.residue_mask)
            loss.backward(retain_graph=True)
            return loss

        optimizer.step(closure)
        losses[width] = closure().item()
    assert losses[64] < 1e-3
    assert 0.05 < losses[48] <= losses[32]


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_heads_take_half_precision_embeddings(batch, half):
    embeddings, mask, _ = batch
    head = SequenceHead(64, 2, task="regression")
    out = head(embeddings.to(half), mask)
    assert out.dtype == torch.float32
    assert head.to(half)(embeddings, mask).dtype == half


def test_a_predictor_compiles_as_one_graph(model):
    tokens, labels = tokens_of(*SEQUENCES), torch.tensor([0.0, 1.0, NAN])
    predictor = Predictor(model, SequenceHead(48, 1, task="regression", pool="attention"))
    compiled = torch.compile(predictor, fullgraph=True, backend="eager")
    expected = copy.deepcopy(predictor)(tokens, labels)["loss"]
    torch.testing.assert_close(compiled(tokens, labels)["loss"], expected)


REFUSED = {
    "no label": (SequenceHead(64, 1, task="regression"), torch.full((3,), NAN), "got none in the batch"),
    "no class": (SequenceHead(64, 3, task="classification"), torch.full((3,), -100), "got none in the batch"),
    "unknown class": (
        SequenceHead(64, 3, task="classification"),
        torch.tensor([0, 3, 1]),
        "expected classes from 0 to 2 and -100 where there is none, got 0 to 3",
    ),
    "another shape": (
        SequenceHead(64, 2, task="regression"),
        torch.zeros(3),
        r"expected floating labels of shape \(3, 2\), got torch.float32 \(3,\)",
    ),
    "floating classes": (
        SequenceHead(64, 3, task="classification"),
        torch.zeros(3),
        r"expected integer labels of shape \(3,\), got torch.float32",
    ),
}


@pytest.mark.parametrize(("head", "labels", "message"), REFUSED.values(), ids=[*REFUSED])
def test_labels_that_say_nothing_or_nonsense_are_refused(batch, head, labels, message):
    embeddings, mask, _ = batch
    with pytest.raises(ValueError, match=message):
        head.loss(head(embeddings, mask), labels, mask)


def test_labels_on_no_residue_are_refused(batch):
    embeddings, mask, _ = batch
    head = ResidueHead(64, 1, task="regression")
    labels = torch.zeros(mask.shape).masked_fill(mask, NAN)  # <cls>, <eos> and padding have some
    with pytest.raises(ValueError, match="expected a label at one residue or sequence at least, got none"):
        head.loss(head(embeddings, mask), labels, mask)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SequenceHead(64, 1, task="ranking"),
            "expected task to be one of 'regression', 'classification'",
        ),
        (
            lambda: SequenceHead(64, 1, task="regression", pool="max"),
            "expected pool to be one of 'mean', 'att",
        ),
        (lambda: SequenceHead(64, 1, task="classification"), "outputs of at least 2 for classification, got"),
        (lambda: ResidueHead(0, 1, task="regression"), "got width 0, hidden None, outputs 1"),
        (lambda: ResidueHead(8, 1, task="regression", hidden=0), "got width 8, hidden 0, outputs 1"),
        (lambda: MatryoshkaHead([]), r"expected heads of different widths, got widths \[\]"),
        (
            lambda: MatryoshkaHead([ResidueHead(8, 1, task="regression") for _ in range(2)]),
            r"got widths \[8, 8\]",
        ),
        (
            lambda: Predictor(small_model(), ResidueHead(65, 1, task="regression")),
            "expected a head of at most the model's width, 64, got 65",
        ),
        (
            lambda: align_labels([[1] * 9, [1], [1] * 5], tokens_of(*SEQUENCES)),
            r"expected one label for each residue, so \[10, 1, 5\] labels, got \[9, 1, 5\]",
        ),
    ],
)
def test_heads_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_head_wider_than_the_embedding_is_refused_with_the_cure(batch):
    embeddings, mask, _ = batch
    head = SequenceHead(128, 1, task="regression")
    with pytest.raises(
        ValueError, match="expected embeddings of at least the head's width, 128, got 64: make"
    ):
        head(embeddings, mask)
