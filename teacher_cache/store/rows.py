"""Convert one image to the rows of a store's arrays and back, as specified in ``teacher_cache/README.md``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from samfeat.teacher_cache.schema import (
    MASK_COLUMNS,
    MAX_KEYPOINTS,
    MAX_MASKS,
    Failure,
    Masks,
    Record,
    StoreSpec,
    TeacherOutput,
)

STORED = (
    "name",
    "source_sha256",
    "box",
    "image",
    "embedding",
    "embedding_scale",
    "groups",
    "edges",
    "keypoints",
    "masks",
    "mask_table",
)
"""The arrays with the data of an image, in the order of its digest."""

LEVELS = 127  # a stored embedding is -127 to 127 times its scale
LARGEST = 2.0**127  # of an embedding's values
_SPARE_BITS = 8  # a scale leaves its last 8 bits zero, so that its products with int8 are exact in float32
_SMALLEST_SCALE = 2 * np.finfo(np.float32).tiny  # below it, results would depend on whether denormals count as 0


class Quantized(NamedTuple):
    """An embedding of 8 bits per value; ``values * scale`` is exact in float32, so all devices agree on it.

    Attributes:
        values: int8 [C, h, w], -127 to 127.
        scale: float32 [h, w], one per position; 0 where all of its values are below 3e-36.
    """

    values: np.ndarray
    scale: np.ndarray


def quantize(embedding: np.ndarray) -> Quantized:
    """The nearest :class:`Quantized` of an embedding, finite floats [C, h, w].

    Each position has the smallest scale that reaches its largest value, so no value is off by more than half a scale,
    1/254 of the largest at its position. Scales are per position rather than per channel because the student learns the
    relations between positions, and an outlier then only reduces the precision of its own position. The result depends
    only on the values; a quantized embedding is returned unchanged.

    Raises:
        ValueError: a value is NaN, infinite, or larger than ``LARGEST``.
    """
    with np.errstate(over="ignore"):
        embedding = np.asarray(embedding, np.float32)
    peak = np.abs(embedding).max(axis=0)
    if not (peak <= LARGEST).all():
        raise ValueError("the embedding holds NaN, infinity or values beyond single precision")
    spare = np.uint32((1 << _SPARE_BITS) - 1)
    scale = (((peak / np.float32(LEVELS)).view(np.uint32) + spare) & ~spare).view(np.float32)
    scale[scale < _SMALLEST_SCALE] = 0
    levels = embedding / np.where(scale > 0, scale, np.float32(np.inf))
    return Quantized(np.rint(levels, out=levels).astype(np.int8), scale)


def dequantize(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The embedding float32 [C, h, w] of int8 [C, h, w] and float32 [h, w]."""
    return values * scale


def stored_values(record: Record, spec: StoreSpec) -> dict[str, np.ndarray]:
    """The stored values of an image by array, without unused rows.

    Raises:
        ValueError: the record does not fit the store.
    """
    output, size = record.output, spec.image_size
    shapes = {
        "image": (record.image.shape, (*size, 3)),
        "embedding": (output.embedding.shape, spec.embedding),
        "groups": (output.groups.shape, size),
        "edges": (output.edges.shape, size),
        "masks": (output.masks.stack.shape[1:], size),
        "mask table": (output.masks.table.shape, (len(output.masks.stack), len(MASK_COLUMNS))),
        "keypoints": (record.keypoints.shape[1:], (3,)),
    }
    for name, (given, wanted) in shapes.items():
        if tuple(given) != tuple(wanted):
            raise ValueError(f"{record.name}: {name} has shape {tuple(given)}, the store takes {tuple(wanted)}")
    if len(output.masks.stack) > MAX_MASKS or len(record.keypoints) > MAX_KEYPOINTS:
        raise ValueError(f"{record.name}: more than {MAX_MASKS} masks or {MAX_KEYPOINTS} keypoints")
    try:
        embedding = quantize(output.embedding)
    except ValueError as error:
        raise ValueError(f"{record.name}: {error}") from None
    return {
        "name": np.array(record.name, object),
        "source_sha256": np.frombuffer(bytes.fromhex(record.source_sha256), np.uint8),
        "box": np.array(record.box, np.int32),
        "image": record.image,
        "embedding": embedding.values,
        "embedding_scale": embedding.scale,
        "groups": output.groups,
        "edges": output.edges,
        "keypoints": record.keypoints,
        "masks": pack(output.masks.stack),
        "mask_table": output.masks.table,
    }


