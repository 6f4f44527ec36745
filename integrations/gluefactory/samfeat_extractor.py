"""SAMFeat as an extractor of glue-factory (github.com/cvg/glue-factory); see README.md beside this file."""

from typing import Any, ClassVar

import torch
from gluefactory.models.base_model import BaseModel
from gluefactory.models.utils.misc import pad_and_stack

from samfeat import SAMFeat


class SAMFeatExtractor(BaseModel):
    """glue-factory's interface: RGB or grey images [B, 3 or 1, H, W] in [0, 1] to keypoints, scores and descriptors.

    Keypoints are those of glue-factory and COLMAP, with (0, 0) at the corner of the image, and descriptors have unit
    length. Padding of the images, beyond ``image_size``, is not looked at.

    ``weights`` is anything that ``SAMFeat.from_pretrained`` takes. With ``force_num_keypoints``, which batches need,
    images with fewer than ``max_num_keypoints`` are filled up with random points whose scores and descriptors are 0.
    """

    default_conf: ClassVar[dict[str, Any]] = {
        "weights": "samfeat",
        "max_num_keypoints": 2048,
        "detection_threshold": 0.0,
        "force_num_keypoints": False,
        "trainable": False,
    }
    required_data_keys: ClassVar[list[str]] = ["image"]

    def _init(self, conf):
        if conf.trainable:
            raise ValueError("SAMFeat is trained by samfeat-cli train: leave trainable at false")
        self.extractor = SAMFeat.from_pretrained(
            conf.weights,
            max_keypoints=conf.max_num_keypoints,
            detection_threshold=conf.detection_threshold,
            weighted_descriptors=False,
        )
        self.set_initialized()

    def _forward(self, data):
        images = data["image"]
        sizes = data.get("image_size", torch.tensor(images.shape[:1:-1]).expand(len(images), 2)).int().tolist()
        found = [self.extractor.extract(image[:, :height, :width]) for image, (width, height) in zip(images, sizes)]
        keypoints = [features["keypoints"] + 0.5 for features in found]
        scores = [features["scores"] for features in found]
        descriptors = [features["descriptors"] for features in found]
        count = self.conf.max_num_keypoints if self.conf.force_num_keypoints else None
        bounds = 0, min(map(min, sizes))  # for images without any keypoint
        return {
            "keypoints": pad_and_stack(keypoints, count, -2, mode="random_c", bounds=bounds),
            "keypoint_scores": pad_and_stack(scores, count, -1),
            "descriptors": pad_and_stack(descriptors, count, -2),
        }

    def loss(self, pred, data):
        """None: the extractor is not trained here."""
        raise NotImplementedError
