"""Synthetic pairs: homographies, warps of images and of their targets, and photometric noise.

Everything is batched torch on the device of its arguments, draws only from the generator it is given, and reads nothing
back to the host. Pixels are (x, y), (0, 0) is the centre of the top-left; homographies map original to warped pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

MOST_BLUR = 2.0  # pixels, the largest deviation that the 11 taps of _blur hold
STILL = 0.25  # of the whole strength, for the mild pairs of :func:`sample_views`
UNIT_SQUARE = ((0.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 0.0))


@dataclass(frozen=True)
class HomographyConfig:
    """Distribution of random homographies; lengths are fractions of the image side, the defaults the published ones.

    Attributes:
        patch: side of the centred square that the image's corners are moved to before any random change.
        perspective: bound of the uniform corner displacements, below ``patch / 2`` so that the image stays convex.
        scale: bounds of the uniform scale factor.
        unscaled: probability of a scale factor of 1.
        overflow: how far a translation may push the quadrangle out of the image.
        rotation: bound of the uniform rotation angle, in radians.
    """

    patch: float = 0.8
    perspective: float = 0.2
    scale: tuple[float, float] = (0.8, 2.0)
    unscaled: float = 1 / 6
    overflow: float = 0.05
    rotation: float = math.pi / 2

    def __post_init__(self) -> None:
        if not 0 <= 2 * self.perspective < self.patch:
            raise ValueError(
                f"perspective must lie in [0, patch / 2), got {self.perspective} with patch {self.patch}: "
                "lower it, or the warped image folds over"
            )
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be two positive ascending factors, got {self.scale}")
        if not 0 <= self.unscaled <= 1:
            raise ValueError(f"unscaled is a probability in [0, 1], got {self.unscaled}")


PUBLISHED = HomographyConfig()


@dataclass(frozen=True)
class ViewConfig:
    """Two windows onto a crop, both seen through homographies; see :func:`sample_views`.

    Attributes:
        size: side of the square windows in pixels, a multiple of 8; 0 disables windows: the views are the crop and a
            homography of it.
        scale: largest ratio of the two views' scales; log-uniform.
        rotation: largest angle between the two views, in radians; small angles are more likely.
        tilt: largest angle between the image plane and the right view, in radians; uniform.
        mild: share of the pairs that get a quarter of scale, rotation and tilt throughout training.
        widen: share of all steps over which scale, rotation and tilt grow from a quarter to their full value.
    """

    size: int = 0
    scale: float = 3.0
    rotation: float = math.pi
    tilt: float = 1.0
    mild: float = 0.3
    widen: float = 0.3

    def __post_init__(self) -> None:
        if self.size < 0 or self.size % 8:
            raise ValueError(f"data.views.size={self.size}: must be a multiple of 8, or 0 for whole crops")
        if self.scale < 1 or not 0 <= self.tilt < math.pi / 2:
            raise ValueError(
                f"data.views: scale must be at least 1 and tilt in [0, pi / 2), got {self.scale} and {self.tilt}"
            )
        if not (0 <= self.mild <= 1 and 0 <= self.widen <= 1):
            raise ValueError(f"data.views: mild and widen are shares in [0, 1], got {self.mild} and {self.widen}")

    def strength(self, progress: float) -> float:
        """Factor of scale, rotation and tilt after a share ``progress`` of all steps, from 0.25 to 1."""
        return 1.0 if progress >= self.widen else STILL + (1 - STILL) * progress / self.widen


class WarpedTargets(NamedTuple):
    """Targets seen through a homography.

    Attributes:
        embedding: [B, C, h, w], on a cell grid over the warped image; zero in cells outside the source.
        groups: integer [B, H, W], the source's own labels; 0 outside.
        edges: float [B, H, W]; 0 outside.
        valid: bool [B, H, W], whether the pixel shows a pixel of the source.
    """

    embedding: Float[Tensor, "b c h w"]
    groups: Int[Tensor, "b H W"]
    edges: Float[Tensor, "b H W"]
    valid: Bool[Tensor, "b H W"]


def sample_homographies(
    count: int, size: tuple[int, int], *, generator: torch.Generator, config: HomographyConfig = PUBLISHED
) -> Float[Tensor, "b 3 3"]:
    """Random homographies as in the training of MTLDesc and SAMFeat.

    The corners of the unit square move to a centred square, are sheared by a random perspective, scaled about their
    centre, translated by at most ``overflow`` past the border and rotated about their centre, in this order.

    Args:
        count: number of homographies.
        size: (height, width) of the images.
        generator: source of all draws; the result lives on its device.
        config: the distribution.

    Returns:
        float32, original to warped pixels, ``[2, 2] = 1``.
    """
    from kornia.geometry.transform import get_perspective_transform

    device = generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator, device=device, dtype=torch.float64)

    def between(low: Tensor | float, high: Tensor | float, *shape: int) -> Tensor:
        return low + (high - low) * uniform(*shape)

    square = torch.tensor(UNIT_SQUARE, device=device, dtype=torch.float64)
    quad = (1 - config.patch) / 2 + config.patch * square.expand(count, 4, 2)
    dy, left, right = between(-config.perspective, config.perspective, 3).unbind(1)
    shift = torch.stack([left, dy, left, -dy, right, dy, right, -dy], dim=1).view(count, 4, 2)
    quad = quad + shift

    scale = between(*config.scale, 1, 1)
    scale = torch.where(uniform(1, 1) < config.unscaled, 1.0, scale)
    centre = quad.mean(dim=1, keepdim=True)
    quad = centre + scale * (quad - centre)

    low = quad.abs().amin(dim=1, keepdim=True) + config.overflow
    high = (1 - quad).abs().amin(dim=1, keepdim=True) + config.overflow
    quad = quad + between(-low, high, 1, 2)

    angle = between(-config.rotation, config.rotation)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(count, 2, 2)
    centre = quad.mean(dim=1, keepdim=True)
    quad = centre + (quad - centre) @ rotation.mT

    height, width = size
    extent = torch.tensor([width - 1, height - 1], device=device, dtype=torch.float64)
    homographies = get_perspective_transform((square * extent).expand(count, 4, 2), quad * extent)
    return (homographies / homographies[:, 2:, 2:]).float()


def sample_views(
    centres: Float[Tensor, "2 b 2"],
    size: tuple[int, int],
    *,
    generator: torch.Generator,
    config: ViewConfig,
    strength: float = 1.0,
    rows: slice = slice(None),
    drawn: int = 0,
) -> Float[Tensor, "2 b 3 3"]:
    """Random homographies from two crops to two windows around a point that both crops show.

    The left view is nearly upright and frontal. The right one is turned, scaled and tilted against it: the plane is
    turned in itself, then about a random axis in it before a camera of focal length 1.2 windows (as in SiLK's training,
    Gleize et al. 2023). The ratio of scales is shared evenly by the two views.

    Args:
        centres: (x, y) of the point in the left and in the right crop; it ends up near the middle of both windows.
        size: (height, width) of the crops; where a window shows less than the crop, it is kept inside.
        generator: source of all draws, on the device of ``centres``.
        config: the distribution.
        strength: see :meth:`ViewConfig.strength`.
        rows, drawn: the pairs are ``rows`` of a larger batch of ``drawn`` pairs and get what they would get there;
            the default: they are the whole batch.

    Returns:
        float32, pixels of the crop to pixels of the window, for left and right.
    """
    device, count = centres.device, drawn or centres.shape[1]

    def between(low: float, high: float) -> Tensor:
        draws = torch.rand(count, generator=generator, device=device, dtype=torch.float64)
        return (low + (high - low) * draws)[rows]

    weaker = between(0, 1) < config.mild
    power = torch.where(weaker, STILL, strength).double()
    ratio = torch.exp(power * math.log(config.scale) * between(-1, 1))
    turn = between(-1, 1)
    angle = power * config.rotation * turn * turn.abs()
    tilt, axis = power * config.tilt * between(0, 1), between(0, 2 * math.pi)
    zoom = torch.exp(between(math.log(0.7), math.log(1.15)))
    upright, zero = between(-0.15, 0.15), torch.zeros_like(tilt)
    jitter = torch.stack([between(-0.1, 0.1) for _ in range(4)], dim=1).view(-1, 2, 2)

    views = []
    turns = ((zoom * ratio.rsqrt(), upright, zero), (zoom * ratio.sqrt(), upright + angle, tilt))
    for side, (scale, rotation, lean) in enumerate(turns):
        reach = config.size / (2 * scale)[:, None]
        extent = centres.new_tensor((size[1] - 1, size[0] - 1)).double()
        low, high = torch.minimum(reach, extent / 2), torch.maximum(extent - reach, extent / 2)
        centre = centres[side].double().clamp(low, high)
        middle = (config.size - 1) / 2 + config.size * jitter[:, side]
        plane = _plane(scale, rotation, lean, axis, focal=1.2 * config.size)
        views.append(_shift(middle) @ plane @ _shift(-centre))
    stacked = torch.stack(views)
    return (stacked / stacked[..., 2:, 2:]).float()


def _plane(scale: Tensor, rotation: Tensor, tilt: Tensor, axis: Tensor, *, focal: float) -> Float[Tensor, "b 3 3"]:
    """A plane about its origin: scaled and turned in itself, then tilted before a camera ``focal`` pixels away."""
    cos, sin, zero, one = rotation.cos(), rotation.sin(), torch.zeros_like(scale), torch.ones_like(scale)
    flat = torch.stack([scale * cos, -scale * sin, zero, scale * sin, scale * cos, zero, zero, zero, one], 1)
    x, y, bent = axis.cos(), axis.sin(), 1 - tilt.cos()  # Rodrigues' formula about the axis (x, y, 0)
    lean = torch.stack(
        [
            *(tilt.cos() + x * x * bent, x * y * bent, zero),
            *(x * y * bent, tilt.cos() + y * y * bent, zero),
            *(-y * tilt.sin() / focal, x * tilt.sin() / focal, one),
        ],
        dim=1,
    )
    return lean.view(-1, 3, 3) @ flat.view(-1, 3, 3)


def _shift(by: Float[Tensor, "b 2"]) -> Float[Tensor, "b 3 3"]:
    moved = torch.eye(3, dtype=by.dtype, device=by.device).repeat(len(by), 1, 1)
    moved[:, :2, 2] = by
    return moved


def warp_points(points: Float[Tensor, "b n 2"], homographies: Float[Tensor, "b 3 3"]) -> Float[Tensor, "b n 2"]:
    """Points (x, y) under homographies. Points on the horizon become huge, but stay finite."""
    px, py = points.unbind(-1)
    rows = homographies.to(points.dtype).unsqueeze(-1).unbind(1)
    # products and sums instead of a matmul, so that autocast and TF32 leave coordinates alone
    x, y, z = (row[:, 0] * px + row[:, 1] * py + row[:, 2] for row in rows)
    z = torch.where(z.abs() < 1e-8, 1e-8, z)
    return torch.stack([x / z, y / z], dim=-1)


def warp(
    images: Float[Tensor, "b c H W"],
    homographies: Float[Tensor, "b 3 3"],
    *,
    mode: Literal["bilinear", "nearest"] = "bilinear",
) -> Float[Tensor, "b c H W"]:
    """Images seen through homographies, on a canvas of their own size, with zeros outside."""
    height, width = images.shape[-2:]
    return _sample(images, _sources(homographies, (height, width), (height, width)), mode=mode, border="zeros")


def warp_smoothly(
    images: Float[Tensor, "b c H W"], homographies: Float[Tensor, "b 3 3"], size: tuple[int, int]
) -> Float[Tensor, "b c h w"]:
    """Images seen through homographies, on a canvas of ``size``, without aliasing and without empty regions.

    Where a homography shrinks the middle of the canvas by a factor of s > 1 (the square root of the ratio of areas),
    the image is first blurred by a Gaussian of deviation 0.5 sqrt(s^2 - 1) pixels. Past its borders it is mirrored.
    """
    points = _sources(homographies, size, size)
    middle = points[:, size[0] // 2 :, size[1] // 2 :]
    across, down = middle[:, 0, 1] - middle[:, 0, 0], middle[:, 1, 0] - middle[:, 0, 0]
    shrink = (across[:, 0] * down[:, 1] - across[:, 1] * down[:, 0]).abs().sqrt()
    deviation = 0.5 * (shrink.square() - 1).clamp(0, 4 * MOST_BLUR**2).sqrt()
    return _sample(_blur(images, deviation[:, None]), points, mode="bilinear", border="reflection")


def warp_targets(
    embedding: Float[Tensor, "b c h w"],
    groups: Int[Tensor, "b H W"],
    edges: Float[Tensor, "b H W"],
    homographies: Float[Tensor, "b 3 3"],
    *,
    canvas: tuple[int, int] | None = None,
    cells: tuple[int, int] | None = None,
) -> WarpedTargets:
    """Targets of warped images from the targets of the clean ones.

    The embedding is sampled bilinearly between its cell centres x = (j + 0.5) W / w - 0.5, edges bilinearly, groups
    from the nearest pixel so that labels survive.

    Args:
        embedding: one vector per cell; the h x w cells cover exactly the H x W pixels.
        groups: label map.
        edges: edge strength, any range.
        homographies: clean to warped pixels.
        canvas: (height, width) of the warped targets; that of the clean ones by default.
        cells: rows and columns of the warped embedding; those of the clean one by default.
    """
    size = (groups.shape[-2], groups.shape[-1])
    canvas = canvas or size
    pixels = _sources(homographies, canvas, canvas)
    where = _sources(homographies, canvas, cells or (embedding.shape[-2], embedding.shape[-1]))
    valid = _inside(pixels, size)
    labels = _sample(groups.unsqueeze(1).float(), pixels, mode="nearest", border="border").squeeze(1)
    strength = _sample(edges.unsqueeze(1), pixels, mode="bilinear", border="border").squeeze(1)
    vectors = _sample(embedding, where, size, mode="bilinear", border="border")
    return WarpedTargets(
        embedding=vectors * _inside(where, size).unsqueeze(1),
        groups=labels.to(groups.dtype) * valid,
        edges=strength * valid,
        valid=valid,
    )


def rasterise(
    keypoints: Float[Tensor, "b k 2"], mask: Bool[Tensor, "b k"], size: tuple[int, int]
) -> Float[Tensor, "b H W"]:
    """Detector labels: 1 at (round(x), round(y)) of every keypoint of the mask, 0 elsewhere.

    Halves round to even; points outside ``size`` = (height, width) are dropped.
    """
    height, width = size
    x, y = keypoints.float().round().unbind(-1)
    mask = mask & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = y.clamp(0, height - 1).long() * width + x.clamp(0, width - 1).long()
    labels = torch.zeros(len(keypoints), height * width, device=keypoints.device)
    return labels.scatter_reduce(1, index, mask.float(), "amax").view(-1, height, width)


def photometric(
    images: Float[Tensor, "b 3 H W"],
    *,
    generator: torch.Generator,
    probability: float = 0.5,
    rows: Int[Tensor, " b"] | None = None,
    drawn: int = 0,
) -> Float[Tensor, "b 3 H W"]:
    """Photometric noise, drawn independently per image.

    Brightness +-50, contrast 0.5 to 1.5 about the middle grey, Gaussian noise (equal in all channels) of deviation 0 to
    10, impulse noise on up to 0.35 % of the values, and in half of the images a motion blur over 3 pixels.

    Args:
        images: values in [0, 255].
        generator: source of all draws, on any device.
        probability: probability that an image is changed.
        rows, drawn: the images are ``rows`` of a larger batch of ``drawn`` images, and are changed as they would be
            there; draws for the others are discarded. None: they are the whole batch.

    Returns:
        new images, values in [0, 255].
    """
    from kornia.filters import motion_blur

    height, width = images.shape[-2:]
    count = len(images) if rows is None else drawn

    def own(draws: Tensor) -> Tensor:
        return (draws if rows is None else draws[rows]).to(images.device)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        draws = torch.rand(count, *shape, generator=generator, device=generator.device)
        return low + (high - low) * own(draws)

    def chance(share: float) -> Tensor:
        return uniform(0, 1, 1, 1, 1) < share

    middle = 127.0
    noisy = (images + uniform(-50, 50, 1, 1, 1)).clamp(0, 255)
    noisy = (middle + uniform(0.5, 1.5, 1, 1, 1) * (noisy - middle)).clamp(0, 255)
    grain = own(torch.randn(count, 1, height, width, generator=generator, device=generator.device))
    noisy = (noisy + uniform(0, 10, 1, 1, 1) * grain).clamp(0, 255)
    hit = uniform(0, 1, *images.shape[1:]) < uniform(0, 0.0035, 1, 1, 1)
    impulse = 255 * torch.sin(math.pi / 2 * uniform(0, 1, *images.shape[1:])) ** 2  # the Beta(1/2, 1/2) distribution
    noisy = torch.where(hit, impulse, noisy)
    blurred = motion_blur(noisy, 3, uniform(0, 360), uniform(-1, 1), border_type="reflect", mode="bilinear")
    noisy = torch.where(chance(0.5), blurred, noisy)
    return torch.where(chance(probability), noisy, images)


def relight(
    images: Float[Tensor, "b 3 H W"],
    *,
    generator: torch.Generator,
    rows: Int[Tensor, " b"] | None = None,
    drawn: int = 0,
) -> Float[Tensor, "b 3 H W"]:
    """Changes of light and camera, drawn per image; stronger than :func:`photometric`.

    Gamma 0.5 to 2, gains of 0.8 to 1.25 a channel, contrast 0.6 to 1.4 about the image's mean, brightness +-30; in 30 %
    of the images a smooth shadow or highlight of 0.4 to 1.4, in 40 % a Gaussian blur of up to 2 pixels, in half of them
    Gaussian noise of deviation up to 12, in 10 % no colour. A sixth of the images stay as they are.

    Args:
        images: values in [0, 255].
        generator: source of all draws, on any device.
        rows, drawn: as in :func:`photometric`.

    Returns:
        new images, values in [0, 255].
    """
    count = len(images) if rows is None else drawn
    height, width = images.shape[-2:]

    def own(draws: Tensor) -> Tensor:
        return (draws if rows is None else draws[rows]).to(images.device)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * own(torch.rand(count, *shape, generator=generator, device=generator.device))

    def chance(share: float) -> Tensor:
        return between(0, 1, 1, 1, 1) < share

    lit = 255 * (images / 255).clamp(0, 1) ** torch.exp(between(-0.7, 0.7, 1, 1, 1))
    lit = lit * torch.exp(between(-0.22, 0.22, 3, 1, 1))
    mean = lit.mean((1, 2, 3), keepdim=True)
    lit = mean + between(0.6, 1.4, 1, 1, 1) * (lit - mean) + between(-30, 30, 1, 1, 1)
    shade = F.interpolate(between(0.4, 1.4, 1, 4, 4), size=(height, width), mode="bicubic", align_corners=False)
    lit = torch.where(chance(0.3), lit * shade.clamp(0.3, 1.5), lit)
    lit = torch.where(chance(0.1), lit.mean(1, keepdim=True).expand_as(lit), lit)
    blurred = chance(0.4)[:, :, 0, 0]
    lit = _blur(lit, blurred * between(0.3, 2.0, 1))
    grain = own(torch.randn(count, 1, height, width, generator=generator, device=generator.device))
    lit = torch.where(chance(0.5), lit + between(0, 12, 1, 1, 1) * grain, lit)
    return torch.where(chance(1 / 6), images, lit).clamp(0, 255)


def _blur(images: Float[Tensor, "b c h w"], sigmas: Float[Tensor, "b 1"]) -> Float[Tensor, "b c h w"]:
    """Blur each image with a Gaussian of its own deviation, 0 to :data:`MOST_BLUR` pixels; a deviation of 0 copies
    it."""
    offsets = torch.arange(-5, 6, device=images.device, dtype=images.dtype)
    kernels = torch.exp(-0.5 * (offsets / sigmas.clamp(min=1e-3)).square())
    kernels = kernels / kernels.sum(1, keepdim=True)
    if images.device.type == "cpu":  # 3.5 times as fast as a convolution per channel, and most images need none
        blurred = images.clone()
        for row in np.flatnonzero(sigmas.numpy()):
            pixels, taps = images[row].permute(1, 2, 0).contiguous().numpy(), kernels[row].numpy()
            found = cv2.sepFilter2D(pixels, -1, taps, taps, borderType=cv2.BORDER_REFLECT_101)
            blurred[row] = torch.from_numpy(found).view(pixels.shape).permute(2, 0, 1)
        return blurred
    kernels = kernels.repeat_interleave(images.shape[1], dim=0)
    batch, channels, height, width = images.shape
    flat = F.pad(images.reshape(1, batch * channels, height, width), (5, 5, 5, 5), mode="reflect")
    flat = F.conv2d(flat, kernels[:, None, None, :], groups=batch * channels)
    return F.conv2d(flat, kernels[:, None, :, None], groups=batch * channels).view(batch, channels, height, width)


def _sources(homographies: Tensor, size: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """[B, h, w, 2]: source pixels of the centres of h x w cells over the warped image."""
    (height, width), (rows, columns) = size, cells
    device = homographies.device
    x = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) * (width / columns) - 0.5
    y = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) * (height / rows) - 0.5
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).view(1, -1, 2)
    inverse = torch.linalg.inv_ex(homographies.double()).inverse.float()
    return warp_points(points.expand(len(homographies), -1, -1), inverse).view(-1, rows, columns, 2)


def _sample(maps: Tensor, points: Tensor, size: tuple[int, int] | None = None, *, mode: str, border: str) -> Tensor:
    """Maps [B, C, h, w] over images of ``size`` (default: one cell a pixel), read at the pixels ``points``."""
    height, width = size or maps.shape[-2:]
    x, y = points.unbind(-1)
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    return F.grid_sample(maps, grid.clamp(-4, 4).to(maps.dtype), mode, border, align_corners=False)


def _inside(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Whether points lie inside an image, whose pixels are unit squares around their centres."""
    height, width = size
    x, y = points.unbind(-1)
    return (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)
