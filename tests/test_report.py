"""The page of a run, read back: pictures against their data, tables against configuration and provenance."""

from __future__ import annotations

import json
import re

import cv2
import numpy as np
import pytest
import torch
from page_parts import Cells, jpegs, plots
from skimage import data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from samfeat.pipelines.config import load_config
from samfeat.pipelines.pictures.draw import GREEN, LEAST, RED, YELLOW
from samfeat.pipelines.train import train
from samfeat.pipelines.training.report import RunReport, draw_curves, forget_after, read_metrics, series, tiles
from samfeat.pipelines.training.validation import PairView, Validation
from samfeat.student.network import PRESETS, SAMFeatNetwork
from samfeat.teacher_cache.store import open_stores

ROWS = [
    {"step": 0, "validation/mma@1": 0.1, "validation/mma@3": 0.25, "validation/mma@5": 0.5},
    {"step": 1, "loss/total": 8.0, "loss/edge": 0.5, "learning_rate": 1e-3, "images_per_second": 9.0, "waiting": 0.125},
    {"step": 2, "loss/total": float("nan"), "loss/edge": 0.25, "learning_rate": 5e-4, "images_per_second": 11.0},
    {"step": 2, "left_out": 1},
    {"step": 2, "validation/mma@1": 0.2, "validation/mma@3": 0.75, "validation/mma@5": 0.8},
]
SETTINGS = ["optimiser.steps=2", "optimiser.batch_size=2", "run.log_every=1", "run.precision=fp32"]
SETTINGS += ["run.accelerator=cpu", "run.validation_images=2", "run.validation_pairs=2", "run.max_keypoints=50"]


