import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import map_coordinates
from scipy.stats import kstest, uniform

from samfeat.pipelines.homography import (
    STILL,
    HomographyConfig,
    ViewConfig,
    photometric,
    rasterise,
    relight,
    sample_homographies,
    sample_views,
    warp,
    warp_points,
    warp_smoothly,
    warp_targets,
)

SIZE = (48, 64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mild(count: int, size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return sample_homographies(
        count, size, generator=seeded(seed), config=HomographyConfig(rotation=0.3, scale=(0.9, 1.2), perspective=0.1)
    )


def smooth(count: int, channels: int, size: tuple[int, int]) -> torch.Tensor:
    """Blurred noise in [0, 255]: smooth enough for OpenCV's 1/32 pixel grid."""
    noise = np.random.default_rng(0).uniform(0, 255, (count * channels, *size)).astype(np.float32)
    return torch.from_numpy(np.stack([cv2.GaussianBlur(n, (0, 0), 3) for n in noise])).view(count, channels, *size)


def translation(dx: float, dy: float) -> torch.Tensor:
    return torch.tensor([[[1.0, 0, dx], [0, 1, dy], [0, 0, 1]]])


def test_statistics_are_the_published_ones():
    homographies = sample_homographies(3000, (400, 400), generator=seeded())
    corners = torch.tensor([[[0.0, 0], [0, 399], [399, 399], [399, 0]]]).expand(3000, 4, 2)
    quad = warp_points(corners, homographies)
    scale = np.sqrt([cv2.contourArea(q) for q in quad.numpy()]) / 399
    assert scale.mean() == pytest.approx(1.06, abs=0.02)
    assert np.percentile(scale, [5, 95]) == pytest.approx([0.66, 1.59], abs=0.04)

    left = quad[:, 1] - quad[:, 0]  # the perspective keeps this side vertical: it shows the rotation alone
    angle = torch.atan2(-left[:, 0], left[:, 1]).numpy()
    assert kstest(angle, uniform(-np.pi / 2, np.pi).cdf).pvalue > 0.01

    axis = torch.arange(0, 400, 19, dtype=torch.float32)
    points = torch.cartesian_prod(axis, axis).expand(3000, -1, 2)
    warped = warp_points(points, homographies)
    inside = ((warped >= 0) & (warped <= 399)).all(-1).float().mean(1).numpy()
    assert inside.mean() == pytest.approx(0.71, abs=0.02)
    assert np.median(inside) == pytest.approx(0.77, abs=0.03)
    assert np.percentile(inside, 5) == pytest.approx(0.31, abs=0.03)


def test_every_homography_is_convex_and_seeded():
    homographies = sample_homographies(500, SIZE, generator=seeded(3))
    corners = torch.tensor([[0.0, 0, 1], [63, 0, 1], [0, 47, 1], [63, 47, 1]])
    assert homographies.dtype == torch.float32
    assert ((corners @ homographies.mT)[..., 2] > 0).all()  # nothing of the image lies beyond the horizon
    assert torch.equal(homographies, sample_homographies(500, SIZE, generator=seeded(3)))
    assert not torch.equal(homographies, sample_homographies(500, SIZE, generator=seeded(4)))


def test_no_freedom_left_gives_the_centred_square():
    still = HomographyConfig(rotation=0, scale=(1, 1), perspective=0, overflow=-0.1)
    homographies = sample_homographies(2, (101, 201), generator=seeded(), config=still)
    corners = torch.tensor([[[0.0, 0], [0, 100], [200, 100], [200, 0]]]).expand(2, 4, 2)
    expected = cv2.getPerspectiveTransform(corners[0].numpy(), np.float32([[20, 10], [20, 90], [180, 90], [180, 10]]))
    assert homographies[1].numpy() == pytest.approx(expected, abs=1e-5)
    assert warp_points(corners, homographies)[0].numpy() == pytest.approx(
        np.array([[20, 10], [20, 90], [180, 90], [180, 10]]), abs=1e-4
    )


@pytest.mark.parametrize(
    "values", [{"perspective": 0.4}, {"perspective": -0.1}, {"scale": (2.0, 0.8)}, {"scale": (0, 1)}, {"unscaled": 1.5}]
)
def test_impossible_distributions_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        HomographyConfig(**values)


def test_warp_points_agrees_with_opencv():
    homographies = sample_homographies(4, SIZE, generator=seeded())
    points = torch.rand(4, 50, 2, generator=seeded(1)) * 60
    for mine, h, p in zip(warp_points(points, homographies), homographies, points):
        expected = cv2.perspectiveTransform(p.numpy()[None].astype(np.float64), h.double().numpy())[0]
        assert mine.numpy() == pytest.approx(expected, abs=1e-3)


def test_warp_points_survives_the_horizon():
    horizon = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [-1, 0, 5]]])
    assert warp_points(torch.tensor([[[5.0, 1.0]]]), horizon).isfinite().all()


