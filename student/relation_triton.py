"""The relation loss and its gradient on CUDA: two Triton kernels for all images of a batch.

``_unit_kernel`` brings maps to the student's grid as unit rows: an int8 teacher is dequantised, resized, normalised and
cast in registers. ``_gap_kernel`` keeps a tile of rows and runs over all columns, as flash attention does. It makes
each tile of the difference twice, once on either side of the diagonal: half as many products again as the symmetric
pass of :mod:`samfeat.student.relation`. But one program owns a row and sums its gradient in registers, where symmetry
would add 0.7 GB to it by atomics (28 images, 2500 positions, 256 channels), in another order in every run.

Imported when the first CUDA tensor arrives. With TRITON_INTERPRET=1 in the environment before Triton is first imported,
the kernels run on the CPU, slowly, for tests.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

_PADDING = 128  # unit rows come in multiples of it, so that no load of a tile needs a mask
_POSITIONS = 32  # rows of a program of _unit_kernel
_ACCUMULATORS = 128  # of a thread's 255 registers, for its part of the gradient


class Tile(NamedTuple):
    """One program of ``_gap_kernel``: rows of its own, columns at a time, warps, steps of columns in flight."""

    rows: int
    columns: int
    warps: int
    stages: int


class Limits(NamedTuple):
    """What a device can do: major number of its compute capability, bytes of shared memory of one program."""

    major: int
    shared_memory: int


_TILES = (  # the first that fits is taken; as compiled for 8.0 and 8.6 none spills registers, for 9.0 the first a few
    Tile(128, 32, 8, 3),
    Tile(128, 32, 8, 2),
    Tile(64, 32, 8, 2),
    Tile(64, 16, 8, 2),
    Tile(32, 16, 4, 2),
    Tile(16, 16, 4, 2),
)


def fused_tile(channels: int, target_channels: int, dtype: torch.dtype, limits: Limits) -> Tile | None:
    """The tile for unit vectors of these channels in ``dtype``, or None where no tile fits the device or the dtype."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    block, width = _block(channels), _block(channels) + _block(target_channels)
    spare = limits.shared_memory - (36 if limits.major == 10 else 2) * 1024  # Blackwell exchanges accumulators there
    for tile in _TILES:
        shared = (tile.rows + tile.stages * tile.columns) * width * dtype.itemsize
        if shared <= spare and tile.rows * block <= _ACCUMULATORS * 32 * tile.warps:
            return tile
    return None


def limits_of(device: torch.device) -> Limits:
    """Limits of a CUDA device; those of an H100 where the kernels are interpreted."""
    if device.type != "cuda":
        return Limits(9, 227 * 1024)
    properties = torch.cuda.get_device_properties(device)
    return Limits(properties.major, getattr(properties, "shared_memory_per_block_optin", 48 * 1024))


def unit_rows(
    maps: Tensor, scale: Tensor | None, mask: Bool[Tensor, "b h w"], dtype: torch.dtype
) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n"]]:
    """Vectors of length 1, one a position, and their lengths before; what is beyond positions and channels is zero.

    Args:
        maps: [B, C, h2, w2], int8 or any float, any strides; resized bilinearly to the h x w of the mask.
        scale: float32 [B, h2, w2] to multiply int8 with; None for floats.
        mask: where not to return zeros.
        dtype: of the vectors; their lengths are float32.

    Returns:
        [B, N, C'] and [B, N], with N the next multiple of 128 from h w and C' the next power of two from C.
    """
    (images, channels, *own), (height, width) = maps.shape, mask.shape[1:]
    padded, block = triton.cdiv(height * width, _PADDING) * _PADDING, _block(channels)
    unit = torch.empty((images, padded, block), dtype=dtype, device=maps.device)
    length = torch.empty((images, padded), dtype=torch.float32, device=maps.device)
    scale = None if scale is None else scale.contiguous()
    with torch.cuda.device_of(maps):
        _unit_kernel[padded // _POSITIONS, images](
            maps, scale, mask.contiguous(), unit, length,
            channels, height, width, own[0], own[1], padded, *maps.stride(),
            SCALED=scale is not None, RESIZED=own != [height, width], BLOCK=block, POSITIONS=_POSITIONS, num_warps=8,
        )  # fmt: skip
    return unit, length


