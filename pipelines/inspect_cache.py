"""Inspect a cache: summary, pictures of images and pairs, self-contained gallery, full verification."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.table import Table
from upath import UPath

from samfeat.files import write_bytes
from samfeat.pipelines.pictures.draw import (
    color_groups,
    color_map,
    draw_keypoints,
    draw_matches,
    enlarged,
    enlargement,
    panel,
    pca_rgb,
    save_png,
    thumbnail,
)
from samfeat.pipelines.pictures.pages import photograph, render
from samfeat.teacher_cache.schema import Record, TeacherOutput
from samfeat.teacher_cache.store import TeacherCache, open_stores, store_paths
from samfeat.teacher_cache.store.rows import dequantize, quantize
from samfeat.teacher_cache.store.verify import Problem, verify_path
from samfeat.teacher_cache.teachers import teacher_of

logger = logging.getLogger(__name__)

__all__ = ["open_stores", "picture_of_image", "picture_of_pair", "repair_command", "summary", "verify", "write_gallery"]

SHOWN_MATCHES = 80
RELATIVE_TOLERANCE = 2e-3  # of the largest value, beyond the rounding to eight bits


def summary(store: TeacherCache) -> Table:
    """Summary table: content, size, teacher, missing shards, value ranges, compression, mask statistics."""
    spec, provenance = store.spec, store.provenance
    table = Table(title=str(store.path), show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="bold")
    table.add_column()
    height, width = spec.image_size
    missing = store.missing()
    state = "complete" if not missing else f"[yellow]{len(missing)} of {spec.shards} shards missing[/]"
    table.add_row("images", f"{spec.images} of {height} x {width}, in {spec.shards} shards ({state})")
    table.add_row(
        "skipped", f"{len(store.failures)}" + "".join(f"\n{text}" for text in list(store.failures.values())[:5])
    )
    table.add_row("teacher", _account(provenance.teacher))
    table.add_row("source", _account(provenance.source))
    table.add_row("labels", _account(provenance.labels))
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in provenance.versions.items()))
    good = [i for i in range(len(store)) if i // spec.shard_images not in set(missing) and i not in store.failures]
    if good:
        masks, keypoints = store.counts["masks"][good], store.counts["keypoints"][good]
        table.add_row("masks an image", f"{_spread(masks)}, {masks.sum()} in all")
        table.add_row("labels an image", _spread(keypoints))
        if spec.paired:
            pairs = sorted({image // 2 for image in good})
            table.add_row("correspondences a pair", _spread(np.array([store.pair(k).valid.sum() for k in pairs])))
        seen = [store[i] for i in _evenly(good, 16)]
        covered = np.mean([(targets.groups > 0).mean() for targets in seen])
        table.add_row("under a mask", f"{covered:.0%} of the pixels (of {len(seen)} images)")
        embeddings = [dequantize(targets.embedding, targets.embedding_scale) for targets in seen]
        for name, values in (("embedding", np.stack(embeddings)), ("edges", np.stack([t.edges for t in seen]))):
            table.add_row(name, f"{values.min():.3g} to {values.max():.3g}, mean {values.mean():.3g}")
    table.add_row("on disk", _sizes(store))
    return table


def picture_of_image(stores: Sequence[TeacherCache], which: str, out: str | Path) -> str:
    """Draw one image and its targets, by number, name, or part of a name; returns a one-line summary.

    Raises:
        ValueError: there is no such image, or more than one.
    """
    store, image = _find(stores, which)
    record = store.record(image)
    save_png(out, panel([tiles(record)], height=320))
    return f"{record.name}: {len(record.output.masks.stack)} masks, {len(record.keypoints)} labels -> {out}"


def picture_of_pair(stores: Sequence[TeacherCache], which: str, out: str | Path) -> str:
    """Draw one pair, its correspondences and both images' targets; returns a one-line summary.

    The pair is given by its number, or by (part of) the name of one of its images.

    Raises:
        ValueError: there is no such pair, or more than one.
    """
    paired = [store for store in stores if store.spec.paired]
    if not paired:
        raise ValueError("no store of this cache has stored pairs: photographs are trained on homography pairs only")
    store, pair = _find(paired, which, pairs=True)
    found = store.pair(pair)
    records = [store.record(image) for image in found.images]
    colors = pca_rgb([record.output.embedding for record in records])
    targets = [tiles(record, own) for record, own in zip(records, colors)]
    save_png(out, panel([[correspondences(store, pair)], *targets], height=320))
    return f"{records[0].name} and {records[1].name}: {int(found.valid.sum())} correspondences -> {out}"


def write_gallery(
    stores: Sequence[TeacherCache],
    out: str | Path,
    *,
    images: int = 24,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """One self-contained HTML file with images, embeddings (PCA), groups, edges, labels and correspondences.

    Args:
        stores: the stores; each gets a section.
        out: the file.
        images: maximum number of images, taken evenly from each store.
        progress: called with (images drawn, images in all).
    """
    chosen = [(store, _chosen(store, max(1, images // len(stores)))) for store in stores]
    total, done, shown = sum(len(views) for _, some in chosen for views in some), 0, []
    for store, some in chosen:
        entries: list[dict[str, Any]] = []
        for views in some:
            records = [store.record(image) for image in views]
            for record, colors in zip(records, pca_rgb([record.output.embedding for record in records])):
                pictures = [
                    photograph(title, thumbnail(picture), alt=f"{title} of {record.name}")
                    for title, picture in tiles(record, colors)
                ]
                entries.append({"name": record.name, "tiles": pictures, "pair": None})
            if len(views) == 2:
                title, drawn = correspondences(store, views[0] // 2)
                entries[-1]["pair"] = photograph(title, drawn, alt=f"{title}: {' and '.join(r.name for r in records)}")
            done += len(views)
            if progress:
                progress(done, total)
        facts = {"name": store.path.name, "images": store.spec.images, "teacher": _account(store.provenance.teacher)}
        shown.append({**facts, "shown": entries})
    write_bytes(out, render("gallery", title="Teacher cache", stores=shown))
    return f"gallery of {total} images -> {out}"


def _chosen(store: TeacherCache, count: int) -> list[list[int]]:
    """About ``count`` images, evenly spread; both views of a pair together, where both are there."""
    good = _finished(store)
    if not store.spec.paired:
        return [[image] for image in _evenly(good, count)]
    pairs = {image // 2: [view for view in good if view // 2 == image // 2] for image in good}
    return [pairs[pair] for pair in _evenly(list(pairs), max(1, count // 2))]


def verify(
    cache: str | Path,
    *,
    recompute: int = 0,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Check every file and every stored value, and run a few images through the teacher again.

    Args:
        cache: the cache, or one store; may be damaged.
        recompute: images of each store to recompute, drawn with the store's seed.
        checkpoint: SAM's weights, for stores of a SAM teacher; nothing is recomputed there without them.
        progress: called with (images checked, total images).

    Returns:
        one line per problem; empty if everything is in order.

    Raises:
        FileNotFoundError: there is no store.
    """
    problems: list[str] = []
    paths, done = store_paths(cache), 0
    sound = {path: store for path in paths if (store := _opened(path))}
    total = sum(len(store) for store in sound.values())
    for path in paths:
        before = len(problems)
        for found in verify_path(path):
            if isinstance(found, Problem):
                where = f"{path.name}" + (f", image {found.image}" if found.image >= 0 else "")
                problems.append(f"{where}: {found.text}")
            else:
                done += 1
                if progress:
                    progress(done, total)
        if recompute and len(problems) == before:
            problems += _recompute(sound[path], recompute, checkpoint)
    return problems