def test_warp_agrees_with_opencv():
    images = smooth(3, 3, SIZE)
    homographies = mild(3, SIZE)
    warped = warp(images, homographies)
    interior = warp(torch.ones(3, 1, *SIZE), homographies)[:, 0] == 1
    for image, h, mine, inside in zip(images, homographies, warped, interior):
        expected = cv2.warpPerspective(image.permute(1, 2, 0).numpy(), h.double().numpy(), SIZE[::-1])
        assert inside.float().mean() > 0.3
        assert np.abs(expected - mine.permute(1, 2, 0).numpy())[inside.numpy()].max() < 0.5  # OpenCV steps by 1/32 px


@pytest.mark.parametrize(("mode", "order"), [("bilinear", 1), ("nearest", 0)])
def test_warp_agrees_with_scipy(mode, order):
    images = smooth(2, 1, SIZE)
    homographies = mild(2, SIZE, seed=5)
    warped = warp(images, homographies, mode=mode)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    for image, h, mine in zip(images[:, 0], homographies, warped[:, 0]):
        source = np.linalg.inv(h.double().numpy()) @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
        source = (source[1::-1] / source[2]).reshape(2, *SIZE)
        expected = map_coordinates(image.numpy(), source, order=order, mode="constant")
        off = np.abs(source - np.floor(source) - 0.5).min(0) < 1e-3 if order == 0 else np.zeros(SIZE, bool)
        edge = (np.abs(source) < 1) | (np.abs(source - np.array(SIZE)[:, None, None] + 1) < 1)
        compare = ~off & ~edge.any(0)  # scipy does not blend with the zeros around the image
        assert compare.mean() > 0.7
        assert np.abs(expected - mine.numpy())[compare].max() < 2e-3


def test_warp_blends_into_a_zero_border():
    warped = warp(torch.full((1, 1, 4, 4), 100.0), translation(1.5, 0))
    assert warped[0, 0, 0].tolist() == pytest.approx([0, 50, 100, 100], abs=1e-3)


@pytest.fixture
def targets() -> dict[str, torch.Tensor]:
    generator = seeded(7)
    return {
        "embedding": torch.randn(1, 5, 8, 8, generator=generator),
        "groups": torch.randint(0, 65536, (1, 32, 32), generator=generator),
        "edges": torch.rand(1, 32, 32, generator=generator) * 255,
    }


def test_targets_under_the_identity_are_unchanged(targets):
    warped = warp_targets(**targets, homographies=torch.eye(3)[None])
    assert warped.valid.all()
    assert torch.equal(warped.groups, targets["groups"])
    assert warped.groups.dtype == targets["groups"].dtype
    assert torch.allclose(warped.edges, targets["edges"], atol=1e-3)
    assert torch.allclose(warped.embedding, targets["embedding"], atol=1e-5)


def test_targets_under_a_translation_roll(targets):
    warped = warp_targets(**targets, homographies=translation(8, -4))  # two cells right, one cell up
    valid = np.zeros((32, 32), bool)
    valid[:28, 8:] = True
    assert np.array_equal(warped.valid[0], valid)
    assert np.array_equal(warped.groups[0], np.roll(targets["groups"][0], (-4, 8), (0, 1)) * valid)
    assert warped.edges[0].numpy() == pytest.approx(np.roll(targets["edges"][0], (-4, 8), (0, 1)) * valid, abs=1e-3)
    cells = valid[1::4, 1::4]
    expected = np.roll(targets["embedding"][0], (-1, 2), (1, 2)) * cells
    assert warped.embedding[0].numpy() == pytest.approx(expected, abs=1e-5)


def test_targets_under_a_quarter_turn_rotate(targets):
    quarter = torch.tensor([[[0.0, 1, 0], [-1, 0, 31], [0, 0, 1]]])  # (x, y) -> (y, 31 - x): counter-clockwise
    warped = warp_targets(**targets, homographies=quarter)
    assert warped.valid.all()
    assert np.array_equal(warped.groups[0], np.rot90(targets["groups"][0]))
    assert warped.edges[0].numpy() == pytest.approx(np.rot90(targets["edges"][0]), abs=1e-3)
    expected = np.rot90(targets["embedding"][0], axes=(1, 2))
    assert warped.embedding[0].numpy() == pytest.approx(expected, abs=1e-4)