def gap_of_images(
    features: Float[Tensor, "b c h w"],
    targets: Tensor,
    scale: Tensor | None,
    attention: Float[Tensor, "b n"] | None,
    mask: Bool[Tensor, "b h w"],
    dtype: torch.dtype,
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"], Float[Tensor, "b n c"]]:
    """As ``_gap_of_images`` of :mod:`samfeat.student.relation`, where :func:`fused_tile` finds a tile."""
    images, channels, positions = len(features), features.shape[1], mask[0].numel()
    tile = fused_tile(channels, targets.shape[1], dtype, limits_of(features.device))
    assert tile is not None
    unit, length = unit_rows(features, None, mask, dtype)
    target, _ = unit_rows(targets, scale, mask, dtype)
    mask = mask.flatten(1).contiguous()
    kept = torch.float32 if features.dtype == torch.float16 else features.dtype  # undivided, it may be beyond float16
    gradient = torch.empty((images, positions, channels), dtype=kept, device=features.device)
    gaps, weights = torch.empty_like(length), None if attention is None else torch.empty_like(length)
    attention = None if attention is None else attention.float().contiguous()
    peak = None if attention is None else attention.abs().amax(1).square()
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    with torch.cuda.device_of(features):
        _gap_kernel[triton.cdiv(positions, tile.rows), images](
            unit, target, length, attention, peak, mask, gradient, gaps, weights,
            channels, unit.shape[1], positions=positions,
            BLOCK=unit.shape[2], TARGET_BLOCK=target.shape[2], WEIGHTED=attention is not None,
            PRECISION="ieee" if exact else "tf32", ROWS=tile.rows, COLUMNS=tile.columns,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    total = mask.sum(1).square() if weights is None else weights[:, :positions].sum(1)
    return gaps[:, :positions].sum(1) / 2, (total / 2).clamp(min=0.5), gradient


def _block(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))


@triton.jit
def _unit_kernel(
    maps, scale, mask, unit, length,
    channels, height, width, own_height, own_width, padded,
    image_stride, channel_stride, y_stride, x_stride,
    SCALED: tl.constexpr, RESIZED: tl.constexpr, BLOCK: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """POSITIONS rows of the units of an image, and their lengths."""
    image = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    channel = tl.arange(0, BLOCK)
    inside = position < height * width
    y, x = position // width, position % width
    maps += image * image_stride + channel[None, :] * channel_stride
    known = inside[:, None] & (channel < channels)[None, :]
    if RESIZED:
        from_y = tl.maximum((y + 0.5) * (own_height / height) - 0.5, 0.0)
        from_x = tl.maximum((x + 0.5) * (own_width / width) - 0.5, 0.0)
        top, left = from_y.to(tl.int32), from_x.to(tl.int32)
        values = tl.zeros((POSITIONS, BLOCK), tl.float32)
        for corner in tl.static_range(4):
            down, right = top + corner // 2, left + corner % 2
            share = (1 - tl.abs(down - from_y)) * (1 - tl.abs(right - from_x))
            down, right = tl.minimum(down, own_height - 1), tl.minimum(right, own_width - 1)
            if SCALED:
                share *= tl.load(scale + (image * own_height + down) * own_width + right, mask=inside, other=0)
            cell = tl.load(maps + (down * y_stride + right * x_stride)[:, None], mask=known, other=0)
            values += share[:, None] * cell.to(tl.float32)
    else:  # where the scale of a position cancels
        values = tl.load(maps + (y * y_stride + x * x_stride)[:, None], mask=known, other=0).to(tl.float32)
    norm = tl.sqrt(tl.sum(values * values, 1)) + 1e-7
    counted = tl.load(mask + image * height * width + position, mask=inside, other=0).to(tl.float32)
    row = image * padded + position
    values *= (counted / norm)[:, None]
    tl.store(unit + row[:, None] * BLOCK + channel[None, :], values.to(unit.dtype.element_ty))
    tl.store(length + row, norm)


@triton.jit
def _gap_kernel(
    unit, target, length, attention, peak, mask, gradient, gaps, weights,
    channels, padded,
    positions: tl.constexpr, BLOCK: tl.constexpr, TARGET_BLOCK: tl.constexpr, WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of ROWS positions: their sums of e^W |D| and of e^W, and the gradient by their features, times Z / 2."""
    image = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel, target_channel = tl.arange(0, BLOCK)[None, :], tl.arange(0, TARGET_BLOCK)[None, :]
    unit += image * padded * BLOCK
    target += image * padded * TARGET_BLOCK
    mask += image * positions
    inside = row < positions
    counted = tl.load(mask + row, mask=inside, other=0).to(tl.float32)
    own = tl.load(unit + row[:, None] * BLOCK + channel)
    minus_own_target = -tl.load(target + row[:, None] * TARGET_BLOCK + target_channel)
    if WEIGHTED:
        attention += image * positions
        own_attention = tl.load(attention + row, mask=inside, other=0)
        largest = tl.load(peak + image)
    gap_sum, weight_sum = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    pulls = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, positions, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        other = tl.load(unit + column[:, None] * BLOCK + channel)
        other_target = tl.load(target + column[:, None] * TARGET_BLOCK + target_channel)
        gap = tl.dot(own, tl.trans(other), input_precision=PRECISION)
        gap = tl.dot(minus_own_target, tl.trans(other_target), gap, input_precision=PRECISION)
        if WEIGHTED:
            other_attention = tl.load(attention + column, mask=column < positions, other=0)
            other_counted = tl.load(mask + column, mask=column < positions, other=0).to(tl.float32)
            weight = tl.exp(own_attention[:, None] * other_attention[None, :] - largest)
            weight_sum += tl.sum(weight * other_counted[None, :], 1)
            gap_sum += tl.sum(weight * tl.abs(gap), 1)
            pull = tl.where(gap < 0, -weight, weight)  # at gap 0 any slope between both is right
        else:
            gap_sum += tl.sum(tl.abs(gap), 1)
            pull = tl.where(gap < 0, -1.0, tl.where(gap > 0, 1.0, 0.0))
        pulls = tl.dot(pull.to(other.dtype), other, pulls, input_precision=PRECISION)
    own_row = image * padded + row
    tl.store(gaps + own_row, gap_sum)
    if WEIGHTED:
        tl.store(weights + own_row, counted * weight_sum)
    again = tl.load(unit + row[:, None] * BLOCK + channel).to(tl.float32)
    pulls -= again * tl.sum(again * pulls, 1)[:, None]  # lengths do not matter
    pulls *= (counted / tl.load(length + own_row))[:, None]
    gradient += (image * positions + row[:, None]) * channels + channel
    tl.store(gradient, pulls.to(gradient.dtype.element_ty), mask=inside[:, None] & (channel < channels))
