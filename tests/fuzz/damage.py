"""Ways to damage files: as disks, downloads and editors do, and as other programs' files differ from ours."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

NAMES = [
    "m[/x]",
    "q[red]",
    "[bold]a[/bold]",
    "a\\",
    "b b",
    "'c'",
    '"d"',
    "caf\udce9",
    "\n",
    "%s",
    "{0}",
    "~",
    "-x",
    "#1",
]
JUNK: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    10**12,
    10**400,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "[red]",
    "\x00",
    "é" * 50,
    [],
    [1],
    [[1, 2], [3]],
    {},
    {"a": 1},
    [None],
    "1e3",
    "${oc.env:HOME}",
    "../../x",
    "0/0",
    "-",
    [[[]]],
]


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """``data`` truncated, with bits flipped, zeros, noise, or something else in its place."""
    size = len(data)
    place = rng.randrange(size) if size else 0
    length = min(size - place, rng.choice([1, 8, 100, 5000]))
    kind = rng.randrange(8)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + bytes(length) + data[place + length :]
    if kind == 2:
        return data[:place] + rng.randbytes(length) + data[place + length :]
    if kind == 3:
        return data[:place] + data[place + length :]
    if kind == 4:
        return data[:place] + rng.randbytes(length) + data[place:]
    if kind == 5:
        return rng.choice(
            [b"", b"\x00", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", b"\x89PNG\r\n\x1a\n", b"{}", b"<html>", b"\xff\xfe"]
        )
    if kind == 6:  # in the head, where formats keep their structure
        place = rng.randrange(min(size, 400)) if size else 0
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 20]) if size else 0):
        changed[place if kind == 6 else rng.randrange(size)] ^= 1 << rng.randrange(8)
        place = min(size - 1, place + rng.randrange(40))
    return bytes(changed)


def damage_file(path: Path, rng: random.Random) -> None:
    """A file with other bytes, gone, a folder, or a link to nowhere or to itself."""
    kind = rng.randrange(12)
    if kind > 3:
        path.write_bytes(damage_bytes(path.read_bytes(), rng))
        return
    path.unlink()
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(path.parent / "nowhere")
    elif kind == 3:
        path.symlink_to(path.name)


def damage_json(text: str, rng: random.Random) -> str:
    """JSON with a value, key or entry that nobody expects."""
    values = json.loads(text)
    spots: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            spots.append((node, key))
            collect(node[key])

    collect(values)
    if not spots or rng.random() < 0.1:
        return json.dumps(rng.choice(JUNK))
    node, key = rng.choice(spots)
    if isinstance(node, dict) and rng.random() < 0.3:
        moved = node.pop(key)
        if rng.random() < 0.5:
            node[rng.choice(NAMES)] = moved
    else:
        node[key] = rng.choice(JUNK)
    return json.dumps(values)


def damage_safetensors(path: Path, rng: random.Random) -> None:
    """A weights file whose header or metadata says something else, its length being right."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if rng.random() < 0.6:
        entry = json.loads(damage_json(header["__metadata__"]["samfeat-weights"], rng))
        if isinstance(entry, dict) and rng.random() < 0.8:
            entry.pop("sha256", None)  # what is left to find is the value itself
        header["__metadata__"]["samfeat-weights"] = json.dumps(entry)
    else:
        header = json.loads(damage_json(json.dumps(header), rng))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def damage_checkpoint(path: Path, rng: random.Random) -> None:
    """A checkpoint whose tensors are something else."""
    values: Any = torch.load(path, weights_only=True)
    name = rng.choice(sorted(values))
    tensor = values[name]
    changes: list[Callable[[], Any]] = [
        lambda: tensor * torch.nan,
        lambda: tensor.to(rng.choice([torch.int8, torch.float16, torch.complex64, torch.bool, torch.float64])),
        lambda: tensor.to_sparse(),
        lambda: tensor.flatten(),
        lambda: torch.nn.Parameter(tensor),
        lambda: tensor.to("meta"),
        lambda: rng.choice([None, 3, "x", [1], {"a": 1}]),
    ]
    if rng.random() < 0.3:
        values[rng.choice([1, "x", None, ("a",), 2.5])] = values.pop(name)
    else:
        values[name] = rng.choice(changes)()
    torch.save(rng.choice([values, values, values, [values], {"model": values}, tensor]), path)


