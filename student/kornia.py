"""The extractor as a local feature of kornia, for ``LocalFeatureMatcher`` and the matchers that take affine frames."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from samfeat.student.extractor import SAMFeat


class KorniaFeature(nn.Module):
    """What kornia's ``LocalFeature`` does, by a student: affine frames, responses and descriptors of a batch.

    Frames are upright and all of one size, since SAMFeat's keypoints have neither scale nor angle. Images with fewer
    keypoints than others are filled up with zero frames, which ``kornia.feature.laf_is_filled`` tells apart and
    ``LocalFeatureMatcher`` drops; drop them before other matchers. kornia's matchers compare by distance: give an
    extractor with ``weighted_descriptors=False``, whose descriptors have unit length.

    Args:
        extractor: the student.
        scale: scale of every frame, in pixels.
    """

    def __init__(self, extractor: SAMFeat, *, scale: float = 1.0) -> None:
        super().__init__()
        self.extractor = extractor
        self.scale = scale

    @torch.no_grad()
    def forward(
        self, image: Float[Tensor, "b c h w"], mask: Float[Tensor, "b 1 h w"] | None = None
    ) -> tuple[Float[Tensor, "b k 2 3"], Float[Tensor, "b k"], Float[Tensor, "b k d"]]:
        """Features of the images, best first.

        Args:
            image: float [B, 3, H, W] (RGB) or [B, 1, H, W] (grey), in [0, 1].
            mask: [B, 1, H, W]; keypoints where it is 0 are left out, after the extractor has chosen its best.

        Returns:
            As kornia's local features do, float32 and on the device of the network: frames [B, K, 2, 3], whose centres
            are (x, y) in pixels, (0, 0) the centre of the top-left one; responses [B, K], the scores in [0, 1]; and
            descriptors [B, K, D], attention-weighted unless the extractor has ``weighted_descriptors=False``. K is the
            largest number of keypoints in any image.

        Raises:
            ValueError: not images as above, or a mask of another size.
        """
        if image.ndim != 4 or image.shape[1] not in (1, 3):
            raise ValueError(f"images must be [B, 1, H, W] or [B, 3, H, W], got {list(image.shape)}")
        if mask is not None and mask.shape != (len(image), 1, *image.shape[2:]):
            raise ValueError(f"the mask of images {list(image.shape)} must be [B, 1, H, W], got {list(mask.shape)}")
        frames, responses, descriptors = [], [], []
        for number, features in enumerate(self.extractor.extract(list(image))):
            keypoints = features["keypoints"]
            kept = torch.ones(len(keypoints), dtype=torch.bool, device=keypoints.device)
            if mask is not None:
                x, y = keypoints.round().long().unbind(1)
                kept = mask[number, 0].to(keypoints.device)[y, x] > 0
            shapes = (self.scale * torch.eye(2, device=keypoints.device)).expand(int(kept.sum()), 2, 2)
            frames.append(torch.cat((shapes, keypoints[kept, :, None]), dim=2))
            responses.append(features["scores"][kept])
            descriptors.append(features["descriptors"][kept])
        padded = (pad_sequence(parts, batch_first=True) for parts in (frames, responses, descriptors))
        return cast(tuple[Tensor, Tensor, Tensor], tuple(padded))
