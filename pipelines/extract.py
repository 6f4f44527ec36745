"""Features of whole folders of images, in files that other tools read: resumable, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from samfeat.pipelines.features.formats import Features, d2net_bytes, write_features
from samfeat.pipelines.features.methods import Method
from samfeat.pipelines.features.parts import Parts, check_config, open_hdf5
from samfeat.pipelines.files import write_bytes, write_json
from samfeat.teacher_cache.images import IMAGE_SUFFIXES, read_image

FORMATS = ("hloc", "d2net")

Progress = Callable[[int, int], None]


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
    :mod:`samfeat.pipelines.features.parts`), where a run that was killed goes on.

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
