"""How much faster is the teacher than segment_anything on the same weights? Random weights, so nothing is downloaded.

    python tests/benchmarks/bench_teacher.py [--device cpu|cuda] [--repeats 3] [--grid 8] [--out bench/teacher.md]

On the CPU: the parts and the whole of ViT-B side by side in one process, three to five minutes on two cores. On a GPU:
images per second of ViT-B and ViT-H, encoder alone, generator, and stage one from JPEG files to a finished store.
The weights are scaled so that the default predicted IoU passes about 40 % of the prompts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from figures import BARS, record
from segment_anything import SamAutomaticMaskGenerator, sam_model_registry
from segment_anything.modeling import Sam
from segment_anything.utils.amg import batched_mask_to_box, calculate_stability_score
from torch.utils.flop_counter import FlopCounterMode

from samfeat.pipelines.build_cache import build_cache
from samfeat.teacher_cache.sources import open_source
from samfeat.teacher_cache.teachers.sam import IMAGES_AT_ONCE, SamParameters, SamTeacher
from samfeat.teacher_cache.teachers.sam_decoder import ImageSide, SamDecoder
from samfeat.teacher_cache.teachers.sam_encoder import SamEncoder
from samfeat.teacher_cache.teachers.sam_masks import (
    Found,
    Frame,
    Resampling,
    find_edge_masks,
    find_masks,
    mask_boxes,
    stability_score,
)

SIZE = 400  # pixels, side of a training crop
PASSING = 0.4  # of the prompts
BOX_NMS = 0.9  # random masks overlap more than real ones; at 0.7 too few would be left
SHARPNESS = 200.0  # standard deviation of the logits of a mask: nearly all masks are stable
FRAME = Frame((SIZE, SIZE), (1024, 1024), 1024)
DECODER = {"all masks": "mask decoder", "40 % pass": "mask decoder, 40 % pass"}
FOUND: dict[str, float] = {}  # figures with a bar

Table = list[str]


def photograph(seed: int = 0, size: tuple[int, int] = (SIZE, SIZE)) -> np.ndarray:
    """A smooth random image, uint8 [H, W, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)


def random_sam(name: str, image: np.ndarray, device: str = "cpu", prompts_per_side: int = 10) -> Sam:
    """A SAM of random weights whose masks are smooth, small, differ from prompt to prompt and pass default thresholds.

    Random weights alone give noise. Positions that dominate the embedding and plain upsampling make masks smooth; the
    last channel of the upscaled features becomes a constant, by which the masks on ``image`` are shifted to a tenth of
    its area; the predicted IoU is shifted so that ``PASSING`` of the prompts have a mask above 0.88.
    """
    torch.manual_seed(0)
    sam = sam_model_registry[name]().eval()
    decoder, side = sam.mask_decoder, sam.image_encoder.img_size
    with torch.no_grad():
        positions = sam.image_encoder.pos_embed
        coarse = 5 * torch.randn(1, positions.shape[-1], 4, 4)
        positions.copy_(F.interpolate(coarse, positions.shape[1:3], mode="bicubic").permute(0, 2, 3, 1))
        for parameter in sam.image_encoder.parameters():
            if parameter.ndim == 2 and len(parameter) % 2:  # tables of relative positions, which start as zeros
                parameter.normal_(std=0.02)
        sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.mul_(0.5)
        for weight in decoder.transformer.parameters():
            if weight.ndim == 2:
                weight.mul_(2)
        for layer in (decoder.output_upscaling[0], decoder.output_upscaling[3]):
            layer.weight.copy_(layer.weight.mean((2, 3), keepdim=True).expand_as(layer.weight) * 6)
        decoder.output_upscaling[3].weight[:, -1] = 0
        decoder.output_upscaling[3].bias[-1] = 3  # GELU(3) is 3 to within 0.5 %
        for head in decoder.output_hypernetworks_mlps:
            head.layers[0].weight.mul_(3)
            head.layers[-1].weight[-1] = 0
            head.layers[-1].bias[-1] = 0
    sam = sam.to(device)
    with torch.inference_mode():
        fast = SamDecoder(sam)
        images = fast.image_side(SamEncoder(sam.image_encoder)(pixels_of(sam, image[None])))
        y, x = torch.meshgrid(*[(torch.arange(prompts_per_side) + 0.5) / prompts_per_side * side] * 2, indexing="ij")
        prompts = fast.tokens(torch.stack([x, y], dim=-1).flatten(0, 1).to(device))
        low = [fast.decode(images, some) for some in prompts.split(4)]
        logits = torch.cat([part.logits for part in low]).unflatten(0, (-1, 3))[..., ::4, ::4]
        predicted_iou = torch.cat([part.predicted_iou for part in low]).unflatten(0, (-1, 3))
        mean = predicted_iou.mean(0)
    with torch.no_grad():
        for head, values in zip(decoder.output_hypernetworks_mlps[1:], logits.clone().transpose(0, 1)):
            factor = SHARPNESS / values.std((1, 2)).mean()
            head.layers[-1].weight.mul_(factor)
            head.layers[-1].bias.mul_(factor)
            head.layers[-1].bias[-1] = -values.flatten()[::7].quantile(0.9) * factor / 3
        level = 0.88 - (predicted_iou - mean).amax(1).quantile(1 - PASSING)
        decoder.iou_prediction_head.layers[-1].bias[1:] += level - mean  # no mask is better than the others
    return sam


