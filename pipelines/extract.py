"""Images to features: one interface for every method, and folders of images in files that other tools read.

What features are, :mod:`samfeat.pipelines.formats` says.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np

from samfeat.pipelines.files import write_bytes, write_json
from samfeat.pipelines.formats import Features, d2net_bytes, write_features
from samfeat.pipelines.parts import Parts, check_config, open_hdf5
from samfeat.teacher_cache.images import IMAGE_SUFFIXES, read_image

METHODS = ("samfeat", "sift", "orb")
FORMATS = ("hloc", "d2net")
OPENCV_KEYPOINTS = 10_000

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
    multiscale: bool | None = None,
    device: str = "auto",
) -> Method:
    """A method by its name.

    Args:
        name: ``samfeat``, ``sift`` (unit L2 descriptors, not RootSIFT) or ``orb`` (bits as +-1/16, so that the dot
            product orders like the Hamming distance).
        weights: weights file of ``samfeat``; the other methods have none.
        max_keypoints: the best so many keypoints are kept. None leaves it to the weights file; 10,000 for the others.
        multiscale: whether ``samfeat`` searches a pyramid of scales too; None leaves it to the weights file. OpenCV's
            methods always have a pyramid of their own.
        device: where ``samfeat`` runs: ``cpu``, ``cuda``, or ``auto``, which takes a GPU where there is one.

    Raises:
        ValueError: unknown name, weights missing, superfluous or damaged, or no keypoint allowed.
        FileNotFoundError: the weights do not exist.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    if max_keypoints is not None and max_keypoints < 1:
        raise ValueError(f"max_keypoints must be at least 1, got {max_keypoints}")
    if name == "samfeat":
        if weights is None:
            raise ValueError("method samfeat needs trained weights: give the .safetensors file that training wrote")
        return _samfeat(Path(weights), max_keypoints, multiscale, device)
    if multiscale is not None:
        raise ValueError(f"method {name} has its own pyramid of scales: leave multiscale out, or choose samfeat")
    if weights is not None:
        raise ValueError(f"method {name} takes no weights, got {weights}: leave them out, or choose samfeat")
    return _opencv(name, max_keypoints or OPENCV_KEYPOINTS)


def shrunk(method: Method, max_size: int) -> Method:
    """The same method on images of at most ``max_size`` pixels on their longer side, with keypoints at full size.

    Larger images are resized by area, as hloc's ``resize_max`` does; points are mapped back by pixel centres.

    Raises:
        ValueError: no pixel allowed.
    """
    if max_size < 1:
        raise ValueError(f"max_size must be at least 1, got {max_size}")

    def extract(image: np.ndarray) -> Features:
        full = np.array(image.shape[1::-1], np.int64)
        factor = max_size / full.max()
        if factor >= 1:
            return method(image)
        size = np.maximum(1, np.round(full * factor)).astype(int)
        features = method(cv2.resize(image, size.tolist(), interpolation=cv2.INTER_AREA))
        scale = (full / size).astype(np.float32)
        keypoints = ((features["keypoints"] + 0.5) * scale - 0.5).astype(np.float32)
        uncertainty = np.array(scale.mean() * features.get("uncertainty", 1), np.float32)
        return features | {"keypoints": keypoints, "image_size": full, "uncertainty": uncertainty}

    return Method(method.name, {**method.config, "max_size": max_size}, extract)


def _samfeat(weights: Path, max_keypoints: int | None, multiscale: bool | None, device: str) -> Method:
    import torch

    from samfeat.student.extractor import SAMFeat

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: no GPU is usable here, choose cpu or auto")
    options = {"max_keypoints": max_keypoints, "multiscale": multiscale}
    overrides = {key: value for key, value in options.items() if value is not None}
    extractor = SAMFeat.from_pretrained(weights, **overrides).to(device)
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
    threads: int = 1,
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
        threads: images that are read and decoded at a time, ahead of the method.
        progress: called with (done, total) after every image.

    Raises:
        FileNotFoundError: no such folder, list, or listed image.
        ValueError: no image, unknown format, or the output was made with another configuration of the method.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: choose one of {', '.join(FORMATS)}")
    paths = list_images(Path(images))
    if format == "hloc":
        return extract_images(paths, output, method=method, overwrite=overwrite, threads=threads, progress=progress)
    return _extract_d2net(paths, Path(output), method, overwrite, threads, progress)


