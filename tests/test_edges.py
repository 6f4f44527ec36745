"""Edge maps: every step against OpenCV, SciPy or geometry."""

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage

from samfeat.teacher_cache.teachers import edges
from samfeat.teacher_cache.teachers.edges import BINARY_THRESHOLD, STYLES, edge_map

SIZE = 80


def disc(radius: float, centre: tuple[float, float] = (40.3, 38.8), softness: float = 1.0) -> np.ndarray:
    """Probability that falls through 0.5 at ``radius`` pixels from ``centre`` (x, y)."""
    y, x = np.indices((SIZE, SIZE))
    distance = np.hypot(x - centre[0], y - centre[1])
    return (1 / (1 + np.exp((distance - radius) / softness))).astype(np.float32)


def random_probabilities(count: int, shape: tuple[int, int], seed: int) -> np.ndarray:
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(count, *shape)), (0, 3, 3))
    return (1 / (1 + np.exp(-smooth / smooth.std() * 3))).astype(np.float32)


def opencv_strength(probabilities: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Steps 4 to 6 of the recipe, mask by mask."""

    def magnitude(image: np.ndarray) -> np.ndarray:
        x = cv2.Sobel(image, cv2.CV_64F, 1, 0, ksize=3, borderType=cv2.BORDER_CONSTANT)
        y = cv2.Sobel(image, cv2.CV_64F, 0, 1, ksize=3, borderType=cv2.BORDER_CONSTANT)
        return np.sqrt(x**2 + y**2)

    each = [magnitude(p) * (magnitude(m.astype(np.float64)) > 0) for p, m in zip(probabilities, masks)]
    return np.max(each, axis=0)


@pytest.mark.parametrize("border", [0, 1, 5])
@pytest.mark.parametrize("given_masks", [False, True])
def test_soft_edges_agree_with_opencv_and_scipy(border: int, given_masks: bool) -> None:
    probabilities = random_probabilities(7, (37, 53), seed=1)
    masks = probabilities > 0.7 if given_masks else probabilities > 0.5
    strength = opencv_strength(probabilities, masks)
    frame = np.ones_like(strength, bool)
    frame[border : 37 - border, border : 53 - border] = False
    strength[frame] = 0
    strength = (strength - strength.min()) / (strength.max() - strength.min())
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    expected = ndimage.convolve(strength, kernel, mode="mirror") * 255
    found = edge_map(probabilities, masks if given_masks else None, border=border)
    assert found.dtype == np.uint8
    assert np.abs(found - expected).max() <= 0.5 + 1e-3  # nothing but the rounding


@pytest.mark.parametrize("blur", [0, 3, 5])
def test_blur_is_that_of_opencv_for_its_size(blur: int) -> None:
    probabilities = random_probabilities(3, (40, 40), seed=2)
    plain = edge_map(probabilities, blur=0)
    expected = cv2.GaussianBlur(plain.astype(np.float64), (blur, blur), 0) if blur else plain
    assert np.abs(edge_map(probabilities, blur=blur) - expected).max() <= 1


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities = random_probabilities(9, (30, 41), seed=3)
    whole = edge_map(probabilities)
    monkeypatch.setattr(edges, "CHUNK_PIXELS", 2 * 30 * 41)
    np.testing.assert_array_equal(edge_map(probabilities), whole)


def test_torch_and_numpy_give_the_same() -> None:
    probabilities = random_probabilities(4, (30, 41), seed=4)
    masks = probabilities > 0.6
    np.testing.assert_array_equal(
        edge_map(probabilities, masks), edge_map(torch.from_numpy(probabilities), torch.from_numpy(masks))
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_a_step_becomes_one_line_beside_it(axis: int) -> None:
    probability = np.zeros((SIZE, SIZE), np.float32)
    probability[:, 30:] = 1  # the boundary runs between columns 29 and 30
    probability = np.moveaxis(probability, 1, axis)[None]
    inner = np.s_[4:-4, 4:-4]
    soft = np.moveaxis(edge_map(probability, border=2), axis, 1)[inner]
    assert (soft[:, 24:28] == [64, 191, 191, 64]).all()  # a ring of two pixels, blurred by (1, 2, 1) / 4
    for style, strength in (("thinned", 191), ("binary", 255)):
        line = np.moveaxis(edge_map(probability, style=style, border=2), axis, 1)[inner]
        assert ((line > 0).sum(1) == 1).all()
        columns = line.argmax(1)
        assert (columns == columns[0]).all()
        assert columns[0] + 4 in (29, 30)
        assert line.max() == strength


@pytest.mark.parametrize("radius", [9.0, 25.0])
def test_a_disc_becomes_a_thin_closed_ring(radius: float) -> None:
    probability = disc(radius)[None]
    for style in ("thinned", "binary"):
        y, x = np.nonzero(edge_map(probability, style=style))
        distance = np.hypot(x - 40.3, y - 38.8)
        assert np.abs(distance - radius).max() < 1.5
        assert abs(np.mean(distance) - radius) < 0.3
        assert len(x) < 1.35 * 2 * np.pi * radius  # about one pixel per pixel of length
        sectors = np.floor(np.arctan2(y - 38.8, x - 40.3) / (2 * np.pi) * 40)
        assert len(np.unique(sectors)) == 40  # closed
    soft = edge_map(probability)
    assert soft[39, 40] == 0
    assert soft[0, 0] == 0


def test_thinned_lines_lie_on_the_ridges_of_the_soft_map() -> None:
    probabilities = np.stack([disc(12, (30, 30)), disc(20, (45, 45)), disc(8, (55, 20))])
    soft, thinned = edge_map(probabilities), edge_map(probabilities, style="thinned")
    kept = thinned > 0
    np.testing.assert_array_equal(thinned[kept], soft[kept])
    assert kept.sum() < 0.35 * (soft > 0).sum()
    # suppressed pixels have something at least as strong beside them
    stronger = ndimage.grey_dilation(soft, footprint=np.ones((3, 3))) >= soft
    assert stronger[(soft > 0) & ~kept].all()
    binary = edge_map(probabilities, style="binary")
    np.testing.assert_array_equal(binary == 255, thinned >= np.rint(BINARY_THRESHOLD * 255))
    assert set(np.unique(binary)) == {0, 255}


def test_the_strongest_mask_of_a_pixel_stands() -> None:
    sharp, faint = disc(20, softness=0.5), disc(10, softness=4.0)
    together = edge_map(np.stack([sharp, faint]), blur=0)
    np.testing.assert_array_equal(together, np.maximum(edge_map(sharp[None], blur=0), together))
    assert together[39, 30] > 0  # on the faint ring
    assert together[39, 30] < together[39, 60]


def test_a_gradient_inside_a_mask_is_no_edge() -> None:
    ramp = np.broadcast_to(np.linspace(0.6, 1.0, SIZE, dtype=np.float32), (1, SIZE, SIZE)).copy()
    assert edge_map(ramp, border=1).max() == 0


def test_a_border_takes_away_the_frame_of_the_image() -> None:
    probability = 1 - disc(20)[None]  # reaches all four sides
    assert edge_map(probability, border=0, blur=0)[0, SIZE // 2] > 150
    bordered = edge_map(probability, border=1)
    assert bordered[[0, -1]].max() == bordered[:, [0, -1]].max() == 0
    assert bordered.max() > 150
    assert edge_map(probability, border=0)[5:-5, 5:-5].max() < 100


@pytest.mark.parametrize("style", STYLES)
def test_without_masks_or_boundaries_nothing_is_drawn(style: str) -> None:
    none = edge_map(np.zeros((0, 9, 12), np.float32), style=style)
    assert none.shape == (9, 12)
    assert none.dtype == np.uint8
    assert none.max() == 0
    assert edge_map(np.zeros((2, 9, 12), np.float32), style=style, border=0).max() == 0


def test_wrong_arguments_are_refused() -> None:
    probabilities = np.zeros((1, 5, 5), np.float32)
    with pytest.raises(ValueError, match="of one shape"):
        edge_map(probabilities[0])
    with pytest.raises(ValueError, match="of one shape"):
        edge_map(probabilities, np.zeros((1, 5, 6), bool))
    with pytest.raises(ValueError, match="odd kernel"):
        edge_map(probabilities, blur=4)
    with pytest.raises(ValueError, match="soft, thinned, binary"):
        edge_map(probabilities, style="canny")
    with pytest.raises(ValueError, match="border"):
        edge_map(probabilities, border=-1)
