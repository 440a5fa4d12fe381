"""Whole evaluations on a synthetic gallery: both directions, rerankers, JSON, gate, report."""

import json
from pathlib import Path

import ir_measures
import numpy as np
import pytest
import torch
from mmsearch.core.errors import InputError, ModelError
from mmsearch.core.types import Candidates, Grid, PatchBatch, TextFeatures
from mmsearch.evaluation.datasets import CaptionSet, read_captions
from mmsearch.evaluation.evaluate import Direction, Plan, evaluate
from mmsearch.evaluation.gallery import Gallery
from mmsearch.evaluation.report import write_report
from mmsearch.evaluation.results import (
    changes,
    failures,
    read_json,
    to_document,
    write_json,
    write_trec,
)
from mmsearch.evaluation.texts import TextBank
from mmsearch.rerank.rerank import rerank
from mmsearch.rerank.scorers import Scores
from PIL import Image

IMAGES, CAPTIONS, WIDTH = 30, 5, 16


class Tower:
    """A text encoder whose vector of "IMAGE TURN" lies near the vector of that image."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        self.asked: list[str] = []

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        self.asked += texts
        rows = []
        for text in texts:
            image, turn = map(int, text.split()[:2])
            noise = np.random.default_rng(1000 * image + turn).normal(size=WIDTH)
            rows.append(self.images[image] + 0.5 * noise)
        pooled = torch.tensor(np.array(rows), dtype=torch.float32)
        lengths = torch.tensor([len(text.split()) for text in texts])
        longest = int(lengths.max())
        mask = torch.arange(longest) < lengths[:, None]
        tokens = torch.where(mask[..., None], pooled[:, None].repeat(1, longest, 1), torch.nan)
        return TextFeatures(
            tuple(texts),
            torch.nn.functional.normalize(pooled, dim=-1),
            tokens,
            mask,
            tuple(tuple(text.split()) for text in texts),
        )


class Knowing:
    """A reranker that sees which image a text is of: patch 0 holds the image's number."""

    name = "knowing"
    needs_patches = True

    def score(
        self,
        text: TextFeatures,
        patches: PatchBatch | None,
        rows: torch.Tensor,
        coarse: torch.Tensor,
    ) -> Scores:
        assert patches is not None
        assert not text.tokens[text.mask].isnan().any()
        assert len(rows.unique()) - int((rows < 0).any()) == len(patches.codes)
        number = patches.codes[:, 0, 0][rows.clamp_min(0)]  # (Q, N)
        wanted = torch.tensor([int(each.split()[0]) for each in text.texts])[:, None]
        return Scores(torch.where(rows < 0, -torch.inf, coarse + (number == wanted)), None)


class Scattered(Knowing):
    """A reranker whose score is arbitrary, but depends on text and image only."""

    name = "scattered"

    def score(
        self,
        text: TextFeatures,
        patches: PatchBatch | None,
        rows: torch.Tensor,
        coarse: torch.Tensor,
    ) -> Scores:
        assert patches is not None
        number = patches.codes[:, 0, 0][rows.clamp_min(0)].double()
        query = torch.tensor([float("".join(each.split()[:2])) for each in text.texts])[:, None]
        return Scores((torch.sin(7.3 * number + 3.1 * query) * 9).float(), None)


class Broken(Knowing):
    name = "broken"

    def score(self, text, patches, rows, coarse) -> Scores:
        return Scores(torch.full_like(coarse, torch.nan), None)


@pytest.fixture
def captions(tmp_path: Path) -> CaptionSet:
    lines = ["image,caption,split"]
    for image in range(IMAGES):
        colour = tuple(np.random.default_rng(image).integers(0, 255, 3).tolist())
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"picture {image}.png")
        lines += [
            f"picture {image}.png,{image} {turn}{' more' * turn},test" for turn in range(CAPTIONS)
        ]
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    return read_captions(tmp_path / "captions.csv")


