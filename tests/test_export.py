"""Weights files: round trips, damage, foreign files, and pickles that want to run code."""

import json
import os
import pickle

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from samfeat.student.export import FORMAT, load_weights, save_checkpoint, save_weights
from samfeat.student.network import NetworkConfig, SAMFeatNetwork, network_preset

CONFIG = NetworkConfig(edge_attention="none", attention_source="backbone", sampling="released")


@pytest.fixture(scope="module")
def network():
    return SAMFeatNetwork(CONFIG, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def path(tmp_path, network):
    save_weights(tmp_path / "w.safetensors", network, extraction={"border": 3}, provenance={"data": [1, "two"]})
    return tmp_path / "w.safetensors"


def refuses(path, message):
    """``load_weights`` refuses in one line that names the file."""
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def rewrite(path, *, changed=(), drop=(), **tensors):
    """The same file with some metadata and tensors changed."""
    with safe_open(path, framework="pt") as file:
        values = {name: file.get_tensor(name) for name in file.keys() if name not in drop}  # noqa: SIM118 (no mapping)
        metadata = json.loads(file.metadata()[FORMAT]) | dict(changed)
        del metadata["sha256"]
    safetensors.torch.save_file(values | tensors, path, {FORMAT: json.dumps(metadata)})


# --------------------------------------------------------------------------------------------------------- round trips


def test_round_trip(path, network):
    loaded = load_weights(path)
    assert loaded.config == CONFIG
    assert loaded.extraction == {"border": 3}
    assert loaded.provenance == {"data": [1, "two"]}
    assert loaded.state_dict.keys() == network.state_dict().keys()
    assert all(torch.equal(loaded.state_dict[name], value) for name, value in network.state_dict().items())
    assert torch.equal(loaded.network().conv_des.weight, network.conv_des.weight)


def test_channels_last_networks_round_trip(tmp_path, network):
    other = SAMFeatNetwork(CONFIG).to(memory_format=torch.channels_last)
    other.load_state_dict(network.state_dict())
    save_weights(tmp_path / "w.safetensors", other, extraction={}, provenance={})
    assert torch.equal(load_weights(tmp_path / "w.safetensors").state_dict["conv1b.weight"], network.conv1b.weight)


def test_anybody_can_read_the_file(path, network):
    assert safetensors.torch.load_file(path).keys() == network.state_dict().keys()
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()[FORMAT])
    assert metadata.keys() == {"version", "network", "extraction", "provenance", "sha256"}
    assert metadata["network"]["edge_attention"] == "none"


def test_same_weights_same_bytes(path, tmp_path, network):
    save_weights(tmp_path / "b.safetensors", network, extraction={"border": 3}, provenance={"data": [1, "two"]})
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_writing_is_whole_or_not_at_all(path, network, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_weights(path, network, extraction={}, provenance={})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("value", [{"data": object()}, {"data": float("nan")}])
def test_provenance_must_be_json(tmp_path, network, value):
    with pytest.raises(ValueError, match="must hold JSON values only"):
        save_weights(tmp_path / "w.safetensors", network, extraction={}, provenance=value)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------- files to refuse


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights file"):
        load_weights(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="no weights file"):
        load_weights(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 100, b"\x89PNG\r\n\x1a\n" * 9])
def test_something_else(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    refuses(path, "neither a safetensors file nor a PyTorch checkpoint")


@pytest.mark.parametrize("share", [0.00002, 0.001, 0.5, 0.99999])
def test_truncated_safetensors(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: max(20, int(len(content) * share))])
    refuses(path, "damaged safetensors file")


def test_other_formats(path):
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    refuses(path, f"its metadata lacks '{FORMAT}'")
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, {"format": "pt"})
    refuses(path, f"its metadata lacks '{FORMAT}'")
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, {FORMAT: "{"})
    refuses(path, "metadata that cannot be read")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": 2}, f"version 2 of {FORMAT}; this program reads version 1"),
        ({"network": {"colour": 1}}, "colour"),
        ({"network": {"sampling": "nearest"}}, "sampling must be one of"),
        ({"extraction": 3}, "metadata that cannot be read"),
        ({"provenance": None}, "metadata that cannot be read"),
    ],
)
def test_other_metadata(path, changed, message):
    rewrite(path, changed=changed)
    refuses(path, message)


