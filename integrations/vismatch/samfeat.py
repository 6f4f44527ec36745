"""SAMFeat as a matcher of vismatch (github.com/gmberton/vismatch); see README.md beside this file."""

from vismatch import BaseMatcher

from samfeat import SAMFeat, match


class SAMFeatMatcher(BaseMatcher):
    """vismatch's interface: two RGB images to keypoints, descriptors and mutual nearest neighbours.

    ``weights`` is anything that ``SAMFeat.from_pretrained`` takes; ``kwargs`` are those of ``BaseMatcher``.
    """

    def __init__(self, device="cpu", max_num_keypoints=2048, *, weights="samfeat", **kwargs):
        super().__init__(device, **kwargs)
        self.extractor = SAMFeat.from_pretrained(weights, max_keypoints=max_num_keypoints).to(device)

    def _forward(self, img0, img1):
        """Images float [3, H, W] in [0, 1], and values up to 0.2 beyond, which resizing may leave.

        Returns keypoints in (x, y) pixels of the images given, (0, 0) the centre of the top-left pixel, and as
        confidence of a match the dot product of its descriptors.
        """
        features0, features1 = (self.extractor.extract(image.clamp(0, 1)) for image in (img0, img1))
        found = match(features0, features1)
        index0, index1 = found["matches"].T
        keypoints0, keypoints1 = features0["keypoints"], features1["keypoints"]
        descriptors0, descriptors1 = features0["descriptors"], features1["descriptors"]
        matched = keypoints0[index0], keypoints1[index1]
        return *matched, keypoints0, keypoints1, descriptors0, descriptors1, found["scores"]
