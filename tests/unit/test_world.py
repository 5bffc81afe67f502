"""The miniature's world: what is held out, what captions say, and that pictures show what scenes say."""

import math

import numpy as np
import pytest

from echodistill_core.miniature import concepts, render, world
from echodistill_core.miniature.recipe.data import draw_scenes, one_scene
from echodistill_core.miniature.world import Scene, Subject


def scenes(count, seed):
    return draw_scenes(one_scene, count, seed)


def scene(subject, context="snow", **more):
    values = {"x": 0.0, "y": 0.0, "size": 0.6, "angle": 0.0, "light": 1.0, "mirrored": False, "seed": 5}
    return Scene(subject, context, **{**values, **more})


def colored(picture, rgb, tolerance=0.25):
    """Which pixels are nearer than `tolerance` to the colour, in sRGB 0..1."""
    return np.abs(picture / 255 - np.array(rgb)).max(-1) < tolerance


def test_pretraining_never_sees_a_held_out_pair_of_colors():
    held_out = {frozenset(pair) for pair in world.HELD_OUT_PAIRS}
    seen = set()
    for drawn, _ in scenes(6000, seed=4):
        if drawn.subject.pattern != "plain":
            seen.add(frozenset((drawn.subject.color, drawn.subject.second)))
    assert seen == {frozenset(pair) for pair in world.PRETRAINING_PAIRS}
    assert not seen & held_out
    assert len(seen) + len(held_out) == math.comb(len(world.COLORS), 2)


def test_concepts_have_held_out_colors_that_development_and_evaluation_do_not_share():
    held_out = {frozenset(pair) for pair in world.HELD_OUT_PAIRS}
    pairs = {}
    for name, group in (("development", concepts.DEVELOPMENT), ("evaluation", concepts.EVALUATION)):
        pairs[name] = {frozenset((c.subject.color, c.subject.second)) for c in group}
        assert len(pairs[name]) == len(group)
        assert pairs[name] <= held_out
    assert not pairs["development"] & pairs["evaluation"]
    assert len(concepts.EVALUATION) >= 6


def test_every_photograph_of_a_concept_has_another_context_and_is_always_the_same():
    for concept in concepts.CONCEPTS.values():
        assert len(set(concept.contexts)) == concepts.PHOTOGRAPHS
        first, again = concepts.photographs(concept), concepts.photographs(concept)
        assert [p.image.tobytes() for p in first] == [p.image.tobytes() for p in again]
        assert len({p.image.tobytes() for p in first}) == concepts.PHOTOGRAPHS
        assert {p.image.size for p in first} == {(64, 64)}


def test_prompts_name_every_context_once_with_the_placeholder():
    made = concepts.prompts(concepts.EVALUATION[0], "<new1>")
    assert [context for _, context in made] == list(world.CONTEXTS)
    assert made[0][0] == "a <new1> mug on the beach"
    assert concepts.prompts(concepts.EVALUATION[0], "")[0][0] == "a mug on the beach"


def test_descriptions_say_everything_that_makes_a_subject():
    subject = Subject("mug", "red", "striped", "blue", "cross")
    assert world.describe(subject) == "red and blue striped mug with a white cross"
    assert world.describe(subject, with_colors=False, with_emblem=False) == "mug"
    assert world.describe(Subject("ball", "pink", second="pink")) == "pink ball"


def test_captions_never_say_what_is_not_there():
    for drawn, caption in scenes(500, seed=9):
        said = set(caption.replace("-", " ").split())
        subject = drawn.subject
        assert subject.shape in said
        assert not said & (set(world.SHAPES) - {subject.shape})
        assert not said & (set(world.COLORS) - {subject.color, subject.second})
        assert not said & (set(world.EMBLEMS) - {subject.emblem, "none"})
        for context, words in world.CONTEXTS.items():
            assert context == drawn.context or not caption.endswith(words)


def test_drawing_fewer_scenes_gives_the_beginning_of_more():
    assert scenes(40, seed=2) == scenes(60, seed=2)[:40]
    assert scenes(40, seed=2) != scenes(40, seed=3)


