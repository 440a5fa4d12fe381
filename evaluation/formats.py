"""The files captions come in, recognised by what they hold and never by their name.

Each reader yields `Entry` for a caption that could be read and `Problem` for a row that could not.
Which readers there are:

    table         CSV, TSV, semicolons or bars with a header; JSON Lines; a JSON list of objects.
                  Hugging Face ``metadata.csv``/``metadata.jsonl`` is this with ``file_name``.
    flickr-csv    Flickr8k ``captions.txt``: ``image,caption``, commas in the caption not quoted
    flickr-token  ``Flickr8k.token.txt``: ``image.jpg#0<TAB>caption``
    karpathy      ``{"images": [{"filename", "filepath"?, "split", "sentences": [{"raw"}]}]}``
    coco          ``{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}``
    webdataset    tars of ``KEY.jpg`` beside ``KEY.txt``, one caption a line, as CLIP_benchmark
                  writes them; one tar, a folder of them, or a folder of such folders by split
"""

from __future__ import annotations

import csv
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..core.errors import InputError

IMAGE_COLUMNS = ("image", "file_name", "filename", "filepath", "image_path", "image_name", "file")
TEXT_COLUMNS = ("caption", "text", "captions", "title", "sentence", "comment", "query")
ID_COLUMNS = ("id", "caption_id", "query_id", "qid")
PICTURE_SUFFIXES = ("webp", "png", "jpg", "jpeg")  # what CLIP_benchmark puts into its tars


class Entry(NamedTuple):
    """One caption as its file gives it."""

    image: str | None  # the name in the file; None where only relevance judgements name images
    text: str
    place: str  # "line 12", "annotations[3]", "s0000001.txt line 2"
    split: str | None = None
    id: str | None = None


class Problem(NamedTuple):
    """A row that was left out, and why."""

    place: str
    kind: str  # "missing image", "duplicate", "empty caption", "encoding", "malformed", "unjudged"
    detail: str

    def __str__(self) -> str:
        return f"{self.place}: {self.kind}: {self.detail}"


Rows = Iterator["Entry | Problem"]


def is_text(text: str) -> bool:
    """Whether a string came from valid UTF-8 (or UTF-16): it has no lone surrogate."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def recognise(path: Path) -> tuple[str, Rows]:
    """Return the name of the format `path` is in, and its rows.

    Raises:
        InputError: nothing is there, or it is in no format that is known.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder", "give a caption file as the argument")
    if path.is_dir():
        return _recognise_folder(path)
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty", "give a file with one caption a row")
    if tarfile.is_tarfile(path):
        return "webdataset", _webdataset([path])
    lines = _decode(path)
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip()[:1] in {"{", "["}:
        return _recognise_json(path, lines)
    if re.match(r"[^\t]+#\d+\t", first):
        return "flickr-token", _flickr_token(lines)
    if first.strip().lower() == "image,caption" and all(map(_FLICKR_LINE.match, lines[1:])):
        return "flickr-csv", _flickr_csv(lines)
    return "table", _table(path, lines)


def _recognise_folder(path: Path) -> tuple[str, Rows]:
    """Look for metadata files or tars here, else one level down, where the folder is the split."""
    for folders in ([path], sorted(child for child in path.iterdir() if child.is_dir())):
        parts: list[tuple[str, Rows]] = []
        for folder in folders:
            split = None if folder == path else folder.name
            prefix = f"{split}/" if split else ""
            tables = [folder / name for name in ("metadata.jsonl", "metadata.csv")]
            table = next((file for file in tables if file.exists()), None)
            tars = sorted(folder.glob("*.tar"), key=lambda tar: (len(tar.name), tar.name))
            if table:
                name, rows = recognise(table)
                parts.append((name, _within(rows, split, prefix)))
            elif tars:
                parts.append(("webdataset", _within(_webdataset(tars), split, prefix)))
        if parts:
            return parts[0][0], (row for _, rows in parts for row in rows)
    raise InputError(
        f"{path} holds neither metadata.csv, metadata.jsonl nor .tar files",
        "give the caption file itself, and the pictures' folder with --images",
    )


