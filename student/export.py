"""Read and write weights files: safetensors with provenance, and the authors' released checkpoint.

A weights file is a safetensors file with one entry of metadata, ``samfeat-weights``, a JSON object: ``version``,
``network`` (the fields of ``NetworkConfig``), ``extraction`` (options of ``SAMFeat``), ``provenance`` (anything that
says where the weights come from) and ``sha256``, a digest of the other entries and of all tensors. Equal contents give
equal bytes. Nothing is ever unpickled beyond tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from samfeat.files import write_bytes
from samfeat.student.network import NetworkConfig, SAMFeatNetwork, network_preset

FORMAT = "samfeat-weights"
DIGEST = "sha256"
VERSION = 1
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_CHANNELS = 1 << 14


class Loaded(NamedTuple):
    """Contents of a weights file.

    Attributes:
        state_dict: exactly the tensors of ``SAMFeatNetwork(config)``, on the CPU.
        config: the network that they belong to.
        extraction: options of ``SAMFeat`` that were stored with them; ``None`` in a foreign checkpoint.
        provenance: where they come from.
    """

    state_dict: dict[str, Tensor]
    config: NetworkConfig
    extraction: dict[str, Any] | None
    provenance: dict[str, Any]

    def network(self) -> SAMFeatNetwork:
        """The network with these weights."""
        network = SAMFeatNetwork(self.config)
        network.load_state_dict(self.state_dict, strict=True)
        return network


def save_weights(
    path: str | os.PathLike[str],
    network: SAMFeatNetwork,
    *,
    extraction: Mapping[str, Any],
    provenance: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Write the weights of ``network`` atomically.

    Args:
        path: the file; an existing one is replaced.
        network: the network; its configuration is stored with the weights.
        extraction: options of ``SAMFeat``, as JSON values (``dataclasses.asdict`` of an ``ExtractionConfig``).
        provenance: anything that says where the weights come from, as JSON values.
        dtype: type to round the weights to; unchanged if None.

    Raises:
        ValueError: ``extraction`` or ``provenance`` holds something that JSON does not know.
        OSError: the file cannot be written.
    """
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in network.state_dict().items()}
    values = {"network": dataclasses.asdict(network.config), "extraction": dict(extraction)}
    values["provenance"] = dict(provenance)
    digest = _digest(tensors, metadata_json(**values))
    write_bytes(path, save(tensors, {FORMAT: metadata_json(**values, **{DIGEST: digest})}))


def save_checkpoint(path: str | os.PathLike[str], network: SAMFeatNetwork) -> None:
    """Write the weights of ``network`` as a plain ``.pt`` state dict that the authors' code loads strictly.

    ``conv_det``, which their network has and never uses, is added with zeros where ``network`` has none. Their
    extractor looks descriptors up as ``sampling="released"`` does; weights trained with ``"exact"`` are read up to half
    a pixel beside their place there.

    Raises:
        ValueError: their network computes something else with these weights: another edge attention than ``"row"``, an
            attention map from the backbone, or other widths.
        OSError: the file cannot be written.
    """
    config = network.config
    if (config.edge_attention, config.attention_source) != ("row", "fused"):
        raise ValueError(
            "the authors' network has edge_attention 'row' and attention_source 'fused', these weights "
            f"{config.edge_attention!r} and {config.attention_source!r}: write safetensors or ONNX instead"
        )
    if config.widths != network_preset("released").widths:
        raise ValueError(
            f"the authors' network has other widths than {config.widths}: write safetensors or ONNX instead"
        )
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
    zeros = {"conv_det.weight": torch.zeros(1, sum(config.widths), 1, 1), "conv_det.bias": torch.zeros(1)}
    buffer = io.BytesIO()
    torch.save(OrderedDict(zeros | tensors), buffer)
    write_bytes(path, buffer.getvalue())


def metadata_json(**values: Any) -> str:
    """Metadata of weights, a JSON object with sorted keys: ``values`` and the version of the format.

    Raises:
        ValueError: a value that JSON does not know.
    """
    try:
        return json.dumps({"version": VERSION} | values, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"extraction and provenance must hold JSON values only: {error}") from error


