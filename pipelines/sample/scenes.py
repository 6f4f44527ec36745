"""What the embedded sample shows: rooms of photographs on walls, boxes and boards; single photographs for evaluation.

The photographs come with scikit-image, scikit-learn and matplotlib, inside their wheels; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import cv2
import numpy as np

from samfeat.images import read_image
from samfeat.pipelines.sample.render import SceneCamera, Surface, look_at, mipmap

SIZE = (480, 640)  # of every rendered view
FOCAL = 560.0  # pixels, at zoom 1
TILES = ("brick", "grass", "gravel")
WALLS = ("brick", "gravel", "hubble_deep_field", "immunohistochemistry", "retina", "china")
PICTURES = (
    *("astronaut", "camera", "china", "coins", "hubble_deep_field", "immunohistochemistry", "motorcycle", "page"),
    *("retina", "rocket", "text"),
)
HELD_OUT = ("coffee", "grace_hopper", "chelsea", "flower")  # in no training scene
CREDITS = (
    "scikit-image (skimage.data): CC0 or public domain, see its docstrings; motorcycle: Middlebury 2014 stereo data; "
    "scikit-learn: china by danielbuechele, flower by vultilion, CC BY 2.0; matplotlib: grace_hopper, public domain"
)

_FACE_TEXELS = 360  # height of the texture of a face; more would never be seen
_LIGHT_TEXELS = 256  # longer side of a map of shadows

Photographs = Mapping[str, np.ndarray]
_Shape = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # texture, corner, right, down: a Surface in the making


class Light(NamedTuple):
    """How a view is developed: gain, exponent, colour cast [3], and standard deviation of the noise in [0, 1]."""

    gain: float
    gamma: float
    cast: np.ndarray
    noise: float


def load_photographs() -> dict[str, np.ndarray]:
    """The photographs, float32 [h, w, 3] in [0, 1], by name."""
    import matplotlib.cbook
    import skimage.data
    import sklearn.datasets

    path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    found = {"grace_hopper": read_image(str(path))}
    found["motorcycle"] = skimage.data.stereo_motorcycle()[0]
    for name in ("china", "flower"):
        found[name] = sklearn.datasets.load_sample_image(f"{name}.jpg")
    for name in {*TILES, *WALLS, *PICTURES, *HELD_OUT} - set(found):
        found[name] = getattr(skimage.data, name)()
    return {
        name: np.atleast_3d(image)[:, :, [0, 1, 2] if image.ndim == 3 else [0, 0, 0]].astype(np.float32) / 255
        for name, image in sorted(found.items())
    }


def room(photographs: Photographs, rng: np.random.Generator) -> list[Surface]:
    """A room of photographs: ground (y = 0), three walls, boxes and boards, lit by one distant lamp that casts shadows.

    It is open at z < -1.5, where the viewers stand, and five to six metres deep.
    """
    depth, width, height = rng.uniform(4.8, 6.2), rng.uniform(7.0, 9.0), rng.uniform(3.4, 4.4)
    left, front = -width / 2, -1.5
    shapes = [
        _shape(_tiled(photographs[rng.choice(TILES)], 3, rng), (left, 0, depth), (width, 0, 0), (0, 0, front - depth)),
        _shape(_wall(photographs, rng), (left, -height, depth), (width, 0, 0), (0, height, 0)),
        _shape(_wall(photographs, rng), (left, -height, front), (0, 0, depth - front), (0, height, 0)),
        _shape(_wall(photographs, rng), (-left, -height, depth), (0, 0, front - depth), (0, height, 0)),
    ]
    pictures = iter(photographs[name] for name in np.concatenate([rng.permutation(PICTURES) for _ in range(5)]))
    for x in rng.permutation(np.linspace(-2.6, 2.6, 7))[: rng.integers(5, 8)]:
        shapes += _box(pictures, rng, x, depth)
    for x in np.linspace(-0.36, 0.36, 4) * width:
        shapes.append(_board(pictures, rng, x, depth, height))
    lamp = np.array([rng.uniform(-0.7, 0.7), 1.0, rng.uniform(0.4, 0.9)])
    return _lit(shapes, lamp / np.linalg.norm(lamp))


def viewpoint(rng: np.random.Generator) -> SceneCamera:
    """A camera of a room: up to two metres apart from the others, rolled up to 30 degrees, zoomed 0.7 to 1.5 times."""
    eye = np.array([rng.uniform(-1.1, 1.1), rng.uniform(-2.2, -1.0), rng.uniform(-1.3, 0.4)])
    target = np.array([rng.uniform(-0.6, 0.6), rng.uniform(-1.5, -0.9), 4.0])
    roll = np.deg2rad(np.clip(rng.normal(0, 12), -30, 30))
    return SceneCamera(
        intrinsics(FOCAL * rng.choice([0.7, 0.85, 1.0, 1.2, 1.5])), look_at(eye, target, roll=roll), SIZE
    )


def intrinsics(focal: float) -> np.ndarray:
    """K of a view whose principal point is its centre."""
    height, width = SIZE
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])


def draw_light(rng: np.random.Generator) -> Light:
    """The light and the sensor of one view."""
    return Light(
        rng.uniform(0.75, 1.25), rng.uniform(0.75, 1.35), rng.uniform(0.9, 1.1, size=3), rng.uniform(0.004, 0.02)
    )


def develop(picture: np.ndarray, light: Light, rng: np.random.Generator) -> np.ndarray:
    """A rendered picture, float32 [H, W, 3] in [0, 1], as a camera would store it: uint8."""
    exposed = np.clip(light.gain * light.cast * picture, 0, 1) ** light.gamma
    noisy = exposed + light.noise * rng.standard_normal(picture.shape, np.float32)
    return np.round(255 * np.clip(noisy, 0, 1)).astype(np.uint8)


def slanted_light(rng: np.random.Generator) -> np.ndarray:
    """A lamp to one side, float32 [H, W, 1]: full brightness there, a third to two thirds of it on the other side."""
    direction, dark = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.65)
    y, x = np.mgrid[-1 : 1 : SIZE[0] * 1j, -1 : 1 : SIZE[1] * 1j]
    along = (x * np.cos(direction) + y * np.sin(direction) + 1.4143) / 2.8286
    return (dark + (1 - dark) * along).astype(np.float32)[:, :, None]


def sky(rng: np.random.Generator) -> np.ndarray:
    """Background of a view, float32 [H, W, 3]: a smooth gradient, without depth."""
    top, bottom = rng.uniform([0.35, 0.45, 0.6], [0.6, 0.7, 0.9]), rng.uniform(0.75, 0.9, size=3)
    ramp = np.linspace(0, 1, SIZE[0])[:, None, None]
    return np.broadcast_to((1 - ramp) * top + ramp * bottom, (*SIZE, 3)).astype(np.float32)


def photograph_on_plane(photograph: np.ndarray) -> Surface:
    """A photograph as the plane z = 0, one metre wide about the origin, mirrored on all sides."""
    height, width = photograph.shape[:2]
    texture = cv2.copyMakeBorder(photograph, height, height, width, width, cv2.BORDER_REFLECT)
    aspect = height / width
    return Surface(
        np.array([-1.5, -1.5 * aspect, 0]), np.array([3.0, 0, 0]), np.array([0, 3.0 * aspect, 0]), mipmap(texture)
    )


def _shape(texture: np.ndarray, *vectors: tuple[float, float, float] | np.ndarray) -> _Shape:
    corner, right, down = (np.array(vector, np.float64) for vector in vectors)
    return texture, corner, right, down


def _box(pictures: Iterator[np.ndarray], rng: np.random.Generator, x: float, depth: float) -> list[_Shape]:
    """Five faces of a box that stands on the ground, turned about the vertical."""
    half, turn = rng.uniform(0.3, 0.6, size=2), rng.uniform(-0.7, 0.7)
    centre = np.array([x, 0, rng.uniform(1.8, depth - 0.9)])
    side = half[0] * np.array([np.cos(turn), 0, np.sin(turn)])
    back = half[1] * np.array([-np.sin(turn), 0, np.cos(turn)])
    up = np.array([0, -rng.uniform(0.5, 1.7), 0])
    outlines = [
        (centre - side - back + up, 2 * side, -up),
        (centre + side + back + up, -2 * side, -up),
        (centre - side + back + up, -2 * back, -up),
        (centre + side - back + up, 2 * back, -up),
        (centre - side + back + up, 2 * side, -2 * back),
    ]
    return [
        _shape(_clipping(next(pictures), right, down, rng), corner, right, down) for corner, right, down in outlines
    ]


def _board(pictures: Iterator[np.ndarray], rng: np.random.Generator, x: float, depth: float, height: float) -> _Shape:
    """A picture on a board, hung on the back wall or leaning in front of it."""
    size = rng.uniform([1.1, 0.9], [1.9, 1.4])
    turn, lean = rng.uniform(-0.35, 0.35), rng.uniform(0.0, 0.3)
    right = size[0] * np.array([np.cos(turn), 0, np.sin(turn)])
    down = size[1] * np.array([np.sin(turn) * np.sin(lean), np.cos(lean), -np.cos(turn) * np.sin(lean)])
    middle = np.array([x, rng.uniform(-height + 1.1, -1.3), depth - rng.uniform(0.6, 1.2)])
    return _shape(_clipping(next(pictures), right, down, rng), middle - right / 2 - down / 2, right, down)


def _clipping(photograph: np.ndarray, right: np.ndarray, down: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A large part of a photograph, of the shape of a face, perhaps mirrored, in another tint."""
    aspect = np.linalg.norm(right) / np.linalg.norm(down)
    height, width = photograph.shape[:2]
    scale = rng.uniform(0.75, 1) * min(width / aspect, height)
    rows, columns = int(scale), int(scale * aspect)
    top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
    part = photograph[top : top + rows, left : left + columns]
    part = part[:, ::-1] if rng.random() < 0.5 else part
    if rows > _FACE_TEXELS:
        part = cv2.resize(part, (int(_FACE_TEXELS * aspect), _FACE_TEXELS), interpolation=cv2.INTER_AREA)
    return _grained(part, 1, rng)


