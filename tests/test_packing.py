import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from rd_torch.backbone import packing as packing_module
from rd_torch.backbone.packing import SHORTEST_SHARE, Packing, in_chunks

LENGTHS = (3, 40, 17, 39, 1, 34, 33, 20)
REAL = {
    "one token": [[1]],
    "equal lengths": [[1] * 5] * 3,
    "padding right": [[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]],
    "padding left": [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]],
    "padding inside": [[1, 0, 1, 1, 0], [1, 1, 0, 1, 1], [0, 1, 0, 1, 0]],
    "a row of padding": [[0, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]],
    "only padding": [[0, 0], [0, 0]],
    "many lengths": [[1] * length + [0] * (40 - length) for length in LENGTHS],
    "no rows": torch.zeros(0, 4),
    "no columns": torch.zeros(3, 0),
}

each_mask = pytest.mark.parametrize("real", [torch.as_tensor(r).bool() for r in REAL.values()], ids=[*REAL])
each_way = pytest.mark.parametrize("make", [Packing.of, Packing.padded], ids=["packed", "padded"])


def features(real, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*real.shape, *shape, dtype=torch.float64, generator=generator)


def attend(packing, q, k, v):
    """Attention of padded `(batch, time, heads, size)`, bucket by bucket, and padded again."""
    q, k, v = map(packing.pack, (q, k, v))
    mixed = [
        bucket.gather(
            scaled_dot_product_attention(bucket.spread(q), bucket.spread(k), bucket.spread(v), bucket.mask)
        )
        for bucket in packing.buckets
    ]
    return packing.unpack(torch.cat(mixed) if mixed else v)


def attend_alone(real, q, k, v):
    """The same one sequence at a time, without any padding."""
    out = q * 0
    for row, here in enumerate(real):
        if here.any():
            alone = (part[row, here].transpose(0, 1) for part in (q, k, v))
            out[row, here] = scaled_dot_product_attention(*alone).transpose(0, 1)
    return out


@each_mask
@each_way
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_unpacked_is_what_was_packed_with_zeros_at_padding(make, real, shape):
    x = features(real, *shape)
    packing = make(real)
    back = packing.unpack(packing.pack(x))
    assert back.shape == x.shape
    assert torch.equal(back[real], x[real])
    assert not back[~real].any()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 9).flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n))))
def test_any_padding_makes_the_round_trip_and_packs_no_more_than_the_real_tokens(rows):
    real = torch.tensor(rows, dtype=torch.bool).view(len(rows), len(rows[0]) if rows else 0)
    packing = Packing.of(real)
    x = features(real, 2)
    assert len(packing.pack(x)) == len(packing.positions) == int(real.sum())
    assert torch.equal(packing.unpack(packing.pack(x)), x * real[..., None])


@each_mask
@each_way
def test_positions_are_columns_and_sequence_is_the_row(make, real):
    packing = make(real)
    batch, time = real.shape
    rows, columns = torch.arange(batch)[:, None].expand(real.shape), torch.arange(time).expand(real.shape)
    assert torch.equal(packing.sequence, packing.pack(rows))
    assert torch.equal(packing.positions, packing.pack(columns))
    assert packing.shape == (batch, time)


@each_mask
def test_a_sequence_is_packed_in_one_piece_and_in_order(real):
    packing = Packing.of(real)
    rows = packing.sequence.unique_consecutive()
    lengths = real.sum(1)[rows]
    assert sorted(rows.tolist()) == real.any(1).nonzero().flatten().tolist()
    assert torch.equal(lengths, lengths.sort(descending=True).values)
    for row in rows:
        assert torch.equal(packing.positions[packing.sequence == row], real[row].nonzero().flatten())