@pytest.fixture(scope="module")
def stores(toy_cache):
    return open_stores(toy_cache)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def view(left: np.ndarray, *, points: np.ndarray | None = None, errors: np.ndarray | None = None, **maps) -> PairView:
    height, width = left.shape[:2]
    given = {
        "heatmap": np.zeros((height, width), np.float32),
        "attention": np.ones((height // 4, width // 4), np.float32),
        "edges": np.zeros((height // 4, width // 4), np.float32),
        "cached_edges": np.zeros((height, width), np.uint8),
    }
    points = np.zeros((2, 0, 2)) if points is None else points
    errors = np.zeros(0) if errors is None else errors
    return PairView(name="a&b.png", left=left, right=left, points=points, errors=errors, teacher="toy", **given | maps)


def write(folder, stores, views, *overrides: str, writer=None) -> str:
    report = RunReport(folder, stores, load_config("sample", overrides), versions={"torch": "9.9"})
    return report.write(2, 4, views, writer).read_text()


def test_matches_are_coloured_by_their_error_and_maps_by_their_value():
    points = np.array([[[10, 10], [10, 30], [10, 50]], [[10, 10], [12.5, 30], [20, 50]]], np.float64)
    heatmap, edges = np.zeros((64, 64), np.float32), np.zeros((16, 16), np.float32)
    cached = np.zeros((64, 64), np.uint8)
    heatmap[:, 32:], edges[:, 8:], cached[:32] = 1, 0.5, 255
    shown = view(
        np.zeros((64, 64, 3), np.uint8),
        points=points,
        errors=np.linalg.norm(points[0] - points[1], axis=1),  # the homography is the identity: 0, 2.5 and 10 pixels
        heatmap=heatmap,
        edges=edges,
        cached_edges=cached,
    )
    (title, matches), (_, image), (_, heat), _, (student, predicted), (teacher, stored) = tiles(shown)
    assert title == "3 matches, 33% within 1 px, 67% within 3 px, 67% within 5 px; 3 drawn"
    factor = LEAST // 64
    for (x, y), color in zip(points[0], (GREEN, YELLOW, RED)):
        assert tuple(matches[round((y + 0.5) * factor - 0.5), round((x + 0.5) * factor - 0.5)]) == color
    assert image.shape == heat.shape == predicted.shape == stored.shape == (LEAST, LEAST, 3)
    assert heat[5, 5].sum() < 30
    assert heat[5, -5].sum() > 600
    assert (student, teacher) == ("edges, student: 0 to 0.5", "edges, teacher toy: 0 to 1")
    assert predicted[5, -5].tolist() == [255] * 3  # on a scale of its own
    assert not predicted[5, 5].any()
    assert stored[5, 5].tolist() == [255] * 3
    assert not stored[-5].any()


def test_a_few_of_many_matches_are_drawn_the_best_ones_on_top():
    rng = np.random.default_rng(0)
    points = np.repeat(rng.random((1, 1000, 2)) * 60, 2, axis=0)
    points[:, 500:] = points[:, :500]  # every point once right and once wrong
    shown = view(np.zeros((64, 64, 3), np.uint8), points=points, errors=np.repeat([0.0, 100.0], 500))
    title, matches = tiles(shown)[0]
    assert "1000 matches, 50% within 1 px" in title
    assert "150 drawn" in title
    colors = {color: (matches == color).all(axis=-1).sum() for color in (GREEN, RED)}
    assert colors[GREEN] > 0.8 * colors[RED] > 0
    assert (tiles(shown)[0][1] == matches).all()


def test_students_that_find_nothing_or_are_broken_are_drawn(folder, stores):
    none = view(np.zeros((64, 64, 3), np.uint8))
    sick = none._replace(heatmap=none.heatmap * np.nan, attention=none.attention * np.inf)
    page = write(folder, stores, [none, sick])
    assert page.count("0 matches; 0 drawn") == 2
    assert len(jpegs(page)) == 12


def test_an_untrained_student_is_drawn(folder, stores):
    config = load_config("default", SETTINGS)
    validation = Validation(stores, [(0, 0), (0, 5)], config.run, config.data)
    views = validation.run(SAMFeatNetwork(PRESETS["default"], generator=torch.Generator().manual_seed(0)), config).views
    drawn = jpegs(write(folder, stores, views))
    for shown, large in zip(views, drawn[::6]):
        left = cv2.resize(large, (2 * LEAST + 8, LEAST))[:, :LEAST]
        expected = cv2.resize(shown.left, (LEAST, LEAST), interpolation=cv2.INTER_CUBIC)
        assert np.median(np.abs(left.astype(int) - expected)) < 8  # but for the lines


def test_the_page_is_self_contained_and_says_how_the_run_goes(folder, stores):
    page = write(folder, stores, [view(np.zeros((64, 64, 3), np.uint8))])
    assert "http" not in page
    assert not re.search(r"<(script|link|iframe)|url\(|@import", page)
    assert "a&amp;b.png" in page
    assert "Step 2 of 4. MMA@3 0.750 now, 0.250 at step 0, best 0.750 at step 2." in page
    assert "their loss was not finite: 1." in page
    assert list(plots(page)) == [
        "matching accuracy (MMA) on held-out images",
        "loss terms",
        "learning rate",
        "images per second",
        "share of the step spent waiting for data",
    ]  # nothing counted keypoints and matches
    assert all(re.findall(r'<img[^>]* alt="([^"]*)"', page))
    cells = Cells()
    cells.feed(page)
    assert cells.rows[:3] == [
        ["step", "mma@1", "mma@3", "mma@5", "keypoints", "matches"],
        ["0", "0.1", "0.25", "0.5", "-", "-"],
        ["2", "0.2", "0.75", "0.8", "-", "-"],
    ]
    assert [path.name for path in folder.glob("*") if path.name.startswith(".")] == []


def test_the_page_tells_what_differs_from_the_preset_and_where_targets_come_from(folder, stores):
    overrides = ("losses.edge=3", "data.homography.scale=[0.5,1.5]", "losses.wsc_form=released")
    tables = Cells()
    tables.feed(write(folder, stores, [], *overrides))
    start = tables.rows.index(["", "preset", "this run"])
    assert tables.rows[start + 1 : start + 4] == [
        ["data.homography.scale", "[0.8, 1.4]", "[0.5, 1.5]"],
        ["losses.edge", "10.0", "3.0"],
        ["losses.wsc_form", "mean_softplus", "released"],
    ]
    assert tables.rows[start + 4][0].startswith(("labels.", "source.", "teacher."))
    assert ["teacher.name", "toy"] in tables.rows
    assert ["teacher.strength", "1.0"] in tables.rows
    assert ["source.number", "6"] in tables.rows
    assert ["labels.max_keypoints", "40"] in tables.rows
    assert ["", "training", "a.zarr"] in tables.rows
    assert ["torch", "9.9", stores[0].provenance.versions["torch"]] in tables.rows
    assert "Preset sample, unchanged." in write(folder, stores, [])


def test_tensorboard_and_the_page_show_the_same_run(stores, tmp_path):
    folder = train(stores[0].path, tmp_path / "run", load_config("default", SETTINGS)).folder
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    rows = read_metrics(folder / "metrics.jsonl")
    names = {name for row in rows for name in row} - {"step"}
    assert set(events.Tags()["scalars"]) == names
    for name in names:
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        np.testing.assert_allclose(logged, series(rows, name), rtol=1e-6)
    assert events.Tags()["images"] == ["validation/pair 0", "validation/pair 1"]
    for pair in events.Tags()["images"]:
        assert [event.step for event in events.Images(pair)] == [0, 2]
        first, last = (
            cv2.imdecode(np.frombuffer(event.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)[..., ::-1].astype(int)
            for event in events.Images(pair)
        )
        assert first.shape == last.shape == (events.Images(pair)[0].height, events.Images(pair)[0].width, 3)
        assert np.abs(first - last).mean() > 1  # the student has changed
    page = (folder / "report.html").read_text()
    assert "Step 2 of 2." in page
    assert len(jpegs(page)) == 12


def test_photographs_make_a_small_page(folder, stores):
    rng = np.random.default_rng(0)
    photo = data.astronaut()[:400, :400]
    edges = cv2.Canny(photo, 50, 150)
    shown = view(photo, points=rng.random((2, 900, 2)) * 399, errors=10 * rng.random(900), cached_edges=edges)
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        page = write(folder, stores, [shown] * 3, writer=writer)
    assert len(page) < 2e6


def test_metrics_of_a_run_that_was_killed(folder):
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "loss/to')
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 2]
    assert series(rows, "loss/total") == [(1, 8.0)]
    assert series(rows, "loss/edge") == [(1, 0.5), (2, 0.25)]
    forget_after(path, 1)
    assert read_metrics(path) == ROWS[:2]
    forget_after(folder / "absent.jsonl", 1)


def test_curves_are_a_picture_with_two_plots(folder):
    picture = cv2.imread(str(draw_curves(folder / "curves.png", ROWS)))
    empty = cv2.imread(str(draw_curves(folder / "empty.png", [])))
    blue = [(np.abs(p.astype(int) - (0xB2, 0x72, 0)).sum(-1) < 30).sum(axis=0) for p in (picture, empty)]
    half = picture.shape[1] // 2
    assert blue[0][:half].sum() > 200  # PALETTE's first colour on both sides
    assert blue[0][half:].sum() > 200
    assert not blue[1].any()
