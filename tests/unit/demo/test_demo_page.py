"""The demo's page as a browser would read it: its pictures, text, curves and scores."""

import dataclasses
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from demo_pages import a_page, bytes_of
from pages import Reader

from echodistill_core.demo.curves import curves, plot, smoothed
from echodistill_core.demo.page import duration, expectations, render
from echodistill_core.demo.scores import score
from echodistill_core.demo.settings import DemoSettings
from echodistill_core.demo.task import DemoTask, choose
from echodistill_core.miniature.judges import ATTRIBUTES

# The page


def test_the_page_holds_every_picture_as_it_is_and_needs_nothing_else():
    page = a_page()
    read = Reader(render(page))
    assert all(address.startswith("data:image/png;base64,") for address in read.loads)
    assert not re.search(r"url\((?!#)", render(page))
    assert not read.tags & {"script", "link", "iframe", "object"}
    expected = list(page.photographs)
    # Row by row: a prompt's pictures side by side.
    expected += [column.images[i] for i in range(6) for column in page.columns]
    assert len(read.images) == len(expected)
    for (_, found), wanted in zip(read.images, expected, strict=True):
        np.testing.assert_array_equal(found, bytes_of(wanted))
    prompts = page.task.prompts("<new1>")
    assert [words for words, _ in read.images[5:7]] == [f"before: {prompts[0]}", f"after: {prompts[0]}"]
    assert read.text.count("a place that no photograph shows") == 3
    assert "1 min 05 s in all" in read.text
    assert "echodistill sample 'runs/my demo' --prompt \"a <new1> mug on the grass\"" in read.text


def test_what_users_write_is_text_on_the_page(photographs):
    task = DemoTask("your <script>x</script>", "<b>&", [], photos=("my photos",))
    read = Reader(render(a_page(task)))
    assert "script" not in read.tags
    assert "your <script>x</script>" in read.text
    assert "a <new1> <b>& on the beach" in read.text
    assert "--photos 'my photos' --class-noun '<b>&'" in read.text


def test_scores_stand_in_the_table_and_only_where_they_are_known():
    page = a_page()
    assert "Scores" not in Reader(render(page)).text
    scored = [dataclasses.replace(c, scores={"dino": 0.1234 + i}) for i, c in enumerate(page.columns)]
    text = Reader(render(dataclasses.replace(page, columns=tuple(scored)))).text
    assert "DINObefore0.123after1.123" in re.sub(r"\s", "", text)
    assert "CLIP-T" not in text


def test_the_page_says_which_result_to_expect(photographs):
    toy, own = choose(DemoSettings(), []), choose(DemoSettings(class_noun="backpack"), [str(photographs)])
    known = dataclasses.replace(own, class_noun="cat")
    assert "random weights" in " ".join(expectations(a_page(toy, family="tiny")))
    assert "photographs" not in " ".join(expectations(a_page(toy)))
    assert "out of its reach" in " ".join(expectations(a_page(own)))
    assert "“backpack”" in " ".join(expectations(a_page(own)))
    assert "none of its training captions" not in " ".join(expectations(a_page(known)))


def test_times_that_were_not_measured_are_not_added_up():
    every = dict.fromkeys(("open", "before", "distil", "echo", "after", "one_step", "teacher", "scores"), 1.5)
    text = Reader(render(a_page(seconds={**every, "teacher": 15.0}))).text.replace("\n", "")
    assert "scores1.5 stogether25.5 s" in text
    assert "250 ms in one step and 2.5 s with the teacher: 10 times" in text
    text = Reader(render(a_page(seconds={**every, "echo": None}))).text.replace("\n", "")
    assert "not measured" in text
    assert "scores1.5 stogether" not in text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0347, "35 ms"),
        (1.04, "1.0 s"),
        (59.9, "59.9 s"),
        (65.2, "1 min 05 s"),
        (119.8, "2 min 00 s"),
        (None, "not measured"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_smoothing_is_the_mean_of_the_neighbours_that_exist():
    values = np.random.default_rng(0).normal(size=23)
    for window in (1, 2, 5, 99):
        ones = np.ones(2 * (window // 2) + 1)
        total = np.convolve(values, ones, "full")[window // 2 :][: len(values)]
        count = np.convolve(np.ones_like(values), ones, "full")[window // 2 :][: len(values)]
        np.testing.assert_allclose(smoothed(values.tolist(), window), total / count, atol=1e-12)


def test_a_curve_is_drawn_for_each_logged_term():
    losses = {
        "distil": [{"step": 1, "recon_teacher": 2.0}, {"step": 3, "recon_teacher": 4.0}],
        "echo": [{"step": 1, "recon_teacher": 3.0, "identity": 0.5, "mse": float("nan")}],
    }
    drawn = curves(losses, {"distil": 3, "echo": 1})
    assert [title for title, _ in drawn] == ["teacher's error (Eq. 1)", "identity (Eq. 2)"]
    for title, svg in drawn:
        assert ElementTree.fromstring(svg).get("aria-label").startswith(title)
        assert "var(--ours)" in svg
    # The labels of the axis are the least and the greatest value.
    assert {"2", "4"} <= set(ElementTree.fromstring(drawn[0][1]).itertext())
    assert curves({"distil": [], "echo": []}, {"distil": 3, "echo": 1}) == []
    assert curves(losses, {"distil": 3, "echo": 1}) == drawn


def test_a_curve_goes_through_its_points_with_the_stages_in_turn():
    axes = plot("teacher", [[(1, 2.0), (3, 4.0)], [(4, 3.0)]], [0, 3], 4).axes[0]
    lines = [line.get_xydata().tolist() for line in axes.lines]
    assert lines[0] == [[1, 2], [3, 4]]
    assert [[4, 3]] in lines
    assert [[3, 0], [3, 1]] in lines  # where the echo begins
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 4), (2, 4))


# Scores


class SayingJudges:
    """Judges that choose fixed features and attributes by an image's first pixel."""

    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])

    def identity(self, images):
        return self.features[images[:, 0, 0, 0].long()]

    image_text_image = identity

    def image_text_text(self, prompts):
        assert not any("<" in prompt for prompt in prompts)
        return torch.tensor([[1.0, 0.0]]).expand(len(prompts), -1)

    def attributes(self, images):
        values = {"shape": "mug", "color": "purple", "second": "orange", "pattern": "plain", "emblem": "cross"}
        seen = {n: torch.full((len(images),), ATTRIBUTES[n][0].index(v)) for n, v in values.items()}
        return {**seen, "context": torch.full((len(images),), ATTRIBUTES["context"][0].index("grass"))}


def test_scores_by_hand(photographs):
    task = choose(DemoSettings(), [])
    images = torch.zeros(6, 3, 8, 8)
    images[3:5] = 1.0
    images[5] = 2.0
    references = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    found = score(SayingJudges(), task, images, task.prompts(), references)
    half = 0.5**0.5
    assert found["clip_t"] == pytest.approx((3 + half) / 6)
    # Each of the first five meets itself and its opposite, the last two references at 45 degrees.
    assert found["dino"] == found["clip_i"] == pytest.approx((5 * 0.5 + half) / 6)
    assert found["attributes"] == pytest.approx(4 / 5)  # the pattern is wrong; two colours have no order
    assert task.contexts.count("grass") == 1
    assert found["context"] == pytest.approx(1 / 6)
    own = choose(DemoSettings(class_noun="dog"), [str(photographs)])
    found = score(SayingJudges(), own, images, own.prompts(), references)
    assert set(found) == {"clip_t", "clip_i", "dino"}