def load_weights(path: str | os.PathLike[str]) -> Loaded:
    """Read weights: a file of :func:`save_weights`, or the authors' released ``.pt`` state dict.

    The file type is detected from the contents. A pickle is read as tensors only; one that asks for more is refused
    before any of it runs. What is stored beside the tensors to tell damage is compared: the digest of a safetensors
    file (files that were written before there was one are read without), the checksums of a ``.pt`` archive.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another format or version, or does not hold exactly the tensors of its network,
            of finite floating-point numbers that are not all zero.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{":  # safetensors: eight bytes of header length, then JSON
        loaded = _load_safetensors(path)
    elif head.startswith((b"PK", b"\x80")):  # torch.save: a zip archive, or formerly a bare pickle
        loaded = _load_checkpoint(path)
    else:
        raise ValueError(f"{path} is neither a safetensors file nor a PyTorch checkpoint")
    _check_tensors(path, loaded)
    return loaded


def _load_safetensors(path: Path) -> Loaded:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is a damaged safetensors file ({_line(error)}); copy or download it again") from error
    if FORMAT not in metadata:
        raise ValueError(f"{path} holds other weights: its metadata lacks {FORMAT!r}")
    try:
        values = json.loads(metadata[FORMAT])
        if values["version"] != VERSION:
            raise ValueError(f"version {values['version']} of {FORMAT}; this program reads version {VERSION}")
        digest = values.pop(DIGEST, None)
        if digest is not None and digest != _digest(tensors, json.dumps(values, sort_keys=True)):
            raise ValueError("its sha256 does not match, the file is damaged: copy it again")
        if metadata.keys() - {FORMAT, "format"} or values.keys() != {"version", "network", "extraction", "provenance"}:
            raise ValueError("unknown or missing entries, the file is damaged or of another kind")
        config = NetworkConfig(**values["network"])
        if max(config.widths) > MOST_CHANNELS:
            raise ValueError(f"widths must be at most {MOST_CHANNELS}, got {config.widths}")
        return Loaded(tensors, config, dict(values["extraction"]), dict(values["provenance"]))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} has metadata that cannot be read ({_line(error)})") from error


def _digest(tensors: Mapping[str, Tensor], metadata: str) -> str:
    """SHA-256 of the metadata and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(metadata.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load_checkpoint(path: Path) -> Loaded:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load compares no checksum
            if damaged is not None:
                raise ValueError(f"the checksum of {damaged} does not match")
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or a pickle that holds more than tensors, and was not run; "
            "ask for a plain state dict or a safetensors file"
        ) from error
    except Exception as error:  # torch and pickle raise whatever a damaged file leads them to
        raise ValueError(f"{path} is a damaged PyTorch checkpoint ({_line(error)})") from error
    if not isinstance(values, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
        for name, value in values.items()
    ):
        raise ValueError(f"{path} must hold a plain state dict (names and tensors), as the authors' released one does")
    return Loaded(dict(values), network_preset("released"), None, {"source": path.name})


def _check_tensors(path: Path, loaded: Loaded) -> None:
    with torch.device("meta"):
        expected = SAMFeatNetwork(loaded.config).state_dict()
    given = loaded.state_dict
    common = sorted(expected.keys() & given.keys())
    problems = {
        "missing": sorted(expected.keys() - given.keys()),
        "unexpected": sorted(given.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(given[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in common
            if given[name].shape != expected[name].shape
        ],
        "not floating-point": [f"{name} {given[name].dtype}" for name in common if given[name].dtype not in FLOATS],
        "NaN or infinite": [
            name for name in common if given[name].dtype in FLOATS and not given[name].isfinite().all()
        ],
    }
    found = [f"{kind}: {_first(names)}" for kind, names in problems.items() if names]
    if not found and not any(given[name].any() for name in common if given[name].ndim > 1):
        found = ["all weights are zero"]
    if found:
        raise ValueError(f"{path} does not hold the tensors of its network; {'; '.join(found)}")


def _first(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _line(error: BaseException) -> str:
    """First line of an error's text."""
    return (str(error).splitlines() or [type(error).__name__])[0]