def _wall(photographs: Photographs, rng: np.random.Generator) -> np.ndarray:
    name = rng.choice(WALLS)
    return _tiled(photographs[name], 2 if len(photographs[name]) < 800 else 1, rng)


def _tiled(photograph: np.ndarray, times: int, rng: np.random.Generator) -> np.ndarray:
    """A photograph and its mirror images side by side, with stains that make every place different."""
    rows = [np.hstack([photograph[:, :: (-1) ** k] for k in range(times)])]
    return _grained(np.vstack([rows[0][:: (-1) ** k] for k in range(times)]), 0.35, rng)


def _grained(texture: np.ndarray, largest: float, rng: np.random.Generator) -> np.ndarray:
    """``texture`` in another tint, with stains of every size from ``largest`` of its height down to a texel."""
    height, width = texture.shape[:2]
    stains = np.zeros((height, width), np.float32)
    cells = 2 / largest
    while cells < height:
        noise = rng.standard_normal((max(2, int(cells)), max(2, int(cells * width / height))), np.float32)
        stains += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        cells *= 2
    tint = rng.uniform(0.88, 1.08, size=3).astype(np.float32)
    return np.clip(texture * tint * (1 + 0.03 * stains[:, :, None]), 0, 1)


def _lit(shapes: list[_Shape], lamp: np.ndarray) -> list[Surface]:
    """The surfaces with the light of a distant lamp, which shines along ``lamp``, baked into their textures."""
    surfaces = []
    for texture, corner, right, down in shapes:
        normal = np.cross(right, down)
        facing = abs(float(normal @ lamp)) / np.linalg.norm(normal)
        rows, columns = np.maximum(1, np.array(texture.shape[:2]) * _LIGHT_TEXELS // max(texture.shape))
        shade = np.zeros((rows, columns), np.float32)
        for _, *other in shapes:
            outline = _shadow(corner, right, down, lamp, *other)
            if outline is not None:
                pixels = np.round(np.clip(outline, -2, 3) * (columns, rows) * 16).astype(np.int32)
                cv2.fillConvexPoly(shade, pixels, 1.0, cv2.LINE_AA, shift=4)
        shade = cv2.resize(cv2.GaussianBlur(shade, (0, 0), 1.0), texture.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        lit = texture * (0.7 + 0.4 * facing * (1 - shade) - 0.15 * shade)[:, :, None]
        surfaces.append(Surface(corner, right, down, mipmap(lit)))
    return surfaces


def _shadow(
    corner: np.ndarray, right: np.ndarray, down: np.ndarray, lamp: np.ndarray, *other: np.ndarray
) -> np.ndarray | None:
    """Outline [4, 2], in units of ``right`` and ``down``, of the shadow that the other parallelogram casts; or None."""
    corner1, right1, down1 = other
    outline = corner1 + np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) @ np.stack([right1, down1])
    a, b, ahead = np.linalg.solve(np.stack([right, down, -lamp], axis=1), (outline - corner).T)
    if ahead.min() < -1e-6 or ahead.max() < 1e-6:
        return None
    return np.stack([a, b], axis=1)
