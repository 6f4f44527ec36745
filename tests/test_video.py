"""`samfeat-cli live` on a video whose motion is known: a window that moves over a photograph."""

import csv
import os
import resource
import signal
import subprocess
import sys
import time
import weakref

import cv2
import numpy as np
import pytest
from skimage import data

from samfeat import cli
from samfeat.pipelines import video
from samfeat.pipelines.features.methods import load_method
from samfeat.pipelines.video import match_video, open_video

STEP = np.array([3.0, 2.0])  # pixels that the window moves from frame to frame; points move the other way
FRAMES, RATE, SIZE = 12, 20.0, (240, 320)


def frame(number):
    """uint8 [240, 320, 3] in RGB."""
    left, top = 60 + int(STEP[0]) * number, 40 + int(STEP[1]) * number
    return data.astronaut()[top : top + SIZE[0], left : left + SIZE[1]]


def write_video(path, numbers, codec):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), RATE, SIZE[::-1])
    for number in numbers:
        writer.write(np.ascontiguousarray(frame(number)[..., ::-1]))
    writer.release()
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", range(FRAMES), "mp4v")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frames")
    for number in range(FRAMES):
        cv2.imwrite(str(folder / f"{number}.png"), frame(number)[..., ::-1])  # 10.png sorts before 2.png as text
    return folder


@pytest.fixture(scope="module")
def orb():
    return load_method("orb", max_keypoints=300)


def rows_of(path):
    """Frames, seconds, tracks and points [N, 2] in the two images."""
    with open(path) as file:
        rows = list(csv.DictReader(file))
    columns = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    points0, points1 = (np.column_stack([columns[f"x{k}"], columns[f"y{k}"]]) for k in (0, 1))
    return columns["frame"].astype(int), columns["seconds"], columns["track"].astype(int), points0, points1


@pytest.mark.parametrize("name", ["samfeat", "sift"])
def test_tracks_follow_the_motion(clip, tmp_path, name):
    method = load_method(name, max_keypoints=300)
    found = match_video(str(clip), method=method, verify="homography", tracks=tmp_path / "t.csv")
    frames, seconds, tracks, points0, points1 = rows_of(tmp_path / "t.csv")
    assert found.frames == FRAMES
    assert sorted(set(frames)) == list(range(1, FRAMES))
    assert seconds == pytest.approx(frames / RATE, abs=2e-3)
    assert found.tracks == len(set(tracks))
    assert found.matches == pytest.approx(len(frames) / (FRAMES - 1))
    errors, long = [], 0
    for track in set(tracks):
        rows = np.flatnonzero(tracks == track)
        assert (np.diff(frames[rows]) == 1).all()
        assert points0[rows[1:]] == pytest.approx(points1[rows[:-1]])
        errors.append(points1[rows] - points0[rows[0]] + STEP * (frames[rows] - frames[rows[0]] + 1)[:, None])
        long += len(rows) == FRAMES - 1
    distances = np.linalg.norm(np.concatenate(errors), axis=1)
    assert np.median(distances) < 0.5
    assert np.percentile(distances, 95) < 1.5
    assert long >= 30


@pytest.mark.parametrize("reference", ["first", "photograph"])
def test_matches_with_a_reference(clip, folder, tmp_path, orb, reference):
    path = str(folder / "3.png")
    match_video(
        str(clip),
        method=orb,
        reference=path if reference == "photograph" else "first",
        verify="homography",
        tracks=tmp_path / "t.csv",
    )
    frames, _, tracks, points0, points1 = rows_of(tmp_path / "t.csv")
    start = 3 if reference == "photograph" else 0
    assert set(frames) == set(range(FRAMES)) - ({0} if reference == "first" else set())
    distances = np.linalg.norm(points1 - points0 + STEP * (frames - start)[:, None], axis=1)
    assert np.percentile(distances, 90) < 2
    for track in set(tracks):
        assert len(np.unique(points0[tracks == track], axis=0)) == 1


def test_frames_of_a_folder_come_in_the_order_of_their_numbers(folder):
    read = open_video(str(folder))
    frames = list(read.frames)
    assert (read.total, read.camera, len(frames)) == (FRAMES, False, FRAMES)
    for number, found in enumerate(frames):
        assert found.image == pytest.approx(frame(number))


