"""Match the frames of a video as they come, and follow points from frame to frame.

One frame and the one it is matched with are in memory at a time, however long the video is.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import cv2
import numpy as np

from samfeat.files import check_outputs
from samfeat.images import list_images, read_image
from samfeat.pipelines.features.formats import Features
from samfeat.pipelines.features.protocol import Method
from samfeat.pipelines.interruption import Interruption
from samfeat.pipelines.match import Estimator, Verification, VerifiedMatches, check_verification, verified_matches
from samfeat.pipelines.pictures.draw import PAPER, captioned, draw_tracks, draw_verified

logger = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]

DEFAULT_RATE = 25.0  # frames per second of a folder, and of a camera or a file that does not tell
HIGHEST_RATE = 240.0  # what a file claims beyond that is not its frame rate
TAIL = 16  # positions of a track that are drawn
SMOOTHING = 0.1  # weight of the latest frame in the frame rate shown
QUIT = (ord("q"), 27)  # or Esc
NO_POINTS = np.zeros((0, 2), np.float32)
NOTHING = VerifiedMatches(np.zeros((0, 2), np.int64), NO_POINTS, NO_POINTS, None, None)
COLUMNS = "frame,seconds,track,x0,y0,x1,y1"


class VideoFrame(NamedTuple):
    """A frame of a video.

    Attributes:
        seconds: time since the first frame.
        image: uint8 [H, W, 3] in RGB.
    """

    seconds: float
    image: np.ndarray


@dataclass(frozen=True)
class Video:
    """A source of frames.

    Attributes:
        name: short name.
        rate: frames per second.
        total: number of frames, as far as known; None for a camera.
        camera: whether the frames come in real time and never end.
        frames: the frames, read one by one; closing it closes the source.
    """

    name: str
    rate: float
    total: int | None
    camera: bool
    frames: Generator[VideoFrame]


class VideoSummary(NamedTuple):
    """The result of :func:`match_video`.

    Attributes:
        frames: number of frames.
        seconds: time it took.
        matches: mean number of matches of two frames that agree with the model (of all, without verification).
        tracks: number of points followed.
        total: number of frames of the source; None if unknown.
        interrupted: whether Ctrl-C or SIGTERM ended it.
    """

    frames: int
    seconds: float
    matches: float
    tracks: int
    total: int | None
    interrupted: bool


def open_video(source: str) -> Video:
    """Open a camera, a video file, or a folder of frames.

    Args:
        source: the number of a camera; the path of a file that OpenCV reads; or that of a folder, whose photographs are
            the frames, in the order of their names with numbers compared by value (``2.png`` before ``10.png``).

    Raises:
        FileNotFoundError: there is no such file or folder.
        OSError: there is no such camera.
        ValueError: the file is not a video, or the folder holds no photograph.
    """
    path = Path(source)
    if source.isdecimal():
        capture = _capture(int(source))
        if not capture.isOpened():
            raise OSError(f"camera {source} cannot be opened: connect it, or give a video file or a folder of frames")
        capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the latest frame, not one of a queue
        return Video(f"camera {source}", _rate(capture), None, True, _of_camera(capture, source))
    if path.is_dir():
        names = sorted(list_images(path).images, key=_natural)
        if not names:
            raise ValueError(
                f"{source} holds no photograph: give a folder of frames, a video file or a camera's number"
            )
        return Video(path.resolve().name, DEFAULT_RATE, len(names), False, _photographs(path, names))
    if not path.exists():
        raise FileNotFoundError(f"{source}: no such file or folder; a camera is given by its number, such as 0")
    capture = _capture(str(path.resolve()))
    if not capture.isOpened() or path.suffix.lower() == ".txt":  # which FFmpeg would draw as ANSI art
        raise ValueError(f"{source} is not a video that OpenCV reads: convert it to MP4, or give a folder of frames")
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    total = count if count > 0 else None
    return Video(path.name, _rate(capture), total, False, _of_file(capture, path.name, total))


def match_video(
    source: str,
    *,
    method: Method,
    reference: str = "previous",
    verify: Verification = "fundamental",
    estimator: Estimator = "magsac",
    ratio: float | None = None,
    record: str | Path | None = None,
    tracks: str | Path | None = None,
    window: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> VideoSummary:
    """Match every frame with the previous one or with a reference, and show, record or list the result.

    Keys in the window: q or Esc ends, r takes the current frame as the reference, p goes back to the previous frame.
    Ctrl-C and SIGTERM end it after the current frame, and what was written is complete up to there.

    Args:
        source: see :func:`open_video`.
        method: what computes the features.
        reference: ``previous``; ``first``, the first frame; or the path of a photograph.
        verify: see :func:`samfeat.pipelines.match.match_images`. Tracks follow the matches that agree with the model.
        estimator: see :func:`samfeat.pipelines.match.estimate`.
        ratio: see :func:`samfeat.pipelines.match.match_images`.
        record: an ``.mp4`` file (MPEG-4) of what the window shows. The recording of a camera keeps its pace, so that
            frames repeat where matching is slower.
        tracks: CSV file with a line for every match, written frame by frame: ``frame`` (from 0), ``seconds``, ``track``
            (the same for one point in all frames), ``x0, y0`` in the previous frame or the reference and ``x1, y1`` in
            this frame, in pixels, (0, 0) being the centre of the top-left one.
        window: show the result in a window.
        overwrite: replace existing outputs.
        progress: called with (frames done, frames in all, None if unknown).

    Raises:
        ValueError: an unknown verification, a source or a reference that cannot be used, an output that exists, is an
            input or has the wrong suffix, a codec that OpenCV lacks, or no screen for the window.
        OSError: a file cannot be read or written.
    """
    check_verification(verify)
    photograph = None if reference in ("previous", "first") else reference
    check_outputs([record, tracks], [None if source.isdecimal() else source, photograph])
    for path, suffix in ((record, ".mp4"), (tracks, ".csv")):
        if path is not None and Path(path).suffix.lower() != suffix:
            raise ValueError(f"{path}: choose a name that ends in {suffix}")
        if path is not None and Path(path).exists() and not overwrite:
            raise ValueError(f"{path} exists: choose another name, or overwrite")
    if window:
        _check_screen()
    against = None if photograph is None else _side(read_image(Path(photograph)), method)
    video = open_video(source)
    keeps = reference != "previous"  # the side that frames are matched with
    done, pairs, matched, known, rate, begun = 0, 0, 0, 0, 0.0, time.monotonic()
    with ExitStack() as outputs:
        outputs.callback(video.frames.close)
        listing = outputs.enter_context(_TrackFile(Path(tracks))) if tracks else None
        recording = outputs.enter_context(_Recording(Path(record), video)) if record else None
        screen = outputs.enter_context(_Window(f"samfeat: {video.name}")) if window else None
        interruption = outputs.enter_context(Interruption())
        since = time.monotonic()
        for frame in video.frames:
            side = _side(frame.image, method)
            found = NOTHING
            if against:
                found = verified_matches(
                    against.features, side.features, verify=verify, estimator=estimator, ratio=ratio
                )
                kept = found.matches if found.inliers is None else found.matches[found.inliers]
                known = _follow(against, side, kept, known)
                pairs, matched = pairs + 1, matched + len(kept)
                if listing:
                    listing.add(done, frame.seconds, against, side, kept)
            done += 1
            now = time.monotonic()
            latest, since = 1 / max(now - since, 1e-6), now
            rate = latest if done <= 2 else (1 - SMOOTHING) * rate + SMOOTHING * latest
            key = -1
            if recording or screen:
                picture = _picture(f"frame {done}, {rate:.1f} FPS", (against or side) if keeps else None, side, found)
                if recording:
                    recording.add(picture, frame.seconds)
                if screen:
                    key = screen.show(picture)
            if progress:
                progress(done, video.total)
            if key in QUIT or interruption.asked:
                break
            keeps = True if key == ord("r") else False if key == ord("p") else keeps
            if against is None or not keeps or key == ord("r"):
                against = side
    if not done:
        raise ValueError(f"{source} holds no frame that can be read: convert it to MP4, or give a folder of frames")
    return VideoSummary(
        done,
        time.monotonic() - begun,
        matched / max(1, pairs),
        known,
        video.total,
        interruption.asked and done != video.total,
    )


@dataclass
class _Side:
    """One image of a match.

    Attributes:
        image: uint8 [H, W, 3].
        features: those of the image.
        tracks: int64 [K], the track of every keypoint, -1 for none.
        tails: float32 [K, TAIL, 2], the last positions of the tracks, latest first, NaN before they began.
    """

    image: np.ndarray
    features: Features
    tracks: np.ndarray
    tails: np.ndarray


def _side(image: np.ndarray, method: Method) -> _Side:
    features = method(image)
    count = len(features["keypoints"])
    tails = np.full((count, TAIL, 2), np.nan, np.float32)
    tails[:, 0] = features["keypoints"]
    return _Side(image, features, np.full(count, -1, np.int64), tails)


def _follow(against: _Side, side: _Side, matches: np.ndarray, known: int) -> int:
    """Continue the tracks of one side in the other; returns the number of tracks, ``known`` ones and new ones."""
    before, now = matches[:, 0], matches[:, 1]
    new = before[against.tracks[before] < 0]
    against.tracks[new] = np.arange(known, known + len(new))
    side.tracks[now] = against.tracks[before]
    side.tails[now, 1:] = against.tails[before, :-1]
    return known + len(new)


def _picture(title: str, reference: _Side | None, side: _Side, found: VerifiedMatches) -> np.ndarray:
    """What is shown and recorded: matches with the reference, or the tracks of the last frames."""
    agree = "" if found.inliers is None else f"{found.inliers.sum()} of "
    title += f", {agree}{len(found.matches)} matches"
    if reference is None:
        return captioned(draw_tracks(side.image, side.tails[side.tracks >= 0]), title)
    drawn, legend = draw_verified(reference.image, side.image, found.points0, found.points1, found.inliers)
    return captioned(drawn, title, legend)


class _TrackFile:
    """A CSV file of matches, on disk after every frame."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w")
        self.file.write(f"{COLUMNS}\n")

    def add(self, frame: int, seconds: float, against: _Side, side: _Side, matches: np.ndarray) -> None:
        """List the matches of a frame."""
        before, now = matches[:, 0], matches[:, 1]
        points = np.hstack([against.features["keypoints"][before], side.features["keypoints"][now]])
        self.file.writelines(
            f"{frame},{seconds:.3f},{track},{x0:.3f},{y0:.3f},{x1:.3f},{y1:.3f}\n"
            for track, (x0, y0, x1, y1) in zip(side.tracks[now].tolist(), points.tolist(), strict=True)
        )
        self.file.flush()

    def __enter__(self) -> _TrackFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.file.close()


