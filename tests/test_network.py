"""The network: names, sizes, cost, wiring against NumPy and OpenCV, attention against loops, sampling by ramps."""

import math

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from samfeat.student.network import (
    PRESETS,
    EdgeAttentionGuidance,
    NetworkConfig,
    SAMFeatNetwork,
    network_preset,
    normalise,
    resize,
    sample,
)

PLAIN_CONVOLUTIONS = [f"conv{level}{which}" for level in "1234" for which in "ab"]
HEADS = ["dist_conv_feat", "dist_conv_fushion", "heatmap1", "heatmap2", "heatmap3", "heatmap4"]
HEADS += ["scalemap", "conv_des", "conv_det", "conv_edg"]
CONVOLUTIONS = [*PLAIN_CONVOLUTIONS, *HEADS, *(f"egde_module.{name}_conv" for name in ("query", "key", "value"))]
ONE_CHANNEL_HEADS = ("heatmap1", "heatmap2", "heatmap3", "heatmap4", "conv_edg", "scalemap")


def build(preset="default", seed=0, **changes):
    config = NetworkConfig(**(vars(network_preset(preset)) | changes))
    return SAMFeatNetwork(config, generator=torch.Generator().manual_seed(seed)).eval()


def images(height=32, width=48, *, batch=1, seed=0):
    return torch.rand((batch, 3, height, width), generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def meta():
    """The released network without any memory behind it: shapes and operations only."""
    with torch.device("meta"):
        return SAMFeatNetwork(network_preset("released"))


# ---------------------------------------------------------------------------------------------- names, sizes, cost


def test_released_state_dict_has_exactly_the_names_of_the_released_checkpoint(meta):
    expected = {f"{name}.{kind}" for name in CONVOLUTIONS for kind in ("weight", "bias")}
    expected |= {f"fuse_weight_{k}" for k in (1, 2, 3, 4)}
    assert set(meta.state_dict()) == expected
    assert len(expected) == 46
    assert meta.fuse_weight_1.shape == (1,)


def test_parameter_counts(meta):
    def count(*prefixes):
        return sum(value.numel() for name, value in meta.state_dict().items() if name.startswith(prefixes))

    assert sum(value.numel() for value in meta.parameters()) == 2_109_652
    assert count("conv1", "conv2", "conv3", "conv4") == 629_184
    assert count("dist_conv") == 590_208
    assert count("heatmap") == 3_460
    assert count("fuse_weight") == 4
    assert count("conv_edg") == 385
    assert count("egde_module") == 443_520
    assert count("scalemap") == 10
    assert count("conv_des") == 442_496
    assert count("conv_det") == 385
    trained = 2_109_652 - 385
    assert sum(value.numel() for value in build("paper").parameters()) == trained
    assert sum(value.numel() for value in build("paper", edge_attention="none").parameters()) == trained - 443_520


# (input channels, output channels, side of the kernel, stride of the map) of every convolution of the default network
DEFAULT_LAYERS = [
    *((3, 16, 3, 1), (16, 16, 3, 1), (16, 32, 3, 2), (32, 32, 3, 2)),  # the backbone
    *((32, 64, 3, 4), (64, 64, 3, 4), (64, 128, 3, 8), (128, 128, 3, 8)),
    *((128, 256, 3, 8), (256, 128, 3, 8)),  # the distillation head and its way back
    *((16, 1, 3, 1), (32, 1, 3, 2), (64, 1, 3, 4), (128, 1, 3, 8)),  # the detection heads
    *((240, 1, 1, 4), (1, 1, 3, 4)),  # edges, attention
    *((240, 64, 1, 4), (64, 128, 3, 4)),  # the bottleneck and the descriptors
]


def test_the_default_network_is_as_large_and_as_costly_as_its_layers():
    parameters = sum(cin * cout * side**2 + cout for cin, cout, side, _ in DEFAULT_LAYERS) + 4  # the fusion weights
    assert sum(value.numel() for value in build("default").parameters()) == parameters == 975_427
    with torch.device("meta"):
        network = SAMFeatNetwork(network_preset("default"))
    with FlopCounterMode(display=False) as counter:
        output = network(torch.empty(1, 3, 480, 640, device="meta"))
    expected = sum(2 * cin * cout * side**2 * 480 * 640 // stride**2 for cin, cout, side, stride in DEFAULT_LAYERS)
    assert counter.get_total_flops() == expected
    assert output.descriptors.shape == (1, 128, 120, 160)
    assert output.distilled.shape == (1, 256, 60, 80)


@pytest.mark.parametrize(
    ("size", "quarter", "eighth"),
    [((400, 400), (100, 100), (50, 50)), ((480, 640), (120, 160), (60, 80)), ((475, 633), (118, 158), (59, 79))],
)
def test_output_shapes(meta, size, quarter, eighth):
    output = meta(torch.empty(2, 3, *size, device="meta"))
    assert output.heatmap.shape == (2, 1, *size)
    assert output.descriptors.shape == (2, 128, *quarter)
    assert output.attention.shape == (2, 1, *quarter)
    assert output.distilled.shape == (2, 256, *eighth)
    assert output.edges.shape == (2, 1, *quarter)
    halves = (size[0] // 2, size[1] // 2)
    assert [logit.shape for logit in output.head_logits] == [(2, 1, *s) for s in (size, halves, quarter, eighth)]


@pytest.mark.parametrize(("size", "gflop"), [((480, 640), 90.05), ((400, 400), 46.59)])
def test_cost(meta, size, gflop):
    with FlopCounterMode(display=False) as counter:
        meta(torch.empty(1, 3, *size, device="meta"))
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, abs=0.01)


def test_slim_needs_a_quarter_of_the_arithmetic():
    gflop = {}
    for preset in ("default", "slim"):
        with torch.device("meta"):
            network = SAMFeatNetwork(network_preset(preset))
        with FlopCounterMode(display=False) as counter:
            output = network(torch.empty(1, 3, 480, 640, device="meta"))
        gflop[preset] = counter.get_total_flops() / 1e9
    assert gflop["slim"] < gflop["default"] / 3.5
    assert output.descriptors.shape == (1, 128, 120, 160)
    assert output.distilled.shape == (1, 256, 60, 80)  # what the teacher's embedding asks for


@pytest.mark.parametrize("widths", [(64, 64, 128), (64, 64, 128, 0), (64, 64, 128, 1.5)])
def test_config_names_wrong_widths(widths):
    with pytest.raises(ValueError, match="widths must be four positive numbers"):
        NetworkConfig(widths=widths)


@pytest.mark.parametrize("channels", [-1, 2.5, "64"])
def test_config_names_a_wrong_bottleneck(channels):
    with pytest.raises(ValueError, match="descriptor_bottleneck must be a number of channels"):
        NetworkConfig(descriptor_bottleneck=channels)


def test_widths_may_come_as_a_list_from_a_file():
    assert NetworkConfig(widths=[64, 64, 128, 128]) == NetworkConfig()


def test_odd_sizes_run():
    output = build()(images(43, 37))
    assert output.heatmap.shape == (1, 1, 43, 37)
    assert all(torch.isfinite(values).all() for values in output[:5])


# ---------------------------------------------------------------------------------------------------------- wiring


@pytest.fixture(scope="module", params=["released", "paper", "default"])
def traced(request):
    """A network, its output, and what went into and came out of every convolution, as NumPy arrays."""
    network = build(request.param)
    with torch.no_grad():  # lively edges, so that their effect shows
        network.conv_edg.weight.mul_(30)
    seen = {}

    def record(name):
        def hook(_, inputs, output):
            seen[name] = inputs[0][0].numpy(), output[0].numpy()

        return hook

    for name, module in network.named_modules():
        if name in CONVOLUTIONS or name in ("egde_module", "conv_bottleneck"):
            module.register_forward_hook(record(name))
    with torch.no_grad():
        output = network(images())
    return network, output, seen


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def relu(values):
    return np.maximum(values, 0)


def pooled(values):
    channels, height, width = values.shape
    return values.reshape(channels, height // 2, 2, width // 2, 2).max(axis=(2, 4))


def upsampled(values, height, width):
    return np.stack([cv2.resize(channel, (width, height), interpolation=cv2.INTER_LINEAR) for channel in values])


def reference_levels(seen):
    """c1, c2, c3, c4 of the backbone, and c4 with the distilled features."""
    c1, c2, c3, c4 = (relu(seen[name][1]) for name in ("conv1b", "conv2b", "conv3b", "conv4b"))
    return c1, c2, c3, c4, c4 + seen["dist_conv_fushion"][1]


def reference_concatenation(c1, c2, c3, c4):
    down1 = (c1[:, 1::4, 1::4] + c1[:, 1::4, 2::4] + c1[:, 2::4, 1::4] + c1[:, 2::4, 2::4]) / 4
    down2 = (c2[:, 0::2, 0::2] + c2[:, 0::2, 1::2] + c2[:, 1::2, 0::2] + c2[:, 1::2, 1::2]) / 4
    return np.concatenate((down1, down2, c3, upsampled(c4, *c3.shape[1:])))


def test_backbone_and_distillation_head(traced):
    _, output, seen = traced
    previous = None
    for level in "1234":
        if previous is not None:
            close(seen[f"conv{level}a"][0], pooled(relu(seen[previous][1])))
        close(seen[f"conv{level}b"][0], relu(seen[f"conv{level}a"][1]))
        previous = f"conv{level}b"
    close(seen["dist_conv_feat"][0], relu(seen["conv4b"][1]))
    close(seen["dist_conv_fushion"][0], seen["dist_conv_feat"][1])
    close(output.distilled[0], seen["dist_conv_feat"][1])
    assert output.distilled.min() < 0  # no activation


def test_features_are_concatenated_from_raw_c3_and_distilled_c4(traced):
    _, _, seen = traced
    c1, c2, c3, _, fused_c4 = reference_levels(seen)
    close(seen["conv_edg"][0], reference_concatenation(c1, c2, c3, fused_c4))


def test_detection_heads(traced):
    network, output, seen = traced
    c1, c2, c3, _, fused_c4 = reference_levels(seen)
    edges = 1 / (1 + np.exp(-seen["conv_edg"][1]))
    close(output.edges[0], edges)
    assert edges.std() > 0.01
    for head, values in enumerate((c1, c2, c3 * edges + c3, fused_c4), start=1):
        close(seen[f"heatmap{head}"][0], values)
        close(output.head_logits[head - 1][0], seen[f"heatmap{head}"][1])
    shares = [0.4, 0.3, 0.2, 0.1] if network.config.initialisation == "stable" else [0.1, 0.2, 0.3, 0.4]
    expected = sum(share * upsampled(seen[f"heatmap{k}"][1], 32, 48) for k, share in enumerate(shares, start=1))
    close(output.heatmap[0].numpy(), expected)
    weights = [getattr(network, f"fuse_weight_{k}").item() for k in (1, 2, 3, 4)]
    assert weights == pytest.approx(shares)


def test_edge_attention_descriptors_and_attention_map(traced):
    network, output, seen = traced
    features, edges = seen["conv_edg"][0], output.edges[0].numpy()
    fused = features
    if network.config.edge_attention != "none":
        close(seen["egde_module"][0], features * edges)
        fused = features + seen["egde_module"][1]
    if network.config.descriptor_bottleneck:
        close(seen["conv_bottleneck"][0], fused)
        close(seen["conv_des"][0], relu(seen["conv_bottleneck"][1]))
        assert seen["conv_des"][0].shape[0] == network.config.descriptor_bottleneck
    else:
        close(seen["conv_des"][0], fused)
    close(output.descriptors[0], seen["conv_des"][1])
    if network.config.attention_source == "backbone":
        fused = reference_concatenation(*reference_levels(seen)[:4])
    close(seen["scalemap"][0], fused.mean(axis=0, keepdims=True))
    close(output.attention[0], np.log1p(np.exp(seen["scalemap"][1])))


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_without_edge_attention_the_features_pass_through(preset):
    network = build(preset, edge_attention="none")
    seen = []
    head = network.conv_bottleneck or network.conv_des
    head.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    network.conv_edg.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    network(images())
    assert torch.equal(seen[0], seen[1])


def test_unused_head_is_unused():
    network = build("released")
    before = network(images())
    with torch.no_grad():
        network.conv_det.weight.fill_(torch.nan)
    after = network(images())
    assert all(torch.equal(a, b) for a, b in zip(before[:5], after[:5]))


# -------------------------------------------------------------------------------------------------- edge attention


def projections(module, features):
    def project(convolution):
        weight, bias = (x.double().detach().numpy() for x in (convolution.weight[:, :, 0, 0], convolution.bias))
        return np.einsum("oc,bchw->bohw", weight, features.double().numpy()) + bias[:, None, None]

    return project(module.query_conv), project(module.key_conv), project(module.value_conv)


def softmax(scores):
    values = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return values / values.sum(axis=-1, keepdims=True)


def guidance(kind):
    generator = torch.Generator().manual_seed(3)
    module = EdgeAttentionGuidance(kind, 384)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return module, torch.randn((2, 384, 5, 7), generator=generator)


def test_row_attention_is_per_channel_attention_between_rows():
    module, features = guidance("row")
    query, key, value = projections(module, features)
    expected = np.zeros_like(query)
    for b in range(query.shape[0]):
        for c in range(query.shape[1]):
            scores = np.empty((5, 5))
            for i in range(5):
                for j in range(5):
                    scores[i, j] = 0.01 * sum(query[b, c, i, x] * key[b, c, j, x] for x in range(7))
            expected[b, c] = softmax(scores) @ value[b, c]
    np.testing.assert_allclose(module(features).detach(), expected, rtol=1e-4, atol=1e-5)


def test_pixel_attention_is_self_attention_over_positions():
    module, features = guidance("pixel")
    query, key, value = (x.reshape(2, 384, 35) for x in projections(module, features))
    weights = softmax(np.einsum("bcp,bcq->bpq", query, key) / math.sqrt(384))
    expected = np.einsum("bpq,bcq->bcp", weights, value).reshape(2, 384, 5, 7)
    np.testing.assert_allclose(module(features).detach(), expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ initial state


def test_released_initialisation():
    network = build("released")
    for name in CONVOLUTIONS:
        convolution = network.get_submodule(name)
        weight, bias = convolution.weight.detach(), convolution.bias.detach()
        expected = math.sqrt(2 / (weight.shape[0] * weight[0, 0].numel()))
        tolerance = 5 / math.sqrt(2 * weight.numel())  # five standard errors
        if weight.numel() > 50:
            assert float(weight.std()) == pytest.approx(expected, rel=tolerance), name
        bound = 1 / math.sqrt(weight[0].numel())
        assert float(bias.abs().max()) <= bound, name
        if bias.numel() > 50:
            assert float(bias.std()) == pytest.approx(bound / math.sqrt(3), rel=0.3), name


def test_stable_initialisation_differs_in_the_one_channel_heads_and_their_shares_only():
    released, stable = (
        build("released", unused_head=False),
        build("released", unused_head=False, initialisation="stable"),
    )
    for name, value in released.state_dict().items():
        same = torch.equal(value, stable.state_dict()[name])
        assert same == (not name.startswith((*ONE_CHANNEL_HEADS, "fuse_weight"))), name
    assert [stable.get_parameter(f"fuse_weight_{k}").item() for k in (1, 2, 3, 4)] == pytest.approx(
        [0.4, 0.3, 0.2, 0.1]
    )


@pytest.mark.parametrize("seed", range(3))
def test_stable_initialisation_starts_from_flat_sensible_maps(seed):
    with torch.no_grad():
        output = build(seed=seed)(images(64, 64, seed=seed))
    for values, least, most in (
        (torch.sigmoid(output.heatmap), 0.2, 0.35),
        (output.edges, 0.05, 0.2),
        (output.attention, 0.8, 1.2),
    ):
        assert least < float(values.min()) <= float(values.max()) < most


def test_initial_heatmap_minimises_the_weighted_detection_loss_near_one_keypoint_in_540_pixels():
    logits = np.linspace(-6, 6, 12001)
    density = 1 / 543
    s = 1 / (1 + np.exp(-logits))
    loss = -(200 * density * np.log(s + 1e-4) + (1 - density) * np.log(1 - s + 1e-4))
    assert logits[loss.argmin()] == pytest.approx(build().heatmap1.bias.item(), abs=0.01)


def test_same_generator_same_weights():
    first, again, other = build(seed=1), build(seed=1), build(seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(first.conv1a.weight, other.conv1a.weight)


def test_every_used_parameter_receives_a_gradient():
    network = build("released")
    output = network(images())
    sum(values.float().square().mean() for values in output[:5]).backward()
    for name, parameter in network.named_parameters():
        gradient = parameter.grad
        if name.startswith("conv_det"):
            assert gradient is None
        elif name != "egde_module.key_conv.bias":  # softmax does not see a shift common to all keys of a query
            assert gradient is not None, name
            assert gradient.abs().sum() > 0, name


# ------------------------------------------------------------------------------------------------ numbers and layouts


def test_translation_by_the_stride_translates_the_maps():
    network = build(edge_attention="none")
    scene = images(16, 192)
    with torch.no_grad():
        left, right = network(scene[..., :184]), network(scene[..., 8:])
    np.testing.assert_allclose(left.heatmap[..., 88:104], right.heatmap[..., 80:96], atol=1e-6)
    np.testing.assert_allclose(left.descriptors[..., 22:26], right.descriptors[..., 20:24], atol=1e-6)


def test_row_attention_does_not_keep_descriptors_in_place_when_rows_change_elsewhere():
    network = build("released")
    scene = images(128, 64)
    changed = scene.clone()
    changed[:, :, :8] = 1
    with torch.no_grad():
        plain, moved = network(scene), network(changed)
    assert torch.equal(plain.heatmap[..., 96:, :], moved.heatmap[..., 96:, :])
    assert (plain.descriptors[..., 24:, :] - moved.descriptors[..., 24:, :]).abs().max() > 1e-4


def test_channels_last_gives_the_same():
    network, batch = build("released"), images(batch=2)
    with torch.no_grad():
        plain = network(batch)
        fast = network.to(memory_format=torch.channels_last)(batch.to(memory_format=torch.channels_last))
    for a, b in zip(plain[:5], fast[:5]):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_bfloat16_autocast_stays_close_and_keeps_logits_in_float32(preset):
    network, batch = build(preset, initialisation="stable"), images()
    with torch.no_grad():
        plain = network(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = network(batch)
    assert mixed.heatmap.dtype == mixed.edges.dtype == mixed.attention.dtype == torch.float32
    assert mixed.descriptors.dtype == torch.bfloat16
    np.testing.assert_allclose(plain.heatmap, mixed.heatmap, atol=0.02)
    np.testing.assert_allclose(plain.attention, mixed.attention, atol=0.02)
    similarity = F.cosine_similarity(plain.descriptors, mixed.descriptors.float(), dim=1)
    assert similarity.min() > 0.999


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 7, 32)])
def test_rejects_other_shapes(shape):
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        build()(torch.zeros(shape))


# ----------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("field", ["edge_attention", "attention_source", "initialisation", "sampling", "unused_head"])
def test_config_names_the_choices(field):
    with pytest.raises(ValueError, match=f"{field} must be .*got 'nonsense'"):
        NetworkConfig(**{field: "nonsense"})


def test_unknown_preset_names_the_presets():
    with pytest.raises(ValueError, match="'official'; choose one of released, paper, default"):
        network_preset("official")


# --------------------------------------------------------------------------------------------- resizing and sampling


def test_resize_agrees_with_opencv():
    values = images(6, 10)
    for size in ((24, 40), (13, 9), (3, 5)):
        expected = upsampled(values[0].numpy(), *size)
        np.testing.assert_allclose(resize(values, size)[0], expected, atol=1e-6)


def ramp(size, cell):
    """Maps of x and y: each cell holds the image position of its centre."""
    rows, columns = size[0] // cell, size[1] // cell
    centre_y, centre_x = (np.arange(n) * cell + (cell - 1) / 2 for n in (rows, columns))
    grid = np.stack(np.broadcast_arrays(centre_x[None, :], centre_y[:, None]))
    return torch.from_numpy(grid).float()[None]


@pytest.mark.parametrize("cell", [1, 2, 4, 8])
def test_exact_sampling_finds_positions(cell):
    size = (48, 64)
    points = torch.tensor([[[10.0, 20.0], [31.5, 23.25], [50.0, 8.0], [9.75, 40.0]]])
    found = sample(ramp(size, cell), points, size, convention="exact")
    np.testing.assert_allclose(found, points, atol=1e-4)


def test_released_sampling_is_off_by_half_a_pixel_at_the_borders():
    size = (48, 64)
    points = torch.tensor([[[10.0, 20.0], [31.5, 23.5], [50.0, 8.0]]])
    found = sample(ramp(size, 4), points, size, convention="released")
    expected = points * torch.tensor([64 / 63, 48 / 47]) - 0.5
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(found[0, 1], points[0, 1], atol=1e-4)  # no deviation in the middle


def test_sampling_holds_the_border_and_keeps_batches_apart():
    maps = torch.cat((ramp((16, 16), 4), ramp((16, 16), 4) + 100))
    points = torch.tensor([[[0.0, 0.0]], [[15.0, 15.0]]])
    found = sample(maps, points, (16, 16), convention="exact")
    np.testing.assert_allclose(found, [[[1.5, 1.5]], [[113.5, 113.5]]], atol=1e-4)


def test_sampling_half_precision_maps_gives_float32():
    maps = ramp((16, 16), 4).bfloat16()
    assert sample(maps, torch.tensor([[[5.0, 7.0]]]), (16, 16), convention="exact").dtype == torch.float32


def test_sampling_no_points():
    assert sample(ramp((16, 16), 4), torch.zeros(1, 0, 2), (16, 16), convention="exact").shape == (1, 0, 2)


def test_sampling_rejects_another_convention():
    with pytest.raises(ValueError, match="convention must be one of"):
        sample(ramp((16, 16), 4), torch.zeros(1, 1, 2), (16, 16), convention="half")


def test_normalise():
    values = torch.tensor([[3.0, 4.0], [1e-6, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(normalise(values), [[0.6, 0.8], [1, 0], [0, 0]], atol=1e-6)
