import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from pages import Reader
from PIL import Image

from echodistill_core.errors import InputError
from echodistill_core.evaluation import paper
from echodistill_core.evaluation.page import render_page
from echodistill_core.evaluation.report import markdown, write_report
from echodistill_core.evaluation.statistics import Estimate
from echodistill_core.evaluation.summary import AGREES, FAILS, UNKNOWN, WITHIN, judge, summarise

HEADER = {"title": "Bench & <more>", "command": "echodistill bench", "seeds": [0, 1], "versions": {"torch": "2.6"}}


def _cell(method, concept="mug", seed=0, *, diverged=False, picture="", **metrics):
    return {
        "method": method,
        "title": f"title of {method}",
        "concept": concept,
        "seed": seed,
        "iterations": 300,
        "role": "student",
        "steps": 1,
        "diverged": diverged,
        "seconds": 10.0 + seed,
        "metrics": metrics or None,
        "picture": picture,
    }


def _bench(method, dino, **more):
    """Three concepts, two seeds; each concept's mean is `dino` plus -0.01, 0, 0.01."""
    return [
        _cell(method, concept, seed, dino=dino + shift + (seed - 0.5) * 0.02, **more)
        for concept, shift in (("mug", -0.01), ("cat", 0.0), ("fish", 0.01))
        for seed in (0, 1)
    ]


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A folder with the report on a bench of three methods, one picture of which is missing and one corrupt."""
    folder = tmp_path_factory.mktemp("bench")
    Image.new("RGB", (8, 4), (200, 30, 30)).save(folder / "red.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    cells = _bench("echodistill", 0.6, clip_t=0.3, clip_i=0.8, context=0.9, attributes=0.8)
    cells += _bench("lora", 0.2, clip_t=0.25, clip_i=0.6, context=0.5, attributes=0.4)
    cells += _bench("mine<b>", 0.4)
    for index, name in enumerate(("red.png", "gone.png", "broken.png")):
        cells[2 * index]["picture"] = name
    write_report(cells, HEADER, folder)
    return folder


def test_every_ordering_holds_in_the_papers_own_figures():
    checked = 0
    for ordering in paper.orderings():
        better, worse = (paper.figure_of(m) for m in (ordering.better, ordering.worse))
        pair = better.value(ordering.metric), worse.value(ordering.metric)
        if None not in pair:
            assert pair[0] > pair[1], ordering
            checked += 1
    assert checked > 50


def test_orderings_cover_what_the_paper_claims():
    claims = {(o.better, o.worse, o.metric) for o in paper.orderings()}
    assert len(claims) == len(paper.orderings())
    for method in ("textual-inversion", "custom-diffusion", "dreambooth", "lora", "teacher-first"):
        for budget in ("", "@best"):
            assert {("echodistill", method + budget, m) for m in ("dino", "clip_i")} <= claims
    assert ("echodistill", "custom-diffusion-teacher", "dino") in claims
    assert ("echodistill-echo", "echodistill", "dino") in claims
    assert ("echodistill-echo-teacher", "echodistill-teacher", "dino") in claims
    for method in ("no-teacher", "no-critics", "no-swd", "one-photograph", "not-shared"):
        assert ("echodistill", method, "dino") in claims


def test_every_method_of_a_table_has_a_title_and_its_table_in_the_paper():
    for table in paper.TABLES:
        for method in table.methods:
            assert paper.title_of(method) != method
    for figure in paper.FIGURES.values():
        if figure.table:
            assert figure.method in next(t.methods for t in paper.TABLES if t.key == figure.table)


def test_verdicts():
    assert judge(None) == UNKNOWN
    assert judge(Estimate(0.2, 0.1, 5)) == AGREES
    assert judge(Estimate(0.2, 0.3, 5)) == WITHIN
    assert judge(Estimate(0.2, float("inf"), 1)) == WITHIN
    assert judge(Estimate(-0.2, 0.3, 5)) == FAILS
    assert judge(Estimate(0.0, 0.0, 5)) == FAILS
    assert judge(Estimate(0.0, 0.0, 5), strict=False) == WITHIN
    assert judge(Estimate(-0.01, 0.3, 5), strict=False) == FAILS


def test_the_verdict_follows_from_paired_cells():
    summary = summarise(_bench("echodistill", 0.6) + _bench("lora", 0.2), {})
    found = {v.ordering.worse: v for v in summary.verdicts if v.ordering.metric == "dino"}
    assert found["lora"].word == AGREES
    assert found["lora"].difference.mean == pytest.approx(0.4)
    assert found["dreambooth"].word == UNKNOWN
    turned = summarise(_bench("echodistill", 0.2) + _bench("lora", 0.6), {})
    assert next(v for v in turned.verdicts if v.ordering.worse == "lora" and v.ordering.metric == "dino").word == FAILS


def test_diverged_runs_count_as_diverged_and_nowhere_else():
    cells = _bench("lora", 0.2)
    cells[0] = _cell("lora", "mug", 0, diverged=True)
    # A diverged run that reports figures nonetheless.
    cells[2] = _cell("lora", "cat", 0, diverged=True, dino=99.0)
    row = summarise(cells, {}).rows["lora"]
    assert (row.cells, row.diverged) == (6, 2)
    # Left are 0.2 in mug and 0.21 in cat, each with seed 1 alone, and 0.21 in fish.
    assert row.estimates["dino"].mean == pytest.approx((0.2 + 0.21 + 0.21) / 3)
    assert row.spreads["dino"].units == 4


def test_missing_null_and_infinite_metrics_are_left_out():
    cells = [_cell("lora", "mug", 0, dino=0.5, clip_t=None), _cell("lora", "mug", 1, dino=float("nan"))]
    row = summarise(cells, {}).rows["lora"]
    assert row.estimates.keys() == {"dino"}
    assert row.estimates["dino"].mean == 0.5


def test_what_was_not_run_is_named():
    cells = _bench("echodistill", 0.6) + _bench("lora", 0.2)[:-1] + [_cell("photographs", dino=0.9)]
    summary = summarise(cells, {})
    assert "dreambooth" in summary.left_out
    assert "lora" not in summary.left_out
    assert "cones-2" not in summary.left_out  # only the paper has it
    assert summary.gaps == {"lora": (5, 6)}
    text = markdown(summary)
    assert "Not run: " in text
    assert "DreamBooth" in text.split("Not run: ")[1]
    assert "LoRA (5 of 6)" in text


def test_methods_that_no_table_knows_are_shown():
    summary = summarise(_bench("mine", 0.4), {})
    assert [section.table.key for section in summary.sections] == ["other"]
    assert "title of mine" in markdown(summary)


def test_tables_without_anything_new_are_left_out():
    keys = [s.table.key for s in summarise(_bench("echodistill", 0.6) + _bench("no-clip", 0.5), {}).sections]
    assert keys == ["1", "8"]


def test_an_empty_bench_gives_a_report_that_says_so(tmp_path):
    for path in write_report([], {}, tmp_path):
        text = path.read_text("utf-8")
        assert "Not run" in text
        assert "before echo" in text


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        ([{"method": "lora"}], "lacks title, concept"),
        ([_cell("lora"), _cell("lora")], "two results for method 'lora', concept 'mug', seed 0"),
        ([_cell("lora", dino="high")], "dino = 'high'"),
    ],
)
def test_malformed_results_are_refused(cells, says, tmp_path):
    with pytest.raises(InputError, match=says):
        write_report(cells, HEADER, tmp_path)
    assert not list(tmp_path.iterdir())


def test_markdown_has_our_figure_the_papers_and_the_verdict(reported):
    text = (reported / "report.md").read_text("utf-8")
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("| method"))
    row = next(line for line in lines if line.startswith("| LoRA |"))
    cells = dict(zip(*([c.strip() for c in line.split("|")[1:-1]] for line in (head, row)), strict=True))
    # Concept means 0.19, 0.20, 0.21: deviation 0.01, and Student's t of 2 degrees of freedom is 4.303.
    assert cells["DINO"] == "0.200 ± 0.025"
    assert cells["DINO, paper"] == "0.160"
    assert cells["ordering"] == "CLIP-I: agrees; DINO: agrees"
    assert (cells["runs"], cells["diverged"], cells["iterations"], cells["seconds"]) == ("6", "0 %", "300", "10.5")
    assert cells["diversity"] == "–"
    assert "- versions: torch 2.6" in lines


def test_the_page_is_whole_and_loads_nothing(reported):
    page = (reported / "report.html").read_text("utf-8")
    read = Reader(page)
    assert read.loads
    assert [v for v in read.loads if not v.startswith("data:image/")] == []
    assert "script" not in read.tags
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "prefers-color-scheme: dark" in page


def test_names_from_outside_cannot_break_the_page(reported):
    page = (reported / "report.html").read_text("utf-8")
    assert "Bench & <more>" not in page
    assert "Bench &amp; &lt;more&gt;" in page
    assert "mine<b>" not in page
    assert "title of mine&lt;b&gt;" in page


def test_pictures_are_inside_the_page_and_missing_ones_are_named(reported):
    page = (reported / "report.html").read_text("utf-8")
    pictures = re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    assert len(pictures) == 1
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[0]))).convert("RGB"), dtype=int)
    assert picture.shape == (4, 8, 3)
    assert abs(picture - (200, 30, 30)).max() < 12
    assert page.count("picture missing") == 2


def test_plots_are_drawings_in_the_pages_colours(reported):
    page = (reported / "report.html").read_text("utf-8")
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    # Two of metrics against each other, and one of each metric that was measured.
    assert len(drawings) == 2 + 5
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "var(--" in drawing
        assert "#0102" not in drawing
    # The first holds DINO against CLIP-T, of the methods that have both.
    words = "".join(ElementTree.fromstring(drawings[0]).itertext())
    assert "LoRA" in words
    assert "EchoDistill, before echo" in words
    assert "mine" not in words


def test_ids_that_plots_refer_to_are_unique_on_the_page(reported):
    page = (reported / "report.html").read_text("utf-8")
    ids = re.findall(r' id="([^"]+)"', page)
    assert ids
    for drawing in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", drawing)) <= set(re.findall(r' id="([^"]+)"', drawing))
    assert len(ids) == len(set(ids))


def test_only_one_step_students_and_references_stand_in_the_corner_plot(tmp_path):
    cells = [_cell(m, dino=0.5, clip_t=0.3) for m in ("echodistill", "steps-4", "custom-diffusion-teacher")]
    cells[1]["steps"] = 4
    cells[2].update(role="teacher", steps=25)
    cells.append({**_cell("photographs", dino=0.9, clip_t=0.3), "role": "", "steps": 0})
    page = render_page(summarise(cells, {}), tmp_path)
    first = re.search(r"<svg.*?</svg>", page, flags=re.DOTALL)[0]
    words = "".join(ElementTree.fromstring(first).itertext())
    assert "EchoDistill, before echo" in words
    assert "real photographs" in words
    assert "4 steps" not in words
    assert "25 steps" not in words


def test_equal_results_give_equal_files(reported, tmp_path):
    cells = _bench("echodistill", 0.6, clip_t=0.3)
    first, second = (write_report(cells, HEADER, tmp_path / name) for name in "ab")
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
