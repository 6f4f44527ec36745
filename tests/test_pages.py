"""Pages read back: what is escaped, what is inside, what a reader without eyes, light or width gets."""

import re

import numpy as np
import pytest
from jinja2 import UndefinedError
from page_parts import Cells, jpegs

from samfeat.pipelines.pictures.pages import photograph, plot, render
from samfeat.pipelines.pictures.tables import Column, Table

PICTURE = np.full((40, 60, 3), (200, 30, 30), np.uint8)


def gallery(**changes):
    tiles = [photograph("one & two", PICTURE, alt='"quoted"'), photograph("three", PICTURE)]
    entry = {"name": "<i>name</i>", "tiles": tiles, "pair": None}
    store = {"name": "a.zarr", "images": 352, "teacher": "toy", "shown": [entry]} | changes
    return render("gallery", title="a <b>", stores=[store]).decode()


def test_everything_is_escaped_and_pictures_are_inside():
    page = gallery()
    assert "<h1>a &lt;b&gt;</h1>" in page
    assert "<h3>&lt;i&gt;name&lt;/i&gt;</h3>" in page
    assert "one &amp; two" in page
    assert 'alt="&#34;quoted&#34;"' in page
    shown = jpegs(page)
    assert len(shown) == page.count("<img") == 2
    for decoded in shown:
        assert decoded.shape == PICTURE.shape
        assert np.abs(decoded.astype(int) - PICTURE).max() <= 4


def test_a_page_loads_nothing_says_how_much_it_shows_and_suits_any_reader():
    page = gallery()
    assert not re.search(r"https?:|<(script|link|iframe)|url\(|@import", page)
    assert "Shows 1 of 352 images" in page
    assert all(alt for alt in re.findall(r'<img[^>]* alt="([^"]*)"', page))
    assert page.count(" alt=") == page.count("<img")
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_a_template_that_lacks_a_value_is_an_error():
    with pytest.raises(UndefinedError):
        render("gallery", title="none")


def test_an_svg_cannot_run_anything():
    picture = plot("p", b"<svg><script>alert(1)</script></svg>", alt="a plot")
    assert picture.source.startswith("data:image/svg+xml;base64,")
    assert picture.plot


TABLE = Table(
    [
        Column("scene"),
        Column("method"),
        Column("AUC", "area", ".1f", "highest"),
        Column("error", "distance", ".2f", "lowest"),
        Column("points", "", "d"),
    ],
    [
        ["a", "x", 50.04, 0.125, 7],
        ["a", "y", 50.0, None, 9],
        ["b", "x", 20.0, 3.0, 1],
        ["b", "y", 10.0, 2.0, 1],
        ["c", "x", 99.9, 0.01, 1],
    ],
)


def test_the_best_of_those_measured_on_the_same_thing_as_printed():
    # a: equal to the digit that is printed; the error of one alone is not the best of any; c: nothing to compare with
    assert TABLE.best() == {(0, 2), (1, 2), (2, 2), (3, 3)}


def test_markdown_by_hand():
    first, second, *rows = TABLE.markdown().splitlines()
    assert (first, second) == ("| scene | method | AUC | error | points |", "| --- | --: | --: | --: | --: |")
    assert rows[:2] == ["| a | x | 50.0 | 0.12 | 7 |", "| a | y | 50.0 | - | 9 |"]


def test_tables_keep_their_text():
    part = {
        "title": "<pose>",
        "folder": "runs/<pose>",
        "meaning": "",
        "table": TABLE,
        "cells": TABLE.text(),
        "best": TABLE.best(),
    }
    page = render("comparison", title="t", parts=[part | {"plots": [], "pictures": [], "groups": []}]).decode()
    parser = Cells()
    parser.feed(page)
    assert parser.rows == [[column.title for column in TABLE.columns], *TABLE.text()]
    assert page.count(' best"') == 4
    assert "<dt>AUC</dt><dd>area; the highest is best</dd>" in page
    assert "<p>runs/&lt;pose&gt;</p>" in page