def pixels_of(sam: Sam, images: np.ndarray) -> torch.Tensor:
    """The encoder's input for square images, uint8 [B, H, W, 3]."""
    side = sam.image_encoder.img_size
    scaled = np.stack([cv2.resize(image, (side, side)) for image in images])
    return sam.preprocess(torch.from_numpy(scaled).to(sam.device).permute(0, 3, 1, 2))


def interleaved(
    contenders: dict[str, Callable[[], object]], repeats: int, *, uncounted: int = 1
) -> dict[str, list[float]]:
    """Seconds of each contender, all of them in every round, after ``uncounted`` rounds."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(repeats + uncounted):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= uncounted:
                times[name].append(time.perf_counter() - start)
    return times


def rows(title: str, times: dict[str, list[float]], figures: dict[str, str] | None = None) -> Table:
    """One line a contender; ratios are to the first one, and some of them are figures with a bar."""
    (reference, *_), lines = times, []
    for name, seconds in times.items():
        median, minimum = (pick(times[reference]) / pick(seconds) for pick in (statistics.median, min))
        bar = ""
        if figures and name in figures:
            FOUND[figures[name]], bar = median, f"{BARS[figures[name]].value:.1f}"
        lines.append(
            f"| {title} | {name} | {1e3 * statistics.median(seconds):.0f} | {1e3 * min(seconds):.0f} "
            f"| {median:.2f} | {minimum:.2f} | {bar} |"
        )
    print(*lines, sep="\n", flush=True)
    return lines


def decoder_rows(sam: Sam, embedding: torch.Tensor, repeats: int) -> Table:
    """The mask decoder for 32 prompts: all masks, and only those of prompts that pass."""
    points = torch.rand(32, 1, 2, generator=torch.Generator().manual_seed(1)) * sam.image_encoder.img_size
    sparse, dense = sam.prompt_encoder(points=(points, torch.ones(32, 1)), boxes=None, masks=None)
    fast = SamDecoder(sam)
    images, prompts = fast.image_side(embedding), fast.tokens(points[:, 0])
    best = fast.decode(images, prompts).predicted_iou.unflatten(0, (-1, 3)).amax(1)
    threshold = best.quantile(1 - PASSING).item()

    def reference() -> object:
        return sam.mask_decoder(
            image_embeddings=embedding,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )

    contenders = {
        "segment_anything": reference,
        "all masks": lambda: [fast.decode(images, some) for some in prompts.split(2)],
        "40 % pass": lambda: [fast.decode(images, some, iou_above=threshold) for some in prompts.split(2)],
    }
    return rows("decoder, 32 prompts", interleaved(contenders, repeats), DECODER)


def post_rows(sam: Sam, repeats: int) -> Table:
    """From the decoder's masks of 64 prompts, a quarter of which pass, to stability scores and boxes."""
    size = (256, 256)
    coarse = torch.randn(192, 1, 12, 12, generator=torch.Generator().manual_seed(2))
    logits = 20 * F.interpolate(coarse, size, mode="bicubic")
    passing = torch.arange(192) % 4 == 0

    def reference() -> object:
        large = sam.postprocess_masks(logits, FRAME.scaled, FRAME.image)[:, 0][passing]
        return calculate_stability_score(large, 0.0, 1.0), batched_mask_to_box(large > 0)

    def ours() -> object:
        resample = Resampling(size, FRAME, logits.device)
        larger = [resample(some) for some in logits[passing, 0].split(12)]
        return [(stability_score(large, 0.0, 1.0), mask_boxes(large > 0)) for large in larger]

    times = interleaved({"segment_anything": reference, "ours": ours}, 3 * repeats)
    return rows("masks to boxes, 192 masks, 25 % pass", times, {"ours": "masks to boxes"})


