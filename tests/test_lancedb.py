"""The search guide's vector database, as its blocks make and ask it: it answers as `rd_torch.search` does."""

import contextlib
import random

import pytest
from pages import DOCS, blocks_of

import rd_torch

BLOCKS = [block.text for block in blocks_of(DOCS / "guides" / "search.md") if block.language == "python"]
LOAD, ASK, INDEX = (
    next(text for text in BLOCKS if words in text)
    for words in ("import lancedb", "def nearest", "create_index")
)


def draw(count, seed):
    """Proteins by names that a query language must quote."""
    rng = random.Random(seed)
    return [
        (f"p{seed}'{n}", "".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=rng.randint(8, 30))))
        for n in range(count)
    ]


@pytest.fixture(scope="module", params=["float32", "float16"])
def page(request, tmp_path_factory):
    """What the guide has defined when its table is loaded, here from a store of several files."""
    model = rd_torch.RDModel.from_pretrained("esm2-rd-mini", device="cpu")
    with contextlib.chdir(tmp_path_factory.mktemp("page")):
        options = {"save_dtype": request.param, "tokens_per_batch": 200}
        rd_torch.embed_to_store(model, draw(300, 0), "proteome.parquet", **options)
        with rd_torch.build_index("proteome.parquet", "proteome.index") as index:
            names = {
                "rd_torch": rd_torch,
                "model": model,
                "index": index,
                "ubiquitin": "MQIFVKTLTGKTITLEVEPS",
            }
            exec(LOAD, names)
            exec(ASK, names)
            yield names


def require_same_answers(page, candidates):
    queries = draw(12, 1)
    vectors = rd_torch.embed(page["model"], [sequence for _, sequence in queries])
    hits = rd_torch.search(page["model"], queries, page["index"], k=10, candidates=candidates)
    for vector in vectors:
        expected = [next(hits) for _ in range(10)]
        names, cosines = zip(*page["nearest"](vector, candidates=candidates), strict=True)
        assert list(names) == [hit.target for hit in expected]
        assert cosines == pytest.approx([hit.similarity for hit in expected], abs=1e-6)


@pytest.mark.parametrize("candidates", [10, 40, 300])
def test_both_stages_answer_as_ours_do(page, candidates):
    require_same_answers(page, candidates)


def test_the_table_has_what_the_store_has_in_its_order(page):
    assert len(page["stored"].files) > 1
    assert page["table"].to_arrow()["identifier"].to_pylist() == [name for name, _ in draw(300, 0)]
    assert dict(zip(page["levels"], page["sizes"], strict=True)) == {
        "28K": 32,
        "90K": 16,
        "207K": 16,
        "1M": 64,
    }


def test_each_level_has_an_index_of_its_own(page):
    exec(INDEX, page)
    made = {each.columns[0]: page["table"].index_stats(each.name) for each in page["table"].list_indices()}
    assert {name: index.distance_type for name, index in made.items()} == {
        "identifier": None,
        "28K": "cosine",
        "90K": "dot",
        "207K": "dot",
        "1M": "dot",
    }
    assert all(index.num_indexed_rows == 300 for index in made.values())
    require_same_answers(page, 40)  # 300 proteins lie in 17 clusters, of which 20 would be scanned
