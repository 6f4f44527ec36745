"""SAMFeat as an extractor of hloc (github.com/cvg/Hierarchical-Localization); see README.md beside this file."""

from typing import Any, ClassVar

from hloc.utils.base_model import BaseModel

from samfeat import SAMFeat


class SAMFeatExtractor(BaseModel):
    """hloc's interface: RGB images [1, 3, H, W] in [0, 1] to lists of keypoints, scores and descriptors.

    ``weights`` is anything that ``SAMFeat.from_pretrained`` takes; ``max_keypoints`` and ``detection_threshold``
    override what the weights file says, unless they are None.
    """

    default_conf: ClassVar[dict[str, Any]] = {"weights": "samfeat", "max_keypoints": None, "detection_threshold": None}
    required_inputs: ClassVar[list[str]] = ["image"]

    def _init(self, conf):
        options = {key: conf[key] for key in ("max_keypoints", "detection_threshold") if conf[key] is not None}
        self.extractor = SAMFeat.from_pretrained(conf["weights"], **options)

    def _forward(self, data):
        found = [self.extractor.extract(image) for image in data["image"]]
        return {
            "keypoints": [features["keypoints"] for features in found],
            "keypoint_scores": [features["scores"] for features in found],
            "descriptors": [features["descriptors"].t() for features in found],
        }
