"""Ablations: the paper's tables IV, V, VI, VIII and IX, and some of our own, as lists of training runs.

``configs/ablations.yaml`` defines the tables, their rows, and the paper's numbers. A row is a change to a preset; every
distinct configuration is trained once per seed, in its own run folder::

    <out>/ablations.md, <table>.json, <table>.png      results so far, rewritten after every run
    <out>/runs/<configuration>/seed<k>/                a run folder of training, with figures.json once it is finished
    <out>/times/<configuration>/round<k>.json          seconds of training steps

Finished runs are not repeated, unfinished ones resume.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from samfeat.files import write_json
from samfeat.pipelines.evaluate import evaluate
from samfeat.pipelines.evaluation.hpatches import HPatches, find_sequences, homographies_sha256
from samfeat.pipelines.features.methods import load_method
from samfeat.pipelines.train import Progress as TrainingProgress
from samfeat.pipelines.train import train
from samfeat.pipelines.training.ablation_report import VALIDATION, write_report
from samfeat.pipelines.training.ablation_tables import Ablations, AblationTable, Row, Run, load_ablations, plan_runs
from samfeat.pipelines.training.checkpoint import NAMES as CHECKPOINTS
from samfeat.pipelines.training.validation import Validation, hold_out
from samfeat.student.extractor import SAMFeat
from samfeat.teacher_cache.store import TeacherCache, open_stores

logger = logging.getLogger(__name__)

ROUNDS = 5  # of step times; every row has a turn in each
WARM_STEPS, TIMED_STEPS, LAST_STEPS = 3, 10, 3  # per turn; the last steps of a training may be reported together


@dataclass(frozen=True)
class AblationSummary:
    """The outcome of a list of runs.

    Attributes:
        report: the Markdown page with all tables.
        runs: how many runs there are.
        failures: reason by run folder, for runs that could not be finished.
    """

    report: Path
    runs: int
    failures: Mapping[str, str]


def ablate(
    cache: str | Path,
    folder: str | Path,
    *,
    names: Sequence[str] = (),
    ablations: Ablations | None = None,
    data: str | Path | None = None,
    seeds: int = 3,
    preset: str = "sample",
    overrides: Sequence[str] = (),
    progress: Callable[[float, int], None] | None = None,
) -> AblationSummary:
    """Train and measure every row of some tables, and write them with mean and spread over seeds.

    Every result is for the student after the last step. All rows run with the first seed first, so the tables are
    complete early and gain precision later. Step times are measured in rounds in which all rows take turns.

    Args:
        cache: a folder with ``*.zarr`` stores, or one store.
        folder: see the module; may hold earlier tables and runs.
        names: of tables; all by default.
        ablations: where the tables are defined, by default ``configs/ablations.yaml``.
        data: a folder of sequences in HPatches' layout to evaluate every student on as well.
        seeds: number of seeds 0, 1, ... of training; each has its own held-out images, shared by all rows.
        preset: see :func:`samfeat.pipelines.config.load_config`; modified by the rows.
        overrides: ``key=value`` changes to the preset; those of a row are applied later.
        progress: called with (done, total) in runs, including fractions.

    Raises:
        FileNotFoundError, ValueError: unknown table, bad configuration, no usable store or sequences, or nothing can be
            held out for validation.
    """
    ablations = ablations or load_ablations()
    unknown = [name for name in names if name not in ablations.tables]
    if unknown:
        raise ValueError(f"unknown table {unknown[0]!r}: there are {', '.join(ablations.tables)}")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    if any(override.startswith("run.seed=") for override in overrides):
        raise ValueError("run.seed cannot be changed here: the number of seeds is")
    stores = open_stores(cache)
    for store in stores:
        store.require_complete()
    chosen = {name: table for name, table in ablations.tables.items() if not names or name in names}
    plan = plan_runs(chosen, stores, seeds=seeds, preset=preset, overrides=overrides)
    for run in {run.config.run.seed: run for run in plan.values()}.values():
        if not hold_out(stores, run.config.run):
            raise ValueError(f"{cache}: too few images to hold any out for validation: add images of other scenes")
    study = _Study(cache, Path(folder), chosen, plan, stores, data, ablations.extraction)
    study.protocol |= {"preset": preset, "overrides": list(overrides), "seeds": seeds}
    return study.go(progress)


class _Study:
    """Setup in the constructor, then :meth:`go`."""

    def __init__(
        self,
        cache: str | Path,
        folder: Path,
        tables: Mapping[str, AblationTable],
        plan: Mapping[tuple[str, str, int], Run],
        stores: Sequence[TeacherCache],
        data: str | Path | None,
        extraction: Mapping[str, Any],
    ) -> None:
        self.cache, self.folder, self.tables, self.plan, self.stores = cache, folder, tables, plan, stores
        self.data, self.extraction = data, extraction
        self.digest = "" if data is None else homographies_sha256(find_sequences(data))[:12]
        self.failures: dict[str, str] = {}
        self.protocol: dict[str, Any] = {
            "stores": [{"name": s.path.name, "images": len(s), "teacher": s.provenance.teacher["name"]} for s in stores]
        }

    def go(self, progress: Callable[[float, int], None] | None) -> AblationSummary:
        """Do everything that is left."""
        timed = {name: table for name, table in self.tables.items() if table.measure == "step_time"}
        turns = [(k, name, label) for name, table in timed.items() for k in range(ROUNDS) for label in table.rows]
        runs: dict[str, Run] = {}
        wanted: dict[str, list[tuple[str, Row]]] = {}
        for (name, label, _), run in sorted(self.plan.items(), key=lambda entry: entry[0][2]):
            if name not in timed:
                runs.setdefault(run.folder, run)
                wanted.setdefault(run.folder, []).append((name, self.tables[name].rows[label]))
        finished = sum((self.folder / place / "figures.json").exists() for place in runs)
        logger.info(f"{len(runs)} training runs, {finished} of them finished; {len(turns)} measurements of step times")
        total = len(runs) + len(turns)

        def tell(done: int, part: float = 0.0) -> None:
            if progress:
                progress(done + part, total)

        for number, (k, name, label) in enumerate(turns):
            tell(number)
            self._time_steps(self.plan[name, label, 0], k)
        page = self._write(*timed)
        for number, (place, run) in enumerate(runs.items(), start=len(turns)):
            tell(number)
            try:
                self._measure(run, [row for _, row in wanted[place]], tell=partial(tell, number))
            except (ValueError, torch.OutOfMemoryError) as error:
                self.failures[place] = str(error).splitlines()[0]
                logger.info(f"{place} failed, the others continue: {self.failures[place]}")
            page = self._write(*(name for name, _ in wanted[place]))
        tell(total)
        return AblationSummary(page, len(runs), self.failures)

    # -- accuracy -----------------------------------------------------------------------------------------------------

    def _measure(self, run: Run, rows: Sequence[Row], *, tell: Callable[[float], None]) -> None:
        """Train one student, unless already done, and measure what its rows need."""
        place = self.folder / run.folder
        figures = self._figures(run)
        if not figures:

            def on_step(state: TrainingProgress) -> None:
                tell(0.95 * state.step / state.steps)

            started = time.monotonic()
            summary = train(self.cache, place, run.config, resume=True, progress=on_step)
            figures = {
                "steps": summary.steps,
                "seconds": time.monotonic() - started,
                "untrained": summary.first,
                VALIDATION: {_named({}): summary.last},
            }
            write_json(place / "figures.json", figures)
            for name in CHECKPOINTS:
                (place / name).unlink(missing_ok=True)
        weights = place / "weights.safetensors"
        for options in (row.extraction for row in rows):
            taken = figures[VALIDATION]
            if _named(options) not in taken:
                validation = Validation(
                    self.stores,
                    sorted(hold_out(self.stores, run.config.run)),
                    run.config.run,
                    run.config.data,
                )
                student = SAMFeat.from_pretrained(weights)
                taken[_named(options)] = validation.run(student.network, run.config, **options).figures
                write_json(place / "figures.json", figures)
            if self.data is None:
                continue
            taken = figures.setdefault(self.digest, {})
            options = {**self.extraction, **options}
            if _named(options) not in taken:
                device = "cpu" if run.config.run.accelerator == "cpu" else "auto"
                method = load_method("samfeat", weights=weights, device=device, **options)
                sequences = place / f"sequences-{self.digest}"
                results = evaluate(HPatches(), self.data, sequences, method=method, name=_named(options))
                taken[_named(options)] = {
                    **{f"mma@{t}": results.mma["all"][t - 1] for t in (1, 3, 5)},
                    "matches": results.matches["all"],
                    "keypoints": results.features.mean,
                }
                write_json(place / "figures.json", figures)

    def _figures(self, run: Run) -> dict[str, Any]:
        path = self.folder / run.folder / "figures.json"
        return json.loads(path.read_text()) if path.exists() else {}

    # -- step time ----------------------------------------------------------------------------------------------------

    def _time_steps(self, run: Run, number: int) -> None:
        """Measure the total seconds of single training steps, unless already done."""
        path = self._times(run) / f"round{number}.json"
        if path.exists():
            return
        steps = WARM_STEPS + TIMED_STEPS + LAST_STEPS
        config = replace(
            run.config,
            optimiser=replace(run.config.optimiser, steps=steps),
            run=replace(
                run.config.run,
                log_every=1,
                validate_every=steps,
                checkpoint_every=steps,
                validation_pairs=1,
                max_keypoints=1,
            ),
        )
        scratch = self._times(run) / "run"
        shutil.rmtree(scratch, ignore_errors=True)
        moments: list[float] = []
        train(self.cache, scratch, config, progress=lambda _: moments.append(time.perf_counter()))
        write_json(path, np.diff(moments)[WARM_STEPS - 1 : -LAST_STEPS].tolist())
        shutil.rmtree(scratch)

    def _times(self, run: Run) -> Path:
        return self.folder / "times" / run.key

    # -- results ------------------------------------------------------------------------------------------------------

    def _write(self, *names: str) -> Path:
        """Write tables and plots of the results so far."""
        results = {}
        for name in dict.fromkeys(names):
            table = self.tables[name]
            rows = {}
            for label, row in table.rows.items():
                runs = [run for (n, r, _), run in self.plan.items() if (n, r) == (name, label)]
                taken = self._rounds(runs[0]) if table.measure == "step_time" else self._by_seed(runs, row)
                rows[label] = {
                    "paper": row.paper,
                    "change": {**table.change, **row.change},
                    "extraction": row.extraction,
                    "key": runs[0].key,
                    "failed": [self.failures[run.folder] for run in runs if run.folder in self.failures],
                    **taken,
                }
            config = next(run.config for (n, _, _), run in self.plan.items() if n == name)
            results[name] = {
                "title": table.title,
                "measure": table.measure,
                "paper": table.paper,
                "reference": table.reference or next(iter(table.rows)),
                "protocol": self.protocol
                | {
                    "steps": config.optimiser.steps,
                    "epochs": config.optimiser.epochs,
                    "batch_size": config.optimiser.batch_size,
                    "data": None if self.data is None else Path(self.data).name,
                },
                "rows": rows,
            }
        return write_report(self.folder, results)

    def _by_seed(self, runs: Sequence[Run], row: Row) -> dict[str, Any]:
        """Results by data set, then by seed; and those of the untrained students by seed."""
        found: dict[str, dict[str, Any]] = {}
        untrained = {}
        for run in runs:
            figures, seed = self._figures(run), str(run.config.run.seed)
            if figures:
                untrained[seed] = figures["untrained"]
            for title, values in self._measured(figures, row):
                found.setdefault(title, {})[seed] = values
        return {"figures": found, "untrained": untrained}

    def _measured(self, figures: Mapping[str, Any], row: Row) -> Iterator[tuple[str, Any]]:
        places = [(VALIDATION, VALIDATION, row.extraction)]
        if self.data is not None:
            places.append((f"{Path(self.data).name} sequences", self.digest, {**self.extraction, **row.extraction}))
        for title, key, options in places:
            if _named(options) in figures.get(key, {}):
                yield title, figures[key][_named(options)]

    def _rounds(self, run: Run) -> dict[str, Any]:
        paths = [self._times(run) / f"round{k}.json" for k in range(ROUNDS)]
        return {"seconds": [json.loads(path.read_text()) for path in paths if path.exists()]}


def _named(options: Mapping[str, Any]) -> str:
    """Extraction options as a name, also used for folders."""
    return " ".join(f"{key}={value}" for key, value in sorted(options.items())) or "as trained"