def test_targets_between_pixels(targets):
    warped = warp_targets(**targets, homographies=translation(0.25, 0))
    assert warped.valid.all()  # the leftmost pixels see the left margin of the source's
    assert torch.equal(warped.groups, targets["groups"])  # labels are never mixed
    edges = targets["edges"]
    assert torch.allclose(warped.edges[..., 1:], 0.75 * edges[..., 1:] + 0.25 * edges[..., :-1], atol=1e-2)
    assert torch.allclose(warped.edges[..., 0], edges[..., 0], atol=1e-2)


def test_the_warped_embedding_agrees_with_its_upsampled_map():
    size, cells = (96, 128), (24, 16)  # different cell sides in x and y
    embedding = F.interpolate(torch.randn(1, 4, 4, 4, generator=seeded()), cells, mode="bicubic", align_corners=False)
    full = F.interpolate(embedding, size, mode="bilinear", align_corners=False)
    homography = mild(1, size, seed=2)
    blank = torch.zeros(1, *size)
    warped = warp_targets(embedding, blank.long(), blank, homography)
    y = (np.arange(cells[0]) + 0.5) * size[0] / cells[0] - 0.5
    x = (np.arange(cells[1]) + 0.5) * size[1] / cells[1] - 0.5
    centres = np.stack(np.meshgrid(x, y), -1).reshape(1, -1, 2)
    source = cv2.perspectiveTransform(centres, np.linalg.inv(homography[0].double().numpy()))[0]
    inside = ((source > 0) & (source < np.array(size[::-1]) - 1)).all(1)
    assert 0.4 < inside.mean() < 1
    for channel, mine in zip(full[0].numpy(), warped.embedding[0].flatten(1).numpy()):
        expected = map_coordinates(channel, source[inside].T[::-1], order=1)
        assert mine[inside] == pytest.approx(expected, abs=0.03)


def test_images_points_and_targets_move_together():
    dot = torch.zeros(1, 1, *SIZE)
    dot[0, 0, 20, 30] = 255
    homography = mild(1, SIZE, seed=11)
    x, y = warp_points(torch.tensor([[[30.0, 20.0]]]), homography)[0, 0].tolist()
    image = warp(dot, homography)[0, 0].numpy()
    edges = warp_targets(torch.zeros(1, 1, 6, 8), (dot[:, 0] > 0).long() * 9, dot[:, 0], homography).edges[0].numpy()
    for picture in (image, edges):
        rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
        centroid = ((picture * columns).sum() / picture.sum(), (picture * rows).sum() / picture.sum())
        assert centroid == pytest.approx((x, y), abs=0.3)


def shrinking(factor: float) -> torch.Tensor:
    """The homography of an image made smaller by a factor, pixels taken as squares, as OpenCV's resize has it."""
    scale, shift = 1 / factor, 0.5 / factor - 0.5
    return torch.tensor([[[scale, 0, shift], [0, scale, shift], [0, 0, 1]]])


def test_a_smooth_warp_that_does_not_shrink_is_that_of_opencv():
    images = smooth(2, 3, SIZE)
    turn = cv2.getRotationMatrix2D((31.5, 23.5), 25, 1.3)
    homography = torch.from_numpy(np.vstack([turn, [0, 0, 1]])).float()
    warped = warp_smoothly(images, homography.expand(2, 3, 3), (40, 56))
    for image, mine in zip(images, warped):
        expected = cv2.warpPerspective(
            image.permute(1, 2, 0).numpy(), homography.double().numpy(), (56, 40), borderMode=cv2.BORDER_REFLECT
        )
        assert np.abs(expected - mine.permute(1, 2, 0).numpy()).max() < 0.5


def test_a_smooth_warp_that_shrinks_does_not_alias():
    noise = torch.from_numpy(np.random.default_rng(0).uniform(0, 255, (1, 1, 120, 150)).astype(np.float32))
    area = cv2.resize(noise[0, 0].numpy(), (50, 40), interpolation=cv2.INTER_AREA)
    smoothly = warp_smoothly(noise, shrinking(3), (40, 50))[0, 0].numpy()
    sampled = warp(noise, shrinking(3))[0, 0, :40, :50].numpy()
    inner = (slice(2, -2), slice(2, -2))
    error, aliased = (np.sqrt(np.mean((picture - area)[inner] ** 2)) for picture in (smoothly, sampled))
    assert aliased > 60  # a pixel in nine of white noise says little about the mean of the nine
    assert error < 0.3 * aliased