def test_wrong_tensors_are_named(path):
    rewrite(path, drop=("conv1a.bias",), extra=torch.zeros(2), scalemap=torch.zeros(1))
    refuses(path, "missing: conv1a.bias; unexpected: extra, scalemap$")


def test_wrong_shapes_are_named(path):
    rewrite(path, **{"conv1a.bias": torch.zeros(3)})
    refuses(path, r"of another shape: conv1a.bias \(3,\) instead of \(64,\)")


# ---------------------------------------------------------------------------------------------- PyTorch checkpoints


@pytest.fixture(scope="module")
def released():
    return SAMFeatNetwork(network_preset("released")).state_dict()


@pytest.mark.parametrize("zipped", [True, False])
def test_released_checkpoint(tmp_path, released, zipped):
    path = tmp_path / "model_29.pt"
    torch.save(released, path, _use_new_zipfile_serialization=zipped)
    loaded = load_weights(path)
    assert loaded.config == network_preset("released")
    assert loaded.extraction is None
    assert torch.equal(loaded.state_dict["conv1a.weight"], released["conv1a.weight"])


AUTHORS_CODE_NAMES = {
    *(f"fuse_weight_{k}" for k in (1, 2, 3, 4)),
    *(
        f"{layer}.{kind}"
        for kind in ("weight", "bias")
        for layer in (
            *(f"conv{k}{part}" for k in (1, 2, 3, 4) for part in "ab"), *(f"heatmap{k}" for k in (1, 2, 3, 4)),
            "dist_conv_feat", "dist_conv_fushion", "scalemap", "conv_des", "conv_det", "conv_edg",
            *(f"egde_module.{part}_conv" for part in ("query", "key", "value")),
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("network_config", [network_preset("released"), NetworkConfig()], ids=["released", "exact"])
def test_a_checkpoint_for_the_authors_code(tmp_path, network_config):
    network = SAMFeatNetwork(network_config, generator=torch.Generator().manual_seed(1))
    save_checkpoint(tmp_path / "m.pt", network)
    values = torch.load(tmp_path / "m.pt", weights_only=True)
    assert set(values) == AUTHORS_CODE_NAMES
    assert sum(value.numel() for value in values.values()) == 2_109_652  # what their network counts
    theirs = load_weights(tmp_path / "m.pt").network()  # strictly
    image = torch.rand((1, 3, 32, 48), generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        for ours, other in zip(network(image)[:5], theirs(image)[:5]):
            assert torch.equal(ours, other)


def test_what_the_authors_code_cannot_compute(tmp_path):
    with pytest.raises(ValueError, match=r"edge_attention 'row'.*these weights 'pixel' and 'backbone'"):
        save_checkpoint(tmp_path / "m.pt", SAMFeatNetwork(network_preset("paper")))
    with pytest.raises(ValueError, match=r"edge_attention 'row'.*these weights 'none' and 'fused'"):
        save_checkpoint(tmp_path / "m.pt", SAMFeatNetwork(network_preset("default")))
    with pytest.raises(ValueError, match=r"other widths than \(16, 32, 64, 128\)"):
        save_checkpoint(tmp_path / "m.pt", SAMFeatNetwork(NetworkConfig(widths=(16, 32, 64, 128))))
    assert not list(tmp_path.iterdir())


def test_prefixed_checkpoint_names_missing_and_unexpected_tensors(tmp_path, released):
    torch.save({f"module.{name}": value for name, value in released.items()}, tmp_path / "m.pt")
    refuses(tmp_path / "m.pt", "missing: conv1a.bias, .* and 42 more; unexpected: module.conv1a.bias, .* and 42 more")


def test_nested_checkpoint(tmp_path, released):
    torch.save({"state_dict": released, "epoch": 29}, tmp_path / "m.pt")
    refuses(tmp_path / "m.pt", "must hold a plain state dict")


def test_truncated_checkpoint(tmp_path, released):
    torch.save(released, tmp_path / "m.pt")
    content = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "m.pt").write_bytes(content[: len(content) // 2])
    refuses(tmp_path / "m.pt", "damaged")


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_a_pickle_that_wants_to_run_code_is_refused_unrun(tmp_path, form):
    path, marker = tmp_path / "m.pt", tmp_path / "marker"
    if form == "bare":
        path.write_bytes(pickle.dumps({"conv1a.weight": Bomb(marker)}, protocol=2))
    else:
        torch.save({"conv1a.weight": Bomb(marker)}, path, _use_new_zipfile_serialization=form == "zip")
    refuses(path, "was not run")
    assert not marker.exists()
    with path.open("rb") as file:  # the bomb is live: plain unpickling sets it off
        torch.load(file, weights_only=False) if form != "bare" else pickle.load(file)
    assert marker.exists()


# ---------------------------------------------------------------------------------------------------- damaged weights


def test_files_without_a_digest_are_read(path, network):
    rewrite(path)
    assert torch.equal(load_weights(path).state_dict["conv_des.weight"], network.conv_des.weight)


def test_any_flipped_bit_of_a_safetensors_file_is_found(path):
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(start, len(content), (8,), generator=generator).tolist()
    places += torch.randint(8, len(content[:start].rstrip()), (24,), generator=generator).tolist()
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 2
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(path.name)):
            load_weights(path)


def test_a_flipped_bit_of_a_checkpoint_is_found(tmp_path, released):
    torch.save(released, tmp_path / "m.pt")
    content = bytearray((tmp_path / "m.pt").read_bytes())
    weights = released["conv_des.weight"].numpy().tobytes()
    content[content.index(weights) + 4001] ^= 1  # the lowest bits of one number: nothing else tells it
    (tmp_path / "m.pt").write_bytes(content)
    assert torch.load(tmp_path / "m.pt", weights_only=True).keys() == released.keys()  # torch does not notice
    refuses(tmp_path / "m.pt", "damaged PyTorch checkpoint .*checksum|damaged PyTorch checkpoint .*CRC")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values * torch.nan, "NaN or infinite: conv1a.bias, .* and 39 more"),
        (lambda values: values + torch.inf, "NaN or infinite"),
        (lambda values: values * 0, "all weights are zero"),
        (lambda values: values.to(torch.int8), "not floating-point: conv1a.bias torch.int8"),
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_weights_that_compute_nothing_are_refused(tmp_path, path, released, kind, change, message):
    if kind == "pt":
        path = tmp_path / "m.pt"
        torch.save({name: change(value) for name, value in released.items()}, path)
    else:
        with safe_open(path, framework="pt") as file:
            rewrite(path, **{name: change(file.get_tensor(name)) for name in file.keys()})  # noqa: SIM118
    refuses(path, message.replace("39", r"\d+"))


@pytest.mark.parametrize(
    "values",
    [{1: torch.zeros(2)}, {"a": torch.zeros(2).to_sparse()}, {"a": torch.zeros(2, device="meta")}, [torch.zeros(2)]],
)
def test_checkpoints_of_other_things(tmp_path, values):
    torch.save(values, tmp_path / "m.pt")
    refuses(tmp_path / "m.pt", "plain state dict|damaged PyTorch checkpoint")


@pytest.mark.parametrize(
    "values",
    [
        {"widths": [10**12, 64, 128, 128]},
        {"widths": 3},
        {"widths": [64, 64, 128]},
        {"widths": ["a", 64, 128, 128]},
        {"unused_head": 1},
        {"edge_attention": ["row"]},
        {"sampling": {"a": 1}},
    ],
)
def test_absurd_networks_are_refused_before_they_are_built(path, values):
    rewrite(path, changed={"network": values})
    refuses(path, "metadata that cannot be read")
