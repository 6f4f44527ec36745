"""SAM's image encoder for batches: the same embedding as ``ImageEncoderViT``, with less work and less memory.

A windowed block pads the 64 x 64 tokens to 70 x 70. Here tokens are projected before they are parted into windows: the
query, key and value of a padding token are the biases of the projection, so nothing is computed for it. Attention is
``scaled_dot_product_attention`` with the decomposed relative positions (Li et al. 2022, MViTv2) as its additive mask;
only blocks that look at the whole image hold a mask of (tokens x tokens), for one image at a time.

ViT-B takes 1.9 times less time than segment_anything's on one thread of a CPU with AVX-512 and AMX
(``tests/benchmarks/bench_teacher.py``). ``tests/test_sam_encoder.py`` compares both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class SamEncoder:
    """Image encoder of a ``segment_anything`` SAM.

    Args:
        encoder: an ``ImageEncoderViT`` with relative positions; its weights are read, its device is used.
        dtype: of weights and activations inside the blocks, ``torch.float32`` or ``torch.bfloat16``. The sum that runs
            through the blocks and all normalisations are float32 always.
    """

    def __init__(self, encoder: Any, *, dtype: torch.dtype = torch.float32) -> None:
        self._patches = _layer(F.conv2d, encoder.patch_embed.proj, dtype, stride=encoder.patch_embed.proj.stride)
        self._positions = encoder.pos_embed
        self._blocks = [_Block(block, encoder.pos_embed.shape[1:3], dtype) for block in encoder.blocks]
        self._neck = encoder.neck
        narrow, _, smooth, _ = encoder.neck
        self._narrow = _layer(F.conv2d, narrow, dtype)
        self._smooth = _layer(F.conv2d, smooth, dtype, padding=smooth.padding)

    def __call__(self, pixels: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b c h w"]:
        """Embeddings of ``pixels``: normalised images, padded to the encoder's input size; float32."""
        tokens = self._patches(pixels).permute(0, 2, 3, 1) + self._positions
        for block in self._blocks:
            tokens = block(tokens)
        features = self._neck[1](self._narrow(tokens.permute(0, 3, 1, 2)).float())
        return self._neck[3](self._smooth(features).float())


class _Block:
    """One transformer block on tokens [b, h, w, c]."""

    def __init__(self, block: Any, size: tuple[int, int], dtype: torch.dtype) -> None:
        attention, mlp = block.attn, block.mlp
        self._norms = block.norm1, block.norm2
        self._heads, self._activation = attention.num_heads, mlp.act
        self._window = block.window_size
        self._qkv, self._projection = _layer(F.linear, attention.qkv, dtype), _layer(F.linear, attention.proj, dtype)
        self._widen, self._narrow = _layer(F.linear, mlp.lin1, dtype), _layer(F.linear, mlp.lin2, dtype)
        self._padding = attention.qkv.bias.to(dtype)  # what the projection makes of a padding token
        rows, columns = (self._window, self._window) if self._window else size
        self._offsets_y = _relative(attention.rel_pos_h.to(dtype), rows)
        self._offsets_x = _relative(attention.rel_pos_w.to(dtype), columns)

    def __call__(self, tokens: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        attend = self._attend_in_windows if self._window else self._attend_globally
        tokens = tokens + self._projection(attend(self._qkv(self._norms[0](tokens))))
        return tokens + self._narrow(self._activation(self._widen(self._norms[1](tokens))))

    def _attend_globally(self, qkv: Float[Tensor, "b h w c3"]) -> Float[Tensor, "b h w c"]:
        return torch.cat([self._attend(image[None]) for image in qkv])

    def _attend_in_windows(self, qkv: Float[Tensor, "b h w c3"]) -> Float[Tensor, "b h w c"]:
        b, h, w, c3 = qkv.shape
        size, (down, across) = self._window, (-(-side // self._window) for side in (h, w))
        padded = qkv
        if (down * size, across * size) != (h, w):
            padded = self._padding.repeat(b, down * size, across * size, 1)
            padded[:, :h, :w] = qkv
        windows = padded.view(b, down, size, across, size, c3).transpose(2, 3).reshape(-1, size, size, c3)
        mixed = self._attend(windows).view(b, down, across, size, size, -1).transpose(2, 3)
        return mixed.reshape(b, down * size, across * size, -1)[:, :h, :w].contiguous()

    def _attend(self, qkv: Float[Tensor, "g h w c3"]) -> Float[Tensor, "g h w c"]:
        """Multi-head attention within each of the g grids of h x w tokens."""
        g, h, w, _ = qkv.shape
        query, key, value = qkv.view(g, h * w, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
        grid = query.unflatten(2, (h, w))
        over_y = torch.einsum("gnhwc,hkc->gnhwk", grid, self._offsets_y).contiguous()
        over_x = torch.einsum("gnhwc,wkc->gnhwk", grid, self._offsets_x).contiguous()
        positions = (over_y[..., :, None] + over_x[..., None, :]).view(g, self._heads, h * w, h * w)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=positions)
        return mixed.transpose(1, 2).reshape(g, h, w, -1)


def _relative(table: Float[Tensor, "offsets c"], size: int) -> Float[Tensor, "size size c"]:
    """Row (q, k): the entry of the table for a query at position q and a key at position k."""
    positions = torch.arange(size, device=table.device)
    return table[positions[:, None] - positions + size - 1]


def _layer(
    function: Callable[..., Tensor], layer: Any, dtype: torch.dtype, **options: Any
) -> Callable[[Tensor], Tensor]:
    """``layer`` with its weights in ``dtype``, whatever the dtype of its input."""
    weight = layer.weight.to(dtype)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return lambda values: function(values.to(dtype), weight, bias, **options)
