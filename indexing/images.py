"""One picture file to one array at the model's input size, safely.

The only module that opens pictures. JPEGs are decoded at the smallest DCT scale that still covers
the model's input (a 12-megapixel photograph takes a fifth of the time), EXIF orientation is
applied, everything ends as 8-bit RGB on white.
"""

from __future__ import annotations

import errno
import math
import tarfile
import threading
import warnings
from dataclasses import dataclass
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image

from ..core.errors import InputError
from .facts import Facts

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_BYTES = 1 << 30  # of one picture file, which is read in full to be hashed and decoded
MAX_PIXELS = 1 << 28  # of a decoded picture: 268 megapixels, above any camera's
MAX_HEADER_PIXELS = 1 << 30  # of a JPEG before DCT scaling makes it small
LARGE_PIXELS = 1 << 25  # above this, pictures are decoded one at a time to bound memory

RAW_SUFFIXES = frozenset(
    ".3fr .arw .cr2 .cr3 .dng .erf .kdc .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .sr2 .srf "  # noqa: SIM905
    ".srw .x3f".split()
)

# What Pillow opens but is no picture file (or starts a program, as EPS starts Ghostscript).
_EXCLUDED_FORMATS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MCIDAS", "MPEG", "WMF"}
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_UPRIGHT = {  # EXIF orientation -> the turn that makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_one_large_picture = threading.Lock()


class UndecodableImage(InputError):
    """A file that cannot be shown as a picture; the message is the reason."""


class MissingDecoder(UndecodableImage):
    """A picture that an extra of mmsearch would read; worth another try once it is installed."""


@dataclass(frozen=True, slots=True)
class InputSpec:
    """How a model wants its pictures, in open_clip's terms."""

    size: tuple[int, int]  # (height, width)
    resize_mode: str = "shortest"  # "shortest" (then centre crop), "longest" (then pad), "squash"
    interpolation: str = "bicubic"  # or "bilinear"


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded picture, ready for the model."""

    pixels: np.ndarray  # (H, W, 3) uint8 at the model's input size
    facts: Facts

    @property
    def width(self) -> int:
        """Pixels of the original, after EXIF orientation."""
        return self.facts.width

    @property
    def height(self) -> int:
        """Pixels of the original, after EXIF orientation."""
        return self.facts.height


def decode(source: Path | bytes, spec: InputSpec, suffix: str = "") -> Picture:
    """Decode a picture and bring it to the model's input size.

    Equal to open_clip's own preprocessing pixel by pixel when no DCT scaling applies.

    Args:
        source: a file, or its content.
        spec: what the model wants.
        suffix: the file name's ending, needed to know camera RAW files given as bytes.

    Raises:
        UndecodableImage: with the reason, whatever is wrong with the content.
    """
    if isinstance(source, Path):
        suffix, source = source.suffix, read_bytes(source)
    with _reasons():
        image = _open(source, suffix.lower())
        width, height = image.size
        facts, orientation = _read_exif(image)
        turned = orientation >= 5
        high, wide = spec.size
        wanted = (wide, high) if turned else spec.size  # (height, width) as stored
        _draft(image, wanted, spec.resize_mode)
        pixels = math.prod(image.size)
        if pixels > MAX_PIXELS:
            raise UndecodableImage(
                f"{width} x {height} pixels are more than {MAX_PIXELS >> 20} million"
            )
        if pixels > LARGE_PIXELS:
            with _one_large_picture:
                array = _prepare(image, orientation, spec)
        else:
            array = _prepare(image, orientation, spec)
        if turned:
            width, height = height, width
        return Picture(array, facts._replace(width=width, height=height))


def open_thumbnail(source: Path | bytes, size: int) -> Image.Image:
    """Open a picture upright, in RGB, with its longer side at most ``size`` pixels.

    Raises:
        UndecodableImage: with the reason.
    """
    suffix = ""
    if isinstance(source, Path):
        suffix, source = source.suffix, read_bytes(source)
    with _reasons():
        image = _open(source, suffix.lower())
        orientation = _read_exif(image)[1]
        image.draft(image.mode, (size, size))
        if math.prod(image.size) > MAX_PIXELS:
            raise UndecodableImage(f"{image.width} x {image.height} pixels are too many")
        image = _upright(_to_rgb(image), orientation)
        image.thumbnail((size, size), Image.Resampling.BICUBIC)
        return image


def source_of(path: Path) -> Path | bytes:
    """Return the file of an indexed picture, or its bytes where it lies in an archive.

    Args:
        path: as the catalog names it, perhaps "archive.tar!member".

    Raises:
        OSError: the archive cannot be read, or has no such member.
    """
    archive, bang, member = str(path).partition(".tar!")
    if not bang:
        return path
    try:
        with tarfile.open(f"{archive}.tar") as tar:
            file = tar.extractfile(member)
            return file.read() if file else b""
    except (tarfile.TarError, KeyError) as error:
        raise FileNotFoundError(errno.ENOENT, "no such picture in the archive", path) from error


def read_bytes(path: Path) -> bytes:
    """Read a picture file in full.

    Raises:
        UndecodableImage: it is empty or larger than any picture.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UndecodableImage(f"the file of {size >> 20} MiB is too large for a picture")
    return path.read_bytes()


class _reasons:  # noqa: N801 - used as a statement
    """Turn whatever a decoder raises into UndecodableImage with one readable line."""

    def __enter__(self) -> None:
        # Broken metadata makes Pillow warn, about pictures it then decodes.
        warnings.filterwarnings("ignore", module=r"PIL\..*")
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, UndecodableImage):
            return
        if isinstance(error, MemoryError):
            raise UndecodableImage("too large for the memory") from error
        if isinstance(error, Exception):  # decoders raise anything, struct.error to SyntaxError
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UndecodableImage(reason[:200]) from error