def list_images(images: Path) -> dict[str, Path]:
    """Paths by name (relative, with forward slashes) of a folder's images, or of a list's, in order.

    Raises:
        FileNotFoundError: no such folder, list, or listed image.
        ValueError: no image, or a list that is no text or names something outside its own folder.
    """
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
    outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise ValueError(f"{images} lists {outside[0]!r}: put the list into the images' folder, and paths below it")
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
    threads: int = 1,
    progress: Progress | None = None,
) -> Extraction:
    """Features of images into one HDF5 file of hloc's layout; complete ones are kept.

    The file appears, or grows, when the last image is done. Until then the features are in a folder beside it (see
    :mod:`samfeat.pipelines.parts`), where a run that was killed goes on.

    Args:
        paths: image by name.
        output: the HDF5 file.
        method: what computes the features. Its configuration is written into the file, and must agree on a second run.
        overwrite: start anew.
        verify: read the images of complete features too, and refuse features of an image that has changed since.
        threads: images that are read and decoded at a time, ahead of the method.
        progress: called with (done, total) after every image.

    Raises:
        ValueError: the file was made with another configuration, or (``verify``) from other images.
        OSError: the file is damaged.
    """
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    digests: dict[str, str] = {}
    if overwrite:
        output.unlink(missing_ok=True)
        Parts.discard(output)
    if output.exists():
        with open_hdf5(output) as file:
            check_config(json.loads(file.attrs.get("config", "null")), method.config, output)
            digests = {name: file[name].attrs.get("sha256") for name in paths if name in file}
    parts = Parts(output, method.config)
    kept = [name for name in paths if name not in digests and name in parts]
    if verify:
        digests_of_all = digests | {name: str(parts[name]["sha256"]) for name in kept}
        for name, digest in digests_of_all.items():
            if hashlib.sha256(paths[name].read_bytes()).hexdigest() != digest:
                raise ValueError(f"{paths[name]} has changed since {output} was written: overwrite the stored features")
    written: list[str] = []
    failed: dict[str, str] = {}
    missing = {name: path for name, path in paths.items() if name not in digests and name not in kept}
    for name, digest, features in _computed(missing, method, failed, threads, progress):
        parts.add(name, {**features, "sha256": np.array(digest)})
        written.append(name)
    if written or kept or not output.exists():
        with parts.packed() as file:
            file.attrs["config"] = json.dumps(dict(method.config))
            for name in paths:
                if name in parts and name not in file:
                    features = parts[name]
                    digest = str(features.pop("sha256"))
                    write_features(file, name, features)
                    file[name].attrs["sha256"] = digest
    else:
        parts.remove()
    return Extraction(written, [name for name in paths if name in digests or name in kept], failed)


def _extract_d2net(
    paths: Mapping[str, Path],
    output: Path,
    method: Method,
    overwrite: bool,
    threads: int,
    progress: Progress | None,
) -> Extraction:
    record = output / f"{method.name}.json"
    if not overwrite and record.exists():
        check_config(json.loads(record.read_text()), method.config, record)
    write_json(record, dict(method.config))
    targets = {name: output / f"{name}.{method.name}" for name in paths}
    written: list[str] = []
    failed: dict[str, str] = {}
    missing = {name: path for name, path in paths.items() if overwrite or not targets[name].exists()}
    for name, _, features in _computed(missing, method, failed, threads, progress):
        write_bytes(targets[name], d2net_bytes(features))
        written.append(name)
    return Extraction(written, [name for name in paths if name not in missing], failed)


def _computed(
    paths: Mapping[str, Path], method: Method, failed: dict[str, str], threads: int, progress: Progress | None
) -> Iterator[tuple[str, str, Features]]:
    """Name, SHA-256 of the file and features of every readable image; the others go to ``failed``."""
    for done, (name, image) in enumerate(_read_ahead(paths, threads), start=1):
        try:
            digest, pixels = image.result()
        except (ValueError, OSError) as error:
            failed[name] = str(error)
        else:
            yield name, digest, method(pixels)
        if progress:
            progress(done, len(paths))


def _read_ahead(paths: Mapping[str, Path], threads: int) -> Iterator[tuple[str, Future[tuple[str, np.ndarray]]]]:
    """Images in order, of which ``threads`` are read while another one is in use."""
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
    try:
        rest = iter(paths.items())
        ahead = deque((name, pool.submit(_read, path)) for name, path in islice(rest, threads))
        while ahead:
            first = ahead.popleft()
            ahead.extend((name, pool.submit(_read, path)) for name, path in islice(rest, 1))
            yield first
    finally:
        pool.shutdown(cancel_futures=True)


def _read(path: Path) -> tuple[str, np.ndarray]:
    """SHA-256 of a file, and its pixels."""
    data = path.read_bytes()
    return hashlib.sha256(data).hexdigest(), read_image(data, name=os.fspath(path))
