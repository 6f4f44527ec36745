"""ALIKED (Zhao et al., IEEE TIM 2023) as a teacher: its descriptors as the embedding, the rest from the classical one.

SAM's embedding tells which regions belong together. A descriptor tells more: what a point looks like, independently of
light and viewpoint. Its channels can therefore be learned directly (``losses.distillation``), not only their relations.
kornia implements the network (and is not used in training); the weights are the authors' own file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from samfeat.teacher_cache.schema import TeacherOutput
from samfeat.teacher_cache.teachers.checkpoints import file_sha256, read_tensors
from samfeat.teacher_cache.teachers.classical import ClassicalTeacher

if TYPE_CHECKING:
    from kornia.feature import ALIKED

RELEASED = "aliked-n16rot.pth"  # the one recommended by the authors
VERSION = 1  # raised whenever the same weights give different targets


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


@dataclass(frozen=True)
class AlikedTeacher:
    """Dense ALIKED; see :class:`samfeat.teacher_cache.teachers.protocol.Teacher`.

    Attributes:
        network: from :func:`aliked_network`.
        weights_sha256: digest of the weights file.
        regions: gives masks, groups and edges.
        device: device of the network.
    """

    name: ClassVar[str] = "aliked"

    network: ALIKED
    weights_sha256: str
    regions: ClassicalTeacher = field(default_factory=ClassicalTeacher)
    device: str = "cpu"

    @classmethod
    def build(cls, *, checkpoint: str | Path | None = None, device: str = "auto") -> AlikedTeacher:
        """The teacher with the weights in ``checkpoint``, the file released by the authors.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: no file is given, or it holds something else.
        """
        if checkpoint is None:
            raise ValueError(f"teacher aliked needs its authors' weights: give --checkpoint {RELEASED}")
        path = Path(checkpoint)
        tensors = read_tensors(path)
        try:
            network = aliked_network(tensors)
        except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError):
            raise ValueError(f"{path} does not hold weights of ALIKED: give the {RELEASED} of its authors") from None
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(network.to(device), file_sha256(path), device=device)

    @classmethod
    def rebuild(cls, described: Mapping[str, Any], *, checkpoint: Path | None = None) -> AlikedTeacher | None:
        """The teacher whose :meth:`provenance` was ``described``; None without its weights."""
        if checkpoint is None:
            return None
        return replace(cls.build(checkpoint=checkpoint), regions=ClassicalTeacher.rebuild(described["regions"]))

    def provenance(self) -> dict[str, Any]:
        """JSON values: the network, the digest of its weights, and the teacher of masks, groups and edges."""
        return {
            "name": self.name,
            "version": VERSION,
            "model": self.network.model_name,
            "weights_sha256": self.weights_sha256,
            "kornia": version("kornia"),
            "regions": self.regions.provenance(),
        }

    def embedding_shape(self, image_size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w): 128 channels (64 of aliked-t16) on the classical teacher's grid, 64 cells along the longer side.

        On real photographs of 400 x 400 pixels, descriptors interpolated on that grid have a mean cosine of 0.97 with
        those that the network computes at its keypoints, and 98 % of them are nearest to their own.
        """
        channels = self.network.desc_head.get_parameter("agg_weights").shape[1]
        return (channels, *self.regions.embedding_shape(image_size)[1:])

    def __call__(self, images: np.ndarray) -> list[TeacherOutput]:
        """The targets of ``images``, uint8 [B, H, W, 3] in RGB.

        Raises:
            ValueError: ``images`` is anything else.
        """
        outputs = self.regions(images)
        return [replace(output, embedding=self._embedding(image)) for image, output in zip(images, outputs)]

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
