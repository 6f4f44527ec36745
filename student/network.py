"""The student network in one file: backbone, distillation head, detection heads, edge attention guidance, descriptors.

Read top to bottom: configuration, network, sampling. Section and figure numbers are those of "Segment Anything Model is
a Good Teacher for Local Feature Learning" (IEEE TIP). Where the paper and the authors' released weights differ,
:class:`NetworkConfig` offers both and :data:`PRESETS` chooses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

EdgeAttention = Literal["row", "pixel", "none"]
AttentionSource = Literal["fused", "backbone"]
Initialisation = Literal["released", "stable"]
Sampling = Literal["released", "exact"]

DESCRIPTOR_DIM = 128
EMBEDDING_DIM = 256
ROW_ATTENTION_SCALE = 0.01  # 1 / sqrt(100 * 100), the positions of a 400 x 400 crop at 1/4; the same at every size
STABLE_SHARES = (0.4, 0.3, 0.2, 0.1)  # of the four detection heads in the fused heat-map, the finest first
STABLE_BIASES = {
    **dict.fromkeys(("heatmap1", "heatmap2", "heatmap3", "heatmap4"), -1.0),
    "conv_edg": math.log(0.1 / 0.9),
    "scalemap": math.log(math.e - 1),
}


@dataclass(frozen=True)
class NetworkConfig:
    """What the network computes. :data:`PRESETS` holds the presets.

    Attributes:
        edge_attention: the attention inside the edge attention guidance (section III-D.3, Fig. 6). ``"row"``: every
            channel separately attends between image rows, as the released weights expect; ``"pixel"``: self-attention
            over all positions, as in the paper (quadratic in the number of pixels); ``"none"``: no guidance.
        attention_source: the features whose mean becomes the attention map (section III-A). ``"fused"``: those after
            the edge attention guidance, as released; ``"backbone"``: c1 to c4 as they leave the backbone, as printed.
        initialisation: ``"released"``: Kaiming normal (fan out) for every convolution, which saturates the one-channel
            heads at the start; ``"stable"``: the same except for the one-channel heads (see ``reset_parameters``).
        sampling: how points are looked up in the maps, see :func:`sample`.
        unused_head: keep ``conv_det``, which is not used in the forward pass but is part of the released weights.
        widths: channels of c1 to c4, the four resolutions of the backbone.
        descriptor_bottleneck: channels to which a 1 x 1 convolution with a ReLU reduces the input of the 3 x 3
            descriptor convolution; with 0 it gets all channels of c1 to c4, as published. On 240 channels it takes 40 %
            of all arithmetic, with a bottleneck of 64 a fifth.
        guidance_bottleneck: channels of the distillation head; a 1 x 1 convolution, needed in training alone, expands
            them to those of the teacher's embedding. With 0 the head itself has that many, as published: a third of
            the arithmetic of a narrow network.

    Raises:
        ValueError: a value is not one of the choices.
    """

    edge_attention: EdgeAttention = "row"
    attention_source: AttentionSource = "fused"
    initialisation: Initialisation = "stable"
    sampling: Sampling = "exact"
    unused_head: bool = False
    widths: tuple[int, int, int, int] = (64, 64, 128, 128)
    descriptor_bottleneck: int = 0
    guidance_bottleneck: int = 0

    def __post_init__(self) -> None:
        choices = {
            "edge_attention": EdgeAttention,
            "attention_source": AttentionSource,
            "initialisation": Initialisation,
            "sampling": Sampling,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {get_args(allowed)}, got {getattr(self, name)!r}")
        if not isinstance(self.unused_head, bool):
            raise ValueError(f"unused_head must be True or False, got {self.unused_head!r}")
        object.__setattr__(self, "widths", tuple(self.widths))  # a list in JSON and YAML
        if len(self.widths) != 4 or not all(isinstance(n, int) and n > 0 for n in self.widths):
            raise ValueError(f"widths must be four positive numbers of channels, got {self.widths!r}")
        for name in ("descriptor_bottleneck", "guidance_bottleneck"):
            channels = getattr(self, name)
            if not isinstance(channels, int) or channels < 0:
                raise ValueError(f"{name} must be a number of channels, got {channels!r}")


PRESETS: dict[str, NetworkConfig] = {
    "released": NetworkConfig(initialisation="released", sampling="released", unused_head=True),
    "paper": NetworkConfig(
        edge_attention="pixel", attention_source="backbone", initialisation="released", sampling="released"
    ),
    "default": NetworkConfig(edge_attention="none", widths=(16, 32, 64, 128), descriptor_bottleneck=64),
    "slim": NetworkConfig(  # a quarter of the arithmetic
        edge_attention="none", widths=(8, 16, 32, 64), descriptor_bottleneck=32, guidance_bottleneck=64
    ),
}


def network_preset(name: str) -> NetworkConfig:
    """The network configuration called ``name``: ``"released"``, ``"paper"``, ``"default"`` or ``"slim"``.

    Raises:
        ValueError: no preset has that name.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


