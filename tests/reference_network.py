"""The released extraction, written out plainly: what the fast path has to equal, and what its speed is compared with.

Nothing is folded, fused or left out: torch's own convolutions, dense descriptors, suppression one keypoint at a time.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from samfeat.student.extractor import ExtractionConfig
from samfeat.student.network import DenseOutput, SAMFeatNetwork


def plain_maps(network: SAMFeatNetwork, images: torch.Tensor) -> DenseOutput:
    """All maps of images [B, 3, H, W] in [-1, 1]."""

    def conv(name: str, maps: torch.Tensor) -> torch.Tensor:
        weight = network.get_parameter(f"{name}.weight")
        return F.conv2d(maps, weight, network.get_parameter(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def resized(maps: torch.Tensor, size: torch.Size) -> torch.Tensor:
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)

    levels, maps = [], images
    for level in "1234":
        maps = F.max_pool2d(maps, 2) if levels else maps
        maps = F.relu(conv(f"conv{level}b", F.relu(conv(f"conv{level}a", maps))))
        levels.append(maps)
    c1, c2, c3, backbone_c4 = levels
    distilled = conv("dist_conv_feat", backbone_c4)
    c4 = backbone_c4 + conv("dist_conv_fushion", distilled)
    quarter = c3.shape[-2:]
    features = torch.cat((resized(c1, quarter), resized(c2, quarter), c3, resized(c4, quarter)), dim=1)
    edges = torch.sigmoid(conv("conv_edg", features))
    heads = [conv(f"heatmap{k}", m) for k, m in enumerate((c1, c2, c3 * edges + c3, c4), start=1)]
    shares = [network.get_parameter(f"fuse_weight_{k}") for k in (1, 2, 3, 4)]
    heatmap = sum(share * resized(head, images.shape[-2:]) for share, head in zip(shares, heads))

    fused = features
    kind = network.config.edge_attention
    if kind != "none":
        query, key, value = (conv(f"egde_module.{name}_conv", features * edges) for name in ("query", "key", "value"))
        if kind == "row":
            fused = features + (0.01 * query @ key.transpose(-1, -2)).softmax(dim=-1) @ value
        else:
            scores = query.flatten(2).transpose(1, 2) @ key.flatten(2) / math.sqrt(features.shape[1])
            attended = scores.softmax(dim=-1) @ value.flatten(2).transpose(1, 2)
            fused = features + attended.transpose(1, 2).unflatten(2, quarter)
    source = fused
    if network.config.attention_source == "backbone":
        source = torch.cat((features[:, : -c4.shape[1]], resized(backbone_c4, quarter)), dim=1)
    attention = F.softplus(conv("scalemap", source.mean(dim=1, keepdim=True)))
    narrowed = F.relu(conv("conv_bottleneck", fused)) if network.config.descriptor_bottleneck else fused
    return DenseOutput(heatmap, conv("conv_des", narrowed), attention, distilled, edges, tuple(heads))


@torch.no_grad()
def plain_extract(network: SAMFeatNetwork, image: np.ndarray, options: ExtractionConfig) -> dict[str, Any]:
    """Features of uint8 [H, W, 3] at one scale, without subpixel refinement; as ``SAMFeat.extract`` gives them."""
    height, width = image.shape[:2]
    h, w = (int(np.round(n / 16) * 16) for n in (height, width))
    resized = cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR)
    maps = plain_maps(network, (torch.from_numpy(resized).float() / 255 * 2 - 1).permute(2, 0, 1)[None].contiguous())
    edges = F.interpolate(maps.edges, size=(h, w), mode="bilinear", align_corners=False)
    probability = torch.sigmoid(maps.heatmap + options.edge_gain * edges)[0, 0].numpy()

    ys, xs = np.nonzero(probability >= options.detection_threshold)
    order = np.argsort(-probability[ys, xs], kind="stable")
    free, radius, border = np.ones((h, w), bool), options.nms_radius, options.border
    points = []
    for y, x in zip(ys[order], xs[order]):
        if free[y, x]:
            free[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1] = False
            if border <= x < w - border and border <= y < h - border:
                points.append((x, y))
    found = np.array(points[: options.max_keypoints], np.float32).reshape(-1, 2)
    scores = probability[found[:, 1].astype(int), found[:, 0].astype(int)]

    released = network.config.sampling == "released"
    at = torch.from_numpy(found)[None, None]
    scale = torch.tensor((w, h)) - 1 if released else torch.tensor((w, h))
    grid = 2 * at / scale - 1 if released else (2 * at + 1) / scale - 1
    descriptors, weights = (
        F.grid_sample(m, grid, mode="bilinear", padding_mode="border", align_corners=False)[0, :, 0].T
        for m in (maps.descriptors, maps.attention)
    )
    descriptors = F.normalize(descriptors, dim=1) * (weights if options.weighted_descriptors else 1)
    ratio = np.array((width / w, height / h), np.float32)
    keypoints = found * ratio if released else (found + 0.5) * ratio - 0.5
    keypoints = np.clip(keypoints, 0, (width - 1, height - 1))
    return {"keypoints": keypoints, "scores": scores, "descriptors": descriptors.numpy()}
