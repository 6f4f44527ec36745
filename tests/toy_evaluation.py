"""An evaluation from outside the package, as CONTRIBUTING shows it."""

from dataclasses import dataclass

from samfeat.pipelines.evaluation.protocol import Evaluation, Results, predict
from samfeat.pipelines.extract import list_images
from samfeat.pipelines.pictures.tables import Column, Table


@dataclass(frozen=True, kw_only=True)
class KeypointCount(Results):
    keypoints: dict[str, int]


@dataclass(frozen=True)
class CountKeypoints(Evaluation):
    results = KeypointCount

    def run(self, job):
        images = list_images(job.data)
        shared = job.start({"images": list(images)})
        features = predict(job, images)
        return KeypointCount(**shared, keypoints={name: len(features(name)["keypoints"]) for name in images})

    def table(self, found):
        rows = [[results.name, sum(results.keypoints.values())] for results in found]
        return Table([Column("method"), Column("keypoints", "in all images", "d", "highest")], rows)