def whole_rows(sam: Sam, image: np.ndarray, grid: int, repeats: int) -> Table:
    """Embedding and masks of an image; and the teacher, which also makes edges from a grid half as fine."""
    ask = {"points_per_side": grid, "box_nms_thresh": BOX_NMS}
    reference = SamAutomaticMaskGenerator(sam, **ask)
    teacher = SamTeacher.from_sam(
        sam, model="random", checkpoint_sha256="0" * 64, **ask, edge_points_per_side=grid // 2
    )
    encoder, decoder = SamEncoder(sam.image_encoder), SamDecoder(sam)
    found: dict[str, int] = {}

    def theirs() -> None:
        found["theirs"] = len(reference.generate(image))

    def ours() -> None:
        images = decoder.image_side(encoder(pixels_of(sam, image[None])))
        found["ours"] = len(generated(decoder, images, grid)[0].masks)

    contenders = {
        "SamAutomaticMaskGenerator": theirs,
        "embedding and masks": ours,
        "SamTeacher, with edges": lambda: teacher(image[None]),
    }
    times = interleaved(contenders, repeats, uncounted=0)
    return rows(f"ViT-B, {grid} x {grid} prompts, {found['theirs']} and {found['ours']} masks", times)


def generated(decoder: SamDecoder, images: ImageSide, grid: int, frame: Frame = FRAME) -> list[Found]:
    """Masks with the default thresholds of the scores."""
    ask = SamParameters(points_per_side=grid)
    return find_masks(
        decoder,
        images,
        frame,
        points_per_side=grid,
        pred_iou_thresh=ask.pred_iou_thresh,
        stability_score_thresh=ask.stability_score_thresh,
        stability_score_offset=ask.stability_score_offset,
        box_nms_thresh=BOX_NMS,
    )


