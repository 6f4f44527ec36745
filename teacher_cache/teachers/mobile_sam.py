"""MobileSAM (Zhang et al. 2023, "Faster Segment Anything") as a teacher: SAM with an encoder for CPUs.

Its encoder, a TinyViT of 5 million parameters, was distilled from ViT-H's into the same embedding space, so that the
prompt encoder and the mask decoder are SAM's own. Everything after the embedding is thus that of ``sam.py``. The
encoder itself is that of the package mobilesam-mirror, which is imported only once a teacher is made.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samfeat.teacher_cache.teachers.checkpoints import file_sha256, read_tensors
from samfeat.teacher_cache.teachers.sam import SamTeacher

FILE = "mobile_sam.pt"
SOURCE = "weights/mobile_sam.pt of github.com/ChaoningZhang/MobileSAM"
BLOB = "7ef2d090979fd9853adf17b7a99c8b94a1c5a6a7"  # git's name of that file's content (commit 34bbbfdf)


class MobileSamTeacher(SamTeacher):
    """MobileSAM; see :class:`SamTeacher` for arguments, targets and errors."""

    name = "mobile_sam"
    _model = "vit_t"
    _source = f"{FILE} ({SOURCE})"

    @staticmethod
    def load(path: Path, model: str) -> tuple[Any, str]:
        """MobileSAM with the weights of a file, on the CPU, and the file's SHA-256."""
        if not path.is_file():
            raise FileNotFoundError(f"no MobileSAM checkpoint at {path}: give {SOURCE}")
        if path.name == FILE and git_blob(path) != BLOB:
            raise ValueError(f"{path} is damaged, or not the official file: download {SOURCE} again, or rename it")
        sam = mobile_sam()
        try:
            sam.load_state_dict(read_tensors(path))
        except (RuntimeError, AttributeError, TypeError):
            raise ValueError(f"{path} does not hold MobileSAM's weights: give {SOURCE}") from None
        return sam, file_sha256(path)

    @staticmethod
    def encoder(sam: Any, dtype: torch.dtype) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """The TinyViT as it is, in ``dtype``, from float32 to float32."""
        network = copy.deepcopy(sam.image_encoder).to(dtype).eval()  # eval() builds its tables of biases anew
        return lambda pixels: (network(pixels.to(dtype)).float(),)


def mobile_sam() -> Any:
    """MobileSAM's network with random weights, a ``Sam`` around a TinyViT.

    Raises:
        ValueError: the package that holds it is not installed.
    """
    if find_spec("mobile_sam") is None or find_spec("timm") is None:
        raise ValueError("teacher mobile_sam needs its network: pip install 'samfeat[mobile-sam]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that timm has moved, or knows already
        from mobile_sam.build_sam import build_sam_vit_t

        return build_sam_vit_t().eval()


def git_blob(path: Path) -> str:
    """The name that git gives to the content of a file: the SHA-1 of its length and its bytes."""
    with path.open("rb") as file:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
