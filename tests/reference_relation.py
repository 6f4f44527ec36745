"""Equations 7 and 8 with whole matrices, for autograd, and maps to try them on: the oracle of the relation loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def features(seed: int, *shape: int, smooth: int = 1) -> Tensor:
    """Float64 features [B, C, h, w]; neighbours are alike over ``smooth`` positions, as in a real network."""
    batch, channels, height, width = shape
    rng = torch.Generator().manual_seed(seed)
    coarse = (batch, channels, -(-height // smooth), -(-width // smooth))
    values = torch.randn(coarse, generator=rng, dtype=torch.float64)
    return F.interpolate(values, size=(height, width), mode="bicubic") + (0.2 if smooth > 1 else 0)


def attention_map(seed: int, *shape: int) -> Tensor:
    return 3 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(student: Tensor, teacher: Tensor, attention: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """Equations 7 and 8 with whole matrices, for autograd; all maps of one size, ``valid`` [B, h, w]."""
    losses = []
    for b in range(len(student)):
        keep = torch.ones(student.shape[2:], dtype=torch.bool) if valid is None else valid[b]
        if not keep.any():
            continue
        own, other = (F.normalize(maps[b][:, keep], dim=0) for maps in (student, teacher))
        weights = torch.zeros(own.shape[1], dtype=own.dtype) if attention is None else attention[b, 0][keep]
        weights = torch.outer(weights, weights).flatten().softmax(0)
        losses.append((weights * (own.T @ own - other.T @ other).abs().flatten()).sum())
    return torch.stack(losses).mean()


class LargestTensor(TorchDispatchMode):
    """How many elements the largest tensor had that was made within."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result
