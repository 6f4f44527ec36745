import cv2
import numpy as np
import pytest
import skimage.data

from samfeat.teacher_cache.schema import POINTS
from samfeat.teacher_cache.sources import open_source
from samfeat.teacher_cache.sources.aligned import AlignedSource
from samfeat.teacher_cache.sources.protocol import sha256_of

CAT = skimage.data.chelsea()  # 300 x 451


def write_view(folder, brightness=(1.0, 0.8, 0.6), image=CAT):
    folder.mkdir(parents=True)
    for k, factor in enumerate(brightness):
        cv2.imwrite(str(folder / f"{k}.png"), np.rint(image[:, :, ::-1] * factor).astype(np.uint8))


@pytest.fixture
def views(tmp_path):
    write_view(tmp_path / "views" / "harbour")
    write_view(tmp_path / "views" / "square", image=CAT[:, ::-1])
    (tmp_path / "views" / "harbour" / "check.json").write_text("{}")
    return tmp_path / "views"


def test_items_are_the_same_crop_of_two_photographs_of_one_view(views):
    source = AlignedSource(views, crop_size=(64, 96), pairs_per_scene=6)
    assert (source.paired, source.crop_size, len(source)) == (True, (64, 96), 12)
    drawn = []
    for k in range(12):
        item = source.item(k)
        assert item.boxes[0] == item.boxes[1]
        left, top, width, height = item.boxes[0]
        assert (width, height) == (96, 64)
        paths = [views / name.split("#")[0] for name in item.names]
        assert paths[0] != paths[1]
        assert paths[0].parent == paths[1].parent == views / ("harbour" if k < 6 else "square")
        for image, path, digest in zip(item.images, paths, item.sha256):
            expected = cv2.imread(str(path))[top : top + 64, left : left + 96, ::-1]
            np.testing.assert_array_equal(image, expected)
            assert digest == sha256_of(path.read_bytes())
        drawn.append(tuple(sorted(paths)))
    assert len(set(drawn[:6])) == len(set(drawn[6:])) == 3  # three photographs make three pairs, each drawn twice
    assert len({source.item(k).boxes for k in range(12)}) > 6


def test_points_are_a_regular_grid_that_corresponds_to_itself(views):
    item = AlignedSource(views, crop_size=(60, 80)).item(0)
    assert item.valid.dtype == bool
    assert item.valid.shape == (POINTS,)
    assert item.valid.all()
    assert item.points.dtype == np.float32
    np.testing.assert_array_equal(item.points[0], item.points[1])
    expected = [(x, y) for y in np.arange(1.0, 60, 3) for x in np.arange(1.5, 80, 4)]  # cells of 4 x 3 pixels
    np.testing.assert_allclose(item.points[0], expected)


def test_everything_follows_from_the_seed(views):
    first, again = (AlignedSource(views, crop_size=(64, 64), seed=3) for _ in range(2))
    assert first.provenance() == again.provenance()
    for k in (5, 0):
        assert (first.item(k).names, first.item(k).boxes) == (again.item(k).names, again.item(k).boxes)
    other = AlignedSource(views, crop_size=(64, 64), seed=4)
    assert [other.item(k).boxes for k in range(5)] != [first.item(k).boxes for k in range(5)]


def test_photographs_of_another_size_are_passed_over(views):
    cv2.imwrite(str(views / "harbour" / "wide.png"), cv2.resize(CAT, (700, 300)))
    source = AlignedSource(views, crop_size=(64, 64), pairs_per_scene=20)
    assert not any("wide" in name for k in range(20) for name in source.item(k).names)
    with pytest.raises(ValueError, match=r"scene square: .* smaller than the 400x400 crop"):
        AlignedSource(views, pairs_per_scene=1).item(1)


def test_folders_that_are_no_views(tmp_path, views):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        AlignedSource(tmp_path / "absent")
    with pytest.raises(ValueError, match="give each fixed camera a sub-folder"):
        AlignedSource(views / "harbour")
    write_view(views / "lonely", brightness=(1.0,))
    with pytest.raises(ValueError, match="lonely holds one photograph, a pair needs two"):
        AlignedSource(views)


def test_what_is_left_out_is_named(views):
    cv2.imwrite(str(views / "alone.png"), CAT)
    assert AlignedSource(views).left_out == [
        "left out 1 file of type .json, such as harbour/check.json",
        "left out 1 photographs in no sub-folder, such as alone.png",
    ]


def test_it_is_chosen_by_name(views):
    assert len(open_source(views, crop_size=64)) == 6  # a folder of photographs, by its layout
    source = open_source(views, kind="aligned", crop_size=64, pairs_per_scene=5)
    assert isinstance(source, AlignedSource)
    assert (len(source), source.crop_size) == (10, (64, 64))
    with pytest.raises(ValueError, match=r"unknown source 'video': choose one of .*aligned"):
        open_source(views, kind="video")
    with pytest.raises(FileNotFoundError, match="scene_info"):
        open_source(views, kind="megadepth")
