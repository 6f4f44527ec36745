"""A page on this machine: match two photographs, and walk through a teacher cache. Needs gradio.

The page is gradio's. It reads photographs through :mod:`samfeat.images`, computes with what ``samfeat-cli match`` uses,
and draws with what ``inspect-cache`` draws. It loads nothing from other machines, and uploads are deleted at its end.
"""

# Annotations are evaluated here: gradio looks for its SelectData among those of an event's function.

import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from samfeat.images import read_image
from samfeat.pipelines.errors import is_of_the_user, one_line
from samfeat.pipelines.features.formats import Features
from samfeat.pipelines.features.methods import load_method, peer_weights
from samfeat.pipelines.features.protocol import Method
from samfeat.pipelines.inspect_cache import correspondences, open_stores, tiles
from samfeat.pipelines.interruption import Interruption
from samfeat.pipelines.match import Verification, VerifiedMatches, verified_matches
from samfeat.pipelines.pictures.draw import (
    GREEN,
    RED,
    draw_keypoints,
    draw_verified,
    enlarged,
    enlargement,
    pca_rgb,
    save_png,
    thumbnail,
    with_scale,
)
from samfeat.pipelines.pictures.overlays import feature_tiles, overlay
from samfeat.pipelines.pictures.pages import photograph, render
from samfeat.teacher_cache.schema import Record
from samfeat.teacher_cache.store import TeacherCache

FIRST_PORT, PORTS = 7860, 100  # gradio's own
MAX_FILE = 40_000_000  # bytes of an upload
KEYPOINTS, SIZES = (64, 8192), (256, 2048)  # ranges of the sliders
SIDE = 1024  # pixels, of the longer side to begin with
NARROW = 260  # pixels; where there is less room, one control a row
WAITING = 16  # requests that may wait; the others are refused
HINT = "Click a point of the image: how alike the embedding is there and elsewhere (cosine)."
EXAMPLES = ("two cameras", "a plane, moved")
CSS = """
footer { display: none !important }
.numbers { overflow-x: auto }
.numbers table { width: max-content }
.numbers td, .numbers th { white-space: nowrap }
.pictures { display: grid; gap: 10px; margin-bottom: 16px }
.pictures { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)) }
.pictures.wide { grid-template-columns: 1fr }
.pictures figure { margin: 0; min-width: 0 }
.pictures img { display: block; width: 100%; height: auto }
.pictures figcaption { font-size: var(--text-sm); color: var(--body-text-color); overflow-wrap: anywhere }
"""


class Comparison(NamedTuple):
    """One method on two photographs.

    Attributes:
        method: the method.
        features: those of both photographs.
        found: their verified matches.
        extracting: seconds for the features of both photographs.
        matching: seconds for matching and verification.
    """

    method: Method
    features: tuple[Features, Features]
    found: VerifiedMatches
    extracting: float
    matching: float


def compare(
    image0: np.ndarray,
    image1: np.ndarray,
    methods: Sequence[Method],
    *,
    verify: Verification = "fundamental",
    ratio: float | None = None,
) -> list[Comparison]:
    """Match two photographs with several methods, as ``samfeat-cli match`` does.

    Args:
        image0: first photograph, uint8 [H, W, 3].
        image1: second one.
        methods: what computes the features.
        verify: see :func:`samfeat.pipelines.match.match_images`.
        ratio: see :func:`samfeat.pipelines.match.match_images`.
    """
    compared = []
    for method in methods:
        start = time.perf_counter()
        features = method(image0), method(image1)
        between = time.perf_counter()
        found = verified_matches(*features, verify=verify, ratio=ratio)
        compared.append(Comparison(method, features, found, between - start, time.perf_counter() - between))
    return compared


def full_size_model(
    model: np.ndarray, verify: Verification, scales: tuple[tuple[float, float], tuple[float, float]]
) -> np.ndarray:
    """A model between two shrunk photographs as one between the photographs themselves, float64 [3, 3].

    Args:
        model: the homography, scaled so that its last entry is 1, or the fundamental matrix, scaled to unit norm.
        verify: ``homography`` or ``fundamental``.
        scales: for both photographs, how many of its pixels (across, down) make one of the shrunk one.
    """
    first, second = (np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]]) for x, y in scales)
    if verify == "homography":
        full = second @ model @ np.linalg.inv(first)
        return full / full[2, 2]
    full = np.linalg.inv(second).T @ model @ np.linalg.inv(first)
    return full / np.linalg.norm(full)


