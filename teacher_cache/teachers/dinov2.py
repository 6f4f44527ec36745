"""DINOv2 (Oquab et al., TMLR 2024) as a teacher: its patch tokens as the embedding, the rest from the classical one.

Self-supervised features that tell parts and materials apart; they come without masks. timm implements the network (and
is not used in training); the weights are the authors' own file.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from samfeat.teacher_cache.teachers.checkpoints import read_tensors
from samfeat.teacher_cache.teachers.network import NetworkTeacher

SIZES = {384: "small", 768: "base", 1024: "large", 1536: "giant"}  # by the width of the tokens
RELEASED = "dinov2_vits14_pretrain.pth"  # the smallest
PATCH, LONG_SIDE = 14, 518  # pixels; 37 patches, as in the last phase of its training
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of values in [0, 1]


def load_dinov2(path: Path) -> torch.nn.Module:
    """timm's network with the authors' weights, of the size and with the registers that they belong to.

    Args:
        path: ``dinov2_vit{s,b,l,g}14[_reg4]_pretrain.pth``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or timm is not installed.
    """
    tensors = read_tensors(path)
    if find_spec("timm") is None:
        raise ValueError("teacher dinov2 needs its network: pip install 'samfeat[dinov2]'")
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    try:
        size = SIZES[tensors["cls_token"].shape[-1]]
        registers = "_reg4" if "register_tokens" in tensors else ""
        network: Any = timm.create_model(f"vit_{size}_patch14{registers}_dinov2", num_classes=0, dynamic_img_size=True)
        network.load_state_dict(checkpoint_filter_fn(tensors, network))
    except (KeyError, AttributeError, IndexError, TypeError, RuntimeError, ValueError):
        raise ValueError(f"{path} does not hold DINOv2's weights: give its authors' file, such as {RELEASED}") from None
    return network.eval()


class DinoV2Teacher(NetworkTeacher):
    """Patch tokens of DINOv2; see :class:`samfeat.teacher_cache.teachers.protocol.Teacher`."""

    name = "dinov2"
    version = 1
    needs = f"its authors' weights: give --checkpoint {RELEASED}"
    load = staticmethod(load_dinov2)

    def provenance(self) -> dict[str, Any]:
        """As the base class, with the version of timm."""
        return {**super().provenance(), "timm": version("timm")}

    def embedding_shape(self, image_size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w): 37 cells along the longer side of ``image_size`` = (height, width), the other in proportion."""
        rows, columns = (max(1, round(LONG_SIDE / PATCH * side / max(image_size))) for side in image_size)
        return self.network.embed_dim, rows, columns

    @torch.inference_mode()
    def _embedding(self, image: np.ndarray) -> np.ndarray:
        """Tokens after the last normalisation, float32 [C, h, w]."""
        _, rows, columns = self.embedding_shape((image.shape[0], image.shape[1]))
        pixels = torch.from_numpy(image.copy()).to(self.device).permute(2, 0, 1)[None].float() / 255
        size = (rows * PATCH, columns * PATCH)
        pixels = F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True)
        mean, deviation = (pixels.new_tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
        tokens = self.network.forward_features((pixels - mean) / deviation)[0, self.network.num_prefix_tokens :]
        return tokens.T.reshape(-1, rows, columns).float().cpu().numpy()
