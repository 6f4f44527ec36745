"""Images to features: one interface for every method, and files that other tools read.

Features are a dictionary of numpy arrays: ``keypoints`` float32 [K, 2], (x, y), (0, 0) being the centre of the top-left
pixel; ``scores`` float32 [K], best first; ``descriptors`` float32 [K, D], compared by their dot product; ``image_size``
int64 [2], (width, height). No keypoint at all is a normal result.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import h5py
import numpy as np

from samfeat.pipelines.files import write_bytes, write_json
from samfeat.teacher_cache.images import IMAGE_SUFFIXES, read_image

PEERS = ("aliked", "disk", "xfeat")
METHODS = ("samfeat", "sift", "orb", *PEERS)
FEATURE_FILES = (".h5", ".hdf5")
FORMATS = ("hloc", "d2net")
OPENCV_KEYPOINTS = 10_000

Features = dict[str, np.ndarray]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Method:
    """A feature extractor: uint8 [H, W, 3] in RGB to features.

    Attributes:
        name: short name, part of file names.
        config: JSON values that identify the method and all that its features depend on.
        extract: the function itself.
    """

    name: str
    config: Mapping[str, Any]
    extract: Callable[[np.ndarray], Features]

    def __call__(self, image: np.ndarray) -> Features:
        """Features of uint8 [H, W, 3]."""
        return self.extract(image)


class Extraction(NamedTuple):
    """What became of the images of a run.

    Attributes:
        written: names whose features were computed.
        skipped: names whose features were there already.
        failed: reason by name, for images that could not be read.
    """

    written: list[str]
    skipped: list[str]
    failed: dict[str, str]


def load_method(
    name: str,
    *,
    weights: str | Path | None = None,
    max_keypoints: int | None = None,
    device: str = "auto",
    **options: Any,
) -> Method:
    """A method by its name.

    Args:
        name: ``samfeat``, ``sift`` (unit L2 descriptors, not RootSIFT) or ``orb`` (bits as +-1/16, so that the dot
            product orders like the Hamming distance).
        weights: weights file of ``samfeat``; the other methods have none.
        max_keypoints: the best so many keypoints are kept. None leaves it to the weights file; 10,000 for the others.
        device: where networks run: ``cpu``, ``cuda``, or ``auto``, which takes a GPU where there is one.
        **options: extraction options of ``samfeat`` that differ from those in the weights file
            (:class:`samfeat.student.extractor.ExtractionConfig`).

    Raises:
        ValueError: unknown name, weights or options missing, superfluous or damaged, or no keypoint allowed.
        FileNotFoundError: the weights do not exist.
    """
    if name not in METHODS and not name.endswith(FEATURE_FILES):
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}, or a .h5 file of features")
    if max_keypoints is not None and max_keypoints < 1:
        raise ValueError(f"max_keypoints must be at least 1, got {max_keypoints}")
    if name in PEERS or name.endswith(FEATURE_FILES):
        from samfeat.pipelines.peers import load_peer

        return load_peer(name, weights, max_keypoints=max_keypoints, device=device)
    if name == "samfeat":
        if weights is None:
            raise ValueError("method samfeat needs trained weights: give the .safetensors file that training wrote")
        if max_keypoints is not None:
            options["max_keypoints"] = max_keypoints
        return _samfeat(Path(weights), device, options)
    if options:
        raise ValueError(f"method {name} has no options, got {', '.join(options)}: leave them out, or choose samfeat")
    if weights is not None:
        raise ValueError(f"method {name} takes no weights, got {weights}: leave them out, or choose samfeat")
    return _opencv(name, max_keypoints or OPENCV_KEYPOINTS)


def _samfeat(weights: Path, device: str, options: Mapping[str, Any]) -> Method:
    import torch

    from samfeat.student.extractor import SAMFeat

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: no GPU is usable here, choose cpu or auto")
    extractor = SAMFeat.from_pretrained(weights, **options).to(device)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    config = {"method": "samfeat", "weights_sha256": digest, **asdict(extractor.extraction)}

    def extract(image: np.ndarray) -> Features:
        return {key: values.cpu().numpy() for key, values in extractor.extract(image).items()}

    return Method("samfeat", config, extract)


def _opencv(name: str, max_keypoints: int) -> Method:
    detector: cv2.Feature2D
    if name == "sift":
        detector = cv2.SIFT.create(nfeatures=max_keypoints, enable_precise_upscale=True)
    else:
        detector = cv2.ORB.create(nfeatures=max_keypoints)

    def extract(image: np.ndarray) -> Features:
        found, codes = detector.detectAndCompute(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), None)
        if codes is None:
            codes = np.zeros((0, detector.descriptorSize()), np.uint8)
        descriptors = _unit_length(codes) if name == "sift" else _unit_bits(codes)
        return _from_opencv(found, descriptors, image, max_keypoints)

    return Method(name, {"method": name, "max_keypoints": max_keypoints, "opencv": cv2.__version__}, extract)


def _unit_length(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def _unit_bits(codes: np.ndarray) -> np.ndarray:
    """Bits as +-1 / sqrt(bits): the dot product of two is 1 - 2 / bits times their Hamming distance."""
    bits = np.unpackbits(codes, axis=1).astype(np.float32)
    return (2 * bits - 1) / np.sqrt(np.float32(bits.shape[1]))


def _from_opencv(
    found: Sequence[cv2.KeyPoint], descriptors: np.ndarray, image: np.ndarray, max_keypoints: int
) -> Features:
    scores = np.array([keypoint.response for keypoint in found], np.float32)
    best = np.argsort(-scores, kind="stable")[:max_keypoints]
    points = np.array([keypoint.pt for keypoint in found], np.float32).reshape(-1, 2)
    return {
        "keypoints": points[best],
        "scores": scores[best],
        "descriptors": descriptors[best],
        "image_size": np.array(image.shape[1::-1], np.int64),
    }


def extract_folder(
    images: str | Path,
    output: str | Path,
    *,
    method: Method,
    format: Literal["hloc", "d2net"] = "hloc",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Extraction:
    """Features of every image of a folder, or of a list, in a file format of other tools.

    A second run computes what is missing. Images that cannot be read are reported, not fatal.

    Args:
        images: a folder, searched through, or a text file with one path a line, relative to the list.
        output: for ``hloc`` one HDF5 file (see :func:`write_features`); for ``d2net`` a folder, where every image gets
            ``<image>.<method>``, an npz file with ``keypoints`` [K, 2], ``scores`` [K], ``descriptors`` [K, D].
        method: what computes the features.
        format: ``hloc`` or ``d2net``.
        overwrite: start anew where the output holds features.
        progress: called with (done, total) after every image.

    Raises:
        FileNotFoundError: no such folder, list, or listed image.
        ValueError: no image, unknown format, or the output was made with another configuration of the method.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: choose one of {', '.join(FORMATS)}")
    paths = list_images(Path(images))
    if format == "hloc":
        return extract_images(paths, output, method=method, overwrite=overwrite, progress=progress)
    return _extract_d2net(paths, Path(output), method, overwrite, progress)


