"""The images that :class:`samfeat.student.extractor.SAMFeat` accepts, as arrays of one kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_rgb(image: Any) -> np.ndarray:
    """Any accepted image (see :meth:`SAMFeat.extract`) as [H, W, 3] in [0, 255]: uint8, or float32 where it was float.

    Raises:
        ValueError: something else than an accepted image.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"):
            raise ValueError(f"a PIL image must have 8 bits a channel, got mode {image.mode!r}")
        image = np.asarray(image.convert("RGB"))
    elif isinstance(image, Tensor):
        image = _tensor_pixels(image)
    elif not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        given = f"numpy {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"image must be a numpy uint8 array, a PIL image or a torch tensor, got {given}")
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4):
        raise ValueError(f"an image array must be [H, W], [H, W, 3] or [H, W, 4], got {list(image.shape)}")
    if 0 in image.shape:
        raise ValueError(f"the image is empty: {image.shape[0]} x {image.shape[1]} pixels")
    return np.array(np.broadcast_to(image[..., :3], (*image.shape[:2], 3)))


def _tensor_pixels(image: Tensor) -> np.ndarray:
    """[H, W, 1 or 3] of a tensor [1 or 3, H, W]."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"an image tensor must be one image, [3, H, W] or [1, H, W], got {list(image.shape)}")
    if image.dtype == torch.uint8:
        return image.permute(1, 2, 0).cpu().numpy()
    if not image.is_floating_point():
        raise ValueError(f"an image tensor must be uint8, or float in [0, 1], got {image.dtype}")
    values = image.detach().permute(1, 2, 0).cpu().float()
    if values.numel() and not (values.isfinite().all() and values.min() >= 0 and values.max() <= 1):
        raise ValueError("a float image must be finite and lie in [0, 1]; divide 8-bit values by 255")
    return (values * 255).numpy()