class _Recording:
    """An MP4 file of pictures; those of another size than the first are fitted into it."""

    def __init__(self, path: Path, video: Video) -> None:
        self.path, self.rate, self.paced = path, round(video.rate, 3), video.camera
        self.written, self.size = 0, (0, 0)
        self.writer: Any = None
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, picture: np.ndarray, seconds: float) -> None:
        """Append a picture; of a camera as often as its time asks for."""
        if self.writer is None:
            self.size = picture.shape[1] // 2 * 2, picture.shape[0] // 2 * 2  # MPEG-4 has no odd sizes
            self.writer = cv2.VideoWriter(str(self.path), cv2.VideoWriter.fourcc(*"mp4v"), self.rate, self.size)
            if not self.writer.isOpened():
                raise OSError(f"{self.path}: OpenCV cannot write MPEG-4 there: choose another folder")
        fitted = np.ascontiguousarray(_fitted(picture, self.size)[..., ::-1])
        copies = max(round(seconds * self.rate) + 1 - self.written, 0) if self.paced else 1
        for _ in range(copies):
            self.writer.write(fitted)
        self.written += copies

    def __enter__(self) -> _Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.writer is None:
            return
        self.writer.release()
        readable = cv2.VideoCapture(str(self.path))
        count = int(readable.get(cv2.CAP_PROP_FRAME_COUNT))
        readable.release()
        if error is None and count < self.written:  # OpenCV does not tell
            raise OSError(f"{self.path}: only {count} of {self.written} frames could be written: is the disk full?")