@pytest.fixture
def gallery(captions: CaptionSet) -> Gallery:
    vectors = np.random.default_rng(0).normal(size=(IMAGES, WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def fetch(rows: np.ndarray) -> PatchBatch:
        codes = torch.from_numpy(rows).float()[:, None, None].repeat(1, 4, 2)
        return PatchBatch(codes, None, Grid(2, 2))

    return Gallery(captions.names, captions.images, np.arange(IMAGES) + 7, vectors, fetch)


def run(captions: CaptionSet, gallery: Gallery, scorers=(), **plan) -> list[Direction]:
    settings = Plan(**{"directions": ("t2i", "i2t"), "candidates": 10, "seed": 3, **plan})
    return evaluate(captions, gallery, Tower(gallery.vectors), scorers, settings)  # type: ignore[arg-type]


def document_of(captions: CaptionSet, directions: list[Direction], plan: Plan) -> dict:
    encoder = {
        "model": "tiny", "pretrained": None, "weights_hash": "0" * 64, "input_size": [64, 64],
        "embed_dim": WIDTH, "grid": [2, 2], "patch_kind": "aligned",
    }  # fmt: skip
    index = {"path": "/index", "images": IMAGES, "encoder": encoder, "patch_codes": "int8"}
    latency = {"encode": {"p50": 3.0, "p95": 4.0}}
    return to_document(captions, directions, plan, index, "test", latency, ["mmsearch", "eval"])


def test_coarse_and_reranked_rows(captions: CaptionSet, gallery: Gallery) -> None:
    for direction in run(captions, gallery, [Knowing(), Scattered()]):
        coarse, knowing, scattered = direction.rows
        assert [row.scorer for row in direction.rows] == ["coarse", "knowing", "scattered"]
        assert 0.2 < coarse.estimates["hit@1"].value < 1
        # What knows the answer reaches the ceiling, what does not stays below; none passes it.
        assert knowing.estimates["hit@1"].value == direction.ceiling.value
        assert scattered.estimates["hit@1"].value < coarse.estimates["hit@1"].value
        for row in direction.rows:
            assert row.estimates["hit@10"].value == direction.ceiling.value
            assert (
                np.sort(row.ranking.order[:, :10]) == np.sort(coarse.ranking.order[:, :10])
            ).all()
        difference = knowing.differences["hit@1"]
        assert difference.low > 0 and difference.p < 0.05
        assert scattered.differences["hit@1"].high < 0
        for estimate in coarse.estimates.values():
            assert estimate.low <= estimate.value <= estimate.high
    t2i, i2t = run(captions, gallery)
    assert t2i.single and not i2t.single
    assert len(t2i.queries) == 150 and len(i2t.queries) == IMAGES
    assert len(t2i.rows) == len(i2t.rows) == 1


def test_order_is_that_of_rerank_as_query_runs_it(captions: CaptionSet, gallery: Gallery) -> None:
    (direction,) = run(captions, gallery, [Scattered()], directions=("t2i",))
    coarse, scattered = (row.ranking for row in direction.rows)
    text = Tower(gallery.vectors).encode_texts([each.text for each in captions.captions])
    ranked = rerank(
        Scattered(),
        text,
        Candidates(coarse.order[:, :10], coarse.scores[:, :10]),
        lambda ids: gallery.fetch(np.array(ids)),
    )
    assert (ranked.ids == scattered.order[:, :10]).all()


def test_image_to_text_scores_the_same_pairs(captions: CaptionSet, gallery: Gallery) -> None:
    """Turned round in blocks, each pair still gets the score it has alone."""
    (direction,) = run(captions, gallery, [Scattered()], directions=("i2t",), candidates=40)
    ranking = direction.rows[1].ranking
    text = Tower(gallery.vectors).encode_texts([each.text for each in captions.captions])
    alone = (
        Scattered()
        .score(
            text,
            gallery.fetch(np.arange(IMAGES)),
            torch.arange(IMAGES).repeat(150, 1),
            torch.zeros(150, IMAGES),
        )
        .rank.numpy()
    )  # (texts, images)
    for image in range(IMAGES):
        expected = alone[ranking.order[image, :40], image]
        np.testing.assert_allclose(ranking.scores[image, :40], expected, rtol=1e-6)


def test_limit_draws_queries_and_leaves_the_gallery_whole(
    captions: CaptionSet, gallery: Gallery
) -> None:
    whole = run(captions, gallery)
    some = run(captions, gallery, limit=12)
    for all_of, part in zip(whole, some, strict=True):
        assert len(part.queries) == 12 and len(part.documents) == len(all_of.documents)
        rows = [all_of.queries.index(query) for query in part.queries]
        assert (part.rows[0].ranking.first == all_of.rows[0].ranking.first[rows]).all()
    assert some[0].queries == run(captions, gallery, limit=12)[0].queries
    assert some[0].queries != run(captions, gallery, limit=12, seed=4)[0].queries
    tower = Tower(gallery.vectors)
    evaluate(captions, gallery, tower, [], Plan(limit=12, candidates=0))  # type: ignore[arg-type]
    assert len(tower.asked) == 12


def test_no_candidates_means_coarse_only(captions: CaptionSet, gallery: Gallery) -> None:
    (direction,) = run(captions, gallery, [Knowing()], directions=("t2i",), candidates=0)
    assert [row.scorer for row in direction.rows] == ["coarse"]
    assert direction.depth == IMAGES


def test_cut_offs_beyond_the_candidates(captions: CaptionSet, gallery: Gallery) -> None:
    """With fewer candidates than k, the list goes on in the coarse order."""
    (direction,) = run(
        captions, gallery, [Knowing()], directions=("t2i",), candidates=3, ks=(1, 20)
    )
    coarse, knowing = direction.rows
    assert knowing.estimates["hit@20"] == coarse.estimates["hit@20"]
    assert knowing.estimates["hit@1"].value == direction.ceiling.value


def test_a_score_that_is_no_number_is_an_error(captions: CaptionSet, gallery: Gallery) -> None:
    with pytest.raises(ModelError, match="not a number"):
        run(captions, gallery, [Broken()])


def test_texts_come_back_as_encoded(gallery: Gallery) -> None:
    texts = [f"{image} {turn}{' word' * (turn % 4)}" for image in range(20) for turn in range(20)]
    tower = Tower(gallery.vectors)
    bank, alone = TextBank(tower, texts), tower.encode_texts([texts[7], texts[333]])  # type: ignore[arg-type]
    taken = bank.take([7, 333])
    assert taken.texts == alone.texts and taken.words == alone.words
    assert torch.equal(taken.mask, alone.mask)
    assert torch.equal(taken.tokens[taken.mask], alone.tokens[alone.mask])
    assert torch.equal(taken.pooled, alone.pooled)


def test_trec_files_read_back_to_the_same_figures(
    captions: CaptionSet, gallery: Gallery, tmp_path: Path
) -> None:
    directions = run(captions, gallery, [Scattered()])
    write_trec(tmp_path / "trec", directions)
    for direction in directions:
        qrels = list(ir_measures.read_trec_qrels(str(tmp_path / f"trec/{direction.name}.qrels")))
        for row in direction.rows:
            names = {
                ir_measures.Success @ 1: "hit@1",
                ir_measures.R @ 5: "recall@5",
                ir_measures.RR: "mrr",
                ir_measures.nDCG @ 10: "ndcg@10",
                ir_measures.AP: "map",
            }
            run_file = tmp_path / f"trec/{direction.name}.{row.scorer}.run"
            found = ir_measures.calc_aggregate(
                names, qrels, ir_measures.read_trec_run(str(run_file))
            )
            for measure, value in found.items():
                ours = row.estimates[names[measure]].value
                assert value == pytest.approx(ours, abs=1e-9), measure


def test_json_round_trip_and_gate(captions: CaptionSet, gallery: Gallery, tmp_path: Path) -> None:
    plan = Plan(candidates=10)
    good = document_of(captions, run(captions, gallery, [Knowing()]), plan)
    write_json(tmp_path / "good.json", good)
    assert read_json(tmp_path / "good.json") == json.loads(json.dumps(good))
    assert good["captions"]["sha256"] and good["versions"]["torch"]
    row = good["directions"]["t2i"]["rows"][1]
    assert row["metrics"]["hit@1"]["low"] <= row["metrics"]["hit@1"]["value"]
    scattered = Scattered()
    scattered.name = "knowing"
    bad = document_of(captions, run(captions, gallery, [scattered], limit=25), plan)
    found = changes(good, bad)
    assert {(each.direction, each.scorer) for each in found} == {
        ("t2i", "coarse"), ("t2i", "knowing"), ("i2t", "coarse"), ("i2t", "knowing"),
    }  # fmt: skip
    assert all(each.shared == 25 for each in found)
    assert {each.scorer for each in failures(found, 0.5)} == {"knowing"}
    assert failures(found, 100) == failures(changes(bad, good), 0) == []
    (tmp_path / "other.json").write_text('{"kind": "compositional"}')
    for name in ("other.json", "absent.json"):
        with pytest.raises(InputError):
            read_json(tmp_path / name)


def test_report_is_one_file(captions: CaptionSet, gallery: Gallery, tmp_path: Path) -> None:
    directions = run(captions, gallery, [Scattered()])
    path = tmp_path / "report.html"
    document = document_of(captions, directions, Plan())
    document["captions"]["problems"] = ["line 3: empty caption: <script>"]
    write_report(path, document, captions, gallery, directions)
    page = path.read_text()
    assert "http://" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    assert "https://" not in page.replace("https://matplotlib.org", "")
    assert "&lt;script&gt;" in page and "<script" not in page
    for words in ("Text to image", "Image to text", "Largest losses", "Worst misses", "ceiling"):
        assert words in page
    assert page.count("data:image/jpeg;base64,") > 20
    coarse = run(captions, gallery, directions=("t2i",))
    write_report(path, document_of(captions, coarse, Plan()), captions, gallery, coarse)
    assert "Largest gains" not in path.read_text() and "Worst misses" in path.read_text()
