"""Schema of a teacher cache: the format's name and version, its arrays, and the values stored in them.

``teacher_cache/README.md`` is normative; this file is its only counterpart in code. Everything here is plain numpy and
frozen dataclasses, so that readers and writers stay independent of each other.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple

import numpy as np

FORMAT = "samfeat-teacher-cache"
VERSION = 2

MAX_MASKS = 1024  # masks of one image; unused slots are never written, so they cost no bytes
MAX_KEYPOINTS = 2048  # detector labels of one image, best first
POINTS = 400  # correspondences of one pair (20 x 20 in the paper's 400 x 400 crops)
MASK_CHUNK = 16  # masks per chunk

MASK_COLUMNS = ("area", "predicted_iou", "stability_score", "x", "y", "width", "height")
"""Columns of a mask table: pixels^2, [0, 1], [0, 1], and the box in pixels (left, top, width, height)."""


@dataclass(frozen=True)
class Masks:
    """The overlapping masks of one image, largest first.

    Attributes:
        stack: bool [K, H, W]; masks may overlap.
        table: float32 [K, 7], columns ``MASK_COLUMNS``; row k describes ``stack[k]``.
    """

    stack: np.ndarray
    table: np.ndarray


@dataclass(frozen=True)
class TeacherOutput:
    """A teacher's output for one image of H x W pixels (paper, section III-B).

    Attributes:
        embedding: float32 [C, h, w], C = 256 for SAM. Covers exactly the image, without padding. Cell (i, j) is centred
            on the pixel x = (j + 0.5) W / w - 0.5, y = (i + 0.5) H / h - 0.5.
        masks: the overlapping masks.
        groups: uint16 [H, W], one label per pixel: k + 1 where ``masks.stack[k]`` wins, 0 where there is no mask.
        edges: uint8 [H, W], soft edge strength, 0 (none) to 255.
    """

    embedding: np.ndarray
    masks: Masks
    groups: np.ndarray
    edges: np.ndarray


class Pair(NamedTuple):
    """Ground-truth correspondences between two images of a store.

    Attributes:
        images: indices (i, j) of the two images.
        points: float32 [2, n, 2], (x, y) in pixels; ``points[0, k]`` in image i is ``points[1, k]`` in image j.
        valid: bool [n], false where the correspondence failed the depth check or fell outside; its points are then
            finite but meaningless.
    """

    images: tuple[int, int]
    points: np.ndarray
    valid: np.ndarray


@dataclass(frozen=True)
class Failure:
    """An image that could not be read or used; it keeps its place in the store, with empty targets.

    Attributes:
        name: unique name of the crop.
        reason: one human-readable line.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Record:
    """Everything stored about one image.

    Attributes:
        name: unique name of the crop, such as ``scene/photo.jpg#12``.
        source_sha256: hex digest of the file that the crop was cut from.
        box: (left, top, width, height) of the crop in its source image, in source pixels.
        image: uint8 [H, W, 3], RGB.
        output: the teacher's output.
        keypoints: float32 [K, 3], detector labels (x, y, score), best first, K <= MAX_KEYPOINTS.
    """

    name: str
    source_sha256: str
    box: tuple[int, int, int, int]
    image: np.ndarray
    output: TeacherOutput
    keypoints: np.ndarray


class Targets(NamedTuple):
    """The training view of one image.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        embedding: int8 [C, h, w], in units of ``embedding_scale``.
        embedding_scale: float32 [h, w]; the teacher's embedding is ``embedding * embedding_scale``, exact in float32.
        groups: uint16 [H, W], 0 = no mask.
        edges: uint8 [H, W].
        keypoints: float32 [K, 3], (x, y, score), best first.
    """

    image: np.ndarray
    embedding: np.ndarray
    embedding_scale: np.ndarray
    groups: np.ndarray
    edges: np.ndarray
    keypoints: np.ndarray


Codec = Literal["none", "lz4", "zstd"]
LZ4_LEVEL, ZSTD_LEVEL = 5, 9
"""How chunks are compressed: not at all; for speed (blosc, lz4hc, CRC-32C); for size (Zstandard)."""


