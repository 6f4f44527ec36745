"""SAM 2's targets against transformers' processor, model and mask post-processing on the same random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torchvision.ops import nms

from samfeat.teacher_cache.schema import Provenance
from samfeat.teacher_cache.teachers import make_teacher, teacher_of
from samfeat.teacher_cache.teachers.edges import edge_map
from samfeat.teacher_cache.teachers.masks import paint
from samfeat.teacher_cache.teachers.sam import SamTeacher

transformers = pytest.importorskip("transformers", reason="pip install 'samfeat[sam2]'")

SIDE = 256  # pixels of the toy's input
WIDE = skimage.data.astronaut()[:120, 100:300]
SQUARE = skimage.data.astronaut()[:160, 120:280]
ASK = {
    "points_per_side": 6,
    "pred_iou_thresh": 0.1,
    "stability_score_thresh": 0.3,
    "box_nms_thresh": 0.95,
    "edge_points_per_side": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy in the layout of the official folders, which hold the model for videos."""
    torch.manual_seed(5)
    configuration = transformers.Sam2VideoConfig(
        vision_config={
            "model_type": "sam2_vision_model",
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 16,
                "image_size": [SIDE, SIDE],
                "embed_dim_per_stage": [16, 32, 64, 128],
                "num_attention_heads_per_stage": [1, 2, 4, 8],
                "blocks_per_stage": [1, 1, 2, 1],
                "global_attention_blocks": [3],
            },
            "backbone_channel_list": [128, 64, 32, 16],
            "backbone_feature_sizes": [[64, 64], [32, 32], [16, 16]],
            "fpn_hidden_size": 32,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": SIDE},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
        image_size=SIDE,
        memory_attention_hidden_size=32,
        memory_attention_feed_forward_hidden_size=32,
        memory_attention_rope_feat_sizes=[16, 16],
        memory_encoder_hidden_size=32,
        memory_encoder_output_channels=16,
        mask_downsampler_embed_dim=32,
        memory_fuser_embed_dim=32,
    )
    toy = transformers.Sam2VideoModel(configuration)
    liven(toy)
    path = tmp_path_factory.mktemp("sam2")
    toy.save_pretrained(path)
    return path


