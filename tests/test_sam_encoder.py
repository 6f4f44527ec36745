"""SAM's image encoder in batches, against ImageEncoderViT on the same weights."""

from functools import partial

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from torch.utils.flop_counter import FlopCounterMode

from samfeat.teacher_cache.teachers.sam_encoder import SamEncoder

CELLS, WIDTH, HEADS = 8, 24, 3


def random_encoder(window: int) -> ImageEncoderViT:
    """Two windowed blocks around a global one; every weight counts, positions and biases above all."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        encoder = ImageEncoderViT(
            img_size=16 * CELLS,
            embed_dim=WIDTH,
            depth=3,
            num_heads=HEADS,
            out_chans=16,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=window,
            global_attn_indexes=(1,),
        )
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        return encoder.eval()


def pixels(images: int = 2) -> torch.Tensor:
    return torch.randn(images, 3, 16 * CELLS, 16 * CELLS, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("window", [2, 3, 5, 7, 8, 9])
@torch.inference_mode()
def test_embeddings_are_those_of_the_original(window: int) -> None:
    encoder, images = random_encoder(window), pixels()
    expected = encoder(images)
    found = SamEncoder(encoder)(images)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.inference_mode()
def test_padding_tokens_take_part_with_the_biases_of_the_projection() -> None:
    encoder = random_encoder(5)
    before = SamEncoder(encoder)(pixels())
    encoder.blocks[0].attn.qkv.bias[2 * WIDTH :] += 5  # all values, those of padding tokens included
    after = SamEncoder(encoder)(pixels())
    expected = encoder(pixels())
    assert (after - before).abs().max() > 0.1
    assert (after - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.inference_mode()
def test_nothing_is_projected_for_padding() -> None:
    encoder = random_encoder(5)
    with FlopCounterMode(display=False) as counter:
        SamEncoder(encoder)(pixels(1))
    linear = counter.get_flop_counts()["Global"][torch.ops.aten.addmm]
    assert linear == 2 * CELLS**2 * 3 * (3 * WIDTH**2 + WIDTH**2 + 2 * 4 * WIDTH**2)


@torch.inference_mode()
def test_images_of_a_batch_do_not_meet() -> None:
    encoder, images = SamEncoder(random_encoder(3)), pixels(3)
    alone = torch.cat([encoder(image[None]) for image in images])
    torch.testing.assert_close(encoder(images), alone, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_bfloat16_is_no_worse_than_autocast() -> None:
    encoder, images = random_encoder(5), pixels()
    exact = encoder(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = encoder(images).float()
    found = SamEncoder(encoder, dtype=torch.bfloat16)(images)
    assert found.dtype == torch.float32
    assert 0 < (found - exact).norm() < 1.1 * (autocast - exact).norm()
