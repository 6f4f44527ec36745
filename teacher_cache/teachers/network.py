"""What teachers share that are a pretrained network beside the classical teacher: their weights and their identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from samfeat.teacher_cache.schema import TeacherOutput
from samfeat.teacher_cache.teachers.checkpoints import file_sha256
from samfeat.teacher_cache.teachers.classical import ClassicalTeacher


@dataclass(frozen=True)
class NetworkTeacher:
    """A network's embedding, with the classical teacher's masks, groups and edges.

    A subclass defines the class attributes, :meth:`load`, ``embedding_shape``, and :meth:`_embedding` or ``__call__``.

    Attributes:
        network: from :meth:`load`, on ``device``.
        weights_sha256: digest of the weights file.
        regions: gives masks, groups and edges.
        device: device of the network.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    """Raised whenever the same weights give different targets."""
    needs: ClassVar[str]
    """The weights and where to get them, for the message to a user who gave none."""

    network: Any
    weights_sha256: str
    regions: ClassicalTeacher = field(default_factory=ClassicalTeacher)
    device: str = "cpu"

    @staticmethod
    def load(path: Path) -> Any:
        """The network with the weights of a file, on the CPU, ready for inference.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else; the package that implements the network is missing.
        """
        raise NotImplementedError

    @classmethod
    def installed(cls) -> Path | None:
        """The weights file of an installed package, if there is one."""
        return None

    @classmethod
    def build(cls, *, checkpoint: str | Path | None = None, device: str = "auto") -> Self:
        """The teacher with the weights in ``checkpoint``, the file released by the network's authors.

        Raises:
            FileNotFoundError, ValueError: see :meth:`load`; no file is given, and none is installed.
        """
        path = cls.installed() if checkpoint is None else Path(checkpoint)
        if path is None:
            raise ValueError(f"teacher {cls.name} needs {cls.needs}")
        network = cls.load(path)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(network.to(device), file_sha256(path), device=device)

    @classmethod
    def rebuild(cls, described: Mapping[str, Any], *, checkpoint: Path | None = None) -> Self | None:
        """The teacher whose :meth:`provenance` was ``described``; None without its weights."""
        if checkpoint is None and cls.installed() is None:
            return None
        return replace(cls.build(checkpoint=checkpoint), regions=ClassicalTeacher.rebuild(described["regions"]))

    def provenance(self) -> dict[str, Any]:
        """JSON values: the digest of the network's weights, and the teacher of masks, groups and edges."""
        regions = self.regions.provenance()
        return {"name": self.name, "version": self.version, "weights_sha256": self.weights_sha256, "regions": regions}

    def __call__(self, images: np.ndarray) -> list[TeacherOutput]:
        """The targets of ``images``, uint8 [B, H, W, 3] in RGB.

        Raises:
            ValueError: ``images`` is anything else.
        """
        outputs = self.regions(images)
        return [replace(output, embedding=self._embedding(image)) for image, output in zip(images, outputs)]

    def _embedding(self, image: np.ndarray) -> np.ndarray:
        """The embedding of an image, uint8 [H, W, 3]: float32 [C, h, w]."""
        raise NotImplementedError