def damage_hdf5(path: Path, rng: random.Random) -> None:
    """A file of features with other datasets, shapes, types or attributes."""
    strange: list[Callable[[], Any]] = [
        lambda: np.zeros((3, 2), np.float32),
        lambda: np.zeros(0),
        lambda: np.float32(1),
        lambda: np.full((4, 2), np.nan),
        lambda: np.zeros((2, 3, 4)),
        lambda: np.zeros((128, 5), np.complex64),
        lambda: np.zeros((128, 5), bool),
        lambda: "text",
        lambda: np.array([b"a", b"b"]),
        lambda: np.array(10**12),
        lambda: h5py.Empty("f"),
        lambda: h5py.SoftLink("/nowhere"),
        lambda: h5py.ExternalLink("nowhere.h5", "/"),
        lambda: h5py.SoftLink("/"),
    ]
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(lambda name: names.append(name.rpartition("/")[0]) if name.endswith("/keypoints") else None)
        group = file[rng.choice(names)]
        kind = rng.randrange(5)
        if kind == 0:
            place = rng.choice([file, group, group["keypoints"]])
            place.attrs[rng.choice(["config", "sha256", "uncertainty"])] = rng.choice(
                [3, b"\xff", "{", "[]", "[" * 5000, np.zeros(3), h5py.Empty("f"), "null", '{"a": 1}']
            )
        elif kind == 1:
            del group[rng.choice(sorted(group))]
        elif kind == 2:
            name = group.name
            del file[name]
            file[name] = rng.choice(strange)()
        else:
            key = rng.choice([*sorted(group), "extra"])
            if key in group:
                del group[key]
            group[key] = rng.choice(strange)()


def damage_text(text: str, rng: random.Random) -> bytes:
    """A text file as editors, other systems and people change it."""
    lines = text.splitlines()
    changes: list[Callable[[], bytes]] = [
        lambda: text.encode("utf-16"),
        lambda: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
        lambda: text.encode() + b"\xff\xfe\x00",
        lambda: (
            "\n".join(
                [*lines, rng.choice(["#", "a", "a b c", '"a', "\t", "a\tb", "${x}", "*y", "&a [*a]", "- 1", "---"])]
            )
        ).encode(),
        lambda: text.replace(" ", rng.choice(["\t", "  ", ",", ""])).encode(),
        lambda: text.replace(
            rng.choice(text or "x"), rng.choice(["[", "{", ":", "'", '"', "%", "@", "\x07", "nan", "1e999"])
        ).encode(),
        lambda: (text * 2).encode(),
        lambda: b"",
    ]
    return rng.choice(changes)()


def damage_value(rng: random.Random) -> str:
    """What stands behind ``key=`` in an override."""
    return rng.choice(
        [
            "[1",
            "{",
            '"',
            "*y",
            "&a",
            "!!python/name:os",
            "\t",
            "[]",
            "{}",
            "{a: 1, a: 2}",
            "nan",
            "-inf",
            "1e999",
            "???",
            "",
            "${oc.env:HOME}",
            "null",
            "true",
            "2020-01-01",
            "0x10",
            "[1, [2]]",
            "-1",
            "0",
            "9" * 400,
            "é",
            "\x00",
            "|",
            ">",
            "%",
            "@",
            "'",
            "a: b: c",
            "- 1",
            "?",
            "1_0",
            "~",
            ".",
            "..",
            "[bold]",
        ]
    )
