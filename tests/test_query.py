"""mmsearch query as a user meets it, over real photographs, and the Python API of the README."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mmsearch.core.errors import UsageError
from mmsearch.indexing.index import ImageIndex
from mmsearch.rerank.searcher import Query, Searcher
from PIL import Image

from .photos import PHOTOGRAPHS, copy_photographs

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    copy_photographs(folder)
    return folder


@pytest.fixture(scope="module")
def index(tmp_path_factory, photos) -> Path:
    """The photographs, indexed with the bundled model as a user would."""
    folder = tmp_path_factory.mktemp("query") / "index"
    done = run("index", str(photos), "--model", "bundled", index=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{len(PHOTOGRAPHS)} added")
    return folder


@pytest.fixture
def searcher(index):
    """The same index as opened in Python, with the head that is taken by default."""
    with ImageIndex.open(index) as opened:
        yield Searcher(opened)


def run(*arguments: str, index: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "mmsearch.cli", *arguments, "--index", str(index)],
        capture_output=True,
        text=True,
        input=stdin,
        env=environment,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a cup of coffee", "coffee.png"),
        ("a cat looking at the camera", "cat.png"),
        ("a motorcycle parked in a garage", "motorcycle-1.png"),
    ],
)
def test_the_demos_first_hits_are_right(index, text, wanted):
    done = run("query", text, "-k", "1", "--paths", index=index)
    assert Path(done.stdout.strip()).name == wanted
    assert done.returncode == 0


def test_piped_output_is_plain_columns_without_being_asked(index, photos):
    done = run("query", "a cat", "-k", "2", index=index)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines] == [["a cat", "1"], ["a cat", "2"]]
    assert Path(lines[0][3]).resolve() == (photos / "cat.png").resolve()
    assert done.stderr == ""


def test_json_tells_all_about_each_hit(index):
    (result,) = json.loads(run("query", "a cat", "-k", "3", "--json", index=index).stdout)
    assert result["query"] == "a cat"
    assert [hit["rank"] for hit in result["hits"]] == [1, 2, 3]
    first = result["hits"][0]
    assert (first["width"], first["height"]) == (451, 300)
    assert -1 <= first["coarse_score"] <= 1
    assert first["probability"] is None or 0 <= first["probability"] <= 1


def test_jsonl_and_csv_agree(index):
    jsonl = run("query", "a cat", "-k", "3", "--jsonl", index=index).stdout
    table = run("query", "a cat", "-k", "3", "--csv", index=index).stdout
    from_jsonl = [json.loads(line)["path"] for line in jsonl.splitlines()]
    assert from_jsonl == [row["path"] for row in csv.DictReader(io.StringIO(table))]


def test_nul_ends_each_path(index):
    assert run("query", "a cat", "-k", "3", "-0", index=index).stdout.count("\0") == 3


def test_many_queries_come_from_a_file_or_a_pipe(index, tmp_path):
    file = tmp_path / "queries.txt"
    file.write_text("a cat\n\n# a comment\na cup of coffee\n")
    asked = ["query", "--file", str(file), "-k", "1", "--jsonl"]
    lines = [json.loads(line) for line in run(*asked, index=index).stdout.splitlines()]
    assert [line["query"] for line in lines] == ["a cat", "a cup of coffee"]
    piped = run("query", "-f", "-", "-k", "1", "--jsonl", index=index, stdin=file.read_text())
    assert [json.loads(line) for line in piped.stdout.splitlines()] == lines


def test_a_picture_finds_itself_and_its_like(index, photos):
    asked = ["query", "--image", str(photos / "motorcycle-1.png"), "-k", "2", "--paths"]
    names = [Path(line).name for line in run(*asked, index=index).stdout.splitlines()]
    assert names == ["motorcycle-1.png", "motorcycle-2.png"]


def test_minus_steers_away(index, photos):
    asked = ["query", "--image", str(photos / "cat.png"), "--json", "-k", "22"]
    (plain,) = json.loads(run(*asked, index=index).stdout)
    (steered,) = json.loads(run(*asked, "--minus", "a cat", index=index).stdout)

    def score(result):
        return next(h["coarse_score"] for h in result["hits"] if h["path"].endswith("/cat.png"))

    assert score(steered) < score(plain)


def shown(hits):
    return [(hit.record.path, round(hit.score, 4), hit.probability) for hit in hits]


def test_a_querys_answer_does_not_depend_on_its_batch(searcher, photos):
    words, picture = Query("a cat"), Query(images=(photos / "coffee.png",))
    first, second, third = searcher.search([picture, words, picture], k=5)
    assert shown(first) == shown(third) == shown(searcher.search([picture], k=5)[0])
    assert [hit.coarse_rank for hit in first] == [1, 2, 3, 4, 5]
    (alone,) = searcher.search([words], k=5)
    assert [hit.record.path for hit in second] == [hit.record.path for hit in alone]
    assert all(hit.probability is not None for hit in second)


def test_only_words_alone_have_a_probability(searcher, photos):
    like = (photos / "cat.png",)
    mixed = [Query("a cat", like), Query("a cat", minus=("a dog",)), Query(images=like)]
    for hits in searcher.search(mixed, k=3):
        assert [hit.probability for hit in hits] == [None] * 3
    for query in mixed:
        with pytest.raises(UsageError, match="only words alone"):
            searcher.search([Query("a cat"), query], min_score=0.1)


def test_no_probability_is_null(index):
    asked = ["query", "a cat", "--minus", "a dog", "-k", "1", "--json"]
    (result,) = json.loads(run(*asked, index=index).stdout)
    assert result["hits"][0]["probability"] is None


def test_what_a_batch_shares_is_encoded_once(searcher, photos, monkeypatch):
    texts, pictures = [], []
    encode_texts, encode = searcher.text_encoder.encode_texts, searcher._encode_pictures
    monkeypatch.setattr(
        searcher.text_encoder, "encode_texts", lambda t: texts.append(t) or encode_texts(t)
    )
    monkeypatch.setattr(searcher, "_encode_pictures", lambda p: pictures.append(p) or encode(p))
    like, minus = (photos / "cat.png",), ("a dog",)
    searcher.search([Query(words, like, minus) for words in ("sleeping", "playing", "eating")])
    assert texts == [["sleeping", "playing", "eating"], minus]
    assert pictures == [like]


def test_where_nothing_is_left_no_probability_is_missed(index):
    asked = ["query", "coffee", "--where", "width > 999999", "--min-score", "0.5"]
    done = run(*asked, index=index)
    assert (done.returncode, done.stdout) == (1, "")
    assert "nothing found" in done.stderr
    scored = run("query", "coffee", "--no-rerank", "--min-score", "0.5", index=index)
    assert scored.returncode == 2
    assert "scorer 'coarse' gives none" in scored.stderr


@pytest.mark.parametrize("asked", [["caf\udce9"], ["a cat", "--minus", "caf\udce9"]])
def test_words_that_are_no_text_are_refused(index, asked):
    done = run("query", *asked, index=index)
    assert done.returncode == 2
    assert "not valid UTF-8" in done.stderr


def test_a_line_that_is_no_text_does_not_end_the_conversation(index):
    command = [sys.executable, "-m", "mmsearch.cli", "query", "-i", "-k", "1", "--paths"]
    done = subprocess.run(
        [*command, "--index", str(index)],
        capture_output=True,
        input=b"caf\xe9\na cat\n",
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"},
        timeout=120,
    )
    assert done.returncode == 0
    assert b"not valid UTF-8" in done.stderr
    assert done.stdout.strip().endswith(b"cat.png")


def test_a_query_of_no_visible_letter_is_answered(searcher):
    (hits,) = searcher.search([Query("\u200b")], k=3)
    assert len(hits) == 3


def test_in_finds_what_was_indexed_through_a_symlink(photos, tmp_path):
    (tmp_path / "real").mkdir()
    shutil.copy(photos / "cat.png", tmp_path / "real" / "cat.png")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    place = tmp_path / "index"
    assert run("index", str(link), "--model", "bundled", index=place).returncode == 0
    done = run("query", "a cat", "--in", str(link), "--paths", index=place)
    assert done.stdout == f"{link / 'cat.png'}\n"


def test_in_restricts_to_a_folder(index, photos, tmp_path):
    inside = run("query", "a cat", "--in", str(photos), "--paths", index=index)
    assert len(inside.stdout.splitlines()) == 10
    outside = run("query", "a cat", "--in", str(tmp_path), index=index)
    assert (outside.returncode, outside.stdout) == (1, "")
    assert "nothing found" in outside.stderr


def test_where_restricts_by_facts(index):
    asked = ["query", "a cat", "--json", "-k", "22", "--where"]
    (result,) = json.loads(run(*asked, "width < 500 and extension = 'png'", index=index).stdout)
    assert "cat.png" in {Path(hit["path"]).name for hit in result["hits"]}
    assert all(hit["width"] < 500 and hit["path"].endswith(".png") for hit in result["hits"])
    assert "--where" in run("query", "--help", index=index).stdout


@pytest.fixture
def changing(tmp_path, photos) -> tuple[Path, Path]:
    """An index of three pictures of its own, one of them with a name made to mislead."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, copy in (
        ("cat.png", "a cat; rm -rf $HOME 'é\n.png"),
        ("coffee.png", "cup.png"),
        ("rocket.jpg", "gone.jpg"),
    ):
        shutil.copy(photos / name, folder / copy)
    done = run("index", str(folder), "--model", "bundled", index=tmp_path / "index")
    assert done.returncode == 0, done.stderr
    return folder, tmp_path / "index"


