"""Mask probabilities -> one edge map, after SAM's zero-shot edge detection (Kirillov et al. 2023, appendix D.2).

Every mask contributes the gradient of its probability along its own boundary; each pixel keeps its strongest
contribution. The per-mask part runs in torch on the probabilities' device; the final steps run per image on the CPU.
"""

from __future__ import annotations

from typing import Literal, get_args

import cv2
import numpy as np
import torch
from scipy.ndimage import gaussian_filter, map_coordinates
from torch import Tensor
from torch.nn import functional as F

Style = Literal["soft", "thinned", "binary"]
STYLES: tuple[str, ...] = get_args(Style)

BINARY_THRESHOLD = 0.25  # of the strength range [0, 1]; a ring of full strength keeps about 0.75 after the blur of 3
ORIENTATION_SIGMA = 1.5  # pixels; scale at which the direction across an edge is read
CHUNK_PIXELS = 1 << 22  # mask pixels processed at once: about eight float32 maps of this size


def edge_map(
    probabilities: np.ndarray | Tensor,
    masks: np.ndarray | Tensor | None = None,
    *,
    blur: int = 3,
    style: Style = "soft",
    border: int = 1,
) -> np.ndarray:
    """Edge strength of an image from the probabilities of its masks.

    The 3 x 3 Sobel magnitude of each probability map (outside the image counts as 0), kept only where the Sobel
    magnitude of the binary mask is positive (about two pixels on either side of the boundary); the maximum over masks,
    stretched to [0, 1]; a Gaussian blur; for ``thinned`` and ``binary`` a suppression of all that is not a maximum
    across the edge.

    Args:
        probabilities: float [K, H, W] in [0, 1].
        masks: bool [K, H, W]; ``probabilities > 0.5`` where left out.
        blur: odd size of the Gaussian kernel in pixels (OpenCV's sigma for that size); 0 for none.
        style: ``soft`` stops after the blur, ``thinned`` leaves lines of one pixel with their strength, ``binary`` sets
            those of at least ``BINARY_THRESHOLD`` to 255 and all else to 0.
        border: width in pixels of the frame where the strength is set to 0 before stretching. To the Sobel filter a
            mask that touches the image border ends there, with more contrast than any boundary inside: with a border of
            0 the frame is a full-strength edge and all others are pushed towards 0. A border of 1 removes just that.

    Returns:
        uint8 [H, W], 0 (no edge) to 255; all 0 where there is no mask or no boundary.

    Raises:
        ValueError: shapes that do not agree, an even or negative blur, a negative border, an unknown style.
    """
    if probabilities.ndim != 3 or (masks is not None and masks.shape != probabilities.shape):
        raise ValueError(
            "probabilities and masks are [K, H, W] of one shape, got "
            f"{tuple(probabilities.shape)} and {None if masks is None else tuple(masks.shape)}"
        )
    if border < 0:
        raise ValueError(f"border is a number of pixels, got {border}")
    check_finish(blur, style)
    strength = _boundary_strength(torch.as_tensor(probabilities), None if masks is None else torch.as_tensor(masks))
    edges = _clear_border(strength, border).cpu().numpy()
    edges = _gaussian_blur(_stretch(edges), blur)
    if style != "soft":
        edges = thin(edges)
    if style == "binary":
        edges = (edges >= BINARY_THRESHOLD).astype(np.float32)
    return np.rint(edges * 255).astype(np.uint8)


def check_finish(blur: int, style: str) -> None:
    """Raise ``ValueError`` unless ``blur`` is 0 or odd and ``style`` is one of ``STYLES``."""
    if blur < 0 or (blur and blur % 2 == 0):
        raise ValueError(f"blur is 0 or an odd kernel size in pixels, got {blur}")
    if style not in STYLES:
        raise ValueError(f"edge style is one of {', '.join(STYLES)}, got {style!r}")


def _boundary_strength(probabilities: Tensor, masks: Tensor | None) -> Tensor:
    """Maximum over masks of the boundary gradient: float32 [H, W]."""
    height, width = probabilities.shape[1:]
    strength = torch.zeros((height, width), device=probabilities.device)
    step = max(1, CHUNK_PIXELS // (height * width))
    for start in range(0, len(probabilities), step):
        chunk = probabilities[start : start + step].float()
        inside = chunk > 0.5 if masks is None else masks[start : start + step].to(chunk.device)
        gradient = _sobel_magnitude(chunk) * (_sobel_magnitude(inside.float()) > 0)
        strength = torch.maximum(strength, gradient.amax(dim=0))
    return strength


def _sobel_magnitude(maps: Tensor) -> Tensor:
    """Magnitude of the 3 x 3 Sobel gradient with zero padding: float [K, H, W] -> [K, H, W]."""
    padded = F.pad(maps, (1, 1, 1, 1))
    over_x = padded[..., 2:] - padded[..., :-2]  # the kernels are separable: a difference across, a (1, 2, 1) sum along
    over_y = padded[:, 2:] - padded[:, :-2]
    gradient_x = over_x[:, :-2] + 2 * over_x[:, 1:-1] + over_x[:, 2:]
    gradient_y = over_y[..., :-2] + 2 * over_y[..., 1:-1] + over_y[..., 2:]
    return torch.hypot(gradient_x, gradient_y)


def _clear_border(strength: Tensor, border: int) -> Tensor:
    if border:
        inner = torch.zeros_like(strength, dtype=torch.bool)
        inner[border:-border, border:-border] = True
        strength = strength * inner
    return strength


def _stretch(edges: np.ndarray) -> np.ndarray:
    """Linear to [0, 1]; a flat map becomes 0."""
    low, high = edges.min(), edges.max()
    return (edges - low) / (high - low) if high > low else np.zeros_like(edges)


def _gaussian_blur(edges: np.ndarray, size: int) -> np.ndarray:
    return cv2.GaussianBlur(edges, (size, size), 0) if size else edges


def thin(edges: np.ndarray) -> np.ndarray:
    """Keep the pixels of an edge map, float [H, W], that are maxima across their edge (of a plateau of two, one).

    All others become 0. The direction across the edge comes from the structure tensor: on a ridge the gradient itself
    vanishes.
    """

    def smooth(values: np.ndarray, order: tuple[int, int] = (0, 0)) -> np.ndarray:
        return gaussian_filter(values, ORIENTATION_SIGMA, order=order, mode="nearest")

    gradient_x, gradient_y = smooth(edges, (0, 1)), smooth(edges, (1, 0))
    across = 0.5 * np.arctan2(2 * smooth(gradient_x * gradient_y), smooth(gradient_x**2) - smooth(gradient_y**2))
    step_y, step_x = np.sin(across), np.cos(across)
    side = np.where(step_x + 0.4 * step_y < 0, -1, 1)  # one side for all directions near the axes of the image
    y, x = np.indices(edges.shape)

    def beside(sign: int) -> np.ndarray:
        """The values one pixel across the edge."""
        at = (y + sign * side * step_y, x + sign * side * step_x)
        return map_coordinates(edges, at, order=1, mode="constant")

    return np.where((edges >= beside(1)) & (edges > beside(-1)), edges, 0)
