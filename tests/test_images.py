import io
import os
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image

from samfeat import images
from samfeat.images import list_images, read_image
from samfeat.teacher_cache.schema import POINTS
from samfeat.teacher_cache.sources.folder import FolderSource
from samfeat.teacher_cache.sources.mtldesc import MtldescSource

CAT = skimage.data.chelsea()


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_reads_rgb_as_opencv_does(tmp_path):
    path = tmp_path / "cat.png"
    cv2.imwrite(str(path), CAT[:, :, ::-1])
    np.testing.assert_array_equal(read_image(path), CAT)
    np.testing.assert_array_equal(read_image(str(path)), CAT)
    np.testing.assert_array_equal(read_image(path.read_bytes()), CAT)
    jpeg = cv2.imencode(".jpg", CAT[:, :, ::-1])[1].tobytes()
    expected = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
    assert np.abs(read_image(jpeg).astype(int) - expected).max() <= 3  # two JPEG decoders


def test_grey_16_bit_palette_and_one_bit_become_rgb():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(read_image(encoded(Image.fromarray(grey), "PNG")), expected)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_image(encoded(deep, "PNG")), expected)
    np.testing.assert_array_equal(read_image(encoded(deep, "TIFF")), expected)
    palette = Image.fromarray(grey).convert("P")
    np.testing.assert_array_equal(read_image(encoded(palette, "PNG")), expected)
    one_bit = read_image(encoded(Image.fromarray(grey > 127), "PNG"))
    np.testing.assert_array_equal(one_bit, np.where(expected > 127, 255, 0))


def test_transparency_is_laid_over_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = (255, 0, 0, 255)
    rgba[2:] = (0, 0, 255, 0)
    image = read_image(encoded(Image.fromarray(rgba), "PNG"))
    assert (image[:2] == (255, 0, 0)).all()
    assert (image[2:] == 255).all()


def test_cmyk_becomes_rgb():
    cmyk = Image.fromarray(CAT).convert("CMYK")
    image = read_image(encoded(cmyk, "JPEG", quality=98))
    assert np.abs(image.astype(int) - CAT).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_as_opencv_applies_it(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(CAT), "JPEG", exif=exif, quality=95)
    expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
    image = read_image(data)
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).mean() < 1


def test_one_pixel():
    assert read_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).tolist() == [[[1, 2, 3]]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_files_are_refused(tmp_path, kind, share):
    data = encoded(Image.fromarray(CAT), kind)
    path = tmp_path / "cut.img"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"damaged|not an image") as error:
        read_image(path)
    assert str(path) in one_line(error)


def test_every_flipped_byte_is_read_or_refused():
    data = encoded(Image.fromarray(CAT[:40, :40]), "PNG")
    refused = 0
    for position in np.random.default_rng(0).integers(len(data), size=200):
        broken = bytearray(data)
        broken[position] ^= 0xFF
        try:
            read_image(bytes(broken))
        except ValueError as error:
            refused += "damaged" in str(error) or "not an image" in str(error)
    assert refused > 150  # any other error would have ended the test; PNG has checksums


def test_unusable_files_are_named(tmp_path):
    empty, text = tmp_path / "empty.jpg", tmp_path / "text.png"
    empty.touch()
    text.write_text("not an image")
    for path, reason in ((empty, "empty"), (text, "not an image"), (tmp_path, "folder")):
        with pytest.raises(ValueError, match=reason) as error:
            read_image(path)
        assert str(path) in one_line(error)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "absent.jpg")
    with pytest.raises(ValueError, match="floating") as error:
        read_image(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))


def test_bombs_are_refused_before_decoding():
    data = encoded(Image.new("1", (15000, 15000)), "PNG")
    with pytest.raises(ValueError, match="pixels allowed") as error:
        read_image(data, name="bomb.png")
    assert one_line(error).startswith("bomb.png")
    with pytest.raises(ValueError, match="451x300"):
        read_image(encoded(Image.fromarray(CAT), "PNG"), max_pixels=1000)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    (root / "deep").mkdir(parents=True)
    Image.fromarray(CAT).save(root / "deep" / "cat.PNG")
    Image.fromarray(skimage.data.astronaut()).save(root / "a.jpg")
    Image.fromarray(skimage.data.astronaut()[:60, :90]).save(root / "small.webp", lossless=True)
    (root / "notes.txt").write_text("no photograph")
    return root