def _open(content: bytes, suffix: str) -> Image.Image:
    """Open a picture without decoding its pixels."""
    if not content:
        raise UndecodableImage("the file is empty")
    if suffix in RAW_SUFFIXES:
        return _open_raw(content)
    try:
        image = Image.open(BytesIO(content), formats=_formats())
    except Image.UnidentifiedImageError as error:
        raise UndecodableImage("not a picture in a known format") from error
    except Image.DecompressionBombError as error:
        raise UndecodableImage("too many pixels, as a decompression bomb has") from error
    if math.prod(image.size) > (MAX_HEADER_PIXELS if image.format == "JPEG" else MAX_PIXELS):
        raise UndecodableImage(f"{image.width} x {image.height} pixels are too many")
    if 0 in image.size:
        raise UndecodableImage("it has no pixels")
    return image


def _open_raw(content: bytes) -> Image.Image:
    """Open a camera RAW file through the preview it holds, or develop it at half size."""
    try:
        import rawpy  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise MissingDecoder('camera RAW files need rawpy: pip install "mmsearch[raw]"') from error
    with rawpy.imread(BytesIO(content)) as raw:
        try:
            preview = raw.extract_thumb()
        except (rawpy.LibRawNoThumbnailError, rawpy.LibRawUnsupportedThumbnailError):
            preview = None
        if preview is not None and preview.format == rawpy.ThumbFormat.JPEG:
            image = Image.open(BytesIO(preview.data), formats=["JPEG"])
            if min(image.size) >= 384:
                return image
        return Image.fromarray(raw.postprocess(half_size=True, use_camera_wb=True))


def _formats() -> list[str]:
    """Return the formats to try, the common ones first, registering what needs it once."""
    if not _known_formats:
        with _registration:
            if not _known_formats:
                Image.MAX_IMAGE_PIXELS = MAX_HEADER_PIXELS  # Pillow's own refuses 200 MP phones
                try:
                    import pillow_heif
                except ImportError:  # no wheel for this platform: HEIC files are named as failed
                    pass
                else:
                    pillow_heif.register_heif_opener()
                Image.init()
                usual = ["JPEG", "PNG", "WEBP", "HEIF", "AVIF", "GIF", "TIFF", "BMP"]
                ranks = {name: rank for rank, name in enumerate(usual)}
                _known_formats.extend(
                    sorted(
                        Image.OPEN.keys() - _EXCLUDED_FORMATS,
                        key=lambda name: (ranks.get(name, len(ranks)), name),
                    )
                )
    return _known_formats


_known_formats: list[str] = []
_registration = threading.Lock()


def _draft(image: Image.Image, size: tuple[int, int], mode: str) -> None:
    """Let the JPEG decoder scale down to the least that covers the model's (height, width)."""
    ratios = size[0] / image.height, size[1] / image.width
    ratio = min(ratios) if mode == "longest" else max(ratios)
    if ratio < 1:
        wanted = math.ceil(image.width * ratio), math.ceil(image.height * ratio)
        if mode == "squash":
            wanted = size[1], size[0]
        image.draft(image.mode, wanted)


def _prepare(image: Image.Image, orientation: int, spec: InputSpec) -> np.ndarray:
    """Decode, turn upright, resize and crop or pad to (H, W, 3) uint8."""
    upright = _upright(_to_rgb(image), orientation)
    return np.asarray(_fit(upright, spec))


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = _UPRIGHT.get(orientation)
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Bring any mode to RGB: 16-bit and float scaled down, transparency put on white."""
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and float grey to 8 bits; 16-bit by its full range."""
    values = np.asarray(image, dtype=np.float32)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0 if high > 255 or image.mode.startswith("I;16") else 255.0
    span = high - low
    scaled = (values - low) * (255 / span) if span > 0 else np.zeros_like(values)
    return Image.fromarray(scaled.astype(np.uint8))


