"""``mmsearch eval`` end to end: a real index, real photographs, a tiny model."""

import json
import tarfile
from pathlib import Path

import pytest
from mmsearch.cli.eval import eval_app
from mmsearch.core.errors import (
    BadIndex,
    GateFailed,
    InputError,
    ModelError,
    StorageError,
    UsageError,
)
from typer.testing import CliRunner, Result

from tests.photos import PHOTOGRAPHS, copy_photographs

NAMES = sorted(PHOTOGRAPHS)


def mmsearch_eval(*arguments: object, error: type[Exception] | None = None) -> Result:
    result = CliRunner().invoke(eval_app, [str(each) for each in arguments])
    if error is None:
        if result.exception is not None:
            raise result.exception
    else:
        assert isinstance(result.exception, error), (result.exception, result.output)
    return result


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photographs with captions.csv beside it."""
    folder = tmp_path_factory.mktemp("eval")
    copy_photographs(folder / "images")
    rows = [f"{name},{name[:-4]} number {turn},test" for name in NAMES for turn in range(3)]
    (folder / "captions.csv").write_text("\n".join(["image,caption,split", *rows]))
    return folder


@pytest.fixture(scope="module")
def index(photos: Path, tiny_model_dir: Path) -> Path:
    """An index that the first evaluation made."""
    folder = photos / "index"
    mmsearch_eval(
        photos / "captions.csv", "--index", folder, "--model", f"local-dir:{tiny_model_dir}",
        "--candidates", 0, "-q",
    )  # fmt: skip
    return folder


def test_figures_files_and_gate(photos: Path, index: Path, tmp_path: Path) -> None:
    captions = photos / "captions.csv"
    result = mmsearch_eval(
        captions, "--index", index, "--direction", "both", "--scorer", "late", "--candidates", 8,
        "--k", "1,3", "--json", tmp_path / "new" / "run.json", "--trec", tmp_path / "trec",
        "--report", tmp_path / "report.html",
    )  # fmt: skip
    assert "Text to image: 66 queries over 22 images" in result.output
    assert "Image to text: 22 queries over 66 captions" in result.output
    document = json.loads((tmp_path / "new" / "run.json").read_text())
    assert [row["scorer"] for row in document["directions"]["i2t"]["rows"]] == ["coarse", "late"]
    assert document["index"]["encoder"]["embed_dim"] == 32
    assert set(document["latency_ms"]) == {"encode", "search", "rerank with late"}
    assert len(list((tmp_path / "trec").iterdir())) == 6
    assert "<svg" in (tmp_path / "report.html").read_text()

    again = ["--index", index, "--direction", "both", "--candidates", 0]
    baseline = tmp_path / "new" / "run.json"
    passed = mmsearch_eval(captions, *again, "--baseline", baseline)
    assert "gate passed" in passed.stderr
    for direction in document["directions"].values():
        direction["rows"][0]["first_relevant"] = [1] * direction["queries"]
    (tmp_path / "perfect.json").write_text(json.dumps(document))
    result = mmsearch_eval(
        captions, *again, "--baseline", tmp_path / "perfect.json", "--max-drop", 0.5,
        error=GateFailed,
    )  # fmt: skip
    assert isinstance(result.exception, GateFailed)
    assert "t2i coarse: recall@1 -" in result.exception.message
    assert GateFailed.exit_code == 3
    table = mmsearch_eval("compare", tmp_path / "perfect.json", baseline).output
    assert "perfect.json" in table and "run.json" in table and "late" in table


def test_images_are_embedded_once_into_the_cache(photos: Path, tiny_model_dir: Path) -> None:
    arguments = [
        photos / "captions.csv", "--model", f"local-dir:{tiny_model_dir}", "--candidates", 0,
        "--limit", 5,
    ]  # fmt: skip
    assert "embedding 22 images" in mmsearch_eval(*arguments).stderr
    second = mmsearch_eval(*arguments)
    assert "using the index in" in second.stderr and "embedding" not in second.stderr


def test_more_images_in_the_index_can_be_searched(
    photos: Path, index: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few.csv"
    few.write_text(f"image,caption\n{NAMES[0]},one\n{NAMES[1]},two\n")
    arguments = [few, "--images", photos / "images", "--index", index, "--candidates", 0]
    assert "over 2 images" in mmsearch_eval(*arguments).output
    assert "over 22 images" in mmsearch_eval(*arguments, "--gallery", "everything").output


def test_bad_rows_are_told_and_strict_is_fatal(photos: Path, index: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    whole = photos / "images" / NAMES[0]
    captions = tmp_path / "captions.csv"
    captions.write_text(
        f"image,caption,split\n{whole},fine,x\nbroken.jpg,cannot be shown,x\ngone.jpg,absent,x\n"
    )
    arguments = [captions, "--index", index, "--candidates", 0]
    result = mmsearch_eval(*arguments)
    assert "line 4: missing image" in result.stderr
    assert "unreadable image: " in result.stderr and "2 rows left out" in result.stderr
    mmsearch_eval(*arguments, "--strict", error=InputError)
    captions.write_text(f"image,caption,split\n{whole},fine,x\nbroken.jpg,cannot be shown,x\n")
    result = mmsearch_eval(*arguments, "--strict", error=InputError)
    assert "could not be embedded" in str(result.exception)


def test_pictures_in_a_tar(photos: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for at, name in enumerate(NAMES[:4]):
            suffix = Path(name).suffix
            tar.add(photos / "images" / name, f"s{at:07d}{suffix}")
            (tmp_path / "text").write_text(f"{name}\nanother\n")
            tar.add(tmp_path / "text", f"s{at:07d}.txt")
    result = mmsearch_eval(
        tmp_path / "0.tar", "--model", f"local-dir:{tiny_model_dir}", "--direction", "both",
        "--candidates", 0, "--report", tmp_path / "report.html",
    )  # fmt: skip
    assert "8 queries over 4 images" in result.output
    assert "data:image/jpeg" in (tmp_path / "report.html").read_text()


def test_compositional_task(photos: Path, index: Path, tmp_path: Path) -> None:
    rows = {
        str(at): {"filename": name, "caption": name, "negative_caption": f"not {name}"}
        for at, name in enumerate(NAMES)
    }
    (tmp_path / "swap_obj.json").write_text(json.dumps(rows))
    result = mmsearch_eval(
        "--task", "sugarcrepe", "--data", tmp_path, "--images", photos / "images", "--index", index,
        "--scorer", "late", "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert "swap_obj" in result.output
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["kind"] == "compositional" and document["trials"] == 22
    assert {row["scorer"] for row in document["rows"]} == {"coarse", "late"}


def test_wrong_command_lines(photos: Path, index: Path) -> None:
    captions = photos / "captions.csv"
    mmsearch_eval(error=UsageError)
    mmsearch_eval("--task", "aro", error=UsageError)
    mmsearch_eval(captions, "--k", "one", error=UsageError)
    mmsearch_eval(captions, "--split", "none", error=InputError)
    mmsearch_eval(captions, "--baseline", "absent.json", error=InputError)
    unknown = [captions, "--index", index, "--scorer", "no-such-scorer"]
    assert isinstance(mmsearch_eval(*unknown, error=Exception).exception, (UsageError, ModelError))


def test_another_model_than_the_indexs_is_refused(
    photos: Path, index: Path, tiny_model_dir: Path, tiny_model, tmp_path: Path
) -> None:
    rows = {"0": {"filename": NAMES[0], "caption": "a", "negative_caption": "b"}}
    (tmp_path / "swap_obj.json").write_text(json.dumps(rows))
    task = ["--task", "sugarcrepe", "--data", tmp_path, "--images", photos / "images"]
    retrieval = [photos / "captions.csv", "--candidates", 0]
    for asked in (task, retrieval):
        arguments = [*asked, "--index", index, "--scorer", "late"]
        other = f"local-dir:{tiny_model('siglip')}"
        result = mmsearch_eval(*arguments, "--model", other, error=BadIndex)
        assert other in str(result.exception)
        mmsearch_eval(*arguments, "--model", f"local-dir:{tiny_model_dir}")
        mmsearch_eval(*arguments, "--pretrained", "openai", error=UsageError)


@pytest.mark.parametrize("option", ["--json", "--report", "--trec"])
def test_what_cannot_be_written_is_told_first(option: str, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    arguments = [photos / "captions.csv", "--model", "no-such-model", option]
    mmsearch_eval(*arguments, tmp_path / "file" / "below", error=StorageError)
    if option != "--trec":
        result = mmsearch_eval(*arguments, tmp_path, error=UsageError)
        assert "is a folder" in str(result.exception)


def test_help_of_the_group_is_that_of_evaluating() -> None:
    output = mmsearch_eval("--help").output
    assert "--candidates" in output and "compare" in output