@dataclass(frozen=True)
class ArraySpec:
    """One array of a store: everything that zarr needs to create it."""

    name: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None
    dtype: str
    dimensions: tuple[str, ...]
    description: str
    unit: str = ""
    codec: Codec = "zstd"
    sparse: bool = False  # chunks and shards of nothing but zeros are left out


@dataclass(frozen=True)
class StoreSpec:
    """The shape of a store: number and size of images and pairs, and images per shard.

    Attributes:
        images: number of images N.
        paired: whether images 2k and 2k + 1 form pair k with stored correspondences.
        image_size: (height, width) of every image.
        embedding: (C, h, w) of every embedding.
        shard_images: images per shard; even for paired stores, so that no pair is split.
    """

    images: int
    paired: bool
    image_size: tuple[int, int]
    embedding: tuple[int, int, int]
    shard_images: int = 32

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"a store needs at least one image, got {self.images}")
        if self.shard_images < 1 or (self.paired and (self.shard_images % 2 or self.images % 2)):
            raise ValueError(
                f"images ({self.images}) and shard_images ({self.shard_images}) must be positive, "
                "and even where images come in pairs"
            )

    def check_types(self) -> None:
        """Raise ``TypeError`` where a value, which may come from a damaged file, is none of what it should be."""
        sizes = (self.images, self.shard_images, *_of_length(self.image_size, 2), *_of_length(self.embedding, 3))
        if any(type(size) is not int or size < 1 for size in sizes) or type(self.paired) is not bool:
            raise TypeError(f"sizes are positive integers and paired is true or false, got {self}")

    @property
    def pairs(self) -> int:
        """Number of stored pairs."""
        return self.images // 2 if self.paired else 0

    @property
    def shards(self) -> int:
        """Number of shards; the last one may be short."""
        return -(-self.images // self.shard_images)

    def shard_range(self, shard: int) -> range:
        """Indices of the images of a shard."""
        return range(shard * self.shard_images, min((shard + 1) * self.shard_images, self.images))

    def arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays of the store, in the order of ``teacher_cache/README.md``."""
        n, s = self.images, self.shard_images
        (height, width), (channels, rows, columns) = self.image_size, self.embedding
        packed = -(-width // 8)

        def per_image(
            name: str, shape: tuple[int, ...], dtype: str, axes: tuple[str, ...], text: str, unit: str = "", **more: Any
        ) -> ArraySpec:
            return ArraySpec(name, (n, *shape), (1, *shape), (s, *shape), dtype, ("image", *axes), text, unit, **more)

        arrays = [
            per_image(
                "image",
                (height, width, 3),
                "uint8",
                ("y", "x", "rgb"),
                "the crop that the teacher saw",
                codec="none",
            ),
            per_image(
                "embedding",
                (channels, rows, columns),
                "int8",
                ("channel", "row", "column"),
                "image encoder output, in units of embedding_scale; covers exactly the crop",
                codec="none",
            ),
            per_image(
                "embedding_scale",
                (rows, columns),
                "float32",
                ("row", "column"),
                "the embedding is embedding * embedding_scale, exact in float32",
                codec="none",
            ),
            per_image(
                "groups", (height, width), "uint16", ("y", "x"), "label map: k + 1 = mask k, 0 = no mask", codec="lz4"
            ),
            per_image("edges", (height, width), "uint8", ("y", "x"), "soft edge strength", "1/255", codec="none"),
            per_image(
                "keypoints",
                (MAX_KEYPOINTS, 3),
                "float32",
                ("keypoint", "x_y_score"),
                "detector labels, best first; rows past keypoint_count are zero",
                "pixel",
                codec="lz4",
            ),
            per_image("keypoint_count", (), "uint16", (), "number of detector labels", codec="none"),
            ArraySpec(
                "masks",
                (n, MAX_MASKS, height, packed),
                (1, MASK_CHUNK, height, packed),
                (s, MAX_MASKS, height, packed),
                "uint8",
                ("image", "mask", "y", "x_packed"),
                "overlapping masks, largest first, eight pixels a byte (numpy.packbits, big-endian)",
                sparse=True,
            ),
            per_image(
                "mask_table",
                (MAX_MASKS, len(MASK_COLUMNS)),
                "float32",
                ("mask", "column"),
                "one row a mask: " + ", ".join(MASK_COLUMNS),
            ),
            per_image("mask_count", (), "uint16", (), "number of masks", codec="none"),
            per_image("name", (), "string", (), "unique name of the crop"),
            per_image(
                "box",
                (4,),
                "int32",
                ("left_top_width_height",),
                "the crop in its source image",
                "pixel",
                codec="none",
            ),
            per_image("source_sha256", (32,), "uint8", ("byte",), "digest of the source file", codec="none"),
            per_image("sha256", (32,), "uint8", ("byte",), "digest of everything stored about the image", codec="none"),
            per_image(
                "failure", (), "string", (), "why the image could not be used; empty for every good image", sparse=True
            ),
        ]
        if self.paired:
            p = s // 2
            arrays += [
                ArraySpec(
                    "pair_points",
                    (self.pairs, 2, POINTS, 2),
                    (1, 2, POINTS, 2),
                    (p, 2, POINTS, 2),
                    "float32",
                    ("pair", "side", "point", "x_y"),
                    "correspondences between images 2k and 2k + 1",
                    "pixel",
                ),
                ArraySpec(
                    "pair_valid",
                    (self.pairs, POINTS),
                    (1, POINTS),
                    (p, POINTS),
                    "bool",
                    ("pair", "point"),
                    "whether the correspondence passed the depth check in both directions",
                ),
            ]
        arrays.append(
            ArraySpec(
                "done", (self.shards,), (1,), None, "uint8", ("shard",), "1 once all else is written", codec="none"
            )
        )
        return tuple(arrays)


@dataclass(frozen=True)
class Provenance:
    """Where a store comes from. Two runs with equal ``identity`` write the same bytes.

    Attributes:
        teacher: the teacher's own description.
        source: the images: kind, path, parameters, digest of the list of names.
        labels: the detector labels: base detector and parameters of the homographic adaptation.
        seed: the seed of every random choice.
        versions: versions of the packages used (not part of the identity).
    """

    teacher: Mapping[str, Any]
    source: Mapping[str, Any]
    labels: Mapping[str, Any]
    seed: int
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def check_types(self) -> None:
        """Raise ``TypeError`` where a value, which may come from a damaged file, is none of what it should be."""
        if not all(isinstance(each, Mapping) for each in (self.teacher, self.source, self.labels, self.versions)):
            raise TypeError("teacher, source, labels and versions are named values")
        if type(self.seed) is not int:
            raise TypeError(f"the seed is an integer, got {self.seed!r}")

    @property
    def identity(self) -> dict[str, Any]:
        """The part that must match before a run may resume a store."""
        return {"teacher": self.teacher, "source": self.source, "labels": self.labels, "seed": self.seed}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the inverse is ``Provenance(**values)``."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def taught_by(self, teacher: Mapping[str, Any]) -> Provenance:
        """A copy with another teacher."""
        return dataclasses.replace(self, teacher=teacher)

    def differences(self, other: Provenance) -> list[str]:
        """One readable line per value of the identity that differs from ``other``, the requested one."""
        mine, theirs = flatten(self.to_json()), flatten(other.to_json())
        keys = [key for key in sorted(mine | theirs) if not key.startswith("versions.")]
        return [
            f"{key}: {mine.get(key, 'absent')!r} there, {theirs.get(key, 'absent')!r} asked for"
            for key in keys
            if mine.get(key) != theirs.get(key)
        ]


def _of_length(values: Any, length: int) -> tuple[Any, ...]:
    if not isinstance(values, tuple) or len(values) != length:
        raise TypeError(f"{length} sizes are expected, got {values!r}")
    return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain values by dotted key, in their order."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def package_versions(*names: str) -> dict[str, str]:
    """Installed versions of ``names`` and of Python."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