def test_a_ball_is_a_disc_of_the_area_that_its_size_says():
    shape = Subject("ball", "red", second="red")
    picture = render.render(scene(shape, "water", size=0.6)).astype(int)
    radius = 0.9 * 0.6 * render.SIDE / 2
    found = (picture[..., 0] > picture[..., 2] + 30).sum()
    assert found == pytest.approx(math.pi * radius**2, rel=0.05)


def test_a_scene_moves_its_subject():
    shape = Subject("ball", "red", second="red")
    for x, y in ((0.2, 0.0), (-0.2, 0.1)):
        picture = render.render(scene(shape, "water", x=x, y=y, size=0.4)).astype(int)
        rows, columns = np.nonzero(picture[..., 0] > picture[..., 2] + 30)
        assert columns.mean() == pytest.approx((x + 1) / 2 * 64 - 0.5, abs=1)
        assert rows.mean() == pytest.approx((y + 1) / 2 * 64 - 0.5, abs=1)


def test_a_halved_subject_has_its_second_color_above():
    picture = render.render(scene(Subject("ball", "red", "halved", "blue")))
    red, blue = colored(picture, world.COLORS["red"]), colored(picture, world.COLORS["blue"])
    assert np.nonzero(blue)[0].mean() < 30 < 34 < np.nonzero(red)[0].mean()
    assert 0.6 < red.sum() / blue.sum() < 1.6


@pytest.mark.parametrize("pattern", ["striped", "dotted"])
def test_patterns_show_both_colors_in_several_pieces(pattern):
    from skimage.measure import label

    picture = render.render(scene(Subject("ball", "red", pattern, "yellow"), size=0.66))
    yellow = colored(picture, world.COLORS["yellow"], 0.3)
    assert label(yellow).max() >= 2
    assert yellow.sum() > 100
    assert colored(picture, world.COLORS["red"], 0.3).sum() > 100


@pytest.mark.parametrize("emblem", ["spot", "cross", "sash"])
def test_an_emblem_is_white_and_the_plain_subject_is_not(emblem):
    plain = render.render(scene(Subject("ball", "blue", second="blue"), "grass"))
    marked = render.render(scene(Subject("ball", "blue", second="blue", emblem=emblem), "grass"))
    middle = np.s_[24:44, 24:40]
    assert (marked[middle].min(-1) > 180).sum() > 30
    assert (plain[middle].min(-1) > 180).sum() == 0


def test_a_mirrored_subject_is_the_mirror_image_lit_from_the_same_side():
    subject = Subject("fish", "orange", second="orange")
    left = render.render(scene(subject, "water"))
    right = render.render(scene(subject, "water", mirrored=True))
    inside_left = colored(left, world.COLORS["orange"], 0.3)
    inside_right = colored(right, world.COLORS["orange"], 0.3)
    assert (inside_left[:, ::-1] == inside_right).mean() > 0.97
    assert (inside_left == inside_right).mean() < 0.95


def test_contexts_look_different_and_seeds_vary_them():
    subject = Subject("ball", "red", second="red")
    pictures = {c: render.render(scene(subject, c)).astype(float) for c in world.CONTEXTS}
    for a in pictures:
        for b in pictures:
            if a < b:
                assert np.abs(pictures[a] - pictures[b]).mean() > 10, (a, b)
        other = render.render(scene(subject, a, seed=6)).astype(float)
        assert np.abs(pictures[a] - other).mean() > 0.5


def test_shapes_stay_inside_their_size():
    x, y = np.meshgrid(np.linspace(-1.6, 1.6, 161, dtype=np.float32), np.linspace(-1.6, 1.6, 161, dtype=np.float32))
    outside = np.maximum(np.abs(x), np.abs(y)) > 1.02
    for shape in world.SHAPES:
        inside = render._SHAPES[shape](x, y) < 0
        assert not (inside & outside).any(), shape
        assert 0.15 < inside.sum() / (np.maximum(np.abs(x), np.abs(y)) <= 1).sum() < 0.95, shape


def test_signed_distances_of_polygons_are_true_distances():
    square = [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]
    u, v = np.meshgrid(np.linspace(-1, 1, 21, dtype=np.float32), np.linspace(-1, 1, 21, dtype=np.float32))
    dx, dy = np.abs(u) - 0.5, np.abs(v) - 0.5
    expected = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)
    assert np.allclose(render._polygon(u, v, square), expected, atol=1e-6)