def list_images(images: Path) -> dict[str, Path]:
    """Paths by name (relative, with forward slashes) of a folder's images, or of a list's, in order."""
    if images.is_dir():
        found = sorted(path for path in images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        if not found:
            raise ValueError(f"{images} holds no image: put {', '.join(sorted(IMAGE_SUFFIXES))} files there")
        return {path.relative_to(images).as_posix(): path for path in found}
    if not images.exists():
        raise FileNotFoundError(f"{images} does not exist: give a folder of images, or a text file that lists them")
    try:
        names = [line.strip() for line in images.read_text().splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"{images} is not a text file: give a folder, or a list with one image a line") from None
    if not names:
        raise ValueError(f"{images} lists no image: write one path a line")
    missing = [name for name in names if not (images.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{images} lists {len(missing)} image(s) that {images.parent} does not hold, the first is {missing[0]!r}"
        )
    return {name: images.parent / name for name in names}


def extract_images(
    paths: Mapping[str, Path],
    output: str | Path,
    *,
    method: Method,
    overwrite: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> Extraction:
    """Features of images into one HDF5 file of hloc's layout, in the order of ``paths``; complete ones are kept.

    Args:
        paths: image by name.
        output: the HDF5 file.
        method: what computes the features. Its configuration is written into the file, and must agree on a second run.
        overwrite: start anew.
        verify: read the images of complete features too, and refuse features of an image that has changed since.
        progress: called with (done, total) after every image.

    Raises:
        ValueError: the file was made with another configuration, or (``verify``) from other images.
        OSError: the file is damaged.
    """
    output = Path(output)
    if overwrite:
        output.unlink(missing_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with _open(output, "a") as file:
        check_config(json.loads(file.attrs.get("config", "null")), method.config, output)
        file.attrs["config"] = json.dumps(dict(method.config))
        file.pop(_PARTIAL, None)
        digests = {name: file[name].attrs.get("sha256") for name in paths if name in file}
    if verify:
        for name, digest in digests.items():
            if hashlib.sha256(paths[name].read_bytes()).hexdigest() != digest:
                raise ValueError(f"{paths[name]} has changed since {output} was written: overwrite the stored features")
    written: list[str] = []
    failed: dict[str, str] = {}
    missing = {name: path for name, path in paths.items() if name not in digests}
    for name, data, features in _computed(missing, method, failed, progress):
        with _open(output, "a") as file:
            write_features(file, name, features)
            file[name].attrs["sha256"] = hashlib.sha256(data).hexdigest()
        written.append(name)
    return Extraction(written, list(digests), failed)


_PARTIAL = ".partial"


def write_features(file: h5py.File, name: str, features: Features) -> None:
    """Adds a group that hloc reads: keypoints [K, 2], scores [K], descriptors [D, K] (transposed), image_size [2].

    The group appears under its name once it is complete. ``keypoints`` carries hloc's attribute ``uncertainty``, the
    localisation error in pixels (1).
    """
    file.pop(_PARTIAL, None)
    group = file.create_group(_PARTIAL)
    for key, values in features.items():
        group.create_dataset(key, data=values.T if key == "descriptors" else values)
    group["keypoints"].attrs["uncertainty"] = 1.0
    file.flush()
    file.move(_PARTIAL, name)


def read_features(file: h5py.File, name: str) -> Features:
    """Features of one image of a file of hloc's layout, descriptors [K, D] again.

    Raises:
        KeyError: the file has no such image.
    """
    features = {key: dataset[()] for key, dataset in file[name].items()}
    features["descriptors"] = np.ascontiguousarray(features["descriptors"].T)
    return features


def _extract_d2net(
    paths: Mapping[str, Path], output: Path, method: Method, overwrite: bool, progress: Progress | None
) -> Extraction:
    record = output / f"{method.name}.json"
    if not overwrite and record.exists():
        check_config(json.loads(record.read_text()), method.config, record)
    write_json(record, dict(method.config))
    targets = {name: output / f"{name}.{method.name}" for name in paths}
    written: list[str] = []
    failed: dict[str, str] = {}
    missing = {name: path for name, path in paths.items() if overwrite or not targets[name].exists()}
    for name, _, features in _computed(missing, method, failed, progress):
        buffer = io.BytesIO()
        keypoints, scores, descriptors = (features[key] for key in ("keypoints", "scores", "descriptors"))
        np.savez(buffer, keypoints=keypoints, scores=scores, descriptors=descriptors)
        write_bytes(targets[name], buffer.getvalue())
        written.append(name)
    return Extraction(written, [name for name in paths if name not in missing], failed)


def _computed(
    paths: Mapping[str, Path], method: Method, failed: dict[str, str], progress: Progress | None
) -> Iterator[tuple[str, bytes, Features]]:
    """Name, file and features of every readable image; the others go to ``failed``."""
    for done, (name, path) in enumerate(paths.items(), start=1):
        try:
            data = path.read_bytes()
            image = read_image(data, name=str(path))
        except (ValueError, OSError) as error:
            failed[name] = str(error)
        else:
            yield name, data, method(image)
        if progress:
            progress(done, len(paths))


def _open(path: Path, mode: str) -> h5py.File:
    try:
        return h5py.File(path, mode)
    except OSError as error:
        raise OSError(f"{path} cannot be opened as HDF5 ({error}): another program holds it, or delete it") from None


def check_config(stored: Mapping[str, Any] | None, config: Mapping[str, Any], where: Path) -> None:
    """Refuses to continue features of another configuration; None = nothing stored yet."""
    wanted = json.loads(json.dumps(dict(config)))
    if stored is None or stored == wanted:
        return
    changes = ", ".join(
        f"{key} {stored.get(key)!r} there, {wanted.get(key)!r} here"
        for key in sorted(stored.keys() | wanted.keys())
        if stored.get(key) != wanted.get(key)
    )
    raise ValueError(f"{where} holds features of another configuration ({changes}): choose another file, or overwrite")