def test_explain_dir_writes_a_sheet_a_hit(changing, tmp_path):
    folder, index = changing
    plain = run("query", "a cat", "--paths", index=index)
    (folder / "gone.jpg").unlink()
    (folder / "cup.png").write_bytes((folder / "cup.png").read_bytes() + b"\0")  # another file
    out = tmp_path / "a" / "why"
    done = run("query", "a cat", "--paths", "--explain-dir", str(out), index=index)
    assert done.stdout == plain.stdout
    assert f"contact sheets written into {out}: 1" in done.stderr
    assert "gone.jpg: it is gone" in done.stderr and "cup.png: it is gone" in done.stderr
    (sheet,) = out.iterdir()
    assert sheet.name == "001-a_cat_rm_-rf_HOME_é_.png"
    with Image.open(sheet) as image:
        assert image.size[0] > 500


def test_no_rerank_is_the_coarse_order(index):
    (result,) = json.loads(run("query", "a cat", "--no-rerank", "--json", index=index).stdout)
    scores = [hit["coarse_score"] for hit in result["hits"]]
    assert scores == sorted(scores, reverse=True)
    assert [hit["coarse_rank"] for hit in result["hits"]] == list(range(1, 11))


def test_reranking_permutes_the_candidates_and_nothing_else(index):
    wide = ["query", "a person outdoors", "-k", "22", "--json"]
    (coarse,) = json.loads(run(*wide, "--no-rerank", index=index).stdout)
    (ranked,) = json.loads(run(*wide, index=index).stdout)
    assert sorted(h["path"] for h in coarse["hits"]) == sorted(h["path"] for h in ranked["hits"])


