"""Fixtures that more than one test file uses."""

import os
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers of two threads each take turns on two cores

import cv2
import pytest
import skimage.data
import torch
from hypothesis import settings
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from toy_runs import leave_out_charts
from toys import toy_store

from samfeat.student.extractor import SAMFeat
from samfeat.student.onnx import export_onnx

settings.register_profile("fixed", derandomize=True)  # the same examples every time
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))  # "default" draws new ones

CHANNELS, INPUT_SIZE, STRIDE = 32, 256, 16
CELLS = INPUT_SIZE // STRIDE


def build_toy_sam() -> Sam:
    """SAM's real classes at toy size (256-pixel input, 16 x 16 x 32 embedding) with fixed random weights.

    A random SAM gives noise that hardly depends on the prompt. Smooth positions, plain upsampling, a livelier
    transformer and masks centred on their mean make it give smooth blobs that differ from prompt to prompt.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        encoder = ImageEncoderViT(
            img_size=INPUT_SIZE,
            patch_size=STRIDE,
            embed_dim=48,
            depth=2,
            num_heads=2,
            out_chans=CHANNELS,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=7,
            global_attn_indexes=(1,),
        )
        coarse = torch.randn(1, 48, 4, 4)
        smooth = torch.nn.functional.interpolate(coarse, (CELLS, CELLS), mode="bicubic")
        encoder.pos_embed.copy_(smooth.permute(0, 2, 3, 1))

        prompts = PromptEncoder(CHANNELS, (CELLS, CELLS), (INPUT_SIZE, INPUT_SIZE), mask_in_chans=16)
        prompts.pe_layer.positional_encoding_gaussian_matrix.mul_(0.5)

        decoder = MaskDecoder(
            transformer_dim=CHANNELS,
            transformer=TwoWayTransformer(depth=2, embedding_dim=CHANNELS, num_heads=2, mlp_dim=64),
            iou_head_hidden_dim=32,
        )
        for weight in decoder.transformer.parameters():
            if weight.ndim == 2:
                weight.mul_(2)
        for layer in (decoder.output_upscaling[0], decoder.output_upscaling[3]):
            layer.weight.copy_(layer.weight.mean((2, 3), keepdim=True).expand_as(layer.weight) * 6)
        sam = Sam(encoder, prompts, decoder).eval()
        _centre_masks(sam)
        return sam


def _centre_masks(sam: Sam) -> None:
    """Turn the last channel of the upscaled features into a constant and use it to shift every mask by its mean."""
    decoder = sam.mask_decoder
    decoder.output_upscaling[3].weight[:, -1] = 0
    decoder.output_upscaling[3].bias[-1] = 3  # GELU(3) is 3 to within 0.5 %
    for head in decoder.output_hypernetworks_mlps:
        head.layers[0].weight.mul_(3)
        head.layers[-1].weight[-1] = 0
        head.layers[-1].bias[-1] = 0
    points, labels = torch.rand(32, 1, 2) * INPUT_SIZE, torch.ones(32, 1)
    sparse, dense = sam.prompt_encoder(points=(points, labels), boxes=None, masks=None)
    logits, _ = decoder(
        image_embeddings=sam.image_encoder(torch.randn(1, 3, INPUT_SIZE, INPUT_SIZE)),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
    )
    for head, values in zip(decoder.output_hypernetworks_mlps[1:], logits.transpose(0, 1)):
        head.layers[-1].weight.mul_(8 / values.std())
        head.layers[-1].bias.mul_(8 / values.std())
        head.layers[-1].bias[-1] = -values.median() * 8 / values.std() / 3
    decoder.iou_prediction_head.layers[-1].bias.add_(0.75)


@pytest.fixture(scope="session")
def toy_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of six pairs of toy crops, ``a.zarr``; nobody changes it."""
    folder = tmp_path_factory.mktemp("toy_cache")
    toy_store(folder / "a.zarr")
    return folder


@pytest.fixture
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_charts(monkeypatch)


@pytest.fixture(scope="session")
def toy_sam() -> Sam:
    """A real SAM small enough for tests; nobody changes it."""
    return build_toy_sam()


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A folder with the slim student as ``fp32.onnx`` and ``int8.onnx``, of 200 keypoints."""
    student = SAMFeat.from_pretrained("samfeat-slim", max_keypoints=200)
    folder = tmp_path_factory.mktemp("exported")
    export_onnx(folder / "fp32.onnx", student)
    photographs = (skimage.data.coffee(), skimage.data.chelsea())
    calibration = [cv2.resize(image, (240, 160), interpolation=cv2.INTER_AREA) for image in photographs]
    export_onnx(folder / "int8.onnx", student, calibration=calibration)
    return folder
