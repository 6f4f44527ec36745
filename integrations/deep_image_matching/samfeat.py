"""SAMFeat as an extractor of deep-image-matching; see README.md beside this file."""

from typing import Any, ClassVar

from deep_image_matching.config import confs, opt_zoo
from deep_image_matching.extractors import ExtractorBase

from samfeat import SAMFeat

opt_zoo["extractors"].append("samfeat")
confs["samfeat+kornia_matcher"] = {
    "extractor": {"name": "samfeat"},
    "matcher": {"name": "kornia_matcher", "match_mode": "mnn"},
}


class SAMFeatExtractor(ExtractorBase):
    """deep-image-matching's interface: RGB [H, W, 3] or grey [H, W], uint8, to arrays of keypoints and descriptors.

    ``weights`` is anything that ``SAMFeat.from_pretrained`` takes; ``max_keypoints`` and ``detection_threshold``
    override what the weights file says, unless they are None. Descriptors have unit length, because
    deep-image-matching's matchers compare them by Euclidean distance.
    """

    _default_conf: ClassVar[dict[str, Any]] = {"weights": "samfeat", "max_keypoints": None, "detection_threshold": None}
    grayscale = False
    as_float = False
    features_as_half = False  # half floats are up to half a pixel off beyond x = 1024

    def __init__(self, config):
        super().__init__(config)
        conf = self.config["extractor"]
        options = {key: conf[key] for key in ("max_keypoints", "detection_threshold") if conf[key] is not None}
        extractor = SAMFeat.from_pretrained(conf["weights"], weighted_descriptors=False, **options)
        self.extractor = extractor.to(self._device)

    def _extract(self, image):
        found = {name: values.cpu().numpy() for name, values in self.extractor.extract(image).items()}
        return {"keypoints": found["keypoints"], "scores": found["scores"], "descriptors": found["descriptors"].T}

    def _frame2tensor(self, image, device="cpu"):
        """Required by the base class; SAMFeat takes arrays."""
        raise NotImplementedError
