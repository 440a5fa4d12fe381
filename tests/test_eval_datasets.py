"""Every caption format on a file of its published shape, and every kind of bad row."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from mmsearch.core.errors import InputError
from mmsearch.evaluation.datasets import CaptionSet, read_captions

DOG = "1000268201_693b08cb0e.jpg"
GIRL = "1001773457_577c3a7d70.jpg"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two empty files in the pictures' place: readers look whether they exist."""
    for name in (DOG, GIRL):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).touch()
    return tmp_path


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def texts(captions: CaptionSet) -> list[tuple[str, str]]:
    return [(captions.images[each.image].name, each.text) for each in captions.captions]


BOTH = [(DOG, "A child in a pink dress ."), (DOG, "A girl, climbing ."), (GIRL, "Two dogs .")]


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        (
            "own.csv",
            f"image,caption,split\n{DOG},A child in a pink dress .,train\n"
            f'{DOG},"A girl, climbing .",train\n{GIRL},Two dogs .,val\n',
            "table",
        ),
        (
            "own.tsv",
            f"caption\timage\nA child in a pink dress .\t{DOG}\nA girl, climbing .\t{DOG}\n"
            f"Two dogs .\t{GIRL}\n",
            "table",
        ),
        (
            "openclip.csv",
            f"filepath\ttitle\r\n{DOG}\tA child in a pink dress .\r\n{DOG}\tA girl, climbing .\r\n"
            f"{GIRL}\tTwo dogs .\r\n",
            "table",
        ),
        (
            "own.jsonl",
            json.dumps({"image": DOG, "caption": "A child in a pink dress ."})
            + "\n"
            + json.dumps({"image": DOG, "caption": "A girl, climbing ."})
            + "\n\n"
            + json.dumps({"image": GIRL, "caption": "Two dogs ."}),
            "table",
        ),
        (  # Salesforce's Karpathy splits, as BLIP and ARO read them
            "coco_karpathy_test.json",
            json.dumps(
                [
                    {"image": DOG, "caption": ["A child in a pink dress .", "A girl, climbing ."]},
                    {"image": GIRL, "caption": ["Two dogs ."]},
                ]
            ),
            "table",
        ),
        (  # Flickr30k's results.csv
            "results.csv",
            f"image_name| comment_number| comment\n{DOG}| 0| A child in a pink dress .\n"
            f"{DOG}| 1| A girl, climbing .\n{GIRL}| 0| Two dogs .\n",
            "table",
        ),
        (  # Kaggle's Flickr8k: commas not always quoted
            "captions.txt",
            f"image,caption\n{DOG},A child in a pink dress .\n{DOG},A girl, climbing .\n"
            f'{GIRL},"Two dogs ."\n',
            "flickr-csv",
        ),
        (
            "Flickr8k.token.txt",
            f"{DOG}#0\tA child in a pink dress .\n{DOG}#1\tA girl, climbing .\n"
            f"{GIRL}#0\tTwo dogs .\n",
            "flickr-token",
        ),
        (
            "dataset_flickr8k.json",
            json.dumps(
                {
                    "images": [
                        {
                            "sentids": [0, 1],
                            "imgid": 0,
                            "sentences": [
                                {
                                    "tokens": ["a", "child"],
                                    "raw": "A child in a pink dress .",
                                    "imgid": 0,
                                    "sentid": 0,
                                },
                                {
                                    "tokens": ["a", "girl"],
                                    "raw": "A girl, climbing .",
                                    "imgid": 0,
                                    "sentid": 1,
                                },
                            ],
                            "split": "train",
                            "filename": DOG,
                        },
                        {
                            "sentids": [2],
                            "imgid": 1,
                            "sentences": [{"tokens": [], "raw": "Two dogs .", "sentid": 2}],
                            "split": "test",
                            "filepath": "val2014",
                            "filename": GIRL,
                        },
                    ],
                    "dataset": "flickr8k",
                }
            ),
            "karpathy",
        ),
        (
            "captions_val2017.json",
            json.dumps(
                {
                    "info": {"year": 2017},
                    "licenses": [],
                    "images": [
                        {"id": 179765, "file_name": DOG, "height": 480, "width": 640},
                        {"id": 190236, "file_name": GIRL, "height": 480, "width": 640},
                    ],
                    "annotations": [
                        {"image_id": 179765, "id": 38, "caption": "A child in a pink dress ."},
                        {"image_id": 179765, "id": 41, "caption": "A girl, climbing ."},
                        {"image_id": 190236, "id": 45, "caption": "Two dogs ."},
                    ],
                }
            ),
            "coco",
        ),
    ],
)
def test_formats(folder: Path, name: str, content: str, form: str) -> None:
    captions = read_captions(write(folder, name, content))
    assert captions.format == form
    assert texts(captions) == BOTH
    assert captions.problems == ()
    assert len({each.id for each in captions.captions}) == 3
    assert all(path.is_absolute() and path.exists() for path in captions.images)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_imagefolder_with_splits(tmp_path: Path, name: str) -> None:
    for split, image, text in (("train", "a.png", "a hat"), ("test", "b.png", "a cat, asleep")):
        (tmp_path / split / "pictures").mkdir(parents=True)
        (tmp_path / split / "pictures" / image).touch()
        row = {"file_name": f"pictures/{image}", "text": text}
        content = (
            f'file_name,text\n{row["file_name"]},"{text}"\n'
            if name.endswith("csv")
            else json.dumps(row)
        )
        write(tmp_path / split, name, content)
    captions = read_captions(tmp_path)
    assert texts(captions) == [("b.png", "a cat, asleep"), ("a.png", "a hat")]
    assert captions.names == ("test/pictures/b.png", "train/pictures/a.png")
    assert [each.split for each in captions.captions] == ["test", "train"]
    assert texts(read_captions(tmp_path, split="train")) == [("a.png", "a hat")]


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def test_webdataset(tmp_path: Path) -> None:
    """The layout of clip_benchmark.webdataset_builder.convert_retrieval_dataset."""
    (tmp_path / "test").mkdir()
    (tmp_path / "dataset_type.txt").write_text("retrieval\n")
    (tmp_path / "test" / "nshards.txt").write_text("2\n")
    for shard, image in ((0, "s0000000"), (1, "s0000001")):
        with tarfile.open(tmp_path / "test" / f"{shard}.tar", "w") as archive:
            add_member(archive, f"{image}.webp", b"picture")
            add_member(archive, f"{image}.txt", b"A dog .\nA brown dog .\n\n")
            add_member(archive, "s0000009.txt", b"of no picture")
    whole = read_captions(tmp_path)
    tar = read_captions(tmp_path / "test" / "1.tar")
    assert whole.format == tar.format == "webdataset"
    assert texts(whole) == [
        ("0.tar!s0000000.webp", "A dog ."),
        ("0.tar!s0000000.webp", "A brown dog ."),
        ("1.tar!s0000001.webp", "A dog ."),
        ("1.tar!s0000001.webp", "A brown dog ."),
    ]
    assert whole.names[0] == "test/0.tar!s0000000.webp"
    assert whole.images[0] == tmp_path / "test" / "0.tar!s0000000.webp"
    assert whole.skipped() == {"empty caption": 2, "missing image": 2}
    assert tar.images == (tmp_path / "test" / "1.tar!s0000001.webp",)


