"""Data sets for localisation: database images with poses, queries, and the pairs to match."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap

from samfeat.pipelines.evaluation.camera_poses import CAMERA_FILES, Pose, PosedCamera, read_cameras
from samfeat.pipelines.evaluation.sfm import camera_pose, digest, pinhole

AACHEN_THRESHOLDS = ((0.25, 2.0), (0.5, 5.0), (5.0, 10.0))  # metres, degrees: fine, medium and coarse
FRACTIONS = (0.0005, 0.001, 0.01)  # of the extent of a scene, instead of Aachen's metres
COVISIBLE = 20  # database images matched with each
MOST_EXHAUSTIVE = 200  # above this number of images, a list of pairs must be given
AACHEN_MODEL = Path("3D-models") / "aachen_v_1_1"


@dataclass(frozen=True)
class PosedScene:
    """A scene for localisation.

    Attributes:
        name: name of the scene.
        folder: folder that image names are relative to.
        database: camera and pose by image name.
        queries: camera by image name.
        map_pairs: database images to match with each other.
        query_pairs: (query, database image) to match.
        truth: true cameras of the queries; None if they are not public.
        thresholds: (distance, degrees) within which a query counts as localised: fine, medium, coarse; distances in the
            units of the poses.
        poses_file: name of the file of poses; ``{name}`` stands for the method.
    """

    name: str
    folder: Path
    database: dict[str, tuple[pycolmap.Camera, Pose]]
    queries: dict[str, pycolmap.Camera]
    map_pairs: list[tuple[str, str]]
    query_pairs: list[tuple[str, str]]
    truth: dict[str, PosedCamera] | None
    thresholds: Sequence[tuple[float, float]]
    poses_file: str = "poses.txt"

    @property
    def names(self) -> list[str]:
        """Database images and queries."""
        return [*self.database, *self.queries]

    def subsets(self) -> dict[str, list[str]]:
        """Queries by subset: ``all``, and ``day`` and ``night`` by the folders of Aachen."""
        subsets = {"all": list(self.queries)}
        for light in ("day", "night"):
            chosen = [query for query in self.queries if f"/{light}/" in f"/{query}"]
            if chosen:
                subsets[light] = chosen
        return subsets

    def identity(self) -> dict[str, Any]:
        """JSON values that identify this scene, its split and its pairs."""
        database = {
            name: [_calibration(camera), *(p.tolist() for p in pose)] for name, (camera, pose) in self.database.items()
        }
        return {
            "database": len(self.database),
            "queries": len(self.queries),
            "cameras_sha256": digest([database, {name: _calibration(c) for name, c in self.queries.items()}]),
            "pairs_sha256": digest([self.map_pairs, self.query_pairs]),
            "thresholds": [list(pair) for pair in self.thresholds],
        }


def _calibration(camera: pycolmap.Camera) -> list[Any]:
    return [camera.model.name, camera.width, camera.height, *camera.params.tolist()]


def find_posed_scenes(folder: str | Path) -> list[PosedScene]:
    """The scenes of a folder: Aachen Day-Night v1.1, a scene with true cameras, or a folder of such scenes.

    Aachen is recognised by ``3D-models/aachen_v_1_1``, see :func:`read_aachen`, true cameras by ``cameras*.json``, see
    :func:`split_scene`.

    Raises:
        FileNotFoundError: no such folder, or a part is missing.
        ValueError: it holds none of these.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give Aachen's, or one of photographs with cameras.json")
    if (folder / AACHEN_MODEL).is_dir():
        return [read_aachen(folder)]
    candidates = [folder] if any(folder.glob(CAMERA_FILES)) else sorted(folder.iterdir())
    found = [path for path in candidates if path.is_dir() and any(path.glob(CAMERA_FILES))]
    if not found:
        raise ValueError(
            f"{folder} holds neither Aachen v1.1 (3D-models/aachen_v_1_1) nor a scene with true cameras (cameras.json)"
        )
    return [split_scene(path) for path in found]