def test_interactive_answers_line_by_line_and_survives_a_bad_line(index):
    done = run("query", "-i", "-k", "1", "--paths", index=index, stdin="a cat\n\na cup of coffee\n")
    names = [Path(line).name for line in done.stdout.splitlines()]
    assert names == ["cat.png", "coffee.png"]
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([""], 2, "the query is empty"),
        ([], 2, "nothing to look for"),
        (["a cat", "--json", "--csv"], 2, "more than one output format"),
        (["a cat", "-k", "0"], 2, "greater than or equal to 1"),
        (["a cat", "--scorer", "nonsense"], 2, "unknown scorer 'nonsense'"),
        (["a cat", "--device", "warp"], 2, "unknown device 'warp'"),
        (["--image", "/no/such.jpg"], 4, "no such picture: /no/such.jpg"),
        (["a cat", "--where", "widht > 3"], 2, "did you mean width?"),
        (["a cat", "--explain-dir", "o", "--no-rerank"], 2, "'coarse' has no attention to show"),
        (["-i", "--explain-dir", "o"], 2, "--explain-dir explains one TEXT"),
        (["a cat", "--minus", "dog", "--min-score", "0.5"], 2, "only words alone have one"),
        (["a cat", "--in", "/no/such/folder"], 4, "no such folder: /no/such/folder"),
        (["--file", "/no/queries.txt"], 4, "cannot read /no/queries.txt"),
    ],
)
def test_mistakes_get_a_clear_line_and_their_exit_code(index, arguments, code, said):
    done = run("query", *arguments, index=index)
    assert said in re.sub(r"[\s│]+", " ", done.stderr)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_picture_of_a_query_that_is_none_is_named(index, tmp_path):
    (tmp_path / "fake.jpg").write_text("not a picture")
    done = run("query", "--image", str(tmp_path / "fake.jpg"), index=index)
    assert done.returncode == 4
    assert "fake.jpg" in done.stderr


def test_a_missing_index_says_how_to_make_one(tmp_path):
    done = run("query", "a cat", index=tmp_path / "none")
    assert done.returncode == 5
    assert "mmsearch index" in done.stderr


def test_the_readmes_python_lines_run(index, photos, tmp_path, monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(photos)
    exec(compile(code, "README.md", "exec"), {})
    assert "coffee.png" in capsys.readouterr().out.splitlines()[0]