def _fitted(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture in (width, height) of ``size``: shrunk if it is larger, white around it if it is smaller."""
    height, width = picture.shape[:2]
    scale = min(1.0, size[0] / width, size[1] / height)
    if scale < 1 and (width - size[0] > 1 or height - size[1] > 1):
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    sheet = np.full((size[1], size[0], 3), PAPER, np.uint8)
    picture = picture[: size[1], : size[0]]
    sheet[: len(picture), : picture.shape[1]] = picture
    return sheet


class _Window:
    """A window on the screen."""

    def __init__(self, title: str) -> None:
        self.title = title
        try:
            cv2.namedWindow(title, cv2.WINDOW_NORMAL)
        except cv2.error:
            raise ValueError("this OpenCV cannot open windows: add --no-window, or install opencv-python") from None

    def show(self, picture: np.ndarray) -> int:
        """Show a picture; returns the key pressed, -1 for none, and that of quitting if the window was closed."""
        cv2.imshow(self.title, picture[..., ::-1])
        key = cv2.waitKey(1)
        closed = cv2.getWindowProperty(self.title, cv2.WND_PROP_VISIBLE) < 1
        return QUIT[0] if closed else key

    def __enter__(self) -> _Window:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        cv2.destroyAllWindows()


def _check_screen() -> None:
    """Raise ValueError where a window would end the process: Qt aborts without a screen."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise ValueError("there is no screen for the window (DISPLAY is not set): add --no-window")


def _capture(source: int | str) -> cv2.VideoCapture:
    """OpenCV's reader, without the messages that it and FFmpeg print by themselves."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    before = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        return cv2.VideoCapture(source)
    finally:
        cv2.utils.logging.setLogLevel(before)


def _rate(capture: cv2.VideoCapture) -> float:
    rate = capture.get(cv2.CAP_PROP_FPS)
    return rate if 0 < rate <= HIGHEST_RATE else DEFAULT_RATE


def _of_camera(capture: cv2.VideoCapture, number: str) -> Generator[VideoFrame]:
    start = time.monotonic()
    try:
        while (picture := capture.read()[1]) is not None:
            yield VideoFrame(time.monotonic() - start, cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
    finally:
        capture.release()
    logger.warning(f"camera {number} gives no more frames")


def _of_file(capture: cv2.VideoCapture, name: str, total: int | None) -> Generator[VideoFrame]:
    """Frames of a video file that announces ``total`` of them."""
    number = 0
    try:
        while (picture := capture.read()[1]) is not None:
            yield VideoFrame(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000, cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
            number += 1
    finally:
        capture.release()
    if total is not None and total - number > max(2, 0.02 * total):  # what a file announces may be an estimate
        logger.warning(f"{name} ends after {number} of the {total} frames announced: it may be damaged or truncated")


def _photographs(folder: Path, names: list[str]) -> Generator[VideoFrame]:
    for number, name in enumerate(names):
        yield VideoFrame(number / DEFAULT_RATE, read_image(folder / name))


def _natural(name: str) -> list[tuple[int, int | str]]:
    """A sorting key by which numbers in names are compared by value."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name)]
