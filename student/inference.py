"""The network as used for extraction: computes the same as ``network.py`` in fewer operations.

- The scale of the image is part of the first convolution: bfloat16 holds I - 127.5 exactly, but not 2 I / 255 - 1.
- On a CPU the full resolution is computed in strips of rows, keeping only what is needed later in memory.
- A detection head is a matrix product at every pixel, whose nine outputs are shifted and added; its share of the fused
  heat-map is folded into its weights. These sums are float32 in every precision: rounding them moves keypoints.
- Query, key and value of the row attention are one matrix product, which returns them channel by channel, as needed.
- Descriptors are computed only at the keypoints: bilinear sampling and the 3 x 3 descriptor convolution commute.

One thread of a CPU with AVX-512 and AMX extracts 2.9 times as fast as with the plain network, and 5.5 times in bfloat16
(``tests/benchmarks/bench_inference.py``). ``tests/test_inference.py`` compares both.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from samfeat.student.network import (
    ROW_ATTENTION_SCALE,
    EdgeAttentionGuidance,
    SAMFeatNetwork,
    Sampling,
    resize,
    sample,
    sampling_grid,
)

STRIP_BYTES = 20 << 20  # below 32 MiB the C library reuses freed memory; above, every page is cleared again
ATTENTION_BLOCKS = 3  # of channels, one after the other on a CPU, for the same reason
POINTS_AT_ONCE = 2048  # points whose neighbourhoods are gathered together
DENSE_SHARE = 0.4  # points per cell of the descriptor map above which the whole map costs less


class Maps(NamedTuple):
    """The maps from which keypoints and descriptors are extracted (h = H // 4, w = W // 4).

    Attributes:
        logits: detection logit [B, H, W] including the edge gain, float32.
        features: input of the descriptor head [B, C, h, w].
        attention: attention map [B, 1, h, w], float32, positive.
        edges: edge probability [B, 1, h, w], float32.
    """

    logits: Tensor
    features: Tensor
    attention: Tensor
    edges: Tensor


class InferenceNetwork(nn.Module):
    """A trained network, folded for inference. It copies the weights: rebuild it when they change.

    Args:
        network: the network; it is not modified.
        dtype: arithmetic of the convolutions and of the attention.
        edge_gain: multiple of the edge probability that is added to the detection logit.
    """

    taps1: Tensor
    taps2: Tensor
    taps3: Tensor
    taps4: Tensor
    heatmap_bias: Tensor
    projection: Tensor
    projection_bias: Tensor
    descriptor_taps: Tensor

    def __init__(self, network: SAMFeatNetwork, *, dtype: torch.dtype = torch.float32, edge_gain: float = 0.0) -> None:
        super().__init__()
        self.config, self.edge_gain, self.dtype = network.config, edge_gain, dtype
        self.exact = torch.promote_types(dtype, torch.float32)

        def layout(convolution: nn.Conv2d) -> nn.Conv2d:
            copied = copy.deepcopy(convolution).to(dtype)
            copied.weight.data = copied.weight.data.contiguous(memory_format=torch.channels_last)
            return copied

        scaled = copy.deepcopy(network.conv1a)
        with torch.no_grad():
            scaled.weight.mul_(2 / 255)
        self.conv1a, self.conv1b = layout(scaled), layout(network.conv1b)
        self.conv2a, self.conv2b = layout(network.conv2a), layout(network.conv2b)
        self.conv3a, self.conv3b = layout(network.conv3a), layout(network.conv3b)
        self.conv4a, self.conv4b = layout(network.conv4a), layout(network.conv4b)
        self.dist_conv_feat, self.dist_conv_fushion = layout(network.dist_conv_feat), layout(network.dist_conv_fushion)
        self.conv_edg, self.conv_des = layout(network.conv_edg), layout(network.conv_des)
        self.conv_bottleneck = None if network.conv_bottleneck is None else layout(network.conv_bottleneck)
        self.scalemap = copy.deepcopy(network.scalemap).to(self.exact)

        heads = [network.get_submodule(f"heatmap{level}") for level in (1, 2, 3, 4)]
        shares = [network.get_parameter(f"fuse_weight_{level}").to(self.exact) for level in (1, 2, 3, 4)]
        for level, (head, share) in enumerate(zip(heads, shares), start=1):
            taps = head.get_parameter("weight")[0].to(self.exact) * share
            self.register_buffer(f"taps{level}", taps.flatten(1).T.contiguous().detach())
        bias = sum(share * head.get_parameter("bias").to(self.exact) for head, share in zip(heads, shares))
        self.register_buffer("heatmap_bias", torch.as_tensor(bias).detach())

        self.guidance = copy.deepcopy(network.egde_module)
        if self.guidance is not None:
            self.guidance.to(dtype)
            if self.config.edge_attention == "row":
                weight, bias = _row_projections(self.guidance)
                self.register_buffer("projection", weight)
                self.register_buffer("projection_bias", bias)
        kernel = network.conv_des.weight.detach().permute(2, 3, 1, 0).flatten(0, 2)
        self.register_buffer("descriptor_taps", kernel.to(dtype).contiguous())
        self.requires_grad_(False).eval()

    def forward(self, pixels: UInt8[Tensor, "b h w 3"] | Float[Tensor, "b h w 3"]) -> Maps:
        """Compute the maps of a batch of images.

        Args:
            pixels: RGB in [0, 255]. Height and width are multiples of 8.

        Raises:
            ValueError: another shape.
        """
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.shape[1] % 8 or pixels.shape[2] % 8 or 0 in pixels.shape:
            raise ValueError(f"pixels must be [B, H, W, 3], H and W multiples of 8, got {list(pixels.shape)}")
        size = pixels.shape[1:3]
        images = (pixels.to(self.exact) - 127.5).to(self.dtype).permute(0, 3, 1, 2)  # channels last as it comes

        logits, pooled, c1 = self._full_resolution(images)
        c2 = _relu(self.conv2b, _relu(self.conv2a, pooled))
        c3 = _relu(self.conv3b, _relu(self.conv3a, F.max_pool2d(c2, 2)))
        backbone_c4 = _relu(self.conv4b, _relu(self.conv4a, F.max_pool2d(c3, 2)))
        c4 = backbone_c4 + self.dist_conv_fushion(self.dist_conv_feat(backbone_c4))

        quarter = c3.shape[-2:]
        features = torch.cat((c1, resize(c2, quarter), c3, resize(c4, quarter)), dim=1)
        edges = torch.sigmoid(self.conv_edg(features).to(self.exact))
        products = self._products(c3, self.taps3) * (1 + edges)  # the head sees c3 E + c3
        at_quarter = _shift_and_add(products) + self.edge_gain * edges[:, 0]
        logits = logits + self.heatmap_bias
        for part in (_shift_and_add(self._products(c2, self.taps2)), at_quarter, self._head4(c4)):
            logits = logits + resize(part[:, None], size)[:, 0]

        fused = self._guided(features, edges.to(self.dtype))
        source = fused.permute(0, 2, 3, 1).mean(dim=3, dtype=self.exact)[:, None]  # over memory side by side
        if self.config.attention_source == "backbone":
            others = features[:, : -c4.shape[1]].sum(dim=1, keepdim=True, dtype=self.exact)
            plain = resize(backbone_c4, quarter).sum(dim=1, keepdim=True, dtype=self.exact)
            source = (others + plain) / features.shape[1]
        narrowed = fused if self.conv_bottleneck is None else _relu(self.conv_bottleneck, fused)
        return Maps(logits, narrowed, F.softplus(self.scalemap(source)), edges)

    def _full_resolution(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first head's logits [B, H, W], max-pooled c1 at 1/2 resolution, c1 at 1/4 resolution.

        Computed in strips of rows with a halo of two, one row for each of the two convolutions; rows affected by a
        strip's artificial border are cut off.
        """
        batch, _, height, width = images.shape
        canvas = images.new_zeros((batch, height + 2, width + 2), dtype=self.exact)
        rows = height
        if images.device.type == "cpu":
            row_bytes = batch * width * self.conv1b.out_channels * canvas.element_size()
            rows = max(8, STRIP_BYTES // row_bytes // 8 * 8)
        pooled, quarter = [], []
        for top in range(0, height, rows):
            bottom, first = min(top + rows, height), max(top - 2, 0)
            c1 = _relu(self.conv1b, _relu(self.conv1a, images[:, :, first : bottom + 2]))
            c1 = c1[:, :, top - first : bottom - first]
            _shift_into(canvas[:, top : bottom + 2], self._products(c1, self.taps1))
            pooled.append(F.max_pool2d(c1, 2))
            quarter.append(resize(c1, (c1.shape[2] // 4, width // 4)))
        if len(pooled) == 1:
            return canvas[:, 1:-1, 1:-1], pooled[0], quarter[0]
        return canvas[:, 1:-1, 1:-1], torch.cat(pooled, dim=2), torch.cat(quarter, dim=2)

    def _products(self, maps: Tensor, taps: Tensor) -> Tensor:
        """[B, 9, h, w], the values at every pixel times each of the nine taps."""
        pixels = maps.permute(0, 2, 3, 1).flatten(1, 2).to(self.exact)
        return (taps @ pixels.mT).unflatten(2, maps.shape[2:])

    def _head4(self, c4: Tensor) -> Tensor:
        return _shift_and_add(self._products(c4, self.taps4))

    def _guided(self, features: Tensor, edges: Tensor) -> Tensor:
        """``features`` and what the edge attention guidance adds to them."""
        if self.guidance is None:
            return features
        if self.config.edge_attention != "row":
            return features + self.guidance(features * edges)
        batch, _, height, width = features.shape
        gated = (features * edges).permute(0, 2, 3, 1).flatten(1, 2).mT  # [B, C, h w]
        blocks = ATTENTION_BLOCKS if features.device.type == "cpu" else 1
        attended = []
        for weight, bias in zip(self.projection.chunk(blocks, dim=1), self.projection_bias.chunk(blocks, dim=1)):
            weight, bias = weight.flatten(0, 1), bias.flatten()[:, None]
            if batch == 1:  # the same as below, a quarter faster on CPUs
                projected = torch.addmm(bias, weight, gated[0])
            else:
                projected = torch.baddbmm(bias[None], weight.expand(batch, -1, -1), gated)
            query, key, value = projected.view(batch, 3, -1, height, width).unbind(1)
            scores = (query @ key.mT).softmax(dim=-1, dtype=self.exact).to(self.dtype)
            attended.append(scores @ value)
        return torch.cat(attended, dim=1).contiguous(memory_format=torch.channels_last).add_(features)

    def descriptors(
        self, maps: Maps, points: list[Tensor], image_size: tuple[int, int], *, convention: Sampling
    ) -> list[Tensor]:
        """Descriptors, not normalised, at points of every image of a batch.

        Args:
            maps: result of :meth:`forward`.
            points: for every image float [n, 2], (x, y) in image pixels.
            image_size: (height, width) of the images.
            convention: see :func:`samfeat.student.network.sample`.

        Returns:
            for every image [n, 128], at least float32.
        """
        cells = maps.features.shape[2] * maps.features.shape[3]
        if maps.features.device.type != "cpu" or max(map(len, points)) > DENSE_SHARE * cells:
            dense = self.conv_des(maps.features)
            return [
                sample(dense[k : k + 1], p[None], image_size, convention=convention)[0] for k, p in enumerate(points)
            ]
        return [
            torch.cat([self._at_points(image, part, image_size, convention) for part in p.split(POINTS_AT_ONCE)])
            for image, p in zip(maps.features, points)
        ]

    def _at_points(self, features: Tensor, points: Tensor, image_size: tuple[int, int], convention: Sampling) -> Tensor:
        """Descriptors at the points of one image: 3 x 3 bilinear samples of its features, then one matrix product."""
        _, height, width = features.shape
        grid = sampling_grid(points.to(self.exact), image_size, convention=convention)
        limit = grid.new_tensor((width - 1, height - 1))
        position = (((grid + 1) * (limit + 1) - 1) / 2).clamp(min=0).minimum(limit)
        corner = position.floor()
        share = position - corner
        offsets = torch.arange(2, device=points.device)
        x, y = (torch.minimum(corner[:, k, None] + offsets, limit[k]).long() for k in (0, 1))
        shares_x, shares_y = (torch.stack((1 - share[:, k], share[:, k]), dim=1) for k in (0, 1))

        shift = torch.arange(-1, 2, device=points.device)[:, None]
        x, y = x[:, None] + shift, y[:, None] + shift  # [n, 3 shifts, 2 corners]
        shares_x = shares_x[:, None] * ((x >= 0) & (x < width))  # the convolution's zeros beyond the border
        shares_y = shares_y[:, None] * ((y >= 0) & (y < height))
        index = y.clamp(0, height - 1)[:, :, None, :, None] * width + x.clamp(0, width - 1)[:, None, :, None]
        weights = shares_y[:, :, None, :, None] * shares_x[:, None, :, None]
        table = features.permute(1, 2, 0).reshape(height * width, -1)
        neighbourhoods = F.embedding_bag(
            index.reshape(-1, 4), table, mode="sum", per_sample_weights=weights.reshape(-1, 4).to(table.dtype)
        )
        found = neighbourhoods.view(len(points), len(self.descriptor_taps)) @ self.descriptor_taps
        return (found if self.conv_des.bias is None else found + self.conv_des.bias).to(self.exact)


def _relu(convolution: nn.Module, maps: Tensor) -> Tensor:
    return F.relu_(convolution(maps))


def _shift_into(canvas: Tensor, products: Tensor) -> None:
    """Add [B, 9, h, w] tap products to a canvas [B, h + 2, w + 2], each shifted to its tap's position."""
    height, width = products.shape[2:]
    for tap in range(9):
        y, x = 2 - tap // 3, 2 - tap % 3
        canvas[:, y : y + height, x : x + width] += products[:, tap]


def _shift_and_add(products: Tensor) -> Tensor:
    """The 3 x 3 convolution [B, h, w] from its tap products."""
    batch, _, height, width = products.shape
    canvas = products.new_zeros((batch, height + 2, width + 2))
    _shift_into(canvas, products)
    return canvas[:, 1:-1, 1:-1]


def _row_projections(guidance: EdgeAttentionGuidance) -> tuple[Tensor, Tensor]:
    """Weights [3, C, C] and biases [3, C] of query (with the scale of the scores), key and value."""
    convolutions = (guidance.query_conv, guidance.key_conv, guidance.value_conv)
    scales = (ROW_ATTENTION_SCALE, 1.0, 1.0)
    weight = torch.stack([c.weight.detach()[:, :, 0, 0] * s for c, s in zip(convolutions, scales)])
    bias = torch.stack([c.get_parameter("bias").detach() * s for c, s in zip(convolutions, scales)])
    return weight, bias