@torch.no_grad()
def liven(toy: Any) -> None:
    """Random weights give noise, the same for all prompts; here they give smooth blobs that differ.

    The last channel of the upscaled features becomes a constant, which shifts every mask to its median.
    """
    toy.vision_encoder.backbone.pos_embed.normal_()
    for convolution in toy.vision_encoder.neck.convs:
        convolution.weight.normal_(std=0.5)
    toy.no_memory_embedding.normal_()
    shared = toy.shared_image_embedding.positional_embedding
    toy.prompt_encoder.shared_embedding.positional_embedding.copy_(shared.mul_(0.5))
    decoder = toy.mask_decoder
    for name, values in decoder.named_parameters():
        if name.startswith("upscale_conv") and values.ndim == 4:
            values.copy_(torch.randn(values.shape[:2])[..., None, None].expand_as(values) * 0.3)
        elif values.ndim == 2:
            values.normal_(std=0.25)
    decoder.upscale_conv2.weight[:, -1] = 0
    decoder.upscale_conv2.bias[-1] = 3  # GELU(3) is 3 to within 0.5 %
    decoder.conv_s0.weight[-1] = 0
    decoder.conv_s0.bias[-1] = 0
    for head in decoder.output_hypernetworks_mlps:
        head.proj_out.weight[-1] = 0
    points = torch.rand(1, 32, 1, 2) * SIDE
    sparse, dense = toy.prompt_encoder(points, torch.ones(1, 32, 1, dtype=torch.int), None, None)
    logits = decoder(
        image_embeddings=torch.randn(1, 32, 16, 16),
        image_positional_embeddings=toy.get_image_wide_positional_embeddings(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
        high_resolution_features=[torch.zeros(1, 4, 64, 64), torch.zeros(1, 8, 32, 32)],
    )[0][0]
    for head, values in zip(decoder.output_hypernetworks_mlps[1:], logits.transpose(0, 1)):
        scale = 8 / values.std()
        head.proj_out.weight.mul_(scale)
        head.proj_out.bias.mul_(scale)
        head.proj_out.bias[-1] = -values.median() * scale / 3


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return transformers.Sam2Model.from_pretrained(folder, local_files_only=True).eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    size = {"height": SIDE, "width": SIDE}
    return transformers.Sam2Processor(transformers.Sam2ImageProcessor(size=size))


@pytest.fixture(scope="module")
def teacher(folder: Path) -> SamTeacher:
    return make_teacher("sam2", checkpoint=folder, device="cpu", options=ASK)


def ask_library(model: Any, processor: Any, image: np.ndarray, per_side: int) -> tuple[np.ndarray, Any, Any]:
    """The embedding [c, h, w], all mask logits [p, 3, H, W] and predicted IoU [p, 3] of a grid of prompts."""
    height, width = image.shape[:2]
    grid = (np.arange(per_side) + 0.5) / per_side
    points = [[[float(x * width), float(y * height)]] for y in grid for x in grid]
    given = processor(images=image, input_points=[points], return_tensors="pt")
    labels = torch.ones(given["input_points"].shape[:3], dtype=torch.int)
    with torch.no_grad():
        embedding = model.get_image_embeddings(given["pixel_values"])[-1][0].numpy()
        said = model(pixel_values=given["pixel_values"], input_points=given["input_points"], input_labels=labels)
    (logits,) = processor.post_process_masks(said.pred_masks, [image.shape[:2]], binarize=False)
    return embedding, logits, said.iou_scores[0]


def library_masks(processor: Any, image: np.ndarray, logits: Any, iou: Any) -> np.ndarray:
    """Masks that the library's filters leave, bool [K, H, W]."""
    height, width = image.shape[:2]
    box = torch.tensor([0.0, 0.0, width, height])
    kept = processor.image_processor.filter_masks(
        logits, iou, (height, width), box, ASK["pred_iou_thresh"], ASK["stability_score_thresh"]
    )
    masks, *_ = processor.image_processor.post_process_for_mask_generation(*kept, ASK["box_nms_thresh"])
    return np.stack(masks)


def by_area(masks: np.ndarray) -> np.ndarray:
    """Largest first, as :func:`sort_masks` does; the toy has no two of one size."""
    areas = masks.sum((1, 2))
    assert len(set(areas.tolist())) == len(masks)
    return masks[np.argsort(-areas)]


@pytest.mark.parametrize("image", [SQUARE, WIDE], ids=["square", "wide"])
def test_targets_are_those_of_the_library(model, processor, teacher, image):
    (output,) = teacher(image[None])
    embedding, logits, iou = ask_library(model, processor, image, ASK["points_per_side"])
    assert teacher.embedding_shape(image.shape[:2]) == output.embedding.shape == (32, 16, 16)
    np.testing.assert_allclose(output.embedding, embedding, atol=1e-4)
    expected = library_masks(processor, image, logits, iou)
    assert 3 <= len(expected) < logits.shape[0] * 3  # some pass, and some do not
    np.testing.assert_array_equal(output.masks.stack, by_area(expected))
    np.testing.assert_array_equal(output.groups, paint(by_area(expected)))


@pytest.mark.parametrize("image", [SQUARE, WIDE], ids=["square", "wide"])
def test_edges_are_those_of_the_librarys_masks(model, processor, teacher, image):
    (output,) = teacher(image[None])
    _, logits, iou = ask_library(model, processor, image, ASK["edge_points_per_side"])
    logits, iou = logits.flatten(0, 1), iou.flatten()
    boxes = []
    for mask in (logits > 0).numpy():
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes.append([columns[0], rows[0], columns[-1], rows[-1]] if len(rows) else [0, 0, 0, 0])
    kept = nms(torch.tensor(np.array(boxes), dtype=torch.float32), iou, ASK["box_nms_thresh"])
    expected = edge_map(logits[kept].sigmoid(), logits[kept] > 0)
    assert expected.max() > 60
    assert (np.abs(output.edges.astype(int) - expected) > 1).mean() <= 1e-4


def test_groups_are_those_of_the_librarys_pipeline(model, processor, teacher):
    """On a square image: on others, the pipeline places its points as if the image were padded."""
    generate = transformers.pipeline("mask-generation", model=model, image_processor=processor.image_processor)
    said = generate(
        Image.fromarray(SQUARE),
        points_per_crop=ASK["points_per_side"],
        pred_iou_thresh=ASK["pred_iou_thresh"],
        stability_score_thresh=ASK["stability_score_thresh"],
        crops_nms_thresh=ASK["box_nms_thresh"],
    )
    (output,) = teacher(SQUARE[None])
    np.testing.assert_array_equal(output.masks.stack, by_area(np.stack([np.asarray(mask) for mask in said["masks"]])))


def test_images_of_a_batch_do_not_meet(teacher):
    images = np.stack([WIDE, WIDE[::-1]])
    encoder, decoder = teacher._parts
    with torch.inference_mode():
        maps = encoder(teacher._pixels(teacher._scaled(images)))
        together = decoder.decode(decoder.image_side(*maps), decoder.tokens(torch.tensor([[20.0, 30.0]])))
        apart = [
            decoder.decode(
                decoder.image_side(*(m[k : k + 1] for m in maps)), decoder.tokens(torch.tensor([[20.0, 30]]))
            )
            for k in range(2)
        ]
    assert together.image.tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(together.logits, torch.cat([each.logits for each in apart]), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together.logits[:3], together.logits[3:], atol=0.1)


def test_a_store_can_be_recomputed(teacher, folder):
    described = teacher.provenance()
    assert described["name"] == "sam2"
    assert described["transformers"] == transformers.__version__
    assert teacher_of(Provenance(described, {}, {}, 0)) is None
    again = teacher_of(Provenance(described, {}, {}, 0), checkpoint=folder)
    np.testing.assert_array_equal(again(WIDE[None])[0].groups, teacher(WIDE[None])[0].groups)


def test_bfloat16_is_close(teacher, folder):
    rough = make_teacher("sam2", checkpoint=folder, device="cpu", options=ASK | {"precision": "bfloat16"})
    embedding, expected = rough(WIDE[None])[0].embedding, teacher(WIDE[None])[0].embedding
    assert 0 < np.abs(embedding - expected).max() <= 0.05 * np.abs(expected).max()


def test_other_weights_are_refused_in_one_line(folder, tmp_path):
    with pytest.raises(ValueError, match="give --checkpoint FOLDER"):
        make_teacher("sam2")
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        make_teacher("sam2", checkpoint=tmp_path)
    described = json.loads((folder / "config.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    described["prompt_encoder_config"]["hidden_size"] = 64
    cases = {
        "no json": ("{", weights),
        "no config": ("[]", weights),
        "another size": (json.dumps(described), weights),
        "cut": ((folder / "config.json").read_text(), weights[:-100]),
    }
    for name, (config, content) in cases.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        (tmp_path / name / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"does not hold SAM 2's weights, or is damaged") as error:
            make_teacher("sam2", checkpoint=tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_missing_package_is_named_with_its_extra(folder, monkeypatch):
    monkeypatch.setattr("samfeat.teacher_cache.teachers.sam2.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'samfeat\[sam2\]'"):
        make_teacher("sam2", checkpoint=folder)