def test_folder_crops(folder):
    source = FolderSource(folder, crop_size=(150, 160))
    assert (source.paired, source.crop_size, len(source)) == (False, (150, 160), 3)
    items = [source.item(k) for k in range(3)]
    assert [item.names for item in items] == [("a.jpg",), ("deep/cat.PNG",), ("small.webp",)]
    for item in items:
        assert item.images[0].shape == (150, 160, 3)
        assert item.images[0].dtype == np.uint8
        assert item.points is None
    left, top, width, height = items[1].boxes[0]  # 451 x 300 has room for 1 to 2 crops and is not resized
    np.testing.assert_array_equal(items[1].images[0], CAT[top : top + height, left : left + width])


def test_folder_scales(folder):
    reduced = FolderSource(folder, crop_size=(100, 100)).item(0)  # 512 > 2 x 100: reduced to 200
    left, top, width, height = reduced.boxes[0]
    assert (width, height) == (256, 256)
    source = read_image(folder / "a.jpg")
    expected = cv2.resize(source[top : top + height, left : left + width], (100, 100), interpolation=cv2.INTER_AREA)
    assert np.abs(reduced.images[0].astype(int) - expected).mean() < 6  # the box is rounded to source pixels
    enlarged = FolderSource(folder, crop_size=(120, 160)).item(2)  # 60 x 90 -> 120 x 180
    left, top, width, height = enlarged.boxes[0]
    assert (top, height, width) == (0, 60, 80)
    with pytest.raises(ValueError, match="90x60, too small") as error:
        FolderSource(folder, crop_size=(300, 300)).item(2)
    assert "small.webp" in one_line(error)


def test_folder_is_deterministic_and_independent_of_other_files(folder):
    before = FolderSource(folder, crop_size=(100, 100), seed=3)
    cat, digest = before.item(1), before.provenance()["names_sha256"]
    other_seed = FolderSource(folder, crop_size=(100, 100), seed=4)
    assert before.item(1).boxes == cat.boxes != other_seed.item(1).boxes
    moved = folder.rename(folder.with_name("moved"))
    assert FolderSource(moved, crop_size=(100, 100), seed=3).provenance() == before.provenance()
    (moved / "a.jpg").unlink()
    after = FolderSource(moved, crop_size=(100, 100), seed=3)
    assert after.item(0).boxes == cat.boxes
    np.testing.assert_array_equal(after.item(0).images[0], cat.images[0])
    assert after.provenance()["names_sha256"] != digest
    assert str(moved) not in str(after.provenance())


