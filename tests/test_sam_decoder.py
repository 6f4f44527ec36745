"""SAM's mask decoder for many prompts, against MaskDecoder on the same weights."""

from types import SimpleNamespace

import pytest
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch.utils.flop_counter import FlopCounterMode

from samfeat.teacher_cache.teachers.sam_decoder import SamDecoder

CELLS = 8


def decoder_of(channels: int, heads: int, depth: int) -> SimpleNamespace:
    """Prompt encoder and decoder on a grid of 8 x 8, every weight random: what a ``Sam`` has, without its encoder."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(11)
        transformer = TwoWayTransformer(depth=depth, embedding_dim=channels, num_heads=heads, mlp_dim=2 * channels)
        sam = SimpleNamespace(
            prompt_encoder=PromptEncoder(channels, (CELLS, CELLS), (16 * CELLS, 16 * CELLS), mask_in_chans=16),
            mask_decoder=MaskDecoder(transformer_dim=channels, transformer=transformer),
            mask_threshold=0.0,
        )
        for parameter in sam.mask_decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        return sam


def inputs(channels: int, images: int = 2, prompts: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(images, channels, CELLS, CELLS, generator=generator)
    return embeddings, torch.rand(prompts, 2, generator=generator, dtype=torch.float64) * 16 * CELLS


def reference(sam: SimpleNamespace | Sam, embeddings: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Logits [images x prompts x 3, h, w] and predicted IoU."""
    sparse, dense = sam.prompt_encoder(points=(points[:, None], torch.ones(len(points), 1)), boxes=None, masks=None)
    each = [
        sam.mask_decoder(
            image_embeddings=embedding[None],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        for embedding in embeddings
    ]
    return tuple(torch.cat(part).flatten(0, 1) for part in zip(*each))


@pytest.mark.parametrize(("channels", "heads", "depth"), [(256, 8, 2), (32, 2, 1), (32, 4, 3)])
@torch.inference_mode()
def test_masks_are_those_of_the_original(channels: int, heads: int, depth: int) -> None:
    sam, (embeddings, points) = decoder_of(channels, heads, depth), inputs(channels)
    logits, predicted_iou = reference(sam, embeddings, points)
    decoder = SamDecoder(sam)
    found = decoder.decode(decoder.image_side(embeddings), decoder.tokens(points))
    assert logits.std() > 0.05
    assert found.logits.shape[1:] == decoder.mask_size == (4 * CELLS, 4 * CELLS)
    assert (found.logits - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert (found.predicted_iou - predicted_iou).abs().max() <= 1e-5
    assert found.image.tolist() == [0] * 15 + [1] * 15


@torch.inference_mode()
def test_the_gate_leaves_the_masks_above_it_as_they_are() -> None:
    sam, (embeddings, points) = decoder_of(64, 4, 2), inputs(64)
    decoder = SamDecoder(sam)
    images, prompts = decoder.image_side(embeddings), decoder.tokens(points)
    everything = decoder.decode(images, prompts)
    threshold = everything.predicted_iou.sort().values[-8].item()  # a tie: this mask itself is not above it
    passing = everything.predicted_iou > threshold
    found = decoder.decode(images, prompts, iou_above=threshold)
    assert 0 < len(set(passing.nonzero()[:, 0].tolist())) == len(found.logits) == 7
    torch.testing.assert_close(found.logits, everything.logits[passing], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.predicted_iou, everything.predicted_iou[passing])
    assert torch.equal(found.image, everything.image[passing])
    assert len(decoder.decode(images, prompts, iou_above=9.0).logits) == 0


@torch.inference_mode()
def test_prompts_that_fail_are_not_upscaled() -> None:
    sam, (embeddings, points) = decoder_of(64, 4, 2), inputs(64)
    decoder = SamDecoder(sam)
    images, prompts = decoder.image_side(embeddings), decoder.tokens(points)
    best = decoder.decode(images, prompts).predicted_iou.unflatten(0, (-1, 3)).amax(1).sort().values

    def flops(iou_above: float | None) -> int:
        with FlopCounterMode(display=False) as counter:
            decoder.decode(images, prompts, iou_above=iou_above)
        return counter.get_total_flops()

    each = (flops(None) - flops(9.0)) / len(best)
    assert each > 0.25 * flops(None) / len(best)
    assert flops(best[-4].item()) == flops(9.0) + 3 * each


@torch.inference_mode()
def test_the_toy_sam_gives_the_same_masks(toy_sam: Sam) -> None:
    embeddings = toy_sam.image_encoder(torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(2)))
    points = torch.rand(20, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 256
    decoder = SamDecoder(toy_sam)
    found = decoder.decode(decoder.image_side(embeddings), decoder.tokens(points))
    logits, predicted_iou = reference(toy_sam, embeddings, points)
    assert (found.logits - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert (found.predicted_iou - predicted_iou).abs().max() <= 1e-5
