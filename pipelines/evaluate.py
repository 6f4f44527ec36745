"""Evaluate a method: predict once into its folder, measure the stored predictions, and compare with other methods."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from samfeat.files import write_bytes, write_json
from samfeat.pipelines.evaluation.protocol import Evaluation, Job, Named, Results, read_results
from samfeat.pipelines.extract import Progress
from samfeat.pipelines.pictures.charts import save_figure

M = TypeVar("M", bound=Named)
R = TypeVar("R", bound=Results)


def evaluate(
    evaluation: Evaluation[M, R],
    data: str | Path,
    output: str | Path,
    *,
    method: M,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> R:
    """Evaluate a method. Run it again after an interruption: stored predictions are not recomputed.

    Writes the method's predictions, pictures and ``results.json`` into ``<output>/<name>``; and from the results of all
    methods in ``output`` the tables ``table.md`` and ``table.json``, and every figure as PNG and SVG.

    Args:
        evaluation: the evaluation, such as ``find_evaluation("pose")``.
        data: folder of its data.
        output: folder of this evaluation, for any number of methods.
        method: the method to evaluate, such as ``evaluation.load_method("sift")``.
        name: name of the method in the output; by default its own name.
        overwrite: recompute stored predictions.
        progress: called with (done, total).

    Raises:
        OSError: missing data.
        ValueError: bad data; predictions of another configuration or other data; or results on other data in
            ``output``.
    """
    output, name = Path(output), name or method.name
    job = Job(data=Path(data), output=output, method=method, name=name, overwrite=overwrite, progress=progress)
    results = evaluation.run(job)
    write_json(job.folder / "results.json", asdict(results))
    found = [
        results if path.parent.name == name else read_results(path, type(results))
        for path in sorted(output.glob("*/results.json"))
    ]
    table = evaluation.table(found)
    write_bytes(output / "table.md", table.markdown().encode())
    write_json(
        output / "table.json",
        {
            "title": evaluation.title or type(evaluation).__name__,
            "meaning": evaluation.meaning,
            "columns": [column._asdict() for column in table.columns],
            "rows": table.rows,
        },
    )
    for stem, figure in evaluation.figures(found).items():
        save_figure(output / stem, figure)
    evaluation.draw(job, found)
    return results