def test_folder_from_many_threads(folder):
    source = FolderSource(folder, crop_size=(100, 100))
    expected = source.item(1).images[0]
    found = []
    threads = [threading.Thread(target=lambda: found.append(source.item(1).images[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(np.array_equal(image, expected) for image in found)


def test_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        FolderSource(tmp_path / "absent", crop_size=(100, 100))
    with pytest.raises(ValueError, match="no photograph") as error:
        FolderSource(tmp_path, crop_size=(100, 100))
    one_line(error)
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8 cut")
    with pytest.raises(ValueError, match="a folder"):
        FolderSource(tmp_path / "bad.jpg", crop_size=(100, 100))
    source = FolderSource(tmp_path, crop_size=(100, 100))  # opens; the bad file shows when it is read
    with pytest.raises(ValueError, match=r"bad\.jpg"):
        source.item(0)
    with pytest.raises(ValueError, match="crop_size"):
        FolderSource(tmp_path, crop_size=(0, 100))


def write_mtldesc(root: Path, *, order: str, name: str = "0000000", number: int = 400, side: int = 400):
    """One pair in the released layout; the right crop is the left one moved 7 px to the left."""
    for part in ("image", "keypoint", "despoint"):
        (root / part).mkdir(parents=True, exist_ok=True)
    photo = cv2.resize(skimage.data.astronaut(), (side + 7, side))
    left, right = photo[:, :-7], photo[:, 7:]
    cv2.imwrite(
        str(root / "image" / f"{name}.jpg"), np.hstack([left, right])[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98]
    )
    rng = np.random.default_rng(1)
    points = rng.uniform(0, side - 1, size=(number, 2)).astype(np.float32)
    points[0], points[1] = (0, 0), (side - 1, side - 1)
    moved = points - (7, 0)
    valid = moved[:, 0] >= 0
    valid[5] = False
    moved[5] = 1e6  # far outside, as the released files have it
    labels_yx = rng.integers(0, side, size=(30, 2))
    np.savez(root / "keypoint" / f"{name}.npz", points_0=labels_yx, points_1=labels_yx[:11])
    flip = slice(None, None, -1) if order == "yx" else slice(None)
    np.savez(
        root / "despoint" / f"{name}.npz",
        desp_point1=(2 * points / (side - 1) - 1)[:, None].astype(np.float32),
        desp_point2=(2 * moved / (side - 1) - 1)[:, None].astype(np.float32),
        valid_mask=valid,
        not_search_mask=np.zeros((number, number), bool),
        raw_desp_point1=points[:, flip],
        raw_desp_point2=moved[:, flip],
    )
    return photo, points, moved, valid, labels_yx


@pytest.mark.parametrize("order", ["xy", "yx"])
def test_mtldesc_in_both_orders(tmp_path, order):
    photo, points, moved, valid, labels_yx = write_mtldesc(tmp_path, order=order)
    source = MtldescSource(tmp_path)
    assert (source.paired, source.crop_size, len(source)) == (True, (400, 400), 1)
    item = source.item(0)
    assert len(item.images) == 2
    for image, expected in zip(item.images, (photo[:, :-7], photo[:, 7:])):
        assert np.abs(image.astype(int) - expected).mean() < 3
    assert item.points.shape == (2, POINTS, 2)
    assert item.points.dtype == np.float32
    np.testing.assert_array_equal(item.valid, valid)
    np.testing.assert_allclose(item.points[:, valid], np.stack([points, moved])[:, valid], atol=1e-3)
    assert np.isfinite(item.points).all()
    assert [labels.shape for labels in item.keypoints] == [(30, 3), (11, 3)]
    np.testing.assert_array_equal(item.keypoints[0][:, :2], labels_yx[:, ::-1])
    assert item.boxes == ((0, 0, 400, 400), (400, 0, 400, 400))
    assert len(set(item.names)) == 2


def test_mtldesc_pads_to_the_stored_number(tmp_path):
    _, points, _, valid, _ = write_mtldesc(tmp_path, order="xy", number=37, side=200)
    item = MtldescSource(tmp_path).item(0)
    assert item.valid.shape == (POINTS,)
    assert item.valid.sum() == valid.sum()
    np.testing.assert_allclose(item.points[0, :37][valid], points[valid], atol=1e-3)
    assert (item.points[:, 37:] == 0).all()


def test_mtldesc_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="image"):
        MtldescSource(tmp_path)
    write_mtldesc(tmp_path, order="xy")
    path = tmp_path / "despoint" / "0000000.npz"
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, "raw_desp_point1": arrays["raw_desp_point1"] + 3})
    with pytest.raises(ValueError, match=r"neither in \(x, y\) nor") as error:
        MtldescSource(tmp_path).item(0)
    assert str(path) in one_line(error)
    np.savez(path, **{key: value for key, value in arrays.items() if key != "valid_mask"})
    with pytest.raises(ValueError, match="lacks valid_mask"):
        MtldescSource(tmp_path).item(0)
    np.savez(path, **{**arrays, "valid_mask": np.array([object()] * 400)})
    with pytest.raises(ValueError, match="cannot be read"):
        MtldescSource(tmp_path).item(0)
    path.write_bytes(b"PK cut")
    with pytest.raises(ValueError, match="cannot be read"):
        MtldescSource(tmp_path).item(0)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="missing"):
        MtldescSource(tmp_path).item(0)
    write_mtldesc(tmp_path, order="xy", name="0000001", side=200)
    with pytest.raises(ValueError, match="400x200, but the first"):
        MtldescSource(tmp_path).item(1)


# -- 16 bits of small range -------------------------------------------------------------------------------------------


@pytest.fixture
def said(caplog):
    """What is logged about stretched images; the message comes once, so each test begins anew."""
    images._stretched.filters[0].said = False
    return caplog