def test_bad_rows_are_named_and_counted(folder: Path) -> None:
    path = write(
        folder,
        "captions.csv",
        b"image,caption,split\n"
        + f"{DOG},A dog .,val\n".encode()
        + b"gone.jpg,No such picture .,val\n"
        + f"{DOG},A dog .,val\n".encode()
        + f"{GIRL}, ,val\n".encode()
        + f"{GIRL},Caf\xe9 .,val\n".encode("latin-1")
        + f"{GIRL},too,many,fields\n".encode()
        + f'{GIRL},"Two\nlines",val\n'.encode()
        + f"{GIRL},After them .,val\n".encode(),
    )
    captions = read_captions(path)
    assert texts(captions) == [(DOG, "A dog ."), (GIRL, "Two\nlines"), (GIRL, "After them .")]
    assert [(each.place, each.kind) for each in captions.problems] == [
        ("line 3", "missing image"),
        ("line 4", "duplicate"),
        ("line 5", "empty caption"),
        ("line 6", "encoding"),
        ("line 7", "malformed"),
    ]
    assert captions.skipped()["encoding"] == 1
    with pytest.raises(InputError, match="line 3: missing image"):
        read_captions(path, strict=True)


def test_bad_rows_of_other_formats(folder: Path) -> None:
    token = write(folder, "t.txt", f"{DOG}#0\tA dog .\nno tab\n{DOG}.1#0\tQuirk of Flickr8k\n")
    assert read_captions(token).skipped() == {"malformed": 1, "missing image": 1}
    lines = write(folder, "t.jsonl", f'{{"image": "{DOG}", "text": "A dog ."}}\n{{broken\n[1]\n')
    assert [each.place for each in read_captions(lines).problems] == ["line 2", "line 3"]
    coco = {
        "images": [{"id": 1, "file_name": DOG}],
        "annotations": [
            {"image_id": 1, "caption": "A dog ."},
            {"image_id": 2, "caption": "Of nothing ."},
            {"image_id": 1},
            {"image_id": 1, "caption": "Half a letter \ud83d"},
        ],
    }
    problems = read_captions(write(folder, "coco.json", json.dumps(coco))).problems
    assert [(each.place, each.kind) for each in problems] == [
        ("annotations[1]", "missing image"),
        ("annotations[2]", "malformed"),
        ("annotations[3]", "encoding"),
    ]


