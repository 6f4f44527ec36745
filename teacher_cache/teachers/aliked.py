"""ALIKED (Zhao et al., IEEE TIM 2023) as a teacher: its descriptors as the embedding, the rest from the classical one.

SAM's embedding tells which regions belong together. A descriptor tells more: what a point looks like, independently of
light and viewpoint. Its channels can therefore be learned directly (``losses.distillation``), not only their relations.
kornia implements the network (and is not used in training); the weights are the authors' own file.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from samfeat.teacher_cache.teachers.checkpoints import read_tensors
from samfeat.teacher_cache.teachers.network import NetworkTeacher

if TYPE_CHECKING:
    from kornia.feature import ALIKED

RELEASED = "aliked-n16rot.pth"  # the one recommended by the authors


def aliked_network(tensors: Mapping[str, Any], **options: Any) -> ALIKED:
    """kornia's ALIKED with the authors' weights, ready for inference on the CPU.

    Args:
        tensors: content of ``aliked-t16.pth``, ``-n16.pth``, ``-n16rot.pth`` or ``-n32.pth``; determines the model.
        **options: passed to kornia's class.

    Raises:
        KeyError, ValueError, RuntimeError: the tensors belong to another network.
    """
    from kornia.feature import ALIKED

    positions, channels = tensors["desc_head.agg_weights"].shape[:2]
    model = "aliked-t16" if channels == 64 else f"aliked-n{positions}"  # n16rot is an n16, trained on rotated images
    network = ALIKED(model, **options)
    network.load_state_dict({**network.dkd.state_dict(prefix="dkd."), **tensors})  # the grid there is a constant
    return network.eval()


class AlikedTeacher(NetworkTeacher):
    """Dense ALIKED; see :class:`samfeat.teacher_cache.teachers.protocol.Teacher`."""

    name = "aliked"
    version = 1
    needs = f"its authors' weights: give --checkpoint {RELEASED}"

    @staticmethod
    def load(path: Path) -> ALIKED:
        """The network of :func:`aliked_network` with the weights of a file; errors as the base class."""
        tensors = read_tensors(path)
        try:
            return aliked_network(tensors)
        except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError):
            raise ValueError(f"{path} does not hold weights of ALIKED: give the {RELEASED} of its authors") from None

    def provenance(self) -> dict[str, Any]:
        """As the base class, with the model and the version of kornia."""
        return {**super().provenance(), "model": self.network.model_name, "kornia": version("kornia")}

    def embedding_shape(self, image_size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w): 128 channels (64 of aliked-t16) on the classical teacher's grid, 64 cells along the longer side.

        On real photographs of 400 x 400 pixels, descriptors interpolated on that grid have a mean cosine of 0.97 with
        those that the network computes at its keypoints, and 98 % of them are nearest to their own.
        """
        channels = self.network.desc_head.get_parameter("agg_weights").shape[1]
        return (channels, *self.regions.embedding_shape(image_size)[1:])

    @torch.inference_mode()
    def _embedding(self, image: np.ndarray) -> np.ndarray:
        """Unit descriptors float32 [C, h, w] at the centres of the cells."""
        height, width = image.shape[:2]
        channels, rows, columns = self.embedding_shape((height, width))
        pixels = torch.from_numpy(image.copy()).to(self.device).permute(2, 0, 1)[None].float() / 255
        features, _ = self.network.extract_dense_map(pixels)
        y = (torch.arange(rows) + 0.5) * height / rows - 0.5
        x = (torch.arange(columns) + 0.5) * width / columns - 0.5
        points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).view(-1, 2)
        extent = torch.tensor([max(width - 1, 1), max(height - 1, 1)])
        found, _ = self.network.desc_head(features, [(points / extent * 2 - 1).to(self.device)])
        return found[0].T.reshape(channels, rows, columns).float().cpu().numpy()
