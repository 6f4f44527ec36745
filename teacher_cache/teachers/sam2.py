"""SAM 2 (Ravi et al., ICLR 2025) as a teacher: SAM with a hierarchical encoder (Hiera), a fraction of ViT-H's cost.

The encoder sees the whole image as a square. Its embedding is the map at 1/16 that the mask decoder reads; two finer
maps sharpen the masks. Prompts, filters, groups and edges are those of ``sam.py``. transformers implements the network
(and is not used in training); the weights are the official ones in its layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from samfeat.teacher_cache.teachers.checkpoints import file_sha256
from samfeat.teacher_cache.teachers.sam import SamTeacher
from samfeat.teacher_cache.teachers.sam_decoder import LowResMasks
from samfeat.teacher_cache.teachers.sam_masks import Frame

SOURCE = "the folder of facebook/sam2.1-hiera-small, or of another size, with config.json and model.safetensors"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of values in [0, 1]


class Sam2Teacher(SamTeacher):
    """SAM 2; see :class:`SamTeacher` for arguments, targets and errors. The checkpoint is a folder."""

    name = "sam2"
    _model = "hiera"
    _source = f"FOLDER ({SOURCE})"

    @staticmethod
    def load(path: Path, model: str) -> tuple[Any, str]:
        """SAM 2 with the weights of a folder, on the CPU, and the SHA-256 of its ``model.safetensors``."""
        return load_sam2(path), file_sha256(path / "model.safetensors")

    @staticmethod
    def encoder(sam: Any, dtype: torch.dtype) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """The image encoder: float32 [b, 3, s, s] -> the maps of the decoder at 1/4, 1/8 and 1/16, float32."""

        def encode(pixels: Tensor) -> tuple[Tensor, ...]:
            with torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
                maps = sam.get_image_embeddings(pixels)
            return tuple(values.float() for values in maps)

        return encode

    @staticmethod
    def decoder(sam: Any) -> Sam2Decoder:
        """The mask decoder on the device of ``sam``."""
        return Sam2Decoder(sam)

    def provenance(self) -> dict[str, Any]:
        """As :class:`SamTeacher`, with the version of transformers."""
        return {**super().provenance(), "transformers": version("transformers")}

    def embedding_shape(self, image_size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w), the same for all images (256 x 64 x 64): SAM 2 stretches an image to a square."""
        prompts = self._sam.prompt_encoder
        return prompts.hidden_size, *prompts.image_embedding_size

    def _frame(self, image_size: tuple[int, int]) -> Frame:
        """Masks cover the whole image and are resized to it at once, so their own grid is the scaled image."""
        size = self._sam.prompt_encoder.mask_input_size
        return Frame(image_size, size, size[0])

    def _scaled(self, images: np.ndarray) -> Tensor:
        from torchvision.transforms.v2.functional import resize

        side = self._sam.prompt_encoder.input_image_size
        return resize(torch.from_numpy(images.copy()).permute(0, 3, 1, 2), [side, side], antialias=True)

    def _pixels(self, scaled: Tensor) -> Tensor:
        values = scaled.float() / 255
        mean, deviation = (values.new_tensor(each)[:, None, None] for each in (MEAN, DEVIATION))
        return (values - mean) / deviation


class Sam2Images(NamedTuple):
    """What all prompts on i images share.

    Attributes:
        features: the embeddings.
        finer: the maps at 1/4 and 1/8 of the encoder's input, with fewer channels.
    """

    features: Float[Tensor, "i c h w"]
    finer: list[Tensor]


class Sam2Decoder:
    """Mask decoder and prompt encoder of transformers' ``Sam2Model``, for prompts of one foreground point.

    Args:
        sam: a ``Sam2Model``; its device is used.

    Attributes:
        mask_size: (height, width) of the masks, which cover the image.
        mask_threshold: logit above which a pixel belongs to a mask.
    """

    mask_threshold = 0.0

    def __init__(self, sam: Any) -> None:
        self._prompts, self._decoder = sam.prompt_encoder, sam.mask_decoder
        self.mask_size: tuple[int, int] = sam.prompt_encoder.mask_input_size
        self._positions = sam.get_image_wide_positional_embeddings().detach()

    def tokens(self, points: Float[Tensor, "p 2"]) -> Float[Tensor, "p t c"]:
        """Tokens of prompts at ``points``, (x, y) in pixels of the masks."""
        points = (points * (self._prompts.input_image_size / self.mask_size[0])).float()
        labels = torch.ones((1, len(points), 1), dtype=torch.int, device=points.device)
        return self._prompts(points[None, :, None], labels, None, None)[0][0]

    def image_side(self, *maps: Float[Tensor, "i c h w"]) -> Sam2Images:
        """Everything about the images that does not depend on the prompt."""
        return Sam2Images(maps[-1], list(maps[:-1]))

    def decode(
        self, images: Sam2Images, prompts: Float[Tensor, "p t c"], *, iou_above: float | None = None
    ) -> LowResMasks:
        """Three masks of every prompt on every image; only those of a predicted IoU above ``iou_above``, if given."""
        count = len(images.features)
        masks, predicted_iou, _, _ = self._decoder(
            image_embeddings=images.features,
            image_positional_embeddings=self._positions.expand(count, -1, -1, -1),
            sparse_prompt_embeddings=prompts.expand(count, -1, -1, -1),
            dense_prompt_embeddings=self._prompts.no_mask_embed.weight[:, :, None, None],
            multimask_output=True,
            high_resolution_features=images.finer,
        )
        image = torch.arange(count, device=masks.device)[:, None, None].expand_as(predicted_iou)
        passed = predicted_iou > (-torch.inf if iou_above is None else iou_above)
        return LowResMasks(masks[passed], predicted_iou[passed], image[passed])


def load_sam2(folder: Path) -> Any:
    """transformers' ``Sam2Model`` with the weights of a folder, on the CPU. Nothing in the folder is executed.

    The official folders hold SAM 2 for videos: its memory is left out.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files hold something else, or transformers is not installed.
    """
    if find_spec("transformers") is None:
        raise ValueError("teacher sam2 needs its network: pip install 'samfeat[sam2]'")
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"no SAM 2 checkpoint in {folder} ({file} is missing): give {SOURCE}")
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import Sam2Config, Sam2Model

    try:
        described = json.loads((folder / "config.json").read_text())
        parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
        network = Sam2Model(Sam2Config(**{part: described[part] for part in parts}))
        tensors = load_file(folder / "model.safetensors")
        network.load_state_dict({name: tensors[name] for name in network.state_dict()})
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, SafetensorError):
        raise ValueError(f"{folder} does not hold SAM 2's weights, or is damaged: give {SOURCE}") from None
    return network.eval()