@pytest.mark.parametrize(("low", "high"), [(0, 4095), (7000, 7060), (40000, 40060), (0, 16383), (100, 900)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_few_bits_in_16_use_the_whole_range(said, low, high, kind):
    grey = np.rint(np.linspace(low, high, 64 * 64)).astype(np.uint16).reshape(64, 64)
    image = read_image(encoded(Image.fromarray(grey), kind), name="thermal.png")
    levels = np.clip((grey - np.float64(low)) / (high - low) * 255, 0, 255)
    assert np.abs(image[:, :, 0] - levels).max() <= 1 + 255 * 0.002  # 0.1 % at either end
    assert (image.min(), image.max()) == (0, 255)
    assert (image[:, :, :1] == image).all()
    read_image(encoded(Image.fromarray(grey), kind), name="another.png")
    assert [record.getMessage() for record in said.records] == [said.records[0].getMessage()]
    assert "thermal.png: 16-bit values of" in said.text


@pytest.mark.parametrize("bits", [12, 16])
def test_colour_of_16_bits(said, bits):
    photo = CAT.astype(np.uint16) << (bits - 8)
    data = cv2.imencode(".png", photo[:, :, ::-1])[1].tobytes()
    image = read_image(data)
    if bits == 16:
        assert np.abs(image.astype(int) - CAT).max() <= 1
        assert not said.records
    else:
        low, high = np.percentile(CAT, (0.1, 99.9))
        assert np.abs(image - np.clip((CAT - low) / (high - low) * 255, 0, 255)).max() <= 2
        assert said.records


def test_an_outlier_does_not_dim_a_thermal_image(said):
    grey = np.random.default_rng(0).integers(7000, 7061, (100, 100)).astype(np.uint16)
    grey[0, :3] = 65535  # dead pixels
    image = read_image(encoded(Image.fromarray(grey), "PNG"))
    assert image.std() > 60


@pytest.mark.parametrize("value", [0, 1, 300, 65535])
def test_one_value_everywhere(value):
    image = read_image(encoded(Image.fromarray(np.full((8, 8), value, np.uint16)), "PNG"))
    assert len(np.unique(image)) == 1


# -- folders ----------------------------------------------------------------------------------------------------------


def test_links_are_followed_once_and_what_is_not_read_is_named(tmp_path):
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for path in (folder / "a.jpg", folder / "sub" / "b.JPEG", elsewhere / "c.png", elsewhere / "deep" / "d.webp"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(CAT).save(path, "PNG")
    (folder / "link").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere / "deep")  # found through the other link too
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "0first").symlink_to(folder / "sub")  # its own name stays
    (folder / "dangling").symlink_to(tmp_path / "absent")
    for name in ("1.heic", "2.HEIC", "sub/x.cr2", "notes.txt", "README", ".hidden"):
        (folder / name).write_bytes(b"x")
    for name in ("e.gif", "f.jfif", "g.jp2"):
        Image.fromarray(CAT).save(folder / name, {"e.gif": "GIF", "f.jfif": "JPEG", "g.jp2": "JPEG2000"}[name])
    found = list_images(folder)
    expected = ["a.jpg", "again/d.webp", "e.gif", "f.jfif", "g.jp2", "link/c.png", "sub/b.JPEG"]
    assert found.images == expected
    assert found.left_out == [
        "left out 1 file of type .cr2, such as sub/x.cr2; convert to JPEG to use them",
        "left out 2 files of type .heic, such as 1.heic; convert to JPEG to use them",
        "left out 1 file of type .txt, such as notes.txt",
        "left out 1 file without a type, such as README",
    ]
    assert FolderSource(folder, crop_size=(64, 64)).names == expected
    assert FolderSource(folder, crop_size=(64, 64)).left_out == found.left_out
    for name in expected:
        assert read_image(folder / name).shape == CAT.shape


def test_names_that_are_not_utf_8_are_left_out_and_named(tmp_path):
    Image.fromarray(CAT).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    Image.fromarray(CAT).save(tmp_path / "b.png")
    source = FolderSource(tmp_path, crop_size=(64, 64))
    assert source.names == ["b.png"]
    assert source.left_out == ["left out '\\udcff.png': its name is not UTF-8, rename it"]


@pytest.mark.real
def test_real_photographs():
    root = Path(os.environ.get("SAMFEAT_DATA", "../shared/data")) / "photos" / "images"
    if not root.is_dir():
        pytest.skip(f"{root} is absent; set SAMFEAT_DATA to the folder of photographs")
    source = FolderSource(root, crop_size=(400, 400))
    for k in range(0, len(source), max(1, len(source) // 5)):
        assert source.item(k).images[0].shape == (400, 400, 3)
