"""`disaggserve plan --report`: one page with every figure, from nowhere but itself, the same for the same inputs."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.integration.test_cli import cluster, dgx, manifest, run

FIGURES = {"attainment", "breakdown", "growth", "promises"}


class Page(HTMLParser):
    """What stands in which section, and every address that the page names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.section = ""
        self.open: list[str] = []
        self.words: dict[str, str] = {}
        self.drawn: dict[str, int] = {}
        self.ids: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {k: v or "" for k, v in attrs}
        self.open.append(tag)
        if "id" in values:
            self.ids[values["id"]] += 1
        if tag == "section":
            self.section = values["id"]
        if tag in ("path", "use"):
            self.drawn[self.section] = self.drawn.get(self.section, 0) + 1
        self.addresses += [values[k] for k in ("href", "src", "xlink:href", "srcset") if k in values]

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words[self.section] = self.words.get(self.section, "") + data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], str, str]:
    """The plan as JSON, and the page twice."""
    at = tmp_path_factory.mktemp("report")
    nodes = dgx(2)
    nodes[1]["spec"] = {"unschedulable": True}
    prices = {"prices": {"NVIDIA-A100-SXM4-80GB": 2.5}, "maxGPUs": 8}
    file, nodes_file = manifest(at / "cr.json", hardware=prices), cluster(at / "nodes.yaml", nodes)
    pages = []
    for name in ("one", "two/deep"):
        done = run("plan", "-f", file, "--nodes", nodes_file, "-o", "json", "--report", at / name)
        assert (done.returncode, done.stderr) == (0, ""), "nothing but the plan when piped"
        pages.append((at / name / "index.html").read_text())
    return json.loads(done.stdout), pages[0], pages[1]


def test_the_page_has_every_figure_and_the_plan_in_words(written: tuple[dict[str, object], str, str]) -> None:
    plan, text, _ = written
    page = Page(text)
    for figure in FIGURES:
        assert page.drawn[figure] > 10, figure
        assert "Predicted." in page.words[figure]
    assert page.words["attainment"].count("req/s") > 1
    words = page.words["words"]
    predicted = plan["predicted"]
    assert isinstance(predicted, dict)
    assert f"{predicted['attainment']:.1%}" in words
    assert str(plan["latencySource"]) in words
    assert str(plan["bottleneck"]) in words
    assert f"{plan['boundShare']:.0%} of it" in words
    rejected = plan["rejected"]
    assert isinstance(rejected, list)
    assert rejected
    assert all(r["reason"] in page.words["rejected"] for r in rejected)
    assert f"{2.5 * plan['gpus']:.2f} per hour" in words  # type: ignore[operator]
    drawn = page.words["attainment"]
    assert all(name in drawn for name in ("chosen: ", "target 90 %", "95 % interval"))
    assert len([r for r in rejected if r["what"] in drawn]) >= 1, "a runner-up of the search is drawn"
    assert "cordoned" in page.words["refused"]
    assert "±" in page.words["source"]
    assert str(plan["digest"]) in text


def test_the_page_needs_nothing_from_outside(written: tuple[dict[str, object], str, str]) -> None:
    _, text, _ = written
    page = Page(text)
    assert all(a.startswith("#") for a in page.addresses)
    assert "http" not in text
    assert not re.search(r"url\((?!#)|@import|<script|<link|<iframe", text)
    assert {i for i, n in page.ids.items() if n > 1} == set()
    assert {a[1:] for a in page.addresses} <= set(page.ids)


def test_equal_inputs_give_equal_bytes(written: tuple[dict[str, object], str, str]) -> None:
    _, one, two = written
    assert one == two


def test_a_folder_that_cannot_be_written_is_one_sentence_before_the_search(tmp_path: Path) -> None:
    file, nodes = manifest(tmp_path / "cr.json"), cluster(tmp_path / "nodes.yaml", dgx(1))
    (tmp_path / "file").write_text("")
    for folder in ("/proc/x", tmp_path / "file"):
        done = run("plan", "-f", file, "--nodes", nodes, "--report", folder)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"--report {folder}: cannot be written")
        assert len(done.stderr.splitlines()) == 1