def split_scene(folder: str | Path) -> PosedScene:
    """A scene with true cameras; every third image (the 2nd, 5th, ... by name) is a query.

    All images are matched with all database images. The thresholds are Aachen's with ``FRACTIONS`` of the extent, the
    largest distance between two database cameras, in place of 0.25, 0.5 and 5 metres.

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: fewer than five cameras.
    """
    folder = Path(folder)
    images = folder / "images" if (folder / "images").is_dir() else folder
    cameras = dict(sorted((read_cameras(folder) or {}).items()))
    if len(cameras) < 5:
        raise ValueError(f"{folder} has {len(cameras)} cameras: at least 5 are needed for a database and queries")
    missing = [name for name in cameras if not (images / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{images} lacks {missing[0]}, whose camera is given: add it, or remove its camera")
    queries = {name: cameras[name] for name in list(cameras)[1::3]}
    database = {name: camera for name, camera in cameras.items() if name not in queries}
    centres = np.array([camera.pose.centre for camera in database.values()])
    extent = float(np.linalg.norm(centres[:, None] - centres, axis=2).max())
    return PosedScene(
        folder.resolve().name,
        images,
        {name: (pinhole(camera), camera.pose) for name, camera in database.items()},
        {name: pinhole(camera) for name, camera in queries.items()},
        list(combinations(database, 2)),
        [(query, name) for query in queries for name in database],
        queries,
        [(share * extent, angle) for share, (_, angle) in zip(FRACTIONS, AACHEN_THRESHOLDS, strict=True)],
    )


def read_aachen(folder: str | Path) -> PosedScene:
    """Aachen Day-Night v1.1, as distributed.

    ``images_upright/`` (or ``images/images_upright/``) with ``db``, ``query`` and ``sequences``;
    ``queries/*_with_intrinsics.txt``; ``3D-models/aachen_v_1_1`` with COLMAP's model, or with ``aachen_v_1_1.nvm`` and
    ``database_intrinsics_v1_1.txt``. Beside them, or in ``pairs``, hloc's ``pairs-query-netvlad50.txt`` (any
    ``pairs-query-*.txt``) and ``pairs-db-covis20.txt`` (any ``pairs-db-*.txt``; without it, every database image is
    matched with the 20 that share the most points with it in COLMAP's model). Queries have no public truth: the file
    ``Aachen_v1_1_eval_[<method>].txt`` goes to visuallocalization.net.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: a list is damaged or names an image that the others do not know.
    """
    folder = Path(folder)
    images = folder / "images_upright"
    if not images.is_dir():
        images = folder / "images" / "images_upright"
    if not images.is_dir():
        raise FileNotFoundError(f"{folder} lacks images_upright: unpack Aachen's database_and_query_images.zip there")
    model = folder / AACHEN_MODEL
    database, covisible = _read_colmap(model) if any(model.glob("images.*")) else _read_nvm(model)
    lists = sorted((folder / "queries").glob("*_with_intrinsics.txt"))
    queries = {name: camera for path in lists for name, camera in _read_intrinsics(path).items()}
    if not queries:
        raise FileNotFoundError(f"{folder / 'queries'} lacks *_with_intrinsics.txt: it comes with the data set")
    map_list, query_list = (_find_pairs(folder, kind) for kind in ("db", "query"))
    if map_list is not None:
        map_pairs = _read_pairs(map_list, database, database)
    elif covisible:
        map_pairs = covisible
    elif len(database) <= MOST_EXHAUSTIVE:
        map_pairs = list(combinations(database, 2))
    else:
        raise FileNotFoundError(f"{folder} lacks pairs-db-covis20.txt: take hloc's, or add COLMAP's model to {model}")
    if query_list is not None:
        query_pairs = _read_pairs(query_list, queries, database)
    elif len(database) <= MOST_EXHAUSTIVE:
        query_pairs = [(query, name) for query in queries for name in database]
    else:
        raise FileNotFoundError(f"{folder} lacks pairs-query-netvlad50.txt: take hloc's pairs/aachen_v1.1")
    missing = next((name for name in [*database, *queries] if not (images / name).is_file()), None)
    if missing:
        raise FileNotFoundError(f"{images} lacks {missing}: unpack all of Aachen's images there")
    poses_file = "Aachen_v1_1_eval_[{name}].txt"
    return PosedScene(
        folder.resolve().name,
        images,
        database,
        queries,
        map_pairs,
        query_pairs,
        None,
        AACHEN_THRESHOLDS,
        poses_file,
    )


def _read_colmap(folder: Path) -> tuple[dict[str, tuple[pycolmap.Camera, Pose]], list[tuple[str, str]]]:
    """Cameras and poses by name, and the pairs of images that share the most points."""
    model = pycolmap.Reconstruction(folder)
    images = sorted((i for i in model.images.values() if i.has_pose), key=lambda image: image.name)
    database = {image.name: (model.cameras[image.camera_id], camera_pose(image)) for image in images}
    pairs: dict[tuple[str, str], None] = {}
    for image in images:
        seen = Counter(
            element.image_id
            for point in image.get_observation_points2D()
            for element in model.points3D[point.point3D_id].track.elements
            if element.image_id != image.image_id
        )
        for other in sorted(seen, key=lambda number: (-seen[number], number))[:COVISIBLE]:
            first, second = sorted((image.name, model.images[other].name))
            pairs[first, second] = None
    return database, list(pairs)


def _read_nvm(folder: Path) -> tuple[dict[str, tuple[pycolmap.Camera, Pose]], list[tuple[str, str]]]:
    """Poses from VisualSFM's model (quaternion and centre), cameras from the list that comes with it; no pairs."""
    models, lists = sorted(folder.glob("*.nvm")), sorted(folder.glob("database_intrinsics*.txt"))
    lists = lists or sorted(folder.parent.glob("database_intrinsics*.txt"))
    if not models or not lists:
        raise FileNotFoundError(
            f"{folder} needs COLMAP's images.bin, or an .nvm model and database_intrinsics_v1_1.txt"
        )
    cameras = _read_intrinsics(lists[-1])
    lines = [line.split() for line in models[-1].read_text().splitlines() if line.strip()]
    try:
        count = int(lines[1][0])
        database = {}
        for name, _, *values in lines[2 : 2 + count]:
            w, x, y, z, *centre = (float(value) for value in values[:7])
            rotation = pycolmap.Rotation3d(np.array([x, y, z, w]) / np.linalg.norm([x, y, z, w])).matrix()
            database[name] = (cameras[name], Pose(rotation, -rotation @ np.array(centre)))
    except (IndexError, ValueError) as error:
        raise ValueError(f"{models[-1]} is not an NVM_V3 model ({error}): copy it again") from None
    except KeyError as error:
        raise ValueError(f"{lists[-1]} lacks the camera of {error}, which {models[-1].name} holds") from None
    return dict(sorted(database.items())), []


def _read_intrinsics(path: Path) -> dict[str, pycolmap.Camera]:
    """Cameras by image name: each line has name, COLMAP camera model, width, height and parameters."""
    cameras = {}
    for line in path.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            try:
                name, model, width, height, *params = line.split()
                cameras[name] = pycolmap.Camera(
                    model=model,
                    width=int(width),
                    height=int(height),
                    params=[float(value) for value in params],
                    has_prior_focal_length=True,
                )
                valid = cameras[name].verify_params()
            except (ValueError, RuntimeError, TypeError):
                valid = False
            if not valid:
                raise ValueError(f"{path} holds {line!r}: write name, camera model, width, height and its parameters")
    return cameras


def _find_pairs(folder: Path, kind: str) -> Path | None:
    found = [*sorted(folder.glob(f"pairs-{kind}-*.txt")), *sorted(folder.glob(f"pairs/pairs-{kind}-*.txt"))]
    if len(found) > 1:
        raise ValueError(f"{folder} holds {' and '.join(path.name for path in found)}: keep one list of {kind} pairs")
    return found[0] if found else None


def _read_pairs(path: Path, first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, str]]:
    """Unordered pairs of names, each once."""
    pairs: dict[tuple[str, str], None] = {}
    for line in path.read_text().splitlines():
        if not line.strip():
            continue
        names = line.split()
        if len(names) != 2 or names[0] not in first or names[1] not in second:
            raise ValueError(f"{path} holds {line!r}: write two names of images that the data set holds")
        if (names[1], names[0]) not in pairs:
            pairs[names[0], names[1]] = None
    return list(pairs)