def similarity(records: Sequence[Record], point: tuple[float, float]) -> list[np.ndarray]:
    """Cosines between the embedding at a point of the first image and every cell of all images, float32 [h, w] each.

    They are what the relation loss compares with the student's (:func:`samfeat.student.relation.relation_loss`).

    Args:
        records: images with embeddings of one teacher.
        point: (x, y) in pixels of the first image; its cell counts.
    """
    units = [record.output.embedding for record in records]
    units = [unit / np.maximum(np.linalg.norm(unit, axis=0), 1e-12) for unit in units]
    (height, width), (rows, columns) = records[0].image.shape[:2], units[0].shape[1:]
    column = int(np.clip((point[0] + 0.5) * columns / width, 0, columns - 1))
    row = int(np.clip((point[1] + 0.5) * rows / height, 0, rows - 1))
    return [np.einsum("c,chw->hw", units[0][:, row, column], unit).astype(np.float32) for unit in units]


def serve_page(
    *,
    weights: str | Path | None = None,
    peers: str | Path | None = None,
    cache: str | Path | None = None,
    device: str = "auto",
    host: str = "127.0.0.1",
    port: int | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    Args:
        weights: of samfeat; None: the shipped student.
        peers: folder with the original weights of XFeat, ALIKED and DISK, which are then offered as well.
        cache: a cache or a store, for the second tab.
        device: ``cpu``, ``cuda``, ``mps`` or ``auto``.
        host: address to listen on. Whoever reaches it can use the page: there is no password.
        port: None takes the first free one from 7860.
        ready: called with the page's address once it answers.

    Raises:
        ValueError: weights or stores that are damaged or foreign.
        OSError: weights or stores that are not there, or a port that is in use.
        ModuleNotFoundError: gradio, or what it brings, is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="samfeat-app-") as folder, Interruption() as interruption:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and pictures: nobody else's, and removed at the end
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        import fastapi
        import gradio as gr
        import uvicorn

        page = make_page(weights=weights, peers=peers, cache=cache, device=device, folder=Path(folder))
        listener = _listen(host, port)
        port = listener.getsockname()[1]
        site = gr.mount_gradio_app(
            fastapi.FastAPI(openapi_url=None),
            page,
            "/",
            server_name=host,
            server_port=port,
            footer_links=[],
            run_history=False,
            show_error=False,
            max_file_size=MAX_FILE,
            ssr_mode=False,
            enable_monitoring=False,
            css=CSS,
        )
        page.has_launched = page.is_running = True  # as launch() does: gradio checks no path of a request before
        server = uvicorn.Server(uvicorn.Config(site, log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        said = False
        while thread.is_alive() and not interruption.asked:
            if server.started and not said:
                said = True
                if ready:
                    ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            time.sleep(0.05)
        server.should_exit = True
        thread.join()


def _listen(host: str, port: int | None) -> socket.socket:
    """A socket on a port, or on the first free one from ``FIRST_PORT``."""
    tries = range(port, port + 1) if port is not None else range(FIRST_PORT, FIRST_PORT + PORTS)
    for number in tries:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, number))
        except OSError as error:
            listener.close()
            reason = error.strerror or error
        else:
            return listener
    where = (
        f"port {port} of {host}" if port is not None else f"ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1} of {host}"
    )
    raise OSError(f"the page cannot use {where} ({reason}): choose another with --port, or another --host")


