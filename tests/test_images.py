"""Decoding: equal to open_clip's preprocessing, and safe against whatever a file holds."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmsearch.indexing import images
from mmsearch.indexing.images import InputSpec, UndecodableImage, decode, open_thumbnail
from mmsearch.indexing.scan import PICTURE_SUFFIXES
from PIL import Image

SQUARE = InputSpec((64, 64))


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reference(image: Image.Image, spec: InputSpec) -> np.ndarray:
    from open_clip.transform import image_transform

    transform = image_transform(
        spec.size, False, resize_mode=spec.resize_mode, interpolation=spec.interpolation
    )
    for step in transform.transforms[:-2]:  # all but ToTensor and Normalize
        image = step(image)
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("target", [(64, 64), (48, 80)])
def test_equals_open_clip(mode, interpolation, target):
    spec = InputSpec(target, mode, interpolation)
    for size in [(64, 64), (100, 75), (75, 101), (333, 65), (30, 50), (641, 479)]:
        image = picture(*size)
        mine = decode(encoded(image, "PNG"), spec).pixels
        theirs = reference(image, spec)
        assert mine.shape == theirs.shape == (*target, 3)
        error = np.abs(mine.astype(int) - theirs.astype(int))
        assert error.max() <= (1 if max(size) > 4 * min(size) else 0)  # strips may round


def test_scaled_jpeg_is_close_to_the_full_decode():
    import skimage.data

    image = Image.fromarray(skimage.data.astronaut()).resize((2000, 2000))
    content = encoded(image, "JPEG", quality=90)
    mine = decode(content, InputSpec((224, 224))).pixels.astype(float)
    theirs = reference(Image.open(BytesIO(content)), InputSpec((224, 224))).astype(float)
    assert np.abs(mine - theirs).mean() < 2.0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation(orientation, kind):
    from PIL import ImageOps

    image = picture(301, 200)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(image, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    upright = ImageOps.exif_transpose(Image.open(BytesIO(content)))
    found = decode(content, SQUARE)
    assert (found.width, found.height) == upright.size
    difference = found.pixels.astype(int) - reference(upright.convert("RGB"), SQUARE).astype(int)
    assert np.abs(difference).mean() < (1.5 if kind == "JPEG" else 0.01)
    assert open_thumbnail(content, 50).size == ((50, 33) if orientation < 5 else (33, 50))


def test_facts():
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = "NIKON\0", "NIKON D90"
    exif.get_ifd(0x8769).update({0x9003: "2020:02:29 12:30:00", 0x9011: "+02:00"})
    exif.get_ifd(0x8825).update({1: "S", 2: (33.0, 30.0, 0.0), 3: "E", 4: (151.0, 0.0, 36.0)})
    facts = decode(encoded(picture(80, 60), "JPEG", exif=exif), SQUARE).facts
    assert facts == (80, 60, 1582972200, -33.5, 151.01, "NIKON D90")


def test_bad_facts_cost_nothing_but_themselves():
    exif = Image.Exif()
    exif[0x0112] = 77
    exif.get_ifd(0x8769)[0x9003] = "0000:00:00 00:00:00"
    exif.get_ifd(0x8825).update({1: "N", 2: (900.0, 0.0, 0.0), 3: "E", 4: (1.0, 0.0, 0.0)})
    assert decode(encoded(picture(80, 60), "JPEG", exif=exif), SQUARE).facts == (
        80,
        60,
        None,
        None,
        None,
        "",
    )
    content = encoded(picture(80, 60), "JPEG", exif=b"Exif\0\0 not exif at all")
    assert decode(content, SQUARE).width == 80
    content = encoded(picture(80, 60), "PNG", icc_profile=b"no profile")
    assert decode(content, SQUARE).width == 80


def test_modes_become_rgb_on_white():
    white, black = [255] * 3, [0] * 3
    clear = Image.new("RGBA", (70, 70), (0, 0, 0, 0))
    palette = Image.new("P", (70, 70), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    wide = np.full((70, 70), 40000, np.uint16)
    cases = {
        "RGBA": (encoded(clear, "PNG"), white),
        "LA": (encoded(clear.convert("LA"), "PNG"), white),
        "P with transparency": (encoded(palette, "PNG", transparency=0), white),
        "GIF": (encoded(palette, "GIF"), black),
        "1": (encoded(Image.new("1", (70, 70), 1), "PNG"), white),
        "L": (encoded(Image.new("L", (70, 70), 9), "PNG"), [9] * 3),
        "I;16": (encoded(Image.fromarray(wide), "PNG"), [155] * 3),
        "I;16 TIFF": (encoded(Image.fromarray(wide), "TIFF"), [155] * 3),
        "CMYK": (encoded(Image.new("CMYK", (70, 70), (0, 0, 0, 255)), "JPEG"), black),
        "YCbCr": (encoded(Image.new("YCbCr", (70, 70), (255, 128, 128)), "TIFF"), white),
        "LAB": (encoded(Image.new("RGB", (70, 70)), "WEBP", lossless=True), black),
    }
    for name, (content, colour) in cases.items():
        pixels = decode(content, SQUARE).pixels
        assert pixels.dtype == np.uint8, name
        assert np.abs(pixels.reshape(-1, 3).mean(0) - colour).max() <= 1, name


def test_float_pictures_are_scaled_to_their_range():
    ramp = np.linspace(-3, 5, 70 * 70, dtype=np.float32).reshape(70, 70)
    ramp[0, 0] = np.nan
    pixels = decode(encoded(Image.fromarray(ramp), "TIFF"), InputSpec((70, 70))).pixels
    assert pixels.min() == 0
    assert pixels.max() >= 254


def test_the_first_frame_of_animations():
    frames = [Image.new("RGB", (70, 70), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert decode(content, SQUARE).pixels.reshape(-1, 3).mean(0)[0] > 240, kind


@pytest.mark.parametrize("kind", ["HEIF", "AVIF", "JPEG2000", "WEBP", "BMP", "TGA", "PPM", "PCX"])
def test_formats(kind):
    images._formats()  # registers HEIF for saving too
    content = encoded(picture(90, 70), kind)
    assert (decode(content, SQUARE).width, decode(content, SQUARE).height) == (90, 70)


def test_extreme_shapes():
    for size in [(1, 20000), (20000, 1), (1, 1), (2, 3)]:
        for kind in ("PNG", "JPEG"):
            found = decode(encoded(picture(*size), kind), InputSpec((224, 224)))
            assert (found.width, found.height) == size
            assert found.pixels.shape == (224, 224, 3)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + start
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"GIF89a", "known format|broken|unpack"),
        (b"just text, called .jpg", "known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "known format"),
        (encoded(picture(400, 300), "JPEG")[:-2000], "truncated"),
        (encoded(picture(400, 300), "PNG")[:-500], "truncated"),
        (png_header(60000, 60000), "bomb"),
        (png_header(20000, 20000), "pixels"),
        (png_header(0, 50), "known format|no pixels|height"),
    ],
    ids=["empty", "stub", "text", "eps", "cut-jpeg", "cut-png", "bomb", "large", "0xN"],
)
def test_the_reason_is_told(content, reason):
    with pytest.raises(UndecodableImage, match=f"(?i){reason}"):
        decode(content, SQUARE)


def test_raw_needs_its_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "rawpy", None)
    with pytest.raises(images.MissingDecoder, match=r"mmsearch\[raw\]"):
        decode(b"II*\0 anything", SQUARE, ".nef")


def test_the_scan_knows_what_can_be_decoded():
    images._formats()
    Image.init()
    names = Image.registered_extensions()
    readable = {end for end, kind in names.items() if kind in images._known_formats}
    assert readable | {".mpo"} | images.RAW_SUFFIXES <= PICTURE_SUFFIXES | {".jps"}


SEEDS = [
    encoded(picture(90, 60), "JPEG", exif=Image.Exif()),
    encoded(picture(90, 60), "JPEG", progressive=True),
    encoded(picture(90, 60, "CMYK"), "JPEG"),
    encoded(picture(90, 60, "RGBA"), "PNG"),
    encoded(picture(90, 60, "P"), "GIF"),
    encoded(picture(90, 60), "WEBP"),
    encoded(picture(90, 60), "TIFF", compression="tiff_lzw"),
    encoded(picture(90, 60), "BMP"),
    encoded(picture(90, 60), "AVIF"),
    encoded(picture(90, 60), "JPEG2000"),
]


def mutate(seed: int) -> bytes:
    """Return one of the seed pictures with bytes changed, cut out, doubled or cut off."""
    random = np.random.default_rng(seed)
    content = bytearray(SEEDS[int(random.integers(len(SEEDS)))])
    for _ in range(int(random.integers(1, 12))):
        at = int(random.integers(max(1, len(content))))
        match int(random.integers(5)):
            case 0 | 1:
                content[at : at + 1] = bytes([int(random.integers(256))])
            case 2:
                del content[at : at + int(random.integers(1, 60))]
            case 3:
                content[at:at] = content[at : at + int(random.integers(1, 60))]
            case 4:
                content[at : at + 4] = random.choice(
                    [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"]
                )
    return bytes(content)


@settings(max_examples=200, deadline=5000, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_mutated_pictures_decode_or_say_why(seed):
    try:
        found = decode(mutate(seed), SQUARE)
    except UndecodableImage as error:
        assert error.message
    else:
        assert found.pixels.shape == (64, 64, 3)


def test_files_are_read_once(tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture(90, 70), "PNG"))
    assert decode(path, SQUARE).width == 90
    assert open_thumbnail(path, 45).size == (45, 35)