@pytest.mark.parametrize("factor", [1.0, 2.0, 3.0])
def test_the_blur_of_a_smooth_warp_is_the_stated_gaussian(factor):
    # a wave of 1/10 cycle a pixel keeps exp(-2 pi^2 sigma^2 f^2) of its height under a Gaussian of deviation sigma
    wave = 100 * np.cos(2 * np.pi * 0.1 * np.arange(200))
    image = torch.from_numpy(np.tile(wave, (200, 1)).astype(np.float32))[None, None]
    centre = torch.tensor([[[1 / factor, 0, 20 - 100 / factor], [0, 1 / factor, 20 - 100 / factor], [0, 0, 1]]])
    middle = warp_smoothly(image, centre, (40, 40))[0, 0, 20, 20]  # pixel 100, a crest
    deviation = 0.5 * np.sqrt(factor**2 - 1)
    assert middle.item() == pytest.approx(100 * np.exp(-2 * np.pi**2 * deviation**2 * 0.01), rel=0.02)


def test_a_smooth_warp_leaves_no_empty_region():
    warped = warp_smoothly(torch.full((1, 3, 32, 32), 90.0), translation(20, -9), (48, 64))
    torch.testing.assert_close(warped, torch.full_like(warped, 90.0))


VIEWS = ViewConfig(size=192, scale=3.0, rotation=np.pi, tilt=1.0, mild=0.0)
CROP = (1000, 1200)  # so large that no window has to be moved


def drawn_views(count: int = 400, *, config: ViewConfig = VIEWS, strength: float = 1.0, seed: int = 0, **part):
    centres = torch.rand(2, count, 2, generator=seeded(99)) * torch.tensor([200.0, 100.0]) + torch.tensor(
        [500.0, 450.0]
    )
    rows = part.get("rows", slice(None))
    views = sample_views(centres[:, rows], CROP, generator=seeded(seed), config=config, strength=strength, **part)
    return centres, views


def jacobians(homographies: torch.Tensor, points: torch.Tensor) -> np.ndarray:
    """Derivatives [b, 2, 2] at one point each, by OpenCV and central differences."""
    found = []
    for homography, (x, y) in zip(homographies.double().numpy(), points.double().numpy()):
        around = np.float64([[[x + 0.1, y], [x - 0.1, y], [x, y + 0.1], [x, y - 0.1]]])
        east, west, south, north = cv2.perspectiveTransform(around, homography)[0]
        found.append(np.stack([east - west, south - north], axis=1) / 0.2)
    return np.array(found)


def test_both_windows_show_the_point_they_are_drawn_around_near_their_middle():
    centres, views = drawn_views()
    for side in (0, 1):
        off = warp_points(centres[side, :, None], views[side])[:, 0] - 191 / 2
        assert off.abs().max() <= 0.1 * 192 + 0.01
        assert off.abs().max() > 0.09 * 192


@pytest.mark.parametrize(("mild", "strength", "power"), [(0.0, 1.0, 1.0), (0.0, STILL, STILL), (1.0, 1.0, STILL)])
def test_scale_rotation_and_tilt_lie_in_their_ranges_and_reach_their_ends(mild, strength, power):
    config = ViewConfig(size=192, scale=3.0, rotation=np.pi, tilt=1.0, mild=mild)
    centres, views = drawn_views(config=config, strength=strength)
    left, right = (jacobians(views[side], centres[side]) for side in (0, 1))
    squares = left.transpose(0, 2, 1) @ left
    assert squares[:, 0, 0] == pytest.approx(squares[:, 1, 1], rel=1e-3)  # the left view is frontal
    assert np.abs(squares[:, 0, 1] / squares[:, 0, 0]).max() < 1e-3
    assert np.abs(np.arctan2(left[:, 1, 0], left[:, 0, 0])).max() < 0.15 + 1e-3  # and nearly upright

    across = right @ np.linalg.inv(left)
    singular = np.linalg.svd(across, compute_uv=False)
    tilt = np.arccos(np.clip(singular[:, 1] / singular[:, 0], 0, 1))  # seen obliquely, one direction is foreshortened
    assert 0.95 * power < tilt.max() < power + 0.01
    ratio = np.log(singular[:, 0]) / np.log(3)
    assert np.abs(ratio).max() < power + 0.01
    assert ratio.min() < -0.9 * power
    assert ratio.max() > 0.9 * power
    u, _, v = np.linalg.svd(across)
    turn = u @ v  # the rotation nearest to the derivative
    angle = np.abs(np.arctan2(turn[:, 1, 0] - turn[:, 0, 1], turn[:, 0, 0] + turn[:, 1, 1]))
    assert 0.9 * power * np.pi < angle.max() < power * np.pi + 0.01
    assert np.median(angle) == pytest.approx(power * np.pi / 4, rel=0.25)  # the square of a uniform share


