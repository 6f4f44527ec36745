"""Look at a cache: a summary, pictures of images and pairs, a self-contained gallery, a check of every stored value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.table import Table

from samfeat.pipelines.files import write_bytes
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
from samfeat.pipelines.pictures.page import figure, page, row, text
from samfeat.teacher_cache.rows import dequantize, quantize
from samfeat.teacher_cache.schema import Gifts, Record
from samfeat.teacher_cache.store import TeacherCache, open_stores
from samfeat.teacher_cache.verify import Problem
from samfeat.teacher_cache.verify import verify as verify_store

__all__ = ["open_stores", "picture_of_image", "picture_of_pair", "summary", "verify", "write_gallery"]

SHOWN_MATCHES = 80
RELATIVE_TOLERANCE = 2e-3  # of the largest value, beyond the rounding to eight bits


def summary(store: TeacherCache) -> Table:
    """What, how much, by which teacher, what is missing, value ranges, compression, mask statistics."""
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


def picture_of_image(stores: Sequence[TeacherCache], name: str, out: str | Path) -> str:
    """Draw one image and its targets; returns a line of text for people.

    Raises:
        ValueError: no image, or more than one, of that name.
    """
    store, image = _find(stores, name)
    record = store.record(image)
    save_png(out, panel([tiles(record)], height=320))
    return f"{record.name}: {len(record.gifts.masks.stack)} masks, {len(record.keypoints)} labels -> {out}"


def picture_of_pair(stores: Sequence[TeacherCache], pair: int, out: str | Path) -> str:
    """Draw one pair, its correspondences and both images' targets; returns a line of text for people.

    Raises:
        ValueError: there is no such pair.
    """
    store = next((store for store in stores if store.spec.paired), None)
    if store is None:
        raise ValueError("no store of this cache has stored pairs: photographs are trained on homography pairs only")
    found = store.pair(pair)
    records = [store.record(image) for image in found.images]
    matches = _correspondences(store, pair)
    title = f"pair {pair}: {int(found.valid.sum())} correspondences, {min(SHOWN_MATCHES, int(found.valid.sum()))} drawn"
    save_png(out, panel([[(title, matches)], *(tiles(record) for record in records)], height=320))
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
        images: at most so many images, taken evenly from each store.
        progress: called with (images drawn, images in all).
    """
    chosen = [(store, _evenly(_finished(store), max(1, images // len(stores)))) for store in stores]
    total, done, sections = sum(len(some) for _, some in chosen), 0, []
    for store, some in chosen:
        rows = []
        for image in some:
            record = store.record(image)
            rows.append(f"<h3>{text(record.name)}</h3>")
            rows.append(row(*(figure(title, thumbnail(picture)) for title, picture in tiles(record))))
            if store.spec.paired and image % 2 == 0 and image + 1 not in store.failures:
                valid = int(store.pair(image // 2).valid.sum())
                drawn = _correspondences(store, image // 2)
                rows.append(row(figure(f"pair {image // 2}: {valid} correspondences", drawn, wide=True)))
            done += 1
            if progress:
                progress(done, total)
        facts = f"{store.spec.images} images. Teacher: {_account(store.provenance.teacher)}"
        sections.append(f"<h2>{text(store.path.name)}</h2><p>{text(facts)}</p>{''.join(rows)}")
    write_bytes(out, page("Teacher cache", "".join(sections)))
    return f"gallery of {total} images -> {out}"


def verify(
    stores: Sequence[TeacherCache],
    *,
    recompute: int = 0,
    checkpoint: Path | None = None,
    report: Callable[[str], None] = print,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Check every stored value, and give a few images to the teacher again.

    Args:
        stores: the stores.
        recompute: images of each store to compute again, drawn by the store's seed.
        checkpoint: SAM's weights, for stores of a SAM teacher; without them nothing is computed again there.
        report: takes one line for people.
        progress: called with (images checked, images in all).

    Returns:
        one line a problem; nothing where everything is in order.
    """
    problems: list[str] = []
    total, done = sum(len(store) for store in stores), 0
    for store in stores:
        for found in verify_store(store):
            if isinstance(found, Problem):
                where = f"{store.path.name}" + (f", image {found.image}" if found.image >= 0 else "")
                problems.append(f"{where}: {found.text}")
            else:
                done += 1
                if progress:
                    progress(done, total)
        if recompute:
            problems += _recompute(store, recompute, checkpoint, report)
    return problems


def _recompute(store: TeacherCache, count: int, checkpoint: Path | None, report: Callable[[str], None]) -> list[str]:
    from samfeat.pipelines.caching.inputs import teacher_of

    teacher = teacher_of(store.provenance, checkpoint=checkpoint)
    if teacher is None:
        report(f"{store.path.name}: nothing recomputed, its teacher needs --checkpoint")
        return []
    good = _finished(store)
    rng = np.random.default_rng(store.provenance.seed)
    problems = []
    for image in sorted(rng.permutation(good)[:count].tolist()):
        record = store.record(image)
        again = teacher(record.image[None])[0]
        line, fine = _compare(record.gifts, again)
        report(f"{store.path.name}, {record.name}: recomputed, {line}")
        if not fine:
            problems.append(f"{store.path.name}, image {image}: the teacher gives other targets now ({line})")
    return problems


def _compare(stored: Gifts, again: Gifts) -> tuple[str, bool]:
    half_step = quantize(again.embedding).scale / 2
    difference = max(0.0, float((np.abs(stored.embedding - again.embedding) - half_step).max()))
    scale = float(np.abs(again.embedding).max()) or 1.0
    groups = float((stored.groups != again.groups).mean())
    edges = int(np.abs(stored.edges.astype(int) - again.edges).max())
    line = f"embedding off by {difference / scale:.1e} relative, groups on {groups:.3%} of the pixels, edges by {edges}"
    return line, difference <= RELATIVE_TOLERANCE * scale and groups <= 1e-3 and edges <= 1


def tiles(record: Record) -> list[tuple[str, np.ndarray]]:
    """Titled pictures of an image and of its targets, uint8 [.., .., 3], at least ``LEAST`` pixels high and wide."""
    gifts, (height, width) = record.gifts, record.image.shape[:2]
    factor = enlargement(record.image)
    size = (width * factor, height * factor)
    image = enlarged(record.image, factor)
    embedding = cv2.resize(pca_rgb(gifts.embedding.astype(np.float32)), size, interpolation=cv2.INTER_NEAREST)
    groups = cv2.resize(gifts.groups.astype(np.float64), size, interpolation=cv2.INTER_NEAREST).astype(np.int64)
    labels = (record.keypoints[:, :2] + 0.5) * factor - 0.5
    return [
        ("image", image),
        ("embedding (PCA)", embedding),
        (f"groups ({len(gifts.masks.stack)} masks)", color_groups(groups, image)),
        ("edges", enlarged(color_map(gifts.edges, "gray", low=0, high=255), factor)),
        (f"{len(record.keypoints)} labels", draw_keypoints(image, labels, record.keypoints[:, 2])),
    ]


def _correspondences(store: TeacherCache, pair: int) -> np.ndarray:
    found = store.pair(pair)
    points = found.points[:, found.valid]
    some = _evenly(list(range(points.shape[1])), SHOWN_MATCHES)
    colors = color_map(np.arange(max(1, len(some)))[None], "hsv")[0][: len(some)]
    image0, image1 = (store[image].image for image in found.images)
    factor = enlargement(image0)
    drawn = (points[:, some] + 0.5) * factor - 0.5
    return draw_matches(enlarged(image0, factor), enlarged(image1, factor), *drawn, colors=colors)


def _find(stores: Sequence[TeacherCache], name: str) -> tuple[TeacherCache, int]:
    problems = []
    for store in stores:
        try:
            return store, store.index(name)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError("; ".join(problems))


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
    """Plain values of a provenance; nested parameters stay in the store's attributes."""
    return ", ".join(f"{key} {value}" for key, value in values.items() if not isinstance(value, Mapping))


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
