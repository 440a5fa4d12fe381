"""Search, ranks, measures and TREC files against slow oracles and ir_measures, with many ties."""

import io
from pathlib import Path

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import AP, RR, R, Success, nDCG
from mmsearch.core.errors import InputError
from mmsearch.evaluation import trec
from mmsearch.evaluation.metrics import measure
from mmsearch.evaluation.ranking import Ranking, Relevance, rescored
from mmsearch.evaluation.search import search

KS = (1, 5, 10)


def random_case(seed: int, graded: bool = True) -> tuple[np.ndarray, np.ndarray, Relevance]:
    """Small integer vectors: scores are exact in float32 whatever the order of summation, and
    full of ties. Some queries have no relevant document."""
    rng = np.random.default_rng(seed)
    queries, documents = rng.integers(1, 30), rng.integers(1, 40)
    q = rng.integers(-2, 3, (queries, 4)).astype(np.float32)
    d = rng.integers(-2, 3, (documents, 4)).astype(np.float32)
    triples = [
        (query, int(document), int(rng.integers(1, 4)) if graded else 1)
        for query in range(queries)
        for document in rng.choice(documents, min(int(rng.integers(0, 7)), documents), False)
    ]
    return q, d, Relevance.from_triples(triples, (queries, documents))


def oracle(
    q: np.ndarray, d: np.ndarray, relevance: Relevance
) -> list[list[tuple[float, int, int]]]:
    """Each query's whole list of (score, grade, document), the worst order that ties allow."""
    grades = {
        (query, document): grade
        for query, document, grade in zip(
            relevance.queries.tolist(),
            relevance.documents.tolist(),
            relevance.grades.tolist(),
            strict=True,
        )
    }
    return [
        sorted(
            ((float(q[i] @ d[j]), grades.get((i, j), 0), j) for j in range(len(d))),
            key=lambda item: (-item[0], item[1], item[2]),
        )
        for i in range(len(q))
    ]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 2000))
def test_search_equals_the_slow_oracle(seed: int, depth: int, block_bytes: int) -> None:
    q, d, relevance = random_case(seed)
    finished: list[int] = []
    found = search(q, d, relevance, depth, block_bytes=block_bytes, on_block=finished.append)
    assert sum(finished) == len(q)
    for query, items in enumerate(oracle(q, d, relevance)):
        kept = items[:depth]
        assert found.order[query].tolist() == [document for _, _, document in kept]
        assert found.scores[query].tolist() == [score for score, _, _ in kept]
        assert found.grades[query].tolist() == [grade for _, grade, _ in kept]
        hits = [rank for rank, (_, grade, _) in enumerate(items, start=1) if grade]
        assert found.first[query] == (hits[0] if hits else len(d) + 1)


def through_trec(ranking: Ranking, relevance: Relevance, folder: Path) -> dict[str, np.ndarray]:
    """The same measures, by ir_measures on the files we write."""
    queries = [f"query {i}" for i in range(len(ranking.order))]
    documents = [f"a dog %{j}.jpg" for j in range(relevance.shape[1])]
    with (folder / "run").open("w") as file:
        trec.write_run(file, queries, documents, ranking.order, ranking.scores, "test")
    with (folder / "qrels").open("w") as file:
        trec.write_qrels(
            file,
            (
                (queries[query], documents[document], grade)
                for query, document, grade in zip(
                    relevance.queries.tolist(),
                    relevance.documents.tolist(),
                    relevance.grades.tolist(),
                    strict=True,
                )
            ),
        )
    names = {nDCG @ 10: "ndcg@10", RR: "mrr", AP: "map"}
    names |= {Success @ k: f"hit@{k}" for k in KS} | {R @ k: f"recall@{k}" for k in KS}
    values = {name: np.zeros(len(queries)) for name in names.values()}
    for metric in ir_measures.iter_calc(
        names,
        list(ir_measures.read_trec_qrels(str(folder / "qrels"))),
        list(ir_measures.read_trec_run(str(folder / "run"))),
    ):
        values[names[metric.measure]][int(metric.query_id.split("%20")[1])] = metric.value
    return values


@pytest.mark.parametrize("graded", [False, True])
def test_measures_equal_ir_measures_on_our_trec_files(tmp_path: Path, graded: bool) -> None:
    for seed in range(25):
        q, d, relevance = random_case(seed, graded)
        coarse = search(q, d, relevance, 15)
        noise = np.random.default_rng(seed).integers(0, 3, coarse.order[:, :8].shape)
        for ranking in (coarse, rescored(coarse, noise.astype(np.float32))):
            ours = measure(ranking, relevance, KS)
            if len(relevance.queries):
                theirs = through_trec(ranking, relevance, tmp_path)
                for name, values in ours.items():
                    np.testing.assert_allclose(values, theirs[name], atol=1e-6, err_msg=name)


def test_rescored_permutes_the_candidates_and_nothing_else() -> None:
    q, d, relevance = random_case(5)
    coarse = search(q, d, relevance, 12)
    n = 7
    scores = np.random.default_rng(0).normal(size=(len(q), n)).astype(np.float32)
    again = rescored(coarse, scores)
    assert (np.sort(again.order[:, :n]) == np.sort(coarse.order[:, :n])).all()
    assert (again.order[:, n:] == coarse.order[:, n:]).all()
    assert ((again.first <= n) == (coarse.first <= n)).all()
    beyond = coarse.first > n
    assert (again.first[beyond] == coarse.first[beyond]).all()
    assert (np.diff(again.scores, axis=1) <= 0).all()