def _within(rows: Rows, split: str | None, prefix: str) -> Rows:
    """Give the rows of a folder the folder's split, and their images and places its name."""
    for row in rows:
        row = row._replace(place=prefix + row.place)
        if isinstance(row, Entry) and row.image is not None:
            row = row._replace(split=row.split or split, image=prefix + row.image)
        yield row


def _recognise_json(path: Path, lines: list[str]) -> tuple[str, Rows]:
    text = "\n".join(lines)
    try:
        document = json.loads(text)
    except RecursionError:
        raise InputError(f"{path} is nested too deep", "give a file of captions") from None
    except ValueError as error:
        try:
            json.loads(next(line for line in lines if line.strip()))
        except ValueError:
            raise InputError(f"{path} is not valid JSON: {error}", "mend or rewrite it") from None
        return "table", _json_lines(lines)
    if isinstance(document, list):
        return "table", _json_rows((f"[{at}]", row) for at, row in enumerate(document))
    if "images" in document and "annotations" in document:
        return "coco", _coco(document)
    if "images" in document:
        return "karpathy", _karpathy(document)
    values = list(document.values())[:1]
    if values and isinstance(values[0], dict) and "negative_caption" in values[0]:
        raise InputError(f"{path} is a SugarCrepe file", "add --task sugarcrepe")
    return "table", _json_lines(lines)


def _decode(path: Path) -> list[str]:
    """Split into lines; a byte that is not UTF-8 becomes a lone surrogate (see `is_text`).

    Raises:
        InputError: it begins as UTF-16 does and is none.
    """
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in {b"\xff\xfe", b"\xfe\xff"} else "utf-8-sig"
    # str.splitlines would also split at U+2028 and form feeds, which captions do contain.
    try:
        text = data.decode(encoding, errors="surrogateescape")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text: {error}", "give a caption file") from None
    return text.replace("\r\n", "\n").split("\n")


# ---------------------------------------------------------------------------------------- tables


def _table(path: Path, lines: list[str]) -> Rows:
    delimiter = max("\t,;|", key=lines[0].count)
    try:
        names = next(csv.reader([lines[0]], delimiter=delimiter))
    except csv.Error:  # no text at all
        names = []
    header = [name.strip().lower() for name in names]
    if not set(TEXT_COLUMNS) & set(header):
        raise InputError(
            f"{path}: no format is known whose first line is {lines[0][:80]!r}",
            "a table needs a header with a column 'image' and a column 'caption' "
            "(see docs/evaluation.md for the formats that are read)",
        )

    def rows() -> Iterator[tuple[str, Any]]:
        reader = csv.reader((line + "\n" for line in lines[1:]), delimiter=delimiter)
        while True:
            place = f"line {reader.line_num + 2}"
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield place, str(error)
                continue
            if fields:
                complete = len(fields) == len(header)
                yield (
                    place,
                    (
                        dict(zip(header, fields, strict=True))
                        if complete
                        else f"{len(fields)} fields where the header has {len(header)}"
                    ),
                )

    return _json_rows(rows())


def _json_lines(lines: list[str]) -> Rows:
    def rows() -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                yield f"line {number}", str(error)

    return _json_rows(rows())


def _json_rows(rows: Iterable[tuple[str, Any]]) -> Rows:
    """Turn objects with an image and one or several captions into entries.

    A row that is a string stands for the reason why it could not be read.
    """
    for place, row in rows:
        if not isinstance(row, dict):
            yield Problem(place, "malformed", row if isinstance(row, str) else "not an object")
            continue
        image, text = _first(row, IMAGE_COLUMNS), _first(row, TEXT_COLUMNS)
        texts = text if isinstance(text, list) else [text]
        if not all(isinstance(each, str) for each in texts):
            yield Problem(
                place, "malformed", "no caption: expected one of " + ", ".join(TEXT_COLUMNS)
            )
            continue
        name, split, key = (
            None if value is None else str(value)
            for value in (image, row.get("split"), _first(row, ID_COLUMNS))
        )
        for at, each in enumerate(texts):
            where = place if len(texts) == 1 else f"{place}, caption {at}"
            unique = key if len(texts) == 1 or key is None else f"{key}#{at}"
            yield Entry(name, each, where, split or None, unique)