class DenseOutput(NamedTuple):
    """All outputs of the network for a batch of H x W images (h = H // 4, w = W // 4).

    Attributes:
        heatmap: fused detection logit [B, 1, H, W], at least float32; its sigmoid is the probability of a keypoint.
        descriptors: descriptor map [B, 128, h, w], not normalised.
        attention: attention map [B, 1, h, w], positive (softplus).
        distilled: counterpart of the teacher's embedding [B, 256, H // 8, W // 8].
        edges: edge probability [B, 1, h, w].
        head_logits: the logits of the four detection heads before fusion, each at its own resolution: [B, 1, H, W],
            [B, 1, H // 2, W // 2], [B, 1, h, w], [B, 1, H // 8, W // 8].
    """

    heatmap: Tensor
    descriptors: Tensor
    attention: Tensor
    distilled: Tensor
    edges: Tensor
    head_logits: tuple[Tensor, Tensor, Tensor, Tensor]


class SAMFeatNetwork(nn.Module):
    """Backbone and heads of SAMFeat (section III-A, Fig. 3): an image in, dense maps out.

    Parameter names, including two misspelt ones, are those of the authors' released weights, which load strictly with
    ``network_preset("released")``.

    Args:
        config: what to compute.
        generator: source of the initial weights; torch's global generator if ``None``.
    """

    def __init__(self, config: NetworkConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        n1, n2, n3, n4 = config.widths
        channels = sum(config.widths)  # of c1 to c4 side by side at 1/4 resolution

        # Backbone (section III-A): eight convolutions, three poolings.
        self.conv1a, self.conv1b = _conv(3, n1), _conv(n1, n1)
        self.conv2a, self.conv2b = _conv(n1, n2), _conv(n2, n2)
        self.conv3a, self.conv3b = _conv(n2, n3), _conv(n3, n3)
        self.conv4a, self.conv4b = _conv(n3, n4), _conv(n4, n4)

        # Distillation head (section III-B) and the projection of its output back into c4.
        guidance = config.guidance_bottleneck or EMBEDDING_DIM
        self.dist_conv_feat, self.dist_conv_fushion = _conv(n4, guidance), _conv(guidance, n4)
        self.dist_conv_expand = None
        if config.guidance_bottleneck:
            self.dist_conv_expand = _conv(guidance, EMBEDDING_DIM, size=1)

        # Detection heads, one per resolution.
        self.heatmap1, self.heatmap2 = DetectionHead(n1), DetectionHead(n2)
        self.heatmap3, self.heatmap4 = DetectionHead(n3), DetectionHead(n4)
        self.fuse_weight_1, self.fuse_weight_2 = _scalar(0.1), _scalar(0.2)
        self.fuse_weight_3, self.fuse_weight_4 = _scalar(0.3), _scalar(0.4)

        # Edge head, edge attention guidance, attention head, descriptor head.
        self.conv_edg = _conv(channels, 1, size=1)
        self.egde_module = None
        if config.edge_attention != "none":
            self.egde_module = EdgeAttentionGuidance(config.edge_attention, channels)
        self.scalemap = _conv(1, 1)
        self.conv_bottleneck = None
        if config.descriptor_bottleneck:
            self.conv_bottleneck = _conv(channels, config.descriptor_bottleneck, size=1)
        self.conv_des = _conv(config.descriptor_bottleneck or channels, DESCRIPTOR_DIM)
        if config.unused_head:
            self.conv_det = _conv(channels, 1, size=1)

        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial weights and biases of the convolutions.

        Kaiming normal, fan out, gain sqrt(2), and biases uniform within 1 / sqrt(fan in). For the heads with a single
        output that means weights of standard deviation 0.47 to 1.41 and saturated maps. ``"stable"`` gives those heads
        weights of 0.01 and sets their biases, so that training starts from maps that are flat and right on average:

        - the heat-map at logit -1, the constant that minimises a detection loss with positive weight 200 where one
          pixel in about 540 is a keypoint (200 p / (1 - p) = e^-1), some 300 in a 400 x 400 crop;
        - the edges at probability 0.1;
        - the attention at 1.

        It also reverses the weights of the four heads in the fused heat-map: with the released 0.1 to 0.4 the coarse
        heads, which cannot localise a keypoint within their cell, dominate the fine ones.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
                bound = 1 / math.sqrt(module.weight[0].numel())
                module.bias.uniform_(-bound, bound, generator=generator)
        if self.config.initialisation == "stable":
            for name, bias in STABLE_BIASES.items():
                self.get_parameter(f"{name}.weight").normal_(std=0.01, generator=generator)
                self.get_parameter(f"{name}.bias").fill_(bias)
            for level, share in enumerate(STABLE_SHARES, start=1):
                self.get_parameter(f"fuse_weight_{level}").fill_(share)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> DenseOutput:
        """All maps of a batch of images.

        Args:
            images: RGB in [-1, 1], that is 2 I / 255 - 1. Any size from 8 x 8; multiples of 8 keep every map aligned.

        Raises:
            ValueError: another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 8:
            raise ValueError(f"images must be [B, 3, H, W] with H and W of at least 8, got {list(images.shape)}")

        c1, c2, c3, backbone_c4 = self._backbone(images)
        distilled = self.dist_conv_feat(backbone_c4)
        c4 = backbone_c4 + self.dist_conv_fushion(distilled)
        if self.dist_conv_expand is not None:
            distilled = self.dist_conv_expand(distilled)

        features = _concatenate(c1, c2, c3, c4)
        edges = torch.sigmoid(_full_precision(self.conv_edg(features)))
        gate = edges.to(features.dtype)

        head_logits = (
            self.heatmap1(c1),
            self.heatmap2(c2),
            self.heatmap3(c3 * gate + c3),  # the gated c3 is used here and nowhere else
            self.heatmap4(c4),
        )
        heatmap = (
            self.fuse_weight_1 * head_logits[0]
            + self.fuse_weight_2 * resize(head_logits[1], images.shape[-2:])
            + self.fuse_weight_3 * resize(head_logits[2], images.shape[-2:])
            + self.fuse_weight_4 * resize(head_logits[3], images.shape[-2:])
        )

        fused = features
        if self.egde_module is not None:
            fused = features + self.egde_module(features * gate)
        plain = self.config.attention_source == "backbone"
        source = _concatenate(c1, c2, c3, backbone_c4) if plain else fused
        attention = F.softplus(_full_precision(self.scalemap(source.mean(dim=1, keepdim=True))))

        narrowed = fused if self.conv_bottleneck is None else F.relu_(self.conv_bottleneck(fused))
        return DenseOutput(heatmap, self.conv_des(narrowed), attention, distilled, edges, head_logits)

    def _backbone(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """C1 to c4 at 1/1, 1/2, 1/4 and 1/8 of the resolution."""
        c1 = F.relu_(self.conv1b(F.relu_(self.conv1a(images))))
        c2 = F.relu_(self.conv2b(F.relu_(self.conv2a(F.max_pool2d(c1, 2)))))
        c3 = F.relu_(self.conv3b(F.relu_(self.conv3a(F.max_pool2d(c2, 2)))))
        c4 = F.relu_(self.conv4b(F.relu_(self.conv4a(F.max_pool2d(c3, 2)))))
        return c1, c2, c3, c4


class DetectionHead(nn.Conv2d):
    """A 3 x 3 convolution to a single logit, at least float32.

    Computed as nine 1 x 1 convolutions whose outputs are shifted and added (the same sum in a different order), because
    torch has no good kernel for a single output channel. On a CPU this takes a sixth of the time, a third in training.
    """

    def __init__(self, channels: int) -> None:
        with torch.random.fork_rng(devices=[]):
            super().__init__(channels, 1, 3, padding=1)

    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
        """Logits of ``maps``."""
        taps = self.weight[0].flip(1, 2).flatten(1).T[:, :, None, None]
        products = _full_precision(F.conv2d(maps, taps))
        logits = F.fold(products.flatten(2), maps.shape[-2:], kernel_size=3, padding=1)
        return logits if self.bias is None else logits + self.bias


class EdgeAttentionGuidance(nn.Module):
    """Attention among edge features (section III-D.3, Fig. 6), added to the backbone features.

    Args:
        kind: ``"row"`` or ``"pixel"``, see :class:`NetworkConfig`.
        channels: of the features.
    """

    def __init__(self, kind: Literal["row", "pixel"], channels: int) -> None:
        super().__init__()
        self.kind = kind
        self.query_conv = _conv(channels, channels, size=1)
        self.key_conv = _conv(channels, channels, size=1)
        self.value_conv = _conv(channels, channels, size=1)

    def forward(self, edge_features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Attended values of ``edge_features``, the features multiplied by the edge probability."""
        convolutions = (self.query_conv, self.key_conv, self.value_conv)
        query, key, value = (convolution(edge_features).contiguous() for convolution in convolutions)
        if self.kind == "row":  # channels are heads, rows are tokens, a row's pixels are a token's features
            scores = ROW_ATTENTION_SCALE * (query @ key.transpose(-1, -2))
            return scores.softmax(dim=-1).to(value.dtype) @ value
        query, key, value = (x.flatten(2).transpose(1, 2).unsqueeze(1) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, scale=1 / math.sqrt(edge_features.shape[1]))
        return attended.squeeze(1).transpose(1, 2).unflatten(2, edge_features.shape[-2:])


def resize(maps: Float[Tensor, "b c h w"], size: tuple[int, int] | torch.Size) -> Float[Tensor, "b c H W"]:
    """Bilinear resize to ``size`` = (height, width) by pixel centres, without antialiasing."""
    if maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False, antialias=False)