@each_mask
@each_way
def test_buckets_cover_every_token_once_and_in_order(make, real):
    packing = make(real)
    count = len(packing.positions)
    ids = torch.arange(count)[:, None, None]
    gathered = [bucket.gather(bucket.spread(ids)) for bucket in packing.buckets]
    assert torch.equal(torch.cat([*gathered, ids[:0]]), ids)
    edges = [0, *(bucket.stop for bucket in packing.buckets)]
    assert [bucket.start for bucket in packing.buckets] == edges[:-1]
    assert edges[-1] == count


@each_mask
def test_a_row_of_a_bucket_is_one_sequence_of_nearly_the_longest_length(real):
    packing = Packing.of(real)
    for bucket in packing.buckets:
        rows = bucket.spread(packing.sequence[:, None, None])[:, 0, :, 0]
        here = torch.ones_like(rows, dtype=torch.bool) if bucket.mask is None else bucket.mask[:, 0, 0]
        for row, valid in zip(rows, here, strict=True):
            assert len(row[valid].unique()) == 1
            assert SHORTEST_SHARE * bucket.length <= valid.sum() <= bucket.length


def test_unequal_lengths_share_few_buckets():
    real = torch.as_tensor(REAL["many lengths"]).bool()
    assert [(bucket.rows, bucket.length) for bucket in Packing.of(real).buckets] == [
        (3, 40), (1, 33), (2, 20), (1, 3), (1, 1)
    ]  # fmt: skip


@each_mask
@each_way
def test_attention_by_buckets_is_attention_of_each_sequence_alone(make, real):
    q, k, v = (features(real, 2, 4, seed=seed) for seed in range(3))
    torch.testing.assert_close(attend(make(real), q, k, v), attend_alone(real, q, k, v), rtol=0, atol=1e-13)


@each_mask
@each_way
def test_gradients_reach_real_tokens_and_no_padding(make, real):
    weights, x = features(real, 3, seed=1), features(real, 3).requires_grad_()
    packing = make(real)
    (packing.unpack(packing.pack(x)) * weights).sum().backward()
    assert torch.equal(x.grad, weights * real[..., None])


@each_mask
@each_way
def test_gradients_of_attention_are_those_of_each_sequence_alone(make, real):
    weights = features(real, 2, 4, seed=3)
    parts = [features(real, 2, 4, seed=seed).requires_grad_() for seed in range(3)]
    ours, alone = (
        torch.autograd.grad((out * weights).sum(), parts, allow_unused=True, materialize_grads=True)
        for out in (attend(make(real), *parts), attend_alone(real, *parts))
    )
    for mine, other in zip(ours, alone, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 100, 257])
@pytest.mark.parametrize(("features", "least"), [(1, 1), (64, 16), (10**9, 256)])
def test_chunks_together_are_the_whole(monkeypatch, tokens, features, least):
    monkeypatch.setattr(packing_module, "CHUNK_FEATURES", features)
    monkeypatch.setattr(packing_module, "CHUNK_TOKENS", least)
    x, y = torch.randn(tokens, 4), torch.randn(tokens, 2, 3)
    sizes = []

    def function(a, b):
        sizes.append(len(a))
        return a + 1, b * a[:, :1, None]

    with torch.no_grad():
        first, second = in_chunks(function, x, y)
    assert torch.equal(first, x + 1)
    assert torch.equal(second, y * x[:, :1, None])
    assert sum(sizes) == tokens
    assert max(sizes) <= max(features // 4, least) + packing_module.CHUNK_MULTIPLE
    assert all(size % packing_module.CHUNK_MULTIPLE == 0 for size in sizes[:-1])


def test_a_graph_is_recorded_in_one_piece(monkeypatch):
    monkeypatch.setattr(packing_module, "CHUNK_FEATURES", 1)
    monkeypatch.setattr(packing_module, "CHUNK_TOKENS", 16)
    calls = []
    in_chunks(lambda x: (calls.append(len(x)) or x,), torch.randn(100, 4, requires_grad=True))
    assert calls == [100]
    in_chunks(lambda x: (calls.append(len(x)) or x,), torch.randn(100, 4))  # frozen, among what trains
    assert len(calls) > 2