def record_of(values: Mapping[str, np.ndarray]) -> Record:
    """The record whose stored values these are; its embedding is float32."""
    masks = Masks(unpack(values["masks"], values["image"].shape[1]), values["mask_table"])
    embedding = dequantize(values["embedding"], values["embedding_scale"])
    left, top, width, height = values["box"].tolist()
    return Record(
        name=str(values["name"][()]),
        source_sha256=values["source_sha256"].tobytes().hex(),
        box=(left, top, width, height),
        image=values["image"],
        output=TeacherOutput(embedding, masks, values["groups"], values["edges"]),
        keypoints=values["keypoints"],
    )


def pack(stack: np.ndarray) -> np.ndarray:
    """Eight pixels per byte along x, first pixel in the highest bit: bool [K, H, W] -> uint8 [K, H, ceil(W / 8)]."""
    if stack.dtype != bool or stack.ndim != 3:
        raise ValueError(f"masks are bool [K, H, W], got {stack.dtype} {stack.shape}")
    return np.packbits(stack, axis=-1)


def unpack(packed: np.ndarray, width: int) -> np.ndarray:
    """Inverse of :func:`pack` for masks of ``width`` pixels: uint8 [K, H, ceil(W / 8)] -> bool [K, H, W].

    Raises:
        ValueError: ``packed`` is not uint8, or does not hold rows of ``width`` pixels.
    """
    if packed.dtype != np.uint8 or packed.shape[-1] != -(-width // 8):
        raise ValueError(f"rows of {width} pixels are uint8 [..., {-(-width // 8)}], got {packed.dtype} {packed.shape}")
    return np.unpackbits(packed, axis=-1, count=width).astype(bool)


def digest(values: Mapping[str, np.ndarray]) -> bytes:
    """SHA-256 of the stored values of one image, in the order of ``teacher_cache/README.md``."""
    box = tuple(values["box"].tolist())
    found = hashlib.sha256(f"{values['name'][()]}\n{values['source_sha256'].tobytes().hex()}\n{box}".encode())
    for name in STORED[3:]:
        array = np.ascontiguousarray(values[name], dtype=values[name].dtype.newbyteorder("<"))
        found.update(str(array.shape).encode())
        found.update(array.data)
    return found.digest()


def rows(record: Record | Failure, spec: StoreSpec) -> dict[str, Any]:
    """The row of each array that describes one image.

    Raises:
        ValueError: the record does not fit the store.
    """
    failure = ""
    if isinstance(record, Failure):
        failure = record.reason.replace("\n", " ") or "unknown"
        record = _blank(record, spec)
    values = stored_values(record, spec)
    return values | {
        "keypoint_count": np.array(len(values["keypoints"]), np.uint16),
        "mask_count": np.array(len(values["masks"]), np.uint16),
        "sha256": np.frombuffer(digest(values), np.uint8),
        "failure": np.array(failure, object),
    }


def _blank(failure: Failure, spec: StoreSpec) -> Record:
    height, width = spec.image_size
    masks = Masks(np.zeros((0, height, width), bool), np.zeros((0, len(MASK_COLUMNS)), np.float32))
    blank = np.zeros((height, width), np.uint8)
    output = TeacherOutput(np.zeros(spec.embedding, np.float32), masks, blank.astype(np.uint16), blank)
    image, keypoints = np.zeros((height, width, 3), np.uint8), np.zeros((0, 3), np.float32)
    return Record(failure.name, "0" * 64, (0, 0, 0, 0), image, output, keypoints)