def repair_command(cache: str | Path) -> str:
    """The command that repairs the stores of a cache, as far as it can be derived from them."""
    path = store_paths(cache)[0]
    return f"samfeat-cli teacher-cache --data DATA --cache {path.parent} --name {path.stem} --repair"


def _opened(path: UPath) -> TeacherCache | None:
    try:
        return TeacherCache.open(path)
    except (ValueError, OSError):
        return None


def _recompute(store: TeacherCache, count: int, checkpoint: Path | None) -> list[str]:
    teacher = teacher_of(store.provenance, checkpoint=checkpoint)
    if teacher is None:
        logger.info(f"{store.path.name}: nothing recomputed, its teacher needs --checkpoint")
        return []
    good = _finished(store)
    rng = np.random.default_rng(store.provenance.seed)
    problems = []
    for image in sorted(rng.permutation(good)[:count].tolist()):
        record = store.record(image)
        again = teacher(record.image[None])[0]
        line, fine = _compare(record.output, again)
        logger.info(f"{store.path.name}, {record.name}: recomputed, {line}")
        if not fine:
            problems.append(f"{store.path.name}, image {image}: the teacher gives other targets now ({line})")
    return problems


def _compare(stored: TeacherOutput, again: TeacherOutput) -> tuple[str, bool]:
    half_step = quantize(again.embedding).scale / 2
    difference = max(0.0, float((np.abs(stored.embedding - again.embedding) - half_step).max()))
    scale = float(np.abs(again.embedding).max()) or 1.0
    groups = float((stored.groups != again.groups).mean())
    edges = int(np.abs(stored.edges.astype(int) - again.edges).max())
    line = f"embedding off by {difference / scale:.1e} relative, groups on {groups:.3%} of the pixels, edges by {edges}"
    return line, difference <= RELATIVE_TOLERANCE * scale and groups <= 1e-3 and edges <= 1