@pytest.mark.parametrize("reference", ["previous", "first"])
def test_the_recording_is_what_was_drawn(clip, tmp_path, orb, monkeypatch, reference):
    drawn = []
    fitted = video._fitted
    monkeypatch.setattr(video, "_fitted", lambda *given: drawn.append(fitted(*given)) or drawn[-1])
    match_video(str(clip), method=orb, reference=reference, record=tmp_path / "new" / "r.mp4")
    capture = cv2.VideoCapture(str(tmp_path / "new" / "r.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == RATE
    for picture in drawn:
        seen = capture.read()[1][..., ::-1]
        assert np.abs(seen.astype(int) - picture).mean() < 12  # MPEG-4 loses some
    assert len(drawn) == FRAMES
    assert capture.read()[0] is False
    assert drawn[5].shape[1] == (SIZE[1] if reference == "previous" else 2 * SIZE[1] + 8)


def test_frames_of_another_size_are_fitted_into_the_recording(tmp_path, orb):
    for number, size in enumerate([(120, 160), (240, 320), (90, 161)]):
        cv2.imwrite(str(tmp_path / f"{number}.png"), cv2.resize(frame(0), size[::-1]))
    match_video(str(tmp_path), method=orb, record=tmp_path / "r.mp4", overwrite=True)
    assert cv2.VideoCapture(str(tmp_path / "r.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 3


def test_few_frames_are_in_memory_at_a_time(clip, orb, tmp_path, monkeypatch):
    alive, most = weakref.WeakSet(), []

    class Tracked(np.ndarray):
        pass

    convert = cv2.cvtColor

    def tracked(picture, code):
        image = convert(picture, code).view(Tracked)
        alive.add(_Holder(image))
        most.append(len(alive))
        return image

    class _Holder:
        def __init__(self, image):
            image.holder = self  # lives as long as the image

    monkeypatch.setattr(video.cv2, "cvtColor", lambda picture, code: tracked(picture, code))
    match_video(str(clip), method=orb, record=tmp_path / "r.mp4", tracks=tmp_path / "t.csv")
    assert len(most) >= FRAMES
    assert max(most) <= 3


def test_frames_without_keypoints_are_a_normal_result(tmp_path, orb):
    for number in range(3):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.zeros((*SIZE, 3), np.uint8))
    found = match_video(str(tmp_path), method=orb, record=tmp_path / "r.mp4", tracks=tmp_path / "t.csv")
    assert (found.frames, found.matches, found.tracks) == (3, 0, 0)
    assert (tmp_path / "t.csv").read_text() == f"{video.COLUMNS}\n"


def test_a_damaged_video_is_used_as_far_as_it_goes(tmp_path, orb, caplog):
    whole = write_video(tmp_path / "clip.avi", range(FRAMES), "MJPG").read_bytes()
    (tmp_path / "half.avi").write_bytes(whole[: len(whole) // 2])
    found = match_video(str(tmp_path / "half.avi"), method=orb)
    assert 2 < found.frames < FRAMES - 2
    assert f"half.avi ends after {found.frames} of the {FRAMES} frames announced" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_it_wrote(tmp_path, number):
    clip = write_video(tmp_path / "clip.mp4", [k % 40 for k in range(400)], "mp4v")
    words = ["live", str(clip), "--no-window", "--method", "orb", "--record", "r.mp4", "--tracks", "t.csv"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from samfeat.cli import main; main()", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    listing, deadline = tmp_path / "t.csv", time.monotonic() + 60
    while not (listing.exists() and listing.stat().st_size > 10_000) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    frames, *_ = rows_of(listing)
    done = frames.max() + 1
    assert 1 < done < 400
    assert err == f"interrupted: {done} of 400 frames are done, and what was written of them is kept\n"
    assert listing.read_text().endswith("\n")
    recording = cv2.VideoCapture(str(tmp_path / "r.mp4"))
    assert sum(recording.read()[0] for _ in range(400)) == done


class Camera:
    """Stands in for OpenCV's reader of camera 7: ten frames a second, and Ctrl-C at the sixth."""

    def __init__(self, source):
        assert source == 7
        self.number = 0

    def isOpened(self):
        return True

    def set(self, key, value):
        return False

    def get(self, key):
        return 30.0 if key == cv2.CAP_PROP_FPS else -1.0

    def read(self):
        time.sleep(0.1)
        self.number += 1
        if self.number == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return True, np.ascontiguousarray(frame(self.number)[..., ::-1])

    def release(self):
        pass


def test_the_recording_of_a_camera_keeps_its_pace(tmp_path, orb, monkeypatch):
    real = cv2.VideoCapture
    monkeypatch.setattr(video.cv2, "VideoCapture", lambda source: Camera(source) if source == 7 else real(source))
    totals = []
    found = match_video(
        "7",
        method=orb,
        record=tmp_path / "r.mp4",
        tracks=tmp_path / "t.csv",
        progress=lambda done, total: totals.append((done, total)),
    )
    assert totals == [(k, None) for k in range(1, 7)]
    assert (found.frames, found.interrupted, found.total) == (6, True, None)
    last = rows_of(tmp_path / "t.csv")[1].max()
    assert last >= 0.6
    assert real(str(tmp_path / "r.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == round(30 * last) + 1


def test_a_full_disk_is_reported(tmp_path, clip, orb):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="of 12 frames could be written: is the disk full"):
            match_video(str(clip), method=orb, record=tmp_path / "r.mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def screen(monkeypatch):
    """A screen without pixels: what was shown, and the keys that are pressed next (-1 for none)."""
    shown, keys, closed = [], [], []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(video.cv2, "namedWindow", lambda title, flags: None)
    monkeypatch.setattr(video.cv2, "imshow", lambda title, picture: shown.append(picture.shape))
    monkeypatch.setattr(video.cv2, "waitKey", lambda wait: keys.pop(0) if keys else -1)
    monkeypatch.setattr(video.cv2, "getWindowProperty", lambda title, key: 0.0 if len(shown) == 9 else 1.0)
    monkeypatch.setattr(video.cv2, "destroyAllWindows", lambda: closed.append(True))
    return shown, keys, closed


def test_keys_choose_a_reference_and_quit(clip, orb, screen):
    shown, keys, closed = screen
    keys[:] = [-1, ord("r"), -1, ord("p"), -1, ord("q")]
    found = match_video(str(clip), method=orb, window=True)
    single, double = SIZE[1], 2 * SIZE[1] + 8
    assert [shape[1] for shape in shown] == [single, single, double, double, single, single]
    assert (found.frames, found.interrupted, closed) == (6, False, [True])


def test_closing_the_window_ends(clip, orb, screen):
    assert match_video(str(clip), method=orb, window=True).frames == 9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.mp4"], "nowhere.mp4: no such file or folder; a camera is given by its number, such as 0"),
        (["notes.txt"], "notes.txt is not a video that OpenCV reads"),
        (["empty"], "empty holds no photograph"),
        (["999"], "camera 999 cannot be opened"),
        (["clip.mp4", "--reference", "last"], "last: no such file or folder"),
        (["clip.mp4", "--reference", "notes.txt"], "notes.txt is not an image"),
        (["clip.mp4", "--record", "r.avi"], "r.avi: choose a name that ends in .mp4"),
        (["clip.mp4", "--tracks", "t.txt"], "t.txt: choose a name that ends in .csv"),
        (["clip.mp4", "--record", "clip.mp4", "--overwrite"], "clip.mp4 is an input"),
        (["clip.mp4", "--tracks", "there.csv"], "there.csv exists"),
        (["clip.mp4", "--ratio", "2"], "ratio must lie in (0, 1]"),
        (["clip.mp4", "--method", "surf"], "unknown method 'surf'"),
    ],
)
def test_bad_input_is_one_line(clip, tmp_path, monkeypatch, capfd, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "notes.txt").write_text("no video\n" * 100)
    (tmp_path / "there.csv").write_text("")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["samfeat-cli", "live", "--no-window", "--method", "orb", *words])
    with pytest.raises(SystemExit) as stop:
        cli.app(prog_name="samfeat-cli")
    assert stop.value.code == 2
    err = capfd.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_no_screen_is_one_line(clip, monkeypatch, orb):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(ValueError, match="--no-window"):
        match_video(str(clip), method=orb, window=True)
