"""Extract features of whole folders of images into files for other tools, resumably and atomically."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import h5py
import numpy as np

from samfeat.files import check_outputs, read_json, read_lines, write_bytes, write_json
from samfeat.images import IMAGE_SUFFIXES, read_image, read_reduced
from samfeat.images import list_images as find_images
from samfeat.pipelines.errors import is_out_of_memory
from samfeat.pipelines.features.formats import Features, d2net_bytes, write_features
from samfeat.pipelines.features.parts import Parts, check_config, open_hdf5, read_config
from samfeat.pipelines.features.protocol import Method

_log = logging.getLogger(__name__)

FORMATS = ("hloc", "d2net")
NOT_UTF8 = "its name is not UTF-8, which HDF5 and text files need: rename it"

Progress = Callable[[int, int], None]


class Extraction(NamedTuple):
    """The outcome for each image of a run.

    Attributes:
        written: names whose features were computed.
        skipped: names whose features already existed.
        failed: reason by name, for images that could not be read.
    """

    written: list[str]
    skipped: list[str]
    failed: dict[str, str]


def extract_folder(
    images: str | Path,
    output: str | Path,
    *,
    method: Method,
    format: Literal["hloc", "d2net"] = "hloc",
    max_size: int | None = None,
    overwrite: bool = False,
    threads: int = 1,
    progress: Progress | None = None,
) -> Extraction:
    """Extract features of every image in a folder or list into another tool's file format.

    A second run computes what is missing. Unusable images (unreadable, too large for memory, or with a name that is not
    UTF-8) are reported but not fatal.

    Args:
        images: a folder, searched recursively, or a text file with one path per line, relative to the list.
        output: for ``hloc`` one HDF5 file (see :func:`write_features`); for ``d2net`` a folder, where every image gets
            ``<image>.<method>``, an npz file with ``keypoints`` [K, 2], ``scores`` [K], ``descriptors`` [K, D].
        method: what computes the features.
        format: ``hloc`` or ``d2net``.
        max_size: longer side that the method shrinks images to (see :func:`samfeat.pipelines.features.methods.shrunk`);
            photographs above the pixel limit are then decoded at a fraction of their size.
        overwrite: replace existing features in the output.
        threads: images read and decoded at once, ahead of the method.
        progress: called with (done, total) after every image.

    Raises:
        FileNotFoundError: no such folder, list, or listed image.
        ValueError: no image, unknown format, an output that is one of the images, or that was made with a different
            configuration of the method.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: choose one of {', '.join(FORMATS)}")
    paths = list_images(Path(images))
    unnamed = {name: NOT_UTF8 for name in paths if not _is_utf8(name)}
    paths = {name: path for name, path in paths.items() if name not in unnamed}
    if format == "hloc":
        made = extract_images(
            paths,
            output,
            method=method,
            max_size=max_size,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )
    else:
        made = _extract_d2net(paths, Path(output), method, max_size, overwrite, threads, progress)
    return made._replace(failed=unnamed | made.failed)


