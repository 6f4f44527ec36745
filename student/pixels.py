"""The images that :class:`samfeat.student.extractor.SAMFeat` accepts, as arrays of one kind."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samfeat.images import load_image, over_white, to_rgb


def as_rgb(image: Any) -> np.ndarray:
    """Any accepted image (see :meth:`SAMFeat.extract`) as [H, W, 3] in [0, 255]: uint8, or float32 if it was float.

    Files and PIL images are read as :func:`samfeat.images.load_image` reads them: upright, transparency over white.

    Raises:
        ValueError: something else than an accepted image.
        OSError: a file that cannot be opened.
    """
    from PIL import Image

    if isinstance(image, str | os.PathLike):
        return load_image(image)
    if isinstance(image, Image.Image):
        pixels = to_rgb(image, name="the PIL image") if 0 not in image.size else np.zeros((*image.size[::-1], 3))
    elif isinstance(image, Tensor):
        pixels = _tensor_pixels(image)
    elif isinstance(image, np.ndarray):
        pixels = _array_pixels(image)
    else:
        raise ValueError(
            f"image must be a path, a numpy array, a PIL image or a torch tensor, got {type(image).__name__}"
        )
    if 0 in pixels.shape:
        raise ValueError(f"the image is empty: {pixels.shape[0]} x {pixels.shape[1]} pixels")
    return np.array(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _array_pixels(image: np.ndarray) -> np.ndarray:
    """[H, W, 1 or 3] of an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]."""
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"an image array must be uint8, or float in [0, 1], got numpy {image.dtype}")
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4):
        raise ValueError(f"an image array must be [H, W], [H, W, 3] or [H, W, 4], got {list(image.shape)}")
    if image.dtype == np.uint8:
        return over_white(image) if image.shape[2] == 4 and image.size else image[..., :3]
    values = _in_range(image.astype(np.float32))
    if values.shape[2] == 4:
        alpha = values[..., 3:] / 255
        values = values[..., :3] * alpha + 255 * (1 - alpha)
    return values


def _tensor_pixels(image: Tensor) -> np.ndarray:
    """[H, W, 1 or 3] of a tensor [1 or 3, H, W], or of a batch of one."""
    if image.ndim == 4 and len(image) == 1:
        image = image[0]
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"an image tensor must be one image, [3, H, W] or [1, H, W], got {list(image.shape)}")
    if image.dtype == torch.uint8:
        return image.permute(1, 2, 0).cpu().numpy()
    if not image.is_floating_point():
        raise ValueError(f"an image tensor must be uint8, or float in [0, 1], got {image.dtype}")
    return _in_range(image.detach().permute(1, 2, 0).cpu().float().numpy())


def _in_range(image: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as values in [0, 255]."""
    if image.size and not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
        raise ValueError("a float image must be finite and lie in [0, 1]; divide 8-bit values by 255")
    return image * np.float32(255)