def _fit(image: Image.Image, spec: InputSpec) -> Image.Image:
    """Resize and crop or pad as open_clip's preprocessing does."""
    height, width = spec.size
    filter_ = _RESAMPLING[spec.interpolation]
    if spec.resize_mode == "squash":
        return image.resize((width, height), filter_)
    if spec.resize_mode == "longest":
        ratio = max(image.height / height, image.width / width)
        inner = round(image.width / ratio) or 1, round(image.height / ratio) or 1
        image = image.resize(inner, filter_)
        left, top = _half(width - image.width), _half(height - image.height)
        padded = Image.new("RGB", (width, height))
        padded.paste(image, (left, top))
        return padded
    return _cover(image, height, width, filter_)


def _cover(image: Image.Image, height: int, width: int, filter_: Image.Resampling) -> Image.Image:
    """Resize the shorter side to fit and crop the centre."""
    if height == width:  # torchvision's Resize(int): the shorter side exact, the longer cut off
        short, long = sorted(image.size)
        scaled_long = int(height * long / short)
        full = (scaled_long, height) if image.width >= image.height else (height, scaled_long)
    else:  # open_clip's ResizeKeepRatio, which is always bicubic
        ratio = min(image.height / height, image.width / width)
        full = round(image.width / ratio), round(image.height / ratio)
        filter_ = Image.Resampling.BICUBIC
    left = round((full[0] - width) / 2.0)
    top = round((full[1] - height) / 2.0)
    if math.prod(full) <= 4 * width * height:
        scaled = image.resize(full, filter_)
        return scaled.crop((left, top, left + width, top + height))
    # A long strip: the same pixels but for rounding, and only those that are kept.
    across, down = image.width / full[0], image.height / full[1]
    box = (left * across, top * down, (left + width) * across, (top + height) * down)
    return image.resize((width, height), filter_, box=box)


def _half(space: int) -> int:
    return max(0, space) // 2


def _read_exif(image: Image.Image) -> tuple[Facts, int]:
    """Read what EXIF says, as far as it can be read; the size is the stored one."""
    try:
        exif = image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, 1)
        orientation = orientation if orientation in _UPRIGHT else 1
    except Exception:  # damaged metadata says nothing about the pixels
        return Facts(*image.size), 1

    def read(part: Callable[[Image.Exif], object]) -> object:
        try:
            return part(exif)
        except Exception:
            return None

    place = read(_place)
    latitude, longitude = place if isinstance(place, tuple) else (None, None)
    taken = read(_taken)
    camera = read(_camera)
    facts = Facts(
        *image.size,
        taken=taken if isinstance(taken, int) else None,
        latitude=latitude,
        longitude=longitude,
        camera=camera if isinstance(camera, str) else "",
    )
    return facts, orientation


def _taken(exif: Image.Exif) -> int | None:
    details = exif.get_ifd(ExifTags.IFD.Exif)
    text = details.get(ExifTags.Base.DateTimeOriginal) or exif.get(ExifTags.Base.DateTime)
    if not text:
        return None
    zone = str(details.get(ExifTags.Base.OffsetTimeOriginal, "")).strip("\0 ")
    moment = datetime.strptime(str(text).strip("\0 ")[:19], "%Y:%m:%d %H:%M:%S")
    if zone:
        return int(datetime.fromisoformat(f"{moment.isoformat()}{zone}").timestamp())
    return int(moment.replace(tzinfo=timezone.utc).timestamp())


def _place(exif: Image.Exif) -> tuple[float, float] | None:
    gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
    if ExifTags.GPS.GPSLatitude not in gps or ExifTags.GPS.GPSLongitude not in gps:
        return None
    latitude = _degrees(gps[ExifTags.GPS.GPSLatitude], gps.get(ExifTags.GPS.GPSLatitudeRef))
    longitude = _degrees(gps[ExifTags.GPS.GPSLongitude], gps.get(ExifTags.GPS.GPSLongitudeRef))
    inside = abs(latitude) <= 90 and abs(longitude) <= 180  # NaN is not inside either
    return (latitude, longitude) if inside else None


def _degrees(parts: tuple[float, float, float], side: object) -> float:
    degrees, minutes, seconds = (float(part) for part in parts)
    value = degrees + minutes / 60 + seconds / 3600
    return -value if str(side).upper().startswith(("S", "W")) else value


def _camera(exif: Image.Exif) -> str:
    maker = str(exif.get(ExifTags.Base.Make, "")).strip("\0 ")
    model = str(exif.get(ExifTags.Base.Model, "")).strip("\0 ")
    name = model if model.lower().startswith(maker.lower()) else f"{maker} {model}"
    return "".join(character for character in name.strip() if character.isprintable())[:128]
