"""SugarCrepe, Winoground and ARO in their published shapes, judged strictly."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmsearch.core.errors import InputError
from mmsearch.core.types import Grid, ImageFeatures, PatchBatch, TextFeatures
from mmsearch.evaluation.compositional import Accuracy, read_task, run_task
from mmsearch.indexing.images import InputSpec
from mmsearch.rerank.scorers import Scores
from PIL import Image


class Spec:
    input_spec = InputSpec((16, 16))


class ByColour:
    """An encoder of pictures by their mean colour, and of texts by the colours they name."""

    spec = Spec()

    def encode_images(self, pixels: np.ndarray) -> ImageFeatures:
        pooled = torch.from_numpy(pixels).float().mean(dim=(1, 2))  # (N, 3)
        pooled = torch.nn.functional.normalize(pooled, dim=-1)
        return ImageFeatures(pooled, pooled[:, None].repeat(1, 4, 1), Grid(2, 2))

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        named = torch.tensor(
            [[float(colour in text) for colour in ("red", "green", "blue")] for text in texts]
        )
        pooled = torch.nn.functional.normalize(named, dim=-1)  # zeros where none is named
        mask = torch.ones(len(texts), 1, dtype=torch.bool)
        return TextFeatures(
            tuple(texts), pooled, pooled[:, None], mask, tuple((text,) for text in texts)
        )


class Contrary:
    name = "contrary"
    needs_patches = True

    def score(
        self,
        text: TextFeatures,
        patches: PatchBatch | None,
        rows: torch.Tensor,
        coarse: torch.Tensor,
    ) -> Scores:
        assert patches is not None and patches.codes.shape[1] == 4
        return Scores(-coarse, None)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("red", "green", "blue"):
        Image.new("RGB", (20, 20), name).save(folder / f"{name}.png")
    halves = Image.new("RGB", (40, 20), "red")
    halves.paste("blue", (20, 0, 40, 20))
    halves.save(folder / "halves.png")
    return folder


def accuracy(rows: list[Accuracy], subset: str, measure: str, scorer: str = "coarse") -> float:
    (found,) = (
        row
        for row in rows
        if (row.subset, row.kind, row.measure, row.scorer) == (subset, "", measure, scorer)
    )
    return found.estimate.value


def sugarcrepe(folder: Path) -> None:
    subsets = {
        "swap_att": [
            ("red.png", "a red one", "a blue one"),
            ("blue.png", "a green one", "a blue one"),
        ],
        # Neither caption names a colour: equal scores are wrong answers.
        "add_obj": [("red.png", "a hat", "a coat"), ("green.png", "a green hat", "a hat")],
    }
    for name, rows in subsets.items():
        content = {
            str(3 * at): {"filename": image, "caption": right, "negative_caption": wrong}
            for at, (image, right, wrong) in enumerate(rows)
        }
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_sugarcrepe(tmp_path: Path, pictures: Path) -> None:
    sugarcrepe(tmp_path)
    seen: list[int] = []
    task = read_task("sugarcrepe", tmp_path, pictures, None, 0)
    rows = run_task(task, ByColour(), [Contrary()], 0, lambda stage, done, total: seen.append(done))  # type: ignore[arg-type]
    assert accuracy(rows, "swap_att", "accuracy") == 0.5
    assert accuracy(rows, "add_obj", "accuracy") == 0.5
    assert accuracy(rows, "swap_att", "accuracy", "contrary") == 0.5
    assert accuracy(rows, "add_obj", "accuracy", "contrary") == 0
    assert accuracy(rows, "all", "accuracy") == 0.5
    assert sum(seen) == 4
    assert [row.difference is None for row in rows if row.subset == "all"] == [True, False]
    one = read_task("sugarcrepe", tmp_path / "add_obj.json", None, 1, 0)
    assert len(one.trials) == 1 and one.trials[0].subset == "add_obj"


def test_winoground(tmp_path: Path, pictures: Path) -> None:
    def example(number: int, first: str, second: str, captions: tuple[str, str], tag: str) -> str:
        return json.dumps(
            {
                "id": number, "image_0": first, "image_1": second, "caption_0": captions[0],
                "caption_1": captions[1], "tag": "Adjective-Color", "secondary_tag": "",
                "num_main_preds": 1, "collapsed_tag": tag,
            }
        )  # fmt: skip

    lines = [
        example(0, "red", "blue", ("a red one", "a blue one"), "Object"),
        # Text right, image not: both captions are nearer to the first picture.
        example(1, "halves", "green", ("red and blue", "red and blue and green"), "Relation"),
        example(2, "red", "red", ("a red one", "one of red"), "Both"),
        example(3, "gone", "red", ("a", "b"), "Both"),
    ]
    (tmp_path / "examples.jsonl").write_text("\n".join(lines))
    task = read_task("winoground", tmp_path, None, None, 0)
    assert len(task.trials) == 3 and task.missing == (str(pictures / "gone.png"),)
    rows = run_task(task, ByColour(), [], 0)  # type: ignore[arg-type]
    for subset, text, image in (("Object", 1, 1), ("Relation", 1, 0), ("Both", 0, 0)):
        found = tuple(accuracy(rows, subset, each) for each in ("text", "image", "group"))
        assert found == (text, image, min(text, image)), subset
    assert accuracy(rows, "all", "group") == pytest.approx(1 / 3)


def test_aro_crops_and_averages_over_relations(tmp_path: Path, pictures: Path) -> None:
    def case(relation: str, left: int, true: str, false: str) -> dict:
        return {
            "image_id": "1", "image_path": "halves.png", "true_caption": true,
            "false_caption": false, "bbox_x": left, "bbox_y": 0, "bbox_w": 20, "bbox_h": 20,
            "relation_name": relation, "predicate_id": "1",
        }  # fmt: skip

    relations = [
        case("on", 0, "red on blue", "blue"),
        case("on", 20, "blue", "red"),
        case("on", 0, "blue", "red"),
        case("under", 20, "blue", "red on blue"),
    ]
    attributes = [
        {key: value for key, value in case("", 0, "red", "blue").items() if key != "relation_name"}
        | {"attributes": ["black", "crouched"]}
    ] * 26
    (tmp_path / "visual_genome_relation.json").write_text(json.dumps(relations))
    (tmp_path / "visual_genome_attribution.json").write_text(json.dumps(attributes))
    rows = run_task(read_task("aro", tmp_path, None, None, 0), ByColour(), [], 0)  # type: ignore[arg-type]
    assert accuracy(rows, "relation", "accuracy") == 0.75
    assert accuracy(rows, "relation", "macro") == pytest.approx((2 / 3 + 1) / 2)
    assert accuracy(rows, "attribution", "macro") == 1
    kinds = {row.kind: row.estimate.value for row in rows if row.kind}
    assert kinds == pytest.approx({"on": 2 / 3, "under": 1, "black_crouched": 1})


def attribution(image: str, attributes: str = "red") -> dict:
    return {
        "image_path": image, "true_caption": "red", "false_caption": "blue", "bbox_x": 0,
        "bbox_y": 0, "bbox_w": 20, "bbox_h": 20, "attributes": [attributes],
    }  # fmt: skip


def test_no_mean_over_kinds_where_each_has_too_few_trials(tmp_path: Path, pictures: Path) -> None:
    rows = [attribution("halves.png", f"kind {at % 10}") for at in range(50)]
    file = tmp_path / "visual_genome_attribution.json"
    file.write_text(json.dumps(rows))
    found = run_task(read_task("aro", file, None, None, 0), ByColour(), [], 0)  # type: ignore[arg-type]
    assert [(row.subset, row.measure) for row in found] == [
        ("attribution", "accuracy"),
        ("all", "accuracy"),
    ]


def test_a_box_lies_in_the_upright_picture(tmp_path: Path, pictures: Path) -> None:
    with Image.open(pictures / "halves.png") as image:
        turn = Image.Exif()
        turn[0x0112] = 3  # upside down: blue comes to the left
        image.save(pictures / "turned.png", exif=turn)
    file = tmp_path / "visual_genome_attribution.json"
    file.write_text(json.dumps([attribution("turned.png")]))
    rows = run_task(read_task("aro", file, None, None, 0), ByColour(), [], 0)  # type: ignore[arg-type]
    assert accuracy(rows, "all", "accuracy") == 0


def test_a_box_of_a_broken_picture_is_the_inputs_fault(tmp_path: Path, pictures: Path) -> None:
    (pictures / "broken.png").write_bytes(b"no picture")
    file = tmp_path / "visual_genome_attribution.json"
    file.write_text(json.dumps([attribution("broken.png")]))
    with pytest.raises(InputError, match=r"broken\.png: not a picture"):
        run_task(read_task("aro", file, None, None, 0), ByColour(), [], 0)  # type: ignore[arg-type]


def test_what_cannot_be_read(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(InputError, match="holds none of"):
        read_task("winoground", tmp_path, None, None, 0)
    (tmp_path / "examples.jsonl").write_text('{"image": 1}')
    with pytest.raises(InputError, match="not in the format of winoground"):
        read_task("winoground", tmp_path, None, None, 0)
    (tmp_path / "swap_att.json").write_text("[1]")
    with pytest.raises(InputError, match="not in the format of sugarcrepe"):
        read_task("sugarcrepe", tmp_path, None, None, 0)
    (tmp_path / "swap_att.json").unlink()
    sugarcrepe(tmp_path)
    with pytest.raises(InputError, match="no image of sugarcrepe"):
        read_task("sugarcrepe", tmp_path, tmp_path / "nowhere", None, 0)
