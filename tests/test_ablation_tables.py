"""The file of ablations: strict, its rows are configurations, and equal configurations are one run."""

from __future__ import annotations

import pytest
from toys import toy_store

from samfeat.pipelines.config import CONFIGS
from samfeat.pipelines.training.ablation_tables import load_ablations, plan_runs

REFERENCE = ("network.edge_attention=row", "losses.edge=1", "losses.wsc_temperature=5")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return toy_store(tmp_path_factory.mktemp("cache") / "a.zarr", 2)


@pytest.fixture(scope="module")
def runs(store):
    """All rows, for a preset that the tables' reference rows are a part of."""
    return plan(store, *REFERENCE)


def plan(store, *overrides, preset="default", seeds=2):
    return plan_runs(load_ablations().tables, [store], seeds=seeds, preset=preset, overrides=overrides)


@pytest.mark.parametrize("preset", CONFIGS)
def test_every_row_is_a_configuration_of_every_preset(store, preset):
    tables = load_ablations().tables
    runs = plan(store, preset=preset)
    assert len(runs) == 2 * sum(len(table.rows) for table in tables.values())
    for (_, _, seed), run in runs.items():
        assert run.config.run.seed == seed
        assert run.folder == f"runs/{run.key}/seed{seed}"


def test_equal_configurations_are_one_run(runs):
    whole = runs["IV", "ASRD + EAG + WSC", 0]
    assert runs["V", "ASRD", 0] == runs["IV", "ASRD", 0] != runs["V", "DSFD", 0]
    assert runs["IX", "ASRD 1, EAG 1", 1] == runs["IV", "ASRD + EAG", 1]
    own = ("warping", "warped along"), ("relation", "by attention (eq. 8)"), ("eag", "rows (released)")
    for table, row in (("VI", "M 0.07, T 5"), *own, ("edge-gain", "not added"), ("edge-gain", "added (released)")):
        assert runs[table, row, 0] == whole, (table, row)
    for row in load_ablations().tables["VIII"].rows:
        assert runs["VIII", row, 0] == runs["IV", row, 0]
    assert len({run.key for run in runs.values()}) == 26  # of 46 rows
    assert runs["IV", "none", 0].key == runs["IV", "none", 1].key


def test_rows_of_table_iv_switch_their_parts_and_nothing_else(runs):
    for row in load_ablations().tables["IV"].rows:
        config = runs["IV", row, 0].config
        on = (config.losses.relation > 0, config.losses.edge > 0, config.losses.wsc > 0)
        assert on == tuple(part in row for part in ("ASRD", "EAG", "WSC"))
        assert (config.network.edge_attention == "row") == ("EAG" in row)
        assert config.losses.detection == config.losses.descriptor == 1


def test_a_run_is_known_by_its_configuration_and_its_stores(store, runs, tmp_path):
    def key(store, *overrides):
        table, overrides = {"V": load_ablations().tables["V"]}, (*REFERENCE, *overrides)
        return plan_runs(table, [store], seeds=1, preset="default", overrides=overrides)["V", "ASRD", 0].key

    assert key(store) == runs["V", "ASRD", 0].key != key(store, "optimiser.steps=5")
    assert key(toy_store(tmp_path / "a.zarr", 2, seed=1)) != key(store)
    assert key(toy_store(tmp_path / "same" / "a.zarr", 2)) == key(store)


def test_changes_of_a_row_come_after_the_users(store):
    runs = plan(store, "losses.wsc_margin=0.5", "losses.edge=7")
    assert runs["VI", "M 0.03, T 1", 0].config.losses.wsc_margin == 0.03
    assert runs["IX", "ASRD 1, EAG 0.5", 0].config.losses.edge == 0.5
    assert runs["warping", "warped along", 0].config.losses.edge == 7


TABLE = "tables: {A: {title: a, rows: {x: {}}}}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tables: {A: {titel: a, rows: {x: {}}}}", "titel"),
        ("tables: {A: {title: a, rows: {x: {chang: {}}}}}", "chang"),
        (TABLE + "other: 1", "other"),
        ("tables: {A: {title: a, measure: speed, rows: {x: {}}}}", "speed"),
        ("tables: {A: {title: a, rows: {x: {paper: many}}}}", "many"),
        ("tables: {A: {rows: {x: {}}}}", "title"),
        ("tables: {A: {title: a}}", "table A has no rows"),
        ("tables: {A: {title: a, reference: y, rows: {x: {}}}}", "no row 'y'"),
        ("tables: {A: {title: a, rows: {x: {extraction: {edge: 1}}}}}", "unknown extraction option 'edge'"),
        (TABLE + "extraction: {gain: 1}", "unknown extraction option 'gain'"),
        ("tables: {A: [1, 2]}", "incompatible"),
        ("tables: {A: {title: 'a}", "a.yaml"),
        ("[1, 2]", "a.yaml"),
        ("", "no table"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, said):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"a\.yaml") as caught:
        load_ablations(tmp_path / "a.yaml")
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_wrong_configuration_key_names_table_and_row(store, tmp_path):
    (tmp_path / "a.yaml").write_text("tables: {A: {title: a, rows: {x: {change: {losses.wcs: 1}}}}}")
    tables = load_ablations(tmp_path / "a.yaml").tables
    with pytest.raises(ValueError, match=r"table A, row x: unknown configuration key 'losses.wcs'.*'losses.wsc'"):
        plan_runs(tables, [store], seeds=1, preset="default")


def test_values_of_all_kinds_reach_the_configuration(store, tmp_path):
    change = (
        "{losses.deep_supervision: true, optimiser.steps: null, data.homography.scale: [0.9, 1.1], run.precision: fp32}"
    )
    (tmp_path / "a.yaml").write_text(f"tables: {{A: {{title: a, rows: {{x: {{change: {change}}}}}}}}}")
    tables = load_ablations(tmp_path / "a.yaml").tables
    config = plan_runs(tables, [store], seeds=1, preset="sample")["A", "x", 0].config
    assert config.losses.deep_supervision is True
    assert config.optimiser.steps is None
    assert tuple(config.data.homography.scale) == (0.9, 1.1)
    assert config.run.precision == "fp32"
