"""SAM's mask decoder for many prompts on one image: the same masks as ``MaskDecoder``, in a third of the arithmetic.

The decoder lets few tokens (the predicted IoU, four masks, the point and its padding) and the 4096 positions of the
image attend to each other. Three facts save the work:

- The first layer sees the same image for every prompt, so its projections are computed once per image.
- Later, keys q.(W x) = (W^T q).x and values sum(p W x) = W sum(p x) need no projection of the image: the
  projected tokens of all heads, 7 x 8, are fewer than the 128 channels of a projection. The bias of a key shifts all
  scores of a query alike and cancels in the softmax.
- The predicted IoU is known before any mask is: prompts that it rejects are not upscaled.

32 prompts take 4.9 times less time than in segment_anything on one thread of a CPU with AVX-512 and AMX, and 6.7 times
less where 40 % of them pass (``tests/benchmarks/bench_teacher.py``). ``tests/test_sam_decoder.py`` compares both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

MASKS = 3  # masks of a prompt; the decoder's first one, for unambiguous prompts, is not used


class LowResMasks(NamedTuple):
    """Masks as returned by the decoder, sorted by image, then prompt, then mask.

    Attributes:
        logits: float32 [M, 4h, 4w] where the embedding is [h, w].
        predicted_iou: float32 [M].
        image: int64 [M], which image each mask belongs to.
    """

    logits: Float[Tensor, "m h4 w4"]
    predicted_iou: Float[Tensor, " m"]
    image: Int[Tensor, " m"]


class ImageSide(NamedTuple):
    """The first layer's input from i images of n positions, shared by all prompts.

    Attributes:
        features: the embeddings as tokens.
        key, value: for tokens that attend to the image.
        query: for positions that attend to the tokens.
    """

    features: Float[Tensor, "i n c"]
    key: Float[Tensor, "i n d"]
    value: Float[Tensor, "i n d"]
    query: Float[Tensor, "i n d"]


class SamDecoder:
    """Mask decoder and prompt encoder of a ``segment_anything`` SAM, for prompts of one foreground point.

    Args:
        sam: a ``Sam``; its weights are read, its device is used.

    Attributes:
        mask_size: (height, width) of the masks, which cover SAM's padded input.
        mask_threshold: logit above which a pixel belongs to a mask.
    """

    def __init__(self, sam: Any) -> None:
        self._prompts, self._decoder = sam.prompt_encoder, sam.mask_decoder
        self._layers = sam.mask_decoder.transformer.layers
        self._size: tuple[int, int] = sam.prompt_encoder.image_embedding_size
        self.mask_size = (4 * self._size[0], 4 * self._size[1])
        self.mask_threshold: float = sam.mask_threshold
        self._positions = sam.prompt_encoder.get_dense_pe().flatten(2).transpose(1, 2).detach()  # [1, n, c]

    def tokens(self, points: Float[Tensor, "p 2"]) -> Float[Tensor, "p t c"]:
        """Tokens of prompts at ``points``, (x, y) in pixels of the encoder's input."""
        labels = torch.ones((len(points), 1), dtype=torch.int, device=points.device)
        sparse, _ = self._prompts(points=(points[:, None], labels), boxes=None, masks=None)
        output = torch.cat([self._decoder.iou_token.weight, self._decoder.mask_tokens.weight])
        return torch.cat([output.expand(len(points), -1, -1), sparse], dim=1)

    def image_side(self, embeddings: Float[Tensor, "i c h w"]) -> ImageSide:
        """Everything about the images that does not depend on the prompt."""
        features = (embeddings + self._prompts.no_mask_embed.weight.view(1, -1, 1, 1)).flatten(2).transpose(1, 2)
        placed = features + self._positions
        to_image, to_tokens = self._layers[0].cross_attn_token_to_image, self._layers[0].cross_attn_image_to_token
        key, value, query = to_image.k_proj(placed), to_image.v_proj(features), to_tokens.q_proj(placed)
        return ImageSide(features.contiguous(), key, value, query)

    def decode(
        self, images: ImageSide, prompts: Float[Tensor, "p t c"], *, iou_above: float | None = None
    ) -> LowResMasks:
        """Masks of every prompt on every image.

        Args:
            images: see :meth:`image_side`.
            prompts: see :meth:`tokens`.
            iou_above: only masks whose predicted IoU is above this; all if None.
        """
        count = len(images.features)
        features, tokens = self._transform(images, prompts)
        start = prompts.repeat(count, 1, 1)
        predicted_iou = self._decoder.iou_prediction_head(self._read(features, tokens, start, 0, 1)[:, 0])[:, 1:]
        image = torch.arange(count, device=features.device).repeat_interleave(len(prompts))
        if iou_above is None:
            logits = self._upscale(features, self._read(features, tokens, start, 2, 2 + MASKS))
            return LowResMasks(logits.flatten(0, 1), predicted_iou.flatten(), image.repeat_interleave(MASKS))
        prompt, mask = torch.nonzero(predicted_iou > iou_above, as_tuple=True)
        passed, row = torch.unique_consecutive(prompt, return_inverse=True)
        features, tokens, start = features[passed], tokens[passed], start[passed]
        logits = self._upscale(features, self._read(features, tokens, start, 2, 2 + MASKS))
        return LowResMasks(logits[row, mask], predicted_iou[prompt, mask], image[prompt])

    def _transform(
        self, images: ImageSide, prompts: Float[Tensor, "p t c"]
    ) -> tuple[Float[Tensor, "g n c"], Float[Tensor, "g t c"]]:
        """The two-way transformer without its last attention; g = images x prompts, image by image."""
        count, first = len(images.features), self._layers[0]
        start = prompts.repeat(count, 1, 1)
        tokens = first.norm1(first.self_attn(prompts, prompts, prompts))
        tokens = tokens + self._read_shared(first.cross_attn_token_to_image, images, tokens + prompts)
        tokens = _mix(first, tokens.flatten(0, 1))
        attention = first.cross_attn_image_to_token
        keys = _block_diagonal(_heads(attention.k_proj(tokens + start), attention) * _scale(attention))
        scores = keys.view(count, -1, keys.shape[-1]) @ images.query.transpose(1, 2)
        features = images.features[:, None].expand(-1, len(prompts), -1, -1).flatten(0, 1)
        features = first.norm4(_write(attention, features, scores.view(*keys.shape[:2], -1), tokens))
        for layer in self._layers[1:]:
            placed = features + self._positions
            queries = tokens + start
            tokens = layer.norm1(tokens + layer.self_attn(queries, queries, tokens))
            tokens = tokens + _attend_to_image(layer.cross_attn_token_to_image, tokens + start, placed, features)
            tokens = _mix(layer, tokens)
            attention = layer.cross_attn_image_to_token
            keys = _heads(attention.k_proj(tokens + start), attention) * _scale(attention)
            shift = torch.einsum("gstd,sd->gst", keys, _heads_of(attention.q_proj.bias, attention))
            folded = _fold(keys, attention.q_proj.weight)
            scores = torch.baddbmm(shift.flatten(1)[..., None], folded, placed.transpose(1, 2))
            features = layer.norm4(_write(attention, features, scores, tokens))
        return features, tokens

    def _read_shared(
        self, attention: Any, images: ImageSide, queries: Float[Tensor, "p t c"]
    ) -> Float[Tensor, "i p t c"]:
        """Attention of the tokens of all prompts to the projected images."""
        p, t, _ = queries.shape
        query = _heads(attention.q_proj(queries), attention).transpose(0, 1).flatten(1, 2)  # [heads, p t, d]
        key, value = _heads(images.key, attention), _heads(images.value, attention)
        mixed = F.scaled_dot_product_attention(query.expand(len(key), -1, -1, -1), key, value)
        return attention.out_proj(mixed.transpose(1, 2).reshape(len(key), p, t, -1))

    def _read(
        self,
        features: Float[Tensor, "g n c"],
        tokens: Float[Tensor, "g t c"],
        start: Float[Tensor, "g t c"],
        first: int,
        last: int,
    ) -> Float[Tensor, "g k c"]:
        """The last attention to the image, for the tokens from ``first`` to before ``last`` alone."""
        transformer = self._decoder.transformer
        tokens, start = tokens[:, first:last], start[:, first:last]
        placed = features + self._positions
        read = _attend_to_image(transformer.final_attn_token_to_image, tokens + start, placed, features)
        return transformer.norm_final_attn(tokens + read)

    def _upscale(
        self, features: Float[Tensor, "g n c"], mask_tokens: Float[Tensor, "g k c"]
    ) -> Float[Tensor, "g k h4 w4"]:
        """Mask logits. A transposed convolution of stride 2 is a linear layer that gives each position four."""
        first, norm, activation, second, last_activation = self._decoder.output_upscaling
        heads = self._decoder.output_hypernetworks_mlps[1:]
        kernels = torch.stack([head(mask_tokens[:, k]) for k, head in enumerate(heads)], dim=1)  # [g, k, c / 8]
        fine = _four_fold(first, features)
        fine = activation(F.layer_norm(fine, (fine.shape[-1],), norm.weight, norm.bias, norm.eps))
        fine = last_activation(_four_fold(second, fine))  # [g, n, 4, 4, c / 8]
        logits = kernels @ fine.flatten(1, 3).transpose(1, 2)
        h, w = self._size
        blocks = logits.unflatten(2, (h, w, 2, 2, 2, 2)).permute(0, 1, 2, 4, 6, 3, 5, 7)
        return blocks.reshape(*logits.shape[:2], 4 * h, 4 * w)


