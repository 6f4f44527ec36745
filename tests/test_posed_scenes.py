import numpy as np
import pytest
from synthetic_scenes import aachen_lens, cameras, write_aachen, write_cameras, write_photographs

from samfeat.pipelines.evaluation import posed_scenes
from samfeat.pipelines.evaluation.posed_scenes import AACHEN_THRESHOLDS, find_posed_scenes, read_aachen, split_scene


@pytest.mark.parametrize("nvm", [False, True])
def test_aachen_is_read_as_it_is_distributed(tmp_path, nvm):
    posed, _ = write_aachen(tmp_path / "aachen_v1.1", nvm=nvm)
    (scene,) = find_posed_scenes(tmp_path / "aachen_v1.1")
    assert scene.name == "aachen_v1.1"
    assert scene.folder == tmp_path / "aachen_v1.1" / "images_upright"
    assert sorted(scene.names) == sorted(posed)
    for name, (lens, pose) in scene.database.items():
        assert np.allclose(pose.rotation, posed[name].pose.rotation)
        assert np.allclose(pose.translation, posed[name].pose.translation)
        assert lens.params.tolist() == aachen_lens(list(posed).index(name)).params.tolist()
    for name, lens in scene.queries.items():
        assert lens.params.tolist() == aachen_lens(list(posed).index(name)).params.tolist()
    assert scene.truth is None
    assert scene.thresholds == AACHEN_THRESHOLDS == ((0.25, 2), (0.5, 5), (5, 10))
    assert scene.poses_file.format(name="sift") == "Aachen_v1_1_eval_[sift].txt"
    assert {subset: len(queries) for subset, queries in scene.subsets().items()} == {"all": 3, "day": 1, "night": 2}
    assert len(scene.query_pairs) == 15
    assert all(query.startswith("query/") and not name.startswith("query/") for query, name in scene.query_pairs)


def test_map_pairs_are_given_or_the_most_covisible(tmp_path, monkeypatch):
    write_aachen(tmp_path)
    names = sorted(read_aachen(tmp_path).database)
    near = {(a, b) for k, a in enumerate(names) for b in names[k + 1 : k + 3]}  # who shares points, see write_model
    assert set(read_aachen(tmp_path).map_pairs) == near
    monkeypatch.setattr(posed_scenes, "COVISIBLE", 1)
    assert set(read_aachen(tmp_path).map_pairs) < near
    (tmp_path / "pairs").mkdir()
    listed = [(names[0], names[1]), (names[1], names[0]), (names[2], names[5])]
    (tmp_path / "pairs" / "pairs-db-covis20.txt").write_text("".join(f"{a} {b}\n" for a, b in listed))
    assert read_aachen(tmp_path).map_pairs == [listed[0], listed[2]]


def test_small_sets_need_no_lists_and_large_ones_do(tmp_path, monkeypatch):
    write_aachen(tmp_path, nvm=True)
    (tmp_path / "pairs-query-netvlad50.txt").unlink()
    scene = read_aachen(tmp_path)
    assert (len(scene.map_pairs), len(scene.query_pairs)) == (15, 18)
    monkeypatch.setattr(posed_scenes, "MOST_EXHAUSTIVE", 5)
    with pytest.raises(FileNotFoundError, match="pairs-db-covis20"):
        read_aachen(tmp_path)
    (tmp_path / "pairs-db-covis20.txt").write_text("db/0.jpg db/1.jpg\n")
    with pytest.raises(FileNotFoundError, match="pairs-query-netvlad50"):
        read_aachen(tmp_path)


@pytest.mark.parametrize(
    ("path", "text", "error", "message"),
    [
        ("queries/day_time_queries_with_intrinsics.txt", "a.jpg PINHOLE 640 480 1 2\n", ValueError, "PINHOLE 640"),
        ("queries/day_time_queries_with_intrinsics.txt", "a.jpg FISHY 640 480 1 2 3\n", ValueError, "FISHY"),
        ("queries/day_time_queries_with_intrinsics.txt", "a.jpg PINHOLE\n", ValueError, "camera model"),
        ("pairs-query-netvlad50.txt", "db/0.jpg db/1.jpg\n", ValueError, "two names"),
        ("pairs-query-hloc.txt", "", ValueError, "keep one list"),
        ("3D-models/aachen_v_1_1/aachen_v_1_1.nvm", "NVM_V3\n\n2\nx\n", ValueError, "NVM_V3"),
        ("3D-models/aachen_v_1_1/database_intrinsics_v1_1.txt", "", ValueError, "lacks the camera of 'db/0.jpg'"),
        ("images_upright/db/2.jpg", None, FileNotFoundError, "lacks db/2.jpg"),
        ("3D-models/aachen_v_1_1/aachen_v_1_1.nvm", None, FileNotFoundError, "nvm model"),
    ],
)
def test_a_damaged_aachen_is_refused_in_one_line(tmp_path, path, text, error, message):
    write_aachen(tmp_path, nvm=True)
    if text is None:
        (tmp_path / path).unlink()
    else:
        (tmp_path / path).write_text(text)
    with pytest.raises(error, match=message) as caught:
        read_aachen(tmp_path)
    assert "\n" not in str(caught.value)


def test_every_third_image_is_a_query(tmp_path):
    posed = cameras(8)
    write_photographs(tmp_path / "place" / "images", list(posed))
    write_cameras(tmp_path / "place", posed)
    (scene,) = find_posed_scenes(tmp_path)
    assert list(scene.queries) == ["0001.png", "0004.png", "0007.png"]
    assert list(scene.truth) == list(scene.queries)
    assert set(scene.database) == set(posed) - set(scene.queries)
    assert (len(scene.map_pairs), len(scene.query_pairs)) == (10, 15)
    centres = [camera.pose.centre for name, camera in posed.items() if name in scene.database]
    extent = max(np.linalg.norm(a - b) for a in centres for b in centres)
    assert np.array(scene.thresholds) == pytest.approx(
        np.array([(0.0005 * extent, 2), (0.001 * extent, 5), (0.01 * extent, 10)])
    )
    assert scene.subsets() == {"all": list(scene.queries)}


def test_another_split_or_pose_is_another_identity(tmp_path):
    posed = cameras(8)
    write_photographs(tmp_path / "images", list(posed))
    write_cameras(tmp_path, posed)
    first = split_scene(tmp_path).identity()
    assert split_scene(tmp_path).identity() == first
    camera = posed["0000.png"]
    posed["0000.png"] = camera._replace(pose=camera.pose._replace(translation=camera.pose.translation + 0.01))
    write_cameras(tmp_path, posed)
    assert split_scene(tmp_path).identity() != first


def test_what_is_no_scene_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        find_posed_scenes(tmp_path / "absent")
    with pytest.raises(ValueError, match="neither Aachen"):
        find_posed_scenes(tmp_path)
    write_cameras(tmp_path, cameras(4))
    with pytest.raises(ValueError, match="at least 5"):
        find_posed_scenes(tmp_path)
    write_cameras(tmp_path, cameras(6))
    with pytest.raises(FileNotFoundError, match=r"lacks 0000\.png"):
        find_posed_scenes(tmp_path)