def sample(
    maps: Float[Tensor, "b c h w"],
    points: Float[Tensor, "b n 2"],
    image_size: tuple[int, int],
    *,
    convention: Sampling,
) -> Float[Tensor, "b n c"]:
    """Values of ``maps`` at image ``points``, bilinear, with border values repeated outside.

    Args:
        maps: [B, C, h, w], any resolution.
        points: [B, n, 2], (x, y) in image pixels; (0, 0) is the centre of the top-left pixel.
        image_size: (height, width) of the image.
        convention: where pixel x lies in the map. ``"exact"``: at (x + 0.5) w / W - 0.5. ``"released"``: at
            x w / (W - 1) - 0.5, as the released weights were trained: half an image pixel too far left at the left
            border, as much too far right at the right border.

    Returns:
        [B, n, C], at least float32.

    Raises:
        ValueError: another convention.
    """
    maps = _full_precision(maps)
    grid = sampling_grid(points.to(maps.dtype), image_size, convention=convention)
    values = F.grid_sample(maps, grid[:, :, None], mode="bilinear", padding_mode="border", align_corners=False)
    return values[..., 0].transpose(1, 2)


def sampling_grid(
    points: Float[Tensor, "*b 2"], image_size: tuple[int, int], *, convention: Sampling
) -> Float[Tensor, "*b 2"]:
    """Position of ``points`` in a map, in ``grid_sample`` coordinates without ``align_corners``: borders at -1 and 1.

    Arguments as in :func:`sample`.

    Raises:
        ValueError: another convention.
    """
    if convention not in get_args(Sampling):
        raise ValueError(f"convention must be one of {get_args(Sampling)}, got {convention!r}")
    size = torch.tensor((image_size[1], image_size[0]), dtype=points.dtype, device=points.device)
    return (2 * points + 1) / size - 1 if convention == "exact" else 2 * points / (size - 1) - 1


def normalise(descriptors: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """``descriptors`` divided by their Euclidean norm, without an epsilon.

    The exception is a vector shorter than 1e-12: it stays (close to) zero instead of becoming NaN.
    """
    return F.normalize(descriptors, dim=-1, eps=1e-12)


def _conv(channels_in: int, channels_out: int, *, size: int = 3) -> nn.Conv2d:
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced by reset_parameters
        return nn.Conv2d(channels_in, channels_out, size, padding=size // 2)


def _scalar(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor([value]))


def _concatenate(c1: Tensor, c2: Tensor, c3: Tensor, c4: Tensor) -> Tensor:
    """The four levels side by side at the resolution of c3 (384 channels)."""
    size = c3.shape[-2:]
    return torch.cat((resize(c1, size), resize(c2, size), c3, resize(c4, size)), dim=1)


def _full_precision(values: Tensor) -> Tensor:
    """At least float32, so that sums of logits, sigmoid and softplus stay accurate under autocast."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