def make_page(
    *,
    weights: str | Path | None = None,
    peers: str | Path | None = None,
    cache: str | Path | None = None,
    device: str = "auto",
    folder: Path,
) -> Any:
    """The page, a ``gradio.Blocks``.

    Args:
        weights: see :func:`serve_page`.
        peers: see :func:`serve_page`.
        cache: see :func:`serve_page`.
        device: see :func:`serve_page`.
        folder: where the examples are written.
    """
    import gradio as gr

    student = load_method("samfeat", weights=weights, device=device)  # its errors before anything is served
    others = {"sift": None, "orb": None, **(peer_weights(Path(peers)) if peers else {})}
    for name, file in others.items():
        load_method(name, weights=file, device=device)
    stores = open_stores(cache) if cache else []
    with gr.Blocks(title="SAMFeat", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        with gr.Tab("Match"):
            _match_tab(student.config, weights, others, device, folder)
        if stores:
            with gr.Tab("Teacher cache"):
                _cache_tab(page, stores)
    page.queue(max_size=WAITING, default_concurrency_limit=1)
    return page


def _match_tab(
    config: Mapping[str, Any], weights: str | Path | None, others: Mapping[str, Path | None], device: str, folder: Path
) -> None:
    import gradio as gr

    with gr.Row():
        first, second = _photograph("First photograph"), _photograph("Second photograph")
    verify = gr.Radio(
        [("fundamental matrix", "fundamental"), ("homography", "homography"), ("nothing", "none")],
        value="fundamental",
        label="Matches have to agree with one",
        render=False,
    )
    examples = [[*paths, model] for paths, model in _examples(folder)]
    gr.Examples(
        examples, [first, second, verify], cache_examples=False, example_labels=list(EXAMPLES), label="Examples"
    )
    names = gr.CheckboxGroup(["samfeat", *others], value=["samfeat"], label="Methods, side by side")
    verify.render()
    with gr.Row():
        budget = min(config["max_keypoints"] or KEYPOINTS[1], KEYPOINTS[1])
        keypoints = _slider(*KEYPOINTS, value=budget, step=1, label="Keypoints, at most")
        threshold = _slider(0, 1, value=config["detection_threshold"], step=0.01, label="Threshold (samfeat)")
        ratio = _slider(0.5, 1, value=1, step=0.01, label="Ratio test (1: none)")
        side = _slider(*SIZES, value=SIDE, step=16, label="Longer side, pixels")
    button = gr.Button("Match", variant="primary")
    numbers = gr.Markdown(
        "Choose two photographs or an example, then press Match.", min_height=60, elem_classes="numbers"
    )
    pictures = gr.HTML()

    def answer(
        path0: str | None,
        path1: str | None,
        names: list[str],
        verify: Verification,
        keypoints: int,
        threshold: float,
        ratio: float,
        side: int,
    ) -> Any:
        if path0 is None or path1 is None:
            gr.Info("Choose two photographs first.")
            return gr.skip(), gr.skip()
        if not names:
            raise ValueError("choose a method")
        methods = [
            load_method(
                name,
                weights=weights if name == "samfeat" else others[name],
                max_keypoints=int(keypoints),
                device=device,
                **({"detection_threshold": float(threshold)} if name == "samfeat" else {}),
            )
            for name in names
        ]
        whole = [
            read_image(path, name=f"the {which} photograph") for path, which in ((path0, "first"), (path1, "second"))
        ]
        images = [thumbnail(image, int(side)) for image in whole]
        compared = compare(images[0], images[1], methods, verify=verify, ratio=None if ratio == 1 else float(ratio))
        return (
            _numbers(compared, verify, whole, images),
            _row([_lines(images, each) for each in compared], "wide")
            + _row([tile for each in compared for tile in _tiles(images, each)]),
        )

    inputs, outputs = [first, second, names, verify, keypoints, threshold, ratio, side], [numbers, pictures]
    guarded = _in_page(answer)
    gr.on([button.click], guarded, inputs, outputs, show_progress_on=numbers, api_name="match")
    changes = [names.change, verify.change, *(slider.release for slider in (keypoints, threshold, ratio, side))]
    gr.on(
        changes,
        guarded,
        inputs,
        outputs,
        show_progress_on=numbers,
        trigger_mode="always_last",
        api_visibility="private",
    )


def _slider(low: float, high: float, **options: Any) -> Any:
    """A slider that moves values into its range: those typed into its box pass through others on their way."""
    import gradio as gr

    slider = gr.Slider(low, high, buttons=[], min_width=NARROW, **options)
    slider.preprocess = lambda value: low if value is None else min(max(value, low), high)
    return slider


def _photograph(label: str) -> Any:
    """An upload whose value is the path of its file, unread: gradio would decode it without our own limits."""
    import gradio as gr

    upload = gr.Image(
        label=label,
        sources=["upload", "clipboard"],
        type="filepath",
        height=320,
        buttons=["fullscreen"],
        min_width=NARROW,
    )
    keep = upload.async_move_resource_to_block_cache

    async def kept(path: Any) -> Any:
        if "://" in str(path):
            raise gr.Error("addresses are not fetched: upload the photograph itself", print_exception=False)
        return await keep(path)

    upload.async_move_resource_to_block_cache = kept
    upload.preprocess = lambda payload: payload and payload.path  # a subclass would have gradio write a .pyi file here
    return upload


def _examples(folder: Path) -> list[tuple[list[str], Verification]]:
    """Pairs of photographs of scikit-image, written into a folder, and what their matches agree with."""
    import skimage.data

    left, right, _ = skimage.data.stereo_motorcycle()
    plane = skimage.data.coffee()
    height, width = plane.shape[:2]
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    moved = np.array([[0.1, 0.2], [0.85, 0.05], [0.95, 0.9], [0.2, 0.8]], np.float32) * (width, height)
    tilted = cv2.warpPerspective(
        plane, cv2.getPerspectiveTransform(corners, moved.astype(np.float32)), (width, height), flags=cv2.INTER_AREA
    )
    pairs: list[tuple[str, list[np.ndarray], Verification]] = [
        ("motorcycle", [left, right], "fundamental"),
        ("coffee", [plane, tilted], "homography"),
    ]
    return [
        ([str(save_png(folder / f"{name}{side}.png", image)) for side, image in enumerate(images)], verify)
        for name, images, verify in pairs
    ]


def _numbers(
    compared: Sequence[Comparison], verify: Verification, whole: Sequence[np.ndarray], images: Sequence[np.ndarray]
) -> str:
    """What was found, as Markdown."""
    rows = ["| method | keypoints | matches | agree | features | matching |", "|---|--:|--:|--:|--:|--:|"]
    models = []
    for each in compared:
        count0, count1 = (len(features["keypoints"]) for features in each.features)
        matches, inliers = len(each.found.matches), each.found.inliers
        agree = "" if inliers is None else f"{inliers.sum()}" + (f" ({inliers.mean():.0%})" if matches else "")
        rows.append(
            f"| {each.method.name} | {count0} and {count1} | {matches} | {agree} | {each.extracting:.2f} s "
            f"| {each.matching:.2f} s |"
        )
        if each.found.model is not None:
            scales = [
                (full.shape[1] / small.shape[1], full.shape[0] / small.shape[0]) for full, small in zip(whole, images)
            ]
            matrix = full_size_model(each.found.model, verify, (scales[0], scales[1]))
            lines = "\n".join("  ".join(f"{value:13.6g}" for value in row) for row in matrix)
            kind = "Fundamental matrix" if verify == "fundamental" else "Homography"
            models.append(f"{kind} of {each.method.name}, in pixels of the uploaded photographs\n```\n{lines}\n```")
    sizes = [f"{image.shape[1]} x {image.shape[0]}" for image in (*whole, *images)]
    size = f"Photographs of {sizes[0]} and {sizes[1]} pixels"
    if sizes[:2] != sizes[2:]:
        size += f", matched at {sizes[2]} and {sizes[3]}"
    return "\n\n".join(["\n".join(rows), f"{size}.", *models])


def _lines(images: Sequence[np.ndarray], each: Comparison) -> tuple[str, np.ndarray]:
    """Title and picture of the matches of a method."""
    found = each.found
    drawn, legend = draw_verified(images[0], images[1], found.points0, found.points1, found.inliers)
    colors = {GREEN: "green", RED: "red"}
    return f"{each.method.name}: " + ", ".join(f"{meaning} ({colors[color]})" for meaning, color in legend), drawn


def _tiles(images: Sequence[np.ndarray], each: Comparison) -> list[tuple[str, np.ndarray]]:
    """Titled pictures of the keypoints and maps of both photographs."""
    method = each.method
    return [
        (f"{method.name}, {which} photograph: {title}", picture)
        for image, features, which in zip(images, each.features, ("first", "second"))
        for title, picture in feature_tiles(image, features, method.maps(image) if method.maps else None)
    ]


def _row(pictures: Sequence[tuple[str, np.ndarray]], kind: str = "") -> str:
    """Titled pictures as HTML."""
    return render("pictures", pictures=[photograph(*each) for each in pictures], kind=f"pictures {kind}").decode()


def _cache_tab(page: Any, stores: Sequence[TeacherCache]) -> None:
    import gradio as gr

    by_name = {store.path.name: store for store in stores}
    with gr.Row():
        chosen = gr.Dropdown(list(by_name), value=stores[0].path.name, label="Store", visible=len(stores) > 1)
        number = gr.Slider(0, len(stores[0]) - 1, value=0, step=1, label="Image", buttons=[], min_width=NARROW)
    with gr.Row():
        with gr.Column(min_width=NARROW):
            picture = gr.Image(
                label="Click a point", type="numpy", interactive=False, height=400, buttons=["fullscreen"]
            )
        with gr.Column(min_width=NARROW):
            alike = gr.HTML()
    targets = gr.HTML()

    def show(name: str, number: int) -> Any:
        store, image = by_name[name], int(number)
        records = _views(store, image)
        colors = pca_rgb([record.output.embedding for record in records])
        drawn = [tiles(record, own) for record, own in zip(records, colors)]
        targets = [(f"{record.name}: {title}", tile) for record, own in zip(records, drawn) for title, tile in own[1:]]
        pair = [correspondences(store, image // 2)] if store.spec.paired and len(records) == 2 else []
        first = gr.Image(drawn[0][0][1], label=f"{records[0].name}: click a point")
        return first, f"<p>{HINT}</p>", _row(targets) + _row(pair, "wide")

    def click(name: str, number: int, event: gr.SelectData) -> Any:
        records = _views(by_name[name], int(number))
        factor = enlargement(records[0].image)
        point = np.array(event.index, float)
        maps = similarity(records, tuple((point + 0.5) / factor - 0.5))
        low = float(min(values.min() for values in maps))
        drawn = []
        for record, values in zip(records, maps):
            image = enlarged(record.image, factor)
            over = overlay(image, values, "viridis", low, 1)
            if record is records[0]:
                over = draw_keypoints(over, point[None])
            drawn.append(
                (
                    f"{record.name}: {values.min():.2f} to {values.max():.2f}",
                    with_scale(over, "viridis", f"{low:.2f}", "1"),
                )
            )
        return f"<p>{HINT}</p>" + _row(drawn)

    def choose(name: str) -> Any:
        return gr.Slider(maximum=len(by_name[name]) - 1, value=0)

    outputs = [picture, alike, targets]
    shown = _in_page(show)
    number.release(shown, [chosen, number], outputs, trigger_mode="always_last", api_name="image")
    chosen.change(choose, chosen, number, api_visibility="private").then(
        shown, [chosen, number], outputs, api_visibility="private"
    )
    picture.select(_in_page(click), [chosen, number], alike, api_visibility="private")
    page.load(shown, [chosen, number], outputs, api_visibility="private")


def _views(store: TeacherCache, image: int) -> list[Record]:
    """An image of a store and, where it is one of a pair, the other one."""
    failed = store.failures
    if image in failed:
        raise ValueError(f"image {image} could not be used: {failed[image]}")
    others = [image ^ 1] if store.spec.paired and image ^ 1 not in failed else []
    return [store.record(each) for each in (image, *others)]


def _in_page(answer: Callable[..., Any]) -> Callable[..., Any]:
    """Report errors of the user in the page, in one line."""

    @wraps(answer)
    def guarded(*arguments: Any) -> Any:
        import gradio as gr

        try:
            return answer(*arguments)
        except Exception as error:
            if not is_of_the_user(error):
                raise
            raise gr.Error(one_line(error), duration=None, print_exception=False) from None

    return guarded