def test_parts_of_the_processes_get_the_views_of_the_whole_batch():
    _, whole = drawn_views(10)
    for rows in (slice(0, 4), slice(4, 10)):
        assert torch.equal(drawn_views(10, rows=rows, drawn=10)[1], whole[:, rows])


def test_views_widen_over_the_stated_share_of_the_run():
    config = ViewConfig(size=64, widen=0.4)
    assert [config.strength(share) for share in (0.0, 0.2, 0.4, 1.0)] == pytest.approx([0.25, 0.625, 1.0, 1.0])
    assert ViewConfig(size=64, widen=0.0).strength(0.0) == 1.0


def test_relight_keeps_a_sixth_as_it_is_and_stays_in_range():
    images = smooth(300, 3, (16, 16))
    lit = relight(images, generator=seeded())
    kept = (lit == images).flatten(1).all(1).float().mean()
    assert kept == pytest.approx(1 / 6, abs=0.07)
    assert lit.min() >= 0
    assert lit.max() <= 255
    assert torch.equal(lit, relight(images, generator=seeded()))


def test_relight_of_a_part_is_that_of_the_whole():
    images = smooth(8, 3, (24, 24))
    whole = relight(images, generator=seeded(2))
    rows = torch.tensor([1, 2, 6])
    part = relight(images[rows], generator=seeded(2), rows=rows, drawn=8)
    torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-3)


def test_relight_has_the_stated_strength():
    grey = torch.full((600, 3, 16, 16), 128.0)
    lit = relight(grey, generator=seeded(1))
    middle = lit.flatten(2).median(2).values
    changed = (lit != grey).flatten(1).any(1)
    spread = (middle.max(1).values - middle.min(1).values)[changed]
    assert (spread > 10).float().mean() > 0.5  # the channels get gains of their own
    assert (spread < 1).float().mean() == pytest.approx(0.1, abs=0.06)  # and 10 % no colour
    brightness = middle.mean(1)[changed]
    assert brightness.min() < 60
    assert brightness.max() > 190


def test_rasterise_rounds_half_to_even_and_drops_what_is_outside():
    keypoints = torch.tensor([[[0.5, 1.5], [2.5, 0.4], [-0.6, 1.0], [3.6, 0.0], [1.0, 1.0], [-0.4, 2.4], [3.0, 2.6]]])
    mask = torch.tensor([[True, True, True, True, False, True, True]])
    labels = rasterise(keypoints, mask, (3, 4))
    assert labels.dtype == torch.float32
    assert labels[0].nonzero().tolist() == [[0, 2], [2, 0]]
    assert labels.sum() == 2


def test_rasterise_keeps_images_apart_and_accepts_none():
    keypoints = torch.tensor([[[1.0, 2.0]], [[2.0, 1.0]]])
    labels = rasterise(keypoints, torch.ones(2, 1, dtype=torch.bool), (4, 5))
    assert labels.nonzero().tolist() == [[0, 2, 1], [1, 1, 2]]
    assert rasterise(torch.zeros(2, 0, 2), torch.zeros(2, 0, dtype=torch.bool), (4, 5)).sum() == 0


def test_photometric_changes_the_share_it_says():
    images = smooth(60, 3, (16, 16))
    noisy = photometric(images, generator=seeded(), probability=0.5)
    changed = (noisy != images).flatten(1).any(1).float().mean()
    assert 0.3 < changed < 0.7
    assert noisy.shape == images.shape
    assert noisy.min() >= 0
    assert noisy.max() <= 255
    assert torch.equal(photometric(images, generator=seeded(), probability=0), images)
    assert torch.equal(noisy, photometric(images, generator=seeded()))


def test_photometric_has_the_stated_strength():
    grey = torch.full((400, 3, 24, 24), 127.0)
    noisy = photometric(grey, generator=seeded(1), probability=1)
    shift = noisy.mean((1, 2, 3)) - 127  # brightness U(-50, 50), times contrast U(0.5, 1.5)
    assert shift.mean() == pytest.approx(0, abs=5)
    assert shift.std() == pytest.approx(100 / 12**0.5 * (1 + 1 / 12) ** 0.5, rel=0.1)
    channels = (noisy[:, 0] - noisy[:, 1]).abs() > 1e-3  # only impulses (and their blur) differ between channels
    assert 0.001 < channels.float().mean() < 0.02
    deviation = noisy.flatten(2).median(1).values.std(1)  # noise of each image, U(0, 10), half of them blurred
    assert 2 < deviation.median() < 5.5
    assert deviation.max() < 10.5