def _mix(layer: Any, tokens: Float[Tensor, "g t c"]) -> Float[Tensor, "g t c"]:
    """The rest of a layer's work on its tokens once they have read the image."""
    tokens = layer.norm2(tokens)
    return layer.norm3(tokens + layer.mlp(tokens))


def _attend_to_image(
    attention: Any,
    queries: Float[Tensor, "g t c"],
    placed: Float[Tensor, "g n c"],
    features: Float[Tensor, "g n c"],
) -> Float[Tensor, "g t c"]:
    """``attention(q=queries, k=placed, v=features)`` without a projection of the image."""
    query = _heads(attention.q_proj(queries), attention) * _scale(attention)
    weights = (_fold(query, attention.k_proj.weight) @ placed.transpose(1, 2)).softmax(dim=-1)
    seen = (weights @ features).unflatten(1, query.shape[1:3])  # [g, heads, t, c]
    value = torch.einsum("gstc,sdc->gtsd", seen, _heads_of(attention.v_proj.weight, attention))
    return attention.out_proj(value.flatten(2) + attention.v_proj.bias)


def _write(
    attention: Any, features: Float[Tensor, "g n c"], scores: Float[Tensor, "g st n"], tokens: Float[Tensor, "g t c"]
) -> Float[Tensor, "g n c"]:
    """Features plus what their positions take from the tokens, given the scores of each head for each token."""
    values = _heads(attention.v_proj(tokens), attention)
    folded = torch.einsum("gstd,csd->gstc", values, attention.out_proj.weight.unflatten(1, (attention.num_heads, -1)))
    folded = folded + attention.out_proj.bias / attention.num_heads  # the weights of each head sum to 1
    weights = scores.unflatten(1, values.shape[1:3]).softmax(dim=2).flatten(1, 2)
    return torch.baddbmm(features, weights.transpose(1, 2), folded.flatten(1, 2))