def tiles(record: Record, colors: np.ndarray | None = None) -> list[tuple[str, np.ndarray]]:
    """Titled pictures of an image and of its targets, uint8 [.., .., 3], at least ``LEAST`` pixels high and wide.

    Args:
        record: the image and its targets.
        colors: uint8 [h, w, 3], its embedding in colours, where they shall be the same as another image's.
    """
    colors = pca_rgb([record.output.embedding])[0] if colors is None else colors
    output, (height, width) = record.output, record.image.shape[:2]
    factor = enlargement(record.image)
    size = (width * factor, height * factor)
    image = enlarged(record.image, factor)
    embedding = cv2.resize(colors, size, interpolation=cv2.INTER_NEAREST)
    groups = cv2.resize(output.groups.astype(np.float64), size, interpolation=cv2.INTER_NEAREST).astype(np.int64)
    labels = (record.keypoints[:, :2] + 0.5) * factor - 0.5
    return [
        ("image", image),
        ("embedding (PCA)", embedding),
        (f"groups ({len(output.masks.stack)} masks)", color_groups(groups, image)),
        ("edges", enlarged(color_map(output.edges, "gray", low=0, high=255), factor)),
        (f"{len(record.keypoints)} labels", draw_keypoints(image, labels, record.keypoints[:, 2], radius=2)),
    ]


def correspondences(store: TeacherCache, pair: int) -> tuple[str, np.ndarray]:
    """Title and picture (uint8 [H, W, 3]) of a pair's correspondences, of which ``SHOWN_MATCHES`` are drawn."""
    found = store.pair(pair)
    points = found.points[:, found.valid]
    some = _evenly(list(range(points.shape[1])), SHOWN_MATCHES)
    colors = color_map(np.arange(max(1, len(some)))[None], "hsv")[0][: len(some)]
    image0, image1 = (store[image].image for image in found.images)
    factor = enlargement(image0)
    drawn = (points[:, some] + 0.5) * factor - 0.5
    title = f"pair {pair}: {points.shape[1]} correspondences, {len(some)} drawn"
    return title, draw_matches(enlarged(image0, factor), enlarged(image1, factor), *drawn, colors=colors)


def _find(stores: Sequence[TeacherCache], which: str, *, pairs: bool = False) -> tuple[TeacherCache, int]:
    """The store and the number of an image, or of a pair, by number or by name."""
    problems = []
    for store in stores:
        try:
            return store, _number(store, which, pairs)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError("; ".join(problems))


def _number(store: TeacherCache, which: str, pairs: bool) -> int:
    """Names take precedence over numbers, so that an image called ``12`` can be selected."""
    count, what = (store.spec.pairs, "pairs") if pairs else (len(store), "images")
    if which.isdecimal() and which not in store.names:
        if int(which) < count:
            return int(which)
        raise ValueError(
            f"{store.path.name} has {count} {what}, numbered from 0: there is no {what.removesuffix('s')} {which}"
        )
    if not pairs:
        return store.index(which)
    found = {i // 2 for i, name in enumerate(store.names) if name == which}
    found = found or {i // 2 for i, name in enumerate(store.names) if which and which in name}
    if len(found) != 1:
        examples = ", ".join(store.names[2 * pair] for pair in sorted(found)[:3] or range(min(3, count)))
        raise ValueError(
            f"{len(found) or 'no'} pairs of {store.path.name} with an image called {which!r}; for example: {examples}"
        )
    return found.pop()


def _finished(store: TeacherCache) -> list[int]:
    missing = set(store.missing())
    return [i for i in range(len(store)) if i // store.spec.shard_images not in missing and i not in store.failures]


def _evenly(values: Sequence[int], count: int) -> list[int]:
    if len(values) <= count:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, count).round().astype(int)]


def _spread(values: np.ndarray) -> str:
    return f"{values.min()} to {values.max()}, median {np.median(values):.0f}"


def _account(values: Mapping[str, Any]) -> str:
    """Plain values of a provenance, digests cut; nested parameters stay in the store's attributes."""
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    return ", ".join(f"{key} {value[:12] if key.endswith('_sha256') else value}" for key, value in plain.items())


def _sizes(store: TeacherCache) -> str:
    stored = store.stored_bytes()
    rows = []
    for array in sorted(store.spec.arrays(), key=lambda array: -stored[array.name])[:6]:
        raw = int(np.prod(array.shape, dtype=np.int64)) * (
            16 if array.dtype == "string" else np.dtype(array.dtype).itemsize
        )
        rows.append(f"{array.name} {stored[array.name] / 1e6:.1f} MB ({stored[array.name] / raw:.1%} of raw)")
    each = sum(stored.values()) / max(1, len(_finished(store)))
    return f"{sum(stored.values()) / 1e6:.1f} MB, {each / 1e6:.2f} MB an image\n" + "\n".join(rows)