def flops(prompts: int = 1024) -> Table:
    """TFLOP of one 400 x 400 image with ViT-H, counted without computing anything."""
    with torch.device("meta"):
        sam = sam_model_registry["vit_h"]().eval()
    sam = sam.to("meta")
    pixels, embedding = torch.empty(1, 3, 1024, 1024, device="meta"), torch.empty(1, 256, 64, 64, device="meta")
    tokens = torch.empty(prompts, 7, 256, device="meta")
    decoder = SamDecoder(sam)
    images = decoder.image_side(embedding)
    features, state = torch.empty(prompts, 4096, 256, device="meta"), tokens

    def counted(call: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        return counter.get_total_flops() / 1e12

    def reference_decoder() -> object:
        return sam.mask_decoder(
            image_embeddings=embedding,
            image_pe=embedding,
            sparse_prompt_embeddings=tokens[:, :2],
            dense_prompt_embeddings=features.transpose(1, 2).unflatten(2, (64, 64)),
            multimask_output=True,
        )

    theirs = counted(lambda: sam.image_encoder(pixels)), counted(reference_decoder)
    everything = counted(lambda: decoder.decode(images, tokens))
    transformer = counted(lambda: decoder._transform(images, tokens))
    first = counted(lambda: decoder._read(features, state, state, 0, 1))
    gated = transformer + first + PASSING * (everything - transformer - first)
    ours = (
        counted(lambda: SamEncoder(sam.image_encoder)(pixels)),
        counted(lambda: decoder.image_side(embedding)) + gated,
    )
    lines = [
        "| ViT-H, 1,024 prompts | encoder | decoder | together, TFLOP | bar |",
        "|---|---|---|---|---|",
        f"| segment_anything | {theirs[0]:.2f} | {theirs[1]:.2f} | {sum(theirs):.2f} | |",
        f"| ours, {PASSING:.0%} of the prompts pass | {ours[0]:.2f} | {ours[1]:.2f} | {sum(ours):.2f} | 7.3 |",
        f"| ours, all pass | {ours[0]:.2f} | {everything:.2f} | {ours[0] + everything:.2f} | |",
    ]
    print(*lines, sep="\n", flush=True)
    FOUND["ViT-H, 1,024 prompts"] = sum(ours)
    return lines


def cpu_tables(grid: int, repeats: int) -> Table:
    """Parts and whole of ViT-B, and the arithmetic of ViT-H."""
    lines = [
        "| what | contender | median ms | min ms | ratio of medians | of minima | bar |",
        "|---|---|---|---|---|---|---|",
    ]
    image = photograph()
    print(*lines, sep="\n", flush=True)
    sam = random_sam("vit_b", image)
    with torch.inference_mode():
        encoder, pixels = SamEncoder(sam.image_encoder), pixels_of(sam, image[None])
        embedding = encoder(pixels)
        lines += decoder_rows(sam, embedding, repeats)
        lines += post_rows(sam, repeats)
        contenders = {"segment_anything": lambda: sam.image_encoder(pixels), "ours": lambda: encoder(pixels)}
        lines += rows("encoder ViT-B, float32", interleaved(contenders, 2, uncounted=0))
        lines += whole_rows(sam, image, grid, 2)
    return [*lines, "", *flops()]


def rate(call: Callable[[], object], images: int, repeats: int) -> tuple[float, float]:
    """Images per second of the fastest of ``repeats`` calls, and the peak of the GPU's memory in GiB."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    fastest = min(interleaved({"": call}, repeats)[""])
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return images / fastest, peak


def write_photographs(folder: Path, count: int) -> None:
    """JPEG files of the size of a crop."""
    folder.mkdir()
    for k in range(count):
        cv2.imwrite(str(folder / f"{k:05}.jpg"), photograph(k))


def stage_one(sam: Sam, name: str, count: int, folder: Path) -> Callable[[], object]:
    """From ``count`` JPEG files to a finished store; every call writes a store of its own."""
    write_photographs(folder / "photos", count)
    teacher = SamTeacher.from_sam(sam, model=name, checkpoint_sha256="0" * 64, box_nms_thresh=BOX_NMS)
    numbers = iter(range(1000))
    return lambda: build_cache(folder / f"{next(numbers)}.zarr", open_source(folder / "photos"), teacher)


def device_table(sam: Sam, name: str, *, batch: int, files: int, repeats: int, folder: Path, grid: int = 32) -> Table:
    """Images per second and memory of one model on the device where it lies."""
    images = np.stack([photograph(k) for k in range(batch)])
    side, kind = sam.image_encoder.img_size, sam.device.type
    frame = Frame((SIZE, SIZE), (side, side), side)
    ask = {"points_per_side": grid, "edge_points_per_side": grid // 2, "box_nms_thresh": BOX_NMS}
    teacher = SamTeacher.from_sam(sam, model=name, checkpoint_sha256="0" * 64, **ask)
    fast, half = (SamEncoder(sam.image_encoder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    decoder, reference = SamDecoder(sam), SamAutomaticMaskGenerator(sam, points_per_side=grid, box_nms_thresh=BOX_NMS)
    lines: Table = []

    def add(what: str, call: Callable[[], object], count: int, times: int = repeats) -> None:
        speed, peak = rate(call, count, times)
        lines.append(f"| {name} | {what} | {speed:.2f} | {1e3 / speed:.1f} | {peak:.1f} |")
        print(lines[-1], flush=True)

    def reference_encoder() -> object:
        with torch.autocast(kind, dtype=torch.bfloat16):
            return sam.image_encoder(pixels)

    with torch.inference_mode():
        pixels = pixels_of(sam, images)
        shared = decoder.image_side(half(pixels))
        edges = {"points_per_side": grid // 2, "points_per_batch": 64, "box_nms_thresh": BOX_NMS}
        found = generated(decoder, shared, grid, frame)
        survivors = sum(len(each.masks) for each in found) / batch
        add("encoder, segment_anything, bfloat16 by autocast", reference_encoder, batch)
        add("encoder, bfloat16", lambda: half(pixels), batch)
        add("encoder, float32", lambda: fast(pixels), batch)
        add(f"masks from embeddings ({survivors:.0f} an image)", lambda: generated(decoder, shared, grid, frame), batch)
        add("edge masks from embeddings", lambda: list(find_edge_masks(decoder, shared, frame, **edges)), batch)
        add("copying the masks to the CPU", lambda: [each.masks.cpu() for each in found], batch)
        add("SamAutomaticMaskGenerator, one image", lambda: reference.generate(images[0]), 1, 2)
    add(f"SamTeacher, float32 masks, {batch} images", lambda: teacher(images), batch)
    precise = teacher(images)
    torch.set_float32_matmul_precision("high")
    add("SamTeacher, TF32 masks", lambda: teacher(images), batch)
    pairs = zip(precise, teacher(images))
    torch.set_float32_matmul_precision("highest")
    same = np.mean([same_partition(one.groups, other.groups) for one, other in pairs])
    lines.append(f"| {name} | pixels that keep their group with TF32 masks | {same:.2%} | | |")
    add("stage one, JPEG files to store", stage_one(sam, name, files, folder), files, 1)
    return lines


def same_partition(one: np.ndarray, other: np.ndarray) -> float:
    """Share of pixels whose group in ``other`` is the one that most of their group in ``one`` has there."""
    pairs, counts = np.unique(np.stack([one.ravel(), other.ravel()]), axis=1, return_counts=True)
    return sum(counts[pairs[0] == label].max() for label in np.unique(one)) / one.size


def gpu_tables(models: list[str], files: int, repeats: int, device: str) -> Table:
    """One table of all models."""
    header = f"Device: {torch.cuda.get_device_name(device)}; {IMAGES_AT_ONCE['cuda']} images at once"
    lines = [header, "", "| model | what | images/s | ms / image | peak GiB |", "|---|---|---|---|---|"]
    print(*lines, sep="\n", flush=True)
    for name in models:
        sam = random_sam(name, photograph(), device)
        with tempfile.TemporaryDirectory() as folder:
            lines += device_table(
                sam, name, batch=IMAGES_AT_ONCE["cuda"], files=files, repeats=repeats, folder=Path(folder)
            )
        del sam
        torch.cuda.empty_cache()
    return [*lines, "", *flops()]


def main() -> None:
    """Print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--grid", type=int, default=8, help="points per side on the CPU; 32 on a GPU")
    parser.add_argument("--models", nargs="+", default=["vit_b", "vit_h"], help="on a GPU; vit_b on the CPU")
    parser.add_argument("--files", type=int, default=256, help="photographs of stage one on a GPU")
    parser.add_argument("--out", type=Path, default=Path("bench/teacher.md"))
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        lines = cpu_tables(arguments.grid, arguments.repeats)
    else:
        lines = gpu_tables(arguments.models, arguments.files, arguments.repeats, arguments.device)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    record(FOUND, beside=arguments.out, device=arguments.device)


if __name__ == "__main__":
    main()