def _fold(values: Float[Tensor, "g s t d"], weight: Float[Tensor, "sd c"]) -> Float[Tensor, "g st c"]:
    """Each head's values through the transpose of its part of a projection."""
    return torch.einsum("gstd,sdc->gstc", values, weight.unflatten(0, (values.shape[1], -1))).flatten(1, 2)


def _block_diagonal(values: Float[Tensor, "g s t d"]) -> Float[Tensor, "g st sd"]:
    """Each head's values in its own channels of all heads, 0 elsewhere."""
    apart = torch.eye(values.shape[1], device=values.device)[:, None, :, None] * values[:, :, :, None]
    return apart.flatten(3).flatten(1, 2)


def _heads(values: Float[Tensor, "g t sd"], attention: Any) -> Float[Tensor, "g s t d"]:
    return values.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def _heads_of(parameter: Tensor, attention: Any) -> Tensor:
    """A weight or bias whose first axis is [heads, channels of a head]."""
    return parameter.unflatten(0, (attention.num_heads, -1))


def _scale(attention: Any) -> float:
    return float((attention.internal_dim // attention.num_heads) ** -0.5)


def _four_fold(layer: Any, values: Float[Tensor, "... c"]) -> Float[Tensor, "... 4 d"]:
    """A transposed convolution of kernel and stride 2, as a linear layer that gives each position 2 x 2."""
    weight = layer.weight.permute(2, 3, 1, 0)  # [2, 2, d, c]
    bias = layer.bias.repeat(4)
    return F.linear(values, weight.flatten(0, 2), bias).unflatten(-1, (4, -1))