def test_names_of_no_file(folder: Path) -> None:
    rows = f",No name .\n .,The folder .\n  ,Blanks .\n{'A long caption ' * 30},x.jpg\n"
    path = write(folder, "c.csv", f"image,caption\n{DOG},A dog .\n{rows}")
    captions = read_captions(path, images_dir=folder / "images")
    assert texts(captions) == [(DOG, "A dog .")]
    assert [each.kind for each in captions.problems] == [
        "malformed",
        "missing image",
        "malformed",
        "missing image",
    ]


def test_json_whose_entries_are_no_objects(folder: Path) -> None:
    coco = {
        "images": [7, {"id": 1, "file_name": DOG}],
        "annotations": [
            None,
            {"image_id": [1], "caption": "A ."},
            {"image_id": 1, "caption": 5},
            {"image_id": 1, "caption": "A dog ."},
        ],
    }
    captions = read_captions(write(folder, "coco.json", json.dumps(coco)))
    assert texts(captions) == [(DOG, "A dog .")]
    assert captions.skipped() == {"malformed": 2, "missing image": 1}
    sentences = [7, {"raw": 5}, {"raw": "A dog ."}]
    karpathy = {"images": ["a", {"filename": DOG, "sentences": sentences, "split": 1}]}
    captions = read_captions(write(folder, "k.json", json.dumps(karpathy)))
    assert texts(captions) == [(DOG, "A dog .")]
    assert [each.place for each in captions.problems] == [
        "images[0]",
        "images[1].sentences[0]",
        "images[1].sentences[1]",
    ]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks(folder: Path, encoding: str) -> None:
    content = f"image,caption,split\n{DOG},Café noir .,val\n".encode(encoding)
    assert texts(read_captions(write(folder, "c.csv", content))) == [(DOG, "Café noir .")]


def test_an_opening_quote_does_not_swallow_the_file(folder: Path) -> None:
    content = f'image,caption\n{DOG},"Look" says a man .\n{DOG},"unfinished\n{GIRL},Two dogs .\n'
    captions = read_captions(write(folder, "captions.txt", content))
    assert [text for _, text in texts(captions)] == [
        '"Look" says a man .',
        '"unfinished',
        "Two dogs .",
    ]


def test_splits(folder: Path) -> None:
    path = write(folder, "c.csv", f"image,caption,split\n{DOG},A .,train\n{GIRL},B .,val\n")
    assert texts(read_captions(path, split="val")) == [(GIRL, "B .")]
    assert len(read_captions(path, split="train,val").captions) == 2
    with pytest.raises(InputError, match="no split 'test'") as error:
        read_captions(path, split="test")
    assert error.value.hint == "its splits are: train, val"


def test_graded_relevance(folder: Path) -> None:
    queries = write(
        folder, "queries.tsv", "query_id\ttext\nq1\ta child\nq2\ttwo dogs\nq3\tno one\n"
    )
    qrels = write(folder, "qrels", f"q1 0 {DOG} 3\nq1 0 {GIRL} 1\nq2 0 {GIRL} 2\nq2 0 {DOG} 0\n")
    captions = read_captions(queries, qrels=qrels)
    assert captions.names == (DOG, GIRL)
    assert [each.grades for each in captions.captions] == [((0, 3), (1, 1)), ((1, 2),)]
    assert captions.skipped() == {"unjudged": 1}


def test_images_elsewhere(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "far").mkdir()
    path = write(tmp_path / "far", "c.csv", f"image,caption,split\n{DOG},A .,val\n")
    with pytest.raises(InputError, match="no caption can be used") as error:
        read_captions(path)
    assert "--images" in error.value.hint
    assert len(read_captions(path, images_dir=folder / "images").captions) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("once upon a time\n", "no format is known"),
        (b"\x8c,\r\x07\x00\xfe,\xb1\r\r,\n", "no format is known"),
        (b"\xff\xfe\x41", "is no text"),
        ('{"images": [', "not valid JSON"),
        pytest.param("[" * 100_000, "nested too deep", id="deep"),
        ('{"0": {"filename": "a", "caption": "b", "negative_caption": "c"}}', "SugarCrepe"),
    ],
)
def test_what_is_no_caption_file(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_captions(write(tmp_path, "c", content))
    with pytest.raises(InputError, match="no such file"):
        read_captions(tmp_path / "absent")
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match="holds neither"):
        read_captions(tmp_path / "bare")