def _first(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if name in row), None)


# ------------------------------------------------------------------------------- published files

_FLICKR_LINE = re.compile(r"(?P<image>[^,]+\.\w+),(?P<caption>.*)$|\s*$")


def _flickr_csv(lines: list[str]) -> Rows:
    for number, line in enumerate(lines[1:], start=2):
        match = _FLICKR_LINE.match(line)
        if match is None or match["image"] is None:
            continue
        caption = match["caption"]
        if len(caption) > 1 and caption[0] == caption[-1] == '"':
            caption = caption[1:-1].replace('""', '"')
        yield Entry(match["image"], caption, f"line {number}")


def _flickr_token(lines: list[str]) -> Rows:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        image, _, turn = name.rpartition("#")
        place = f"line {number}"
        if tab and image and turn.isdigit():
            yield Entry(image, caption, place, id=name)
        else:
            yield Problem(place, "malformed", "expected image.jpg#0<TAB>caption")


def _karpathy(document: dict[str, Any]) -> Rows:
    for place, image in _listed(document, "images"):
        name = image.get("filename") or image.get("file_name")
        if not name or "sentences" not in image:
            yield Problem(place, "malformed", "no 'filename' or no 'sentences'")
            continue
        folder, split = image.get("filepath"), image.get("split")
        path = f"{folder}/{name}" if folder else str(name)
        for turn, sentence in _listed(image, "sentences"):
            caption, key = sentence.get("raw"), sentence.get("sentid")
            if isinstance(caption, str):
                yield Entry(
                    path,
                    caption,
                    f"{place}.{turn}",
                    None if split is None else str(split),
                    None if key is None else str(key),
                )
            else:
                yield Problem(f"{place}.{turn}", "malformed", "no 'raw'")


def _listed(owner: dict[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a list, each with its place; what is no object comes as an empty one."""
    listed = owner[name]
    for at, each in enumerate(listed if isinstance(listed, list) else []):
        yield f"{name}[{at}]", each if isinstance(each, dict) else {}


def _coco(document: dict[str, Any]) -> Rows:
    names = {
        str(image.get("id")): image.get("file_name") for _, image in _listed(document, "images")
    }
    for place, annotation in _listed(document, "annotations"):
        name, caption = names.get(str(annotation.get("image_id"))), annotation.get("caption")
        if not isinstance(caption, str):
            yield Problem(place, "malformed", "no 'caption'")
        elif not name:
            yield Problem(place, "missing image", f"no image has id {annotation.get('image_id')}")
        else:
            key = annotation.get("id")
            yield Entry(str(name), caption, place, id=None if key is None else str(key))


def _webdataset(tars: list[Path]) -> Rows:
    for tar in tars:
        pictures: dict[str, str] = {}
        texts: dict[str, bytes] = {}
        with tarfile.open(tar) as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = f"{folder}/{stem}"
                if suffix.lower() in PICTURE_SUFFIXES:
                    pictures[key] = member.name
                elif suffix.lower() == "txt" and (file := archive.extractfile(member)):
                    texts[key] = file.read()
        for key, data in texts.items():
            name = f"{tar.name}:{key.lstrip('/')}.txt"
            if key not in pictures:
                yield Problem(name, "missing image", "no picture of this name in the tar")
                continue
            captions = data.decode(errors="surrogateescape").splitlines()
            for number, caption in enumerate(captions, start=1):
                yield Entry(f"{tar.name}!{pictures[key]}", caption, f"{name} line {number}")