def list_images(images: Path) -> dict[str, Path]:
    """Paths by name (relative, with forward slashes) of a folder's images, or of a list's, in order.

    Raises:
        FileNotFoundError: no such folder, list, or listed image.
        ValueError: no image, or a list that is not text or names something outside its own folder.
    """
    if images.is_dir():
        found = find_images(images)
        for line in found.left_out:
            _log.warning("%s: %s", images, line)
        if not (found.images or found.unnamed):
            raise ValueError(f"{images} holds no image: put {', '.join(sorted(IMAGE_SUFFIXES))} files there")
        return {name: images / name for name in sorted(found.images + found.unnamed)}
    if not images.exists():
        raise FileNotFoundError(f"{images} does not exist: give a folder of images, or a text file that lists them")
    names = list(dict.fromkeys(line for _, line in read_lines(images)))
    if not names:
        raise ValueError(f"{images} lists no image: write one path per line")
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
    max_size: int | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> Extraction:
    """Write features of images to one HDF5 file in hloc's layout; complete ones are kept.

    The file appears, or grows, when the last image is done. Until then the features are in a folder next to it (see
    :mod:`samfeat.pipelines.features.parts`), from which a killed run resumes.

    Args:
        paths: image by name.
        output: the HDF5 file.
        method: what computes the features. Its configuration is written into the file, and must agree on a second run.
        overwrite: replace existing features.
        verify: also read the images of complete features, and refuse features of an image that has changed since.
        max_size: see :func:`extract_folder`.
        threads: images read and decoded at once, ahead of the method.
        progress: called with (done, total) after every image.

    Raises:
        ValueError: the file is one of the images, was made with another configuration, or (``verify``) from other
            images.
        OSError: the file is damaged.
    """
    output = Path(output)
    check_outputs([output], paths.values())
    output.parent.mkdir(parents=True, exist_ok=True)
    digests: dict[str, str | None] = {}
    if overwrite:
        output.unlink(missing_ok=True)
        Parts.discard(output)
    if output.exists():
        with open_hdf5(output) as file:
            check_config(read_config(file), method.config, output)
            digests = {name: _stored_digest(file, name) for name in paths if name in file}
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
    for name, digest, features in _computed(missing, method, max_size, failed, threads, progress):
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
    max_size: int | None,
    overwrite: bool,
    threads: int,
    progress: Progress | None,
) -> Extraction:
    record = output / f"{method.name}.json"
    if not overwrite and record.exists():
        check_config(read_json(record), method.config, record)
    write_json(record, dict(method.config))
    targets = {name: output / f"{name}.{method.name}" for name in paths}
    check_outputs([record, *targets.values()], paths.values())
    written: list[str] = []
    failed: dict[str, str] = {}
    missing = {name: path for name, path in paths.items() if overwrite or not targets[name].exists()}
    for name, _, features in _computed(missing, method, max_size, failed, threads, progress):
        write_bytes(targets[name], d2net_bytes(features))
        written.append(name)
    return Extraction(written, [name for name in paths if name not in missing], failed)


def _computed(
    paths: Mapping[str, Path],
    method: Method,
    max_size: int | None,
    failed: dict[str, str],
    threads: int,
    progress: Progress | None,
) -> Iterator[tuple[str, str, Features]]:
    """Yield name, SHA-256 of the file and features of every usable image; add the others to ``failed``."""
    for done, (name, image) in enumerate(_read_ahead(paths, max_size, threads), start=1):
        try:
            digest, pixels, size = image.result()
            features = _at_size(method(pixels), pixels.shape[:2], size)
        except (ValueError, OSError) as error:
            failed[name] = str(error)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed[name] = "not enough memory for an image of this size: give a smaller --max-size"
        else:
            yield name, digest, features
        if progress:
            progress(done, len(paths))


def _at_size(features: Features, read: tuple[int, ...], size: tuple[int, int]) -> Features:
    """Rescale features of an image read at another size to full-size pixels; sizes are (height, width)."""
    if tuple(read) == size:
        return features
    scale = np.array([size[1] / read[1], size[0] / read[0]], np.float32)
    return features | {
        "keypoints": ((features["keypoints"] + 0.5) * scale - 0.5).astype(np.float32),
        "image_size": np.array([size[1], size[0]], np.int64),
        "uncertainty": np.array(scale.mean() * features.get("uncertainty", 1), np.float32),
    }


def _read_ahead(
    paths: Mapping[str, Path], max_size: int | None, threads: int
) -> Iterator[tuple[str, Future[tuple[str, np.ndarray, tuple[int, int]]]]]:
    """Yield images in order, reading ``threads`` ahead."""
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
    try:
        rest = iter(paths.items())
        ahead = deque((name, pool.submit(_read, path, max_size)) for name, path in islice(rest, threads))
        while ahead:
            first = ahead.popleft()
            ahead.extend((name, pool.submit(_read, path, max_size)) for name, path in islice(rest, 1))
            yield first
    finally:
        pool.shutdown(cancel_futures=True)


def _read(path: Path, max_size: int | None) -> tuple[str, np.ndarray, tuple[int, int]]:
    """SHA-256 of a file, its pixels, and the (height, width) of the whole image."""
    data, name = path.read_bytes(), os.fspath(path)
    if max_size is None:
        pixels = read_image(data, name=name)
        size = pixels.shape[0], pixels.shape[1]
    else:
        pixels, size = read_reduced(data, max_size, name=name)
    return hashlib.sha256(data).hexdigest(), pixels, size


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _stored_digest(file: h5py.File, name: str) -> str | None:
    digest = file[name].attrs.get("sha256")
    return digest if isinstance(digest, str) else None
