"""DINOv2's tokens as an embedding, against timm's network on images that torchvision prepared."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torchvision.transforms import v2

from samfeat.teacher_cache.schema import Provenance
from samfeat.teacher_cache.teachers import make_teacher, teacher_of
from samfeat.teacher_cache.teachers.classical import ClassicalTeacher

timm = pytest.importorskip("timm", reason="pip install 'samfeat[dinov2]'")

IMAGE = skimage.data.astronaut()[:300, 100:500]


def released(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A network's weights in the layout of the authors' files: 37 x 37 positions after that of the class token."""
    tensors = {name: values.clone() for name, values in network.state_dict().items()}
    if "reg_token" in tensors:
        tensors["register_tokens"] = tensors.pop("reg_token")
        class_position = torch.zeros(1, 1, tensors["pos_embed"].shape[2])
        tensors["pos_embed"] = torch.cat([class_position, tensors["pos_embed"]], dim=1)
    return tensors | {"mask_token": torch.zeros(1, tensors["cls_token"].shape[2])}


@pytest.fixture(scope="module", params=["", "_reg4"])
def network(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    made = timm.create_model(f"vit_small_patch14{request.param}_dinov2", num_classes=0, dynamic_img_size=True).eval()
    with torch.no_grad():
        for name, values in made.named_parameters():
            if name.endswith("gamma"):
                values.fill_(1)  # else the blocks hardly matter
    return made


def test_the_embedding_is_the_networks_own_patch_tokens(network, tmp_path):
    torch.save(released(network), tmp_path / "small.pth")
    teacher = make_teacher("dinov2", checkpoint=tmp_path / "small.pth", device="cpu")
    (output,) = teacher(IMAGE[None])
    assert teacher.embedding_shape(IMAGE.shape[:2]) == output.embedding.shape == (384, 28, 37)
    prepare = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Resize((28 * 14, 37 * 14), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    with torch.no_grad():
        (tokens,) = network.get_intermediate_layers(prepare(Image.fromarray(IMAGE))[None], n=1, reshape=True, norm=True)
    np.testing.assert_allclose(output.embedding, tokens[0].numpy(), atol=1e-4)
    (regions,) = ClassicalTeacher()(IMAGE[None])
    np.testing.assert_array_equal(output.groups, regions.groups)
    np.testing.assert_array_equal(output.edges, regions.edges)
    assert teacher_of(Provenance(teacher.provenance(), {}, {}, 0)) is None
    again = teacher_of(Provenance(teacher.provenance(), {}, {}, 0), checkpoint=tmp_path / "small.pth")
    np.testing.assert_array_equal(again(IMAGE[None])[0].embedding, output.embedding)


def test_other_weights_are_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="give --checkpoint dinov2_vits14_pretrain"):
        make_teacher("dinov2")
    for number, tensors in enumerate(({}, {"cls_token": torch.zeros(1, 1, 77)}, {"cls_token": torch.zeros(1, 1, 384)})):
        torch.save(tensors, tmp_path / f"{number}.pth")
        with pytest.raises(ValueError, match=r"\.pth does not hold DINOv2's weights") as error:
            make_teacher("dinov2", checkpoint=tmp_path / f"{number}.pth")
        assert "\n" not in str(error.value)


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    torch.save({}, tmp_path / "0.pth")
    monkeypatch.setattr("samfeat.teacher_cache.teachers.dinov2.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'samfeat\[dinov2\]'"):
        make_teacher("dinov2", checkpoint=tmp_path / "0.pth")
