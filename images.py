"""The one reader of photographs, from files and pictures to arrays.

The teacher's cache, the student and the command line all read through here, so that they see the same pixels.
"""

from __future__ import annotations

import io
import logging
import os
import struct
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

if TYPE_CHECKING:
    from upath import UPath

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".dib", ".gif", ".tga"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx"}
    | ({".avif"} if features.check("avif") else set())
)
"""What Pillow reads of the formats that photographs come in."""

CAMERA_SUFFIXES = frozenset(
    {".heic", ".heif", ".hif", ".avif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".psd"}
)
"""What photographs come in too, and has to be converted."""

MAX_PIXELS = 80_000_000  # below Pillow's own alarm; 240 MB once decoded
FULL_DEPTH = 1 << 15  # values of 16 bits that reach this use the whole range
NARROW = 1 << 13  # values of 16 bits within this of each other are stretched, wherever they lie
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap width and height


def load_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image file as the command line does: uint8 [H, W, 3] in RGB, upright, transparency over white.

    Args:
        path: the file.

    Raises:
        ValueError: the file is empty, truncated, not an image, or has more than 80 million pixels.
        OSError: the file cannot be opened.
    """
    return read_image(Path(path))


def read_image(
    source: str | Path | UPath | bytes, *, name: str | None = None, max_pixels: int = MAX_PIXELS, upright: bool = True
) -> np.ndarray:
    """Read a photograph as uint8 [H, W, 3] in RGB, upright by default.

    Grey, palette and CMYK images become RGB, transparency is laid over white, the EXIF orientation is applied, and of
    several frames the first is read. 16 bits are scaled to 8: values that use the whole range by 255 / 65535, others
    (12 bits in 16, thermal cameras) so that 0.1 % of them become 0 and 0.1 % 255, which a log message says once.

    Args:
        source: a path, a URL, or the bytes of a file.
        name: name of the image in error messages; its path by default. max_pixels: larger images are refused before
            they are decoded.
        upright: whether the EXIF orientation is applied; COLMAP, for one, does not.

    Raises:
        ValueError: the file is empty, truncated, too large or not an image.
        OSError: the file cannot be opened.
    """
    return _decode(source, name, max_pixels=max_pixels, upright=upright)[0]


def read_reduced(
    source: str | Path | UPath | bytes, max_size: int, *, name: str | None = None
) -> tuple[np.ndarray, tuple[int, int]]:
    """As :func:`read_image`, but photographs of more than :data:`MAX_PIXELS` are read at a fraction of their size.

    They may have twice as many pixels as Pillow warns of, 179 million. JPEG files are decoded at 1/2, 1/4 or 1/8, so
    that the whole is never in memory.

    Args:
        source: a path, a URL, or the bytes of a file.
        max_size: least length of the longer side, in pixels, of a photograph that is read at a fraction.
        name: what error messages call the image; by default its path.

    Returns:
        the pixels, uint8 [H, W, 3], and the (height, width) of the whole photograph, upright.

    Raises:
        ValueError: as :func:`read_image`.
        OSError: the file cannot be opened.
    """
    return _decode(source, name, max_pixels=None, upright=True, max_size=max_size)


def read_bytes(path: str | Path | UPath) -> bytes:
    """The bytes of a file, at a path or a URL.

    Raises:
        ValueError: it is a folder.
        OSError: it cannot be opened.
    """
    if isinstance(path, str):
        if "://" in path:
            from upath import UPath

            path = UPath(path)
        else:
            path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not an image; name one of the files in it")
    return path.read_bytes()


class Listing(NamedTuple):
    """The files below a folder.

    Attributes:
        images: paths of the photographs relative to the folder, with forward slashes, sorted.
        left_out: one line for each kind of file that is not read, with its number and an example.
        unnamed: photographs whose names are not UTF-8, which neither stores nor feature files can hold.
    """

    images: list[str]
    left_out: list[str]
    unnamed: list[str]


def list_images(folder: Path | UPath) -> Listing:
    """The photographs in a folder and its sub-folders, following links, each folder once.

    Hidden files are not counted among those left out.
    """
    files: Iterable[str]
    if getattr(folder, "protocol", ""):  # a URL
        root = cast("UPath", folder)
        files = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    else:
        files = _walk(Path(str(folder)))
    images: list[str] = []
    unnamed: list[str] = []
    others: dict[str, list[str]] = {}
    for name in sorted(files):
        suffix = os.path.splitext(name)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            (images if _is_text(name) else unnamed).append(name)
        elif not any(part.startswith(".") for part in name.split("/")):
            others.setdefault(f"of type {suffix}" if suffix else "without a type", []).append(name)
    return Listing(
        images,
        [
            f"left out {len(names)} file{'s' * (len(names) > 1)} {kind}, such as {names[0]}"
            + ("; convert to JPEG to use them" if os.path.splitext(names[0])[1].lower() in CAMERA_SUFFIXES else "")
            for kind, names in sorted(others.items())
        ],
        unnamed,
    )


def _walk(root: Path) -> Iterator[str]:
    """The files below a folder. Real folders come first, so that what a link repeats keeps its own name."""
    seen: set[tuple[int, int]] = set()
    waiting, links = [root], list[Path]()
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir():
                    (links if entry.is_symlink() else waiting).append(folder / entry.name)
                elif entry.is_file():
                    yield (folder / entry.name).relative_to(root).as_posix()


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def to_rgb(image: Image.Image, *, name: str = "the image", upright: bool = True) -> np.ndarray:
    """A PIL image as :func:`read_image` reads a file: uint8 [H, W, 3] in RGB.

    Raises:
        ValueError: values of 32 bits or floating point.
    """
    if upright:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, as "I;16" or widened to 32 bits
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"{name} holds 32-bit values; convert it to 8 or 16 bits a channel")
        return np.repeat(to_eight_bits(values, name)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError(f"{name} holds floating-point values; convert it to 8 or 16 bits a channel")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def over_white(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 4] (RGB and alpha) as uint8 [H, W, 3], laid over white as :func:`read_image` does."""
    return to_rgb(Image.fromarray(image))


def _decode(
    source: str | Path | UPath | bytes,
    name: str | None,
    *,
    max_pixels: int | None,
    upright: bool,
    max_size: int | None = None,
) -> tuple[np.ndarray, tuple[int, int]]:
    if not isinstance(source, bytes):
        name, source = name or str(source), read_bytes(source)
    name = name or f"an image of {len(source)} bytes"
    if not source:
        raise ValueError(f"{name} is empty (0 bytes); copy the photograph again or remove it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # there are limits of our own
            image = Image.open(io.BytesIO(source))
        with image:
            width, height = image.size
            if max_pixels is not None and width * height > max_pixels:
                raise _too_large(name, f"{width}x{height}", max_pixels)
            if max_size is not None and width * height > MAX_PIXELS:
                share = max_size / max(width, height)
                image.draft(None, (round(width * share), round(height * share)))
            deep = _deep_colour(image, source, name)  # first: Pillow forgets the depth when it loads
            turned = upright and image.getexif().get(ORIENTATION) in TURNED
            image.load()
            if deep is not None and (orientation := image.getexif().get(ORIENTATION)):
                deep.getexif()[ORIENTATION] = orientation
            return to_rgb(deep or image, name=name, upright=upright), (width, height) if turned else (height, width)
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not an image that Pillow reads; use JPEG, PNG, WebP, TIFF or BMP") from None
    except Image.DecompressionBombError:
        raise _too_large(name, "huge", max_pixels or 2 * (Image.MAX_IMAGE_PIXELS or 0)) from None
    except (OSError, SyntaxError, EOFError, struct.error, IndexError) as error:
        raise ValueError(f"{name} is damaged or truncated ({error}); copy the photograph again or remove it") from None


def _too_large(name: str, size: str, max_pixels: int) -> ValueError:
    return ValueError(f"{name} is {size}, more than the {max_pixels} pixels allowed; scale it down first")


def _deep_colour(image: Image.Image, data: bytes, name: str) -> Image.Image | None:
    """A colour image of 16 bits, of which Pillow reads the upper 8 alone; None for any other image."""
    tiles = getattr(image, "tile", None)
    raw = tiles[0][3] if tiles else ""
    raw = raw[0] if isinstance(raw, tuple) else raw
    if image.mode not in ("RGB", "RGBA") or not str(raw).endswith((";16B", ";16L", ";16N")):
        return None
    import cv2

    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.ndim != 3 or values.shape[:2] != image.size[::-1]:
        return None  # a compression that OpenCV does not know
    colour = to_eight_bits(values[:, :, 2::-1], name)
    if values.shape[2] == 4:
        colour = np.dstack([colour, (values[:, :, 3] // 256).astype(np.uint8)])
    return Image.fromarray(np.ascontiguousarray(colour))


def to_eight_bits(values: np.ndarray, name: str) -> np.ndarray:
    """Values of 16 bits as uint8 of the same shape, scaled as :func:`read_image` says."""
    low, high = (float(each) for each in np.percentile(values, (0.1, 99.9)))
    if high >= FULL_DEPTH and high - low >= NARROW:
        return ((values.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8)
    if high == low:  # one value: it has no range to stretch
        low, high = 0.0, float((1 << int(values.max()).bit_length()) - 1) or 1.0
    _stretched.warning(
        f"{name}: 16-bit values of {low:.0f} to {high:.0f} are stretched to 0 to 255, as in all such images"
    )
    return np.rint(np.clip((values - low) * (255 / (high - low)), 0, 255)).astype(np.uint8)


class _Once(logging.Filter):
    """Lets one message through."""

    said = False

    def filter(self, record: logging.LogRecord) -> bool:
        first, self.said = not self.said, True
        return first


_stretched = logging.getLogger(f"{__name__}.stretched")
_stretched.addFilter(_Once())