def test_equal_new_scores_rank_the_relevant_last() -> None:
    relevance = Relevance.from_triples([(0, 1, 1)], (1, 3))
    coarse = search(np.ones((1, 1), np.float32), np.ones((3, 1), np.float32) * 2, relevance, 3)
    assert coarse.first.tolist() == [3]
    assert rescored(coarse, np.zeros((1, 3), np.float32)).first.tolist() == [3]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_order_of_input_changes_no_measure(seed: int) -> None:
    q, d, relevance = random_case(seed)
    rng = np.random.default_rng(seed)
    new_q, new_d = rng.permutation(len(q)), rng.permutation(len(d))
    place_q, place_d = np.argsort(new_q), np.argsort(new_d)
    triples = [
        (int(place_q[query]), int(place_d[document]), int(grade))
        for query, document, grade in zip(
            relevance.queries, relevance.documents, relevance.grades, strict=True
        )
    ]
    moved = Relevance.from_triples(triples, relevance.shape)
    before = measure(search(q, d, relevance, 10), relevance, KS)
    after = measure(search(q[new_q], d[new_d], moved, 10), moved, KS)
    for name in before:
        np.testing.assert_allclose(before[name][new_q], after[name], err_msg=name)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_duplicates_of_the_relevant_do_not_raise_recall(seed: int) -> None:
    """Copies nobody judged tie with the original, and ties count against us."""
    q, d, relevance = random_case(seed)
    copies = np.concatenate([d, d[relevance.documents]])
    wider = Relevance(
        relevance.queries, relevance.documents, relevance.grades, (len(q), len(copies))
    )
    before = measure(search(q, d, relevance, 10), relevance, KS)
    after = measure(search(q, copies, wider, 10), wider, KS)
    for name in before:
        assert (after[name] <= before[name] + 1e-12).all(), name


def test_a_perfect_ranker_scores_one() -> None:
    d = np.eye(20, dtype=np.float32)
    q = np.repeat(d, 5, axis=0)
    relevance = Relevance.from_triples([(i, i // 5, 1) for i in range(100)], (100, 20))
    for direction, case in (((q, d), relevance), ((d, q), relevance.transposed())):
        values = measure(search(*direction, case, 10), case, KS)
        fewer = {"recall@1"} if len(direction[0]) == 20 else set()  # 1 of 5 captions fits at 1
        assert all((each == 1).all() for name, each in values.items() if name not in fewer)


def test_a_random_ranker_scores_k_over_m() -> None:
    rng = np.random.default_rng(1)
    size, queries = 200, 20_000
    q = rng.normal(size=(queries, 64)).astype(np.float32)
    d = rng.normal(size=(size, 64)).astype(np.float32)
    relevance = Relevance.from_triples(
        [(i, int(rng.integers(size)), 1) for i in range(queries)], (queries, size)
    )
    ranking = search(q, d, relevance, 10)
    for k in KS:
        expected = k / size
        spread = 5 * np.sqrt(expected * (1 - expected) / queries)
        assert abs(measure(ranking, relevance, KS)[f"recall@{k}"].mean() - expected) < spread
    assert abs(np.median(ranking.first) - size / 2) < 5


def test_what_is_not_retrieved_is_a_miss() -> None:
    """A relevant document absent from the gallery, or beyond the list, scores nothing."""
    relevance = Relevance.from_triples([(0, 3, 1)], (2, 4))
    d = np.array([[4], [3], [2], [1]], np.float32)
    ranking = search(np.ones((2, 1), np.float32), d, relevance, 2)
    values = measure(ranking, relevance, (1, 2))
    assert ranking.first.tolist() == [4, 5]
    assert all(each.tolist() == [0, 0] for each in values.values())


def test_run_scores_survive_the_round_trip() -> None:
    scores = np.array([[0.3, 0.3, 0.3, -0.1]], np.float32)
    file = io.StringIO()
    order = np.array([[2, 0, 1, 3]])
    trec.write_run(file, ["q"], list("abcd"), order, scores, "tag")
    lines = [line.split() for line in file.getvalue().splitlines()]
    read = np.array([np.float32(line[4]) for line in lines])
    assert [line[2] for line in lines] == ["c", "a", "b", "d"]
    assert (np.diff(read) < 0).all() and read[0] == scores[0, 0] and read[3] == scores[0, 3]


def test_names_with_spaces_come_back(tmp_path: Path) -> None:
    path = tmp_path / "qrels"
    with path.open("w") as file:
        trec.write_qrels(file, [("my query#0", "a b/ü 100%.jpg", 2), ("my query#0", "c.jpg", 1)])
    assert len(path.read_text().splitlines()[0].split()) == 4
    assert trec.read_qrels(path) == {"my query#0": {"a b/ü 100%.jpg": 2, "c.jpg": 1}}


@pytest.mark.parametrize("content", ["q 0 d\n", "q 0 d high\n", "\n"])
def test_broken_qrels(tmp_path: Path, content: str) -> None:
    (tmp_path / "qrels").write_text(content)
    with pytest.raises(InputError):
        trec.read_qrels(tmp_path / "qrels")


def test_qrels_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("q 0 caf\xe9.jpg 1\n".encode("latin-1"))
    for name, reason in (("absent", "No such file"), ("latin", "not UTF-8")):
        with pytest.raises(InputError, match=reason):
            trec.read_qrels(tmp_path / name)
