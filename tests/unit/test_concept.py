"""Augmentation, captions and image sets against brute force, counting and Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image

from echodistill_core.concept.augment import draw_view, inside_mask, plain_view, to_unit
from echodistill_core.concept.images import ImageSet, square_images
from echodistill_core.concept.photographs import load_photographs
from echodistill_core.concept.prompts import TEMPLATES, caption, epoch_order, subject
from echodistill_core.settings import TrainSettings
from echodistill_core.training.batches import TrainingImages

SIZE, FACTOR = 64, 8


def photograph(size=SIZE, seed=0):
    return torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def draws(image, count, seed=0, *, flip=False, resize=True):
    generator = torch.Generator().manual_seed(seed)
    return [draw_view(image, FACTOR, generator, flip=flip, resize=resize) for _ in range(count)]


def brightness(size=SIZE):
    """A photograph without a grey pixel, so that the canvas shows: every value is 200."""
    return torch.full((3, size, size), 200, dtype=torch.uint8)


@pytest.fixture(scope="module")
def many():
    return draws(brightness(), 3000)


# --- pixels ---------------------------------------------------------------------------------------


def test_bytes_become_minus_one_to_one():
    x = to_unit(torch.arange(256, dtype=torch.uint8))
    np.testing.assert_allclose(x.double().numpy(), np.arange(256) / 255 * 2 - 1, atol=1e-7)
    assert x.dtype == torch.float32
    assert (x.min().item(), x.max().item()) == (-1.0, 1.0)


def test_plain_view_is_the_photograph_and_its_mirror():
    image = photograph()
    plain, mirrored = plain_view(image, FACTOR, False), plain_view(image, FACTOR, True)
    assert torch.equal(plain.pixels, to_unit(image))
    assert torch.equal(mirrored.pixels, torch.from_numpy(to_unit(image).numpy()[:, :, ::-1].copy()))
    assert torch.equal(plain.mask, torch.ones(1, 8, 8))
    assert plain.words == mirrored.words == ""


def test_views_stay_in_range_whatever_bicubic_overshoots():
    stripes = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    stripes[:, :, SIZE // 2 :] = 255
    for view in draws(stripes, 100, flip=True):
        assert view.pixels.shape == (3, SIZE, SIZE)
        assert view.pixels.min().item() >= -1
        assert view.pixels.max().item() <= 1


# --- the mask -------------------------------------------------------------------------------------


def mask_by_pixels(cells, factor, left, top, side):
    inside = np.zeros((cells * factor, cells * factor), bool)
    inside[top : top + side, left : left + side] = True
    mask = np.zeros((cells, cells), np.float32)
    for row in range(cells):
        for column in range(cells):
            mask[row, column] = all(
                inside[row * factor + y, column * factor + x] for y in range(factor) for x in range(factor)
            )
    return mask


@pytest.mark.parametrize("side", [15, 16, 21, 24, 33, 40])
def test_mask_marks_cells_wholly_inside(side):
    cells, factor = 5, 8
    for left in range(0, 41 - side, 3):
        for top in range(41 - side):
            actual = inside_mask(cells, factor, left, top, side)
            assert actual.shape == (1, cells, cells)
            np.testing.assert_array_equal(actual[0].numpy(), mask_by_pixels(cells, factor, left, top, side))


def test_mask_of_a_square_without_a_whole_cell_is_the_cell_of_its_middle():
    mask = inside_mask(8, 8, 12, 27, 10)  # pixels 12..21 across, 27..36 down; the middle is (17, 32)
    assert mask.sum().item() == 1
    assert mask[0, 4, 2].item() == 1


def test_masks_of_draws_agree_with_their_pixels(many):
    # The canvas is exactly 0 and this photograph nowhere, so the pixels themselves tell where the photograph lies.
    for view in many[:300]:
        inside = (view.pixels != 0).all(0)
        cells = inside.reshape(8, 8, 8, 8).permute(0, 2, 1, 3).flatten(2).all(-1).float()
        assert torch.equal(view.mask[0], cells)


def test_canvas_is_exactly_grey_and_the_rest_the_photograph(many):
    shrunken = [v for v in many if (v.pixels == 0).any()]
    assert len(shrunken) > 1000
    for view in shrunken:
        canvas = (view.pixels == 0).all(0)
        torch.testing.assert_close(
            view.pixels[:, ~canvas], torch.full((3, int((~canvas).sum())), 200 / 127.5 - 1), rtol=0, atol=1e-5
        )


def test_shrunken_photograph_is_the_resized_one_in_its_place():
    y, x = np.mgrid[:SIZE, :SIZE]
    image = torch.from_numpy(np.stack([x * 3 + 20, y * 3 + 20, x + y + 60]).astype(np.uint8))
    seen = 0
    for view in draws(image, 60, seed=3):
        rows, columns = (torch.nonzero((view.pixels != 0).any(0).any(d)).flatten() for d in (1, 0))
        side = len(rows)
        if side == SIZE:
            continue
        seen += 1
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
        found = view.pixels[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        difference = (found + 1) * 127.5 - torch.from_numpy(np.array(pillow)).permute(2, 0, 1)
        assert difference.abs().max().item() < 1.6  # Pillow rounds to bytes after each of two passes
    assert seen > 30


# --- what is drawn, how often ---------------------------------------------------------------------


def sides(views):
    return np.array([int((v.pixels != 0).any(0).any(0).sum()) for v in views])


def test_two_thirds_shrink_and_sizes_are_uniform(many):
    found = sides(many)
    shrunken = found < SIZE
    # Among 3000 draws the share of shrunken ones has a deviation of 0.0086; a side may also round up to the full one.
    deviation = (2 / 9 / len(many)) ** 0.5
    near_full = 2 / 3 * (0.5 / SIZE) / (2 / 3)
    assert shrunken.mean() == pytest.approx(2 / 3 - near_full, abs=4 * deviation)
    assert found[shrunken].min() >= round(SIZE / 3)
    assert found[shrunken].mean() == pytest.approx(SIZE * 2 / 3, abs=4 * SIZE * (2 / 3) / 12**0.5 / 2000**0.5)


def test_places_of_the_photograph_are_spread_over_the_canvas(many):
    lefts, rooms = [], []
    for view in many:
        columns = torch.nonzero((view.pixels != 0).any(0).any(0)).flatten()
        if len(columns) < SIZE // 2:
            lefts.append(columns[0].item())
            rooms.append(SIZE - len(columns))
    shares = np.array(lefts) / np.array(rooms)
    assert shares.min() == 0
    assert shares.max() == 1
    assert shares.mean() == pytest.approx(0.5, abs=4 / 12**0.5 / len(shares) ** 0.5)


def test_captions_describe_the_view(many):
    counts = {}
    for view, side in zip(many, sides(many), strict=True):
        counts[view.words] = counts.get(view.words, 0) + 1
        if side < 0.6 * SIZE:
            assert view.words in ("far away", "very small")
        elif side < SIZE:
            assert view.words == ""
        else:
            assert view.words in ("zoomed in", "close up", "")
    assert set(counts) == {"far away", "very small", "zoomed in", "close up", ""}
    # Each pair shares its draws evenly, and near words stand on the third that is enlarged.
    near, far = counts["zoomed in"] + counts["close up"], counts["far away"] + counts["very small"]
    assert near == pytest.approx(len(many) / 3, abs=4 * (len(many) * 2 / 9) ** 0.5)
    assert counts["zoomed in"] == pytest.approx(near / 2, abs=4 * near**0.5 / 2)
    assert counts["far away"] == pytest.approx(far / 2, abs=4 * far**0.5 / 2)


def test_enlarged_views_are_windows_of_the_enlarged_photograph():
    # Bands whose value is their place: the steps between pixels tell the enlargement.
    ramp = (torch.arange(SIZE) * 3 + 20).to(torch.uint8).expand(3, SIZE, SIZE).contiguous()
    scales = []
    for view in draws(ramp, 200, seed=5):
        if view.words in ("zoomed in", "close up"):
            assert torch.equal(view.mask, torch.ones(1, 8, 8))
            row = (view.pixels[0, 0] + 1) * 127.5
            scales.append(3 / ((row[-8] - row[8]) / (SIZE - 16)).item())
    assert len(scales) > 40
    assert min(scales) > 1.19
    assert max(scales) < 1.41
    assert max(scales) - min(scales) > 0.1


def test_flip_mirrors_half_of_the_draws_and_nothing_else():
    image, plain = photograph(), to_unit(photograph())
    assert all(torch.equal(v.pixels, plain) for v in draws(image, 20, resize=False))
    views = draws(image, 1000, flip=True, resize=False)
    mirrored = sum(torch.equal(v.pixels, plain.flip(-1)) for v in views)
    assert mirrored + sum(torch.equal(v.pixels, plain) for v in views) == 1000
    assert mirrored == pytest.approx(500, abs=4 * 1000**0.5 / 2)
    assert {v.words for v in views} == {""}


def test_draws_are_decided_by_the_generator_alone():
    first, again, other = (draws(photograph(), 20, seed=s, flip=True) for s in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.pixels, b.pixels)
        assert torch.equal(a.mask, b.mask)
        assert a.words == b.words
    assert not all(torch.equal(a.pixels, b.pixels) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("size", [64, 96])
def test_every_draw_takes_as_many_random_numbers(size):
    states = set()
    for flip in (False, True):
        for resize in (False, True):
            generator = torch.Generator().manual_seed(9)
            for _ in range(10):  # ten draws meet every kind
                draw_view(photograph(size), FACTOR, generator, flip=flip, resize=resize)
            states.add(generator.get_state().numpy().tobytes())
    reference = torch.Generator().manual_seed(9)
    for _ in range(10):
        torch.rand(6, generator=reference)
    assert states == {reference.get_state().numpy().tobytes()}


def test_augmentation_draws_nothing_global():
    before = torch.get_rng_state()
    draws(photograph(), 10, flip=True)
    assert torch.equal(torch.get_rng_state(), before)


# --- captions -------------------------------------------------------------------------------------


def test_every_template_takes_the_subject_once():
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 20
    for template in TEMPLATES:
        text = caption(template, "<new1>", "coffee mug")
        assert text.count("<new1> coffee mug") == 1
        assert "photo" in text or "snapshot" in text
        assert "{" not in text
        assert not text.startswith(("a ", "the "))  # "close up" may stand before it


def test_captions_name_the_placeholder_before_its_noun():
    assert caption("photo of a {}", "<new1>", "dog") == "photo of a <new1> dog"
    assert subject("<new1>", "") == "<new1>"


def test_epoch_order_is_a_permutation_of_its_arguments_alone():
    assert sorted(epoch_order(60, 3, 5)) == list(range(60))
    assert epoch_order(60, 3, 5) == epoch_order(60, 3, 5)
    orders = {tuple(epoch_order(60, epoch, seed)) for epoch in range(5) for seed in range(5)}
    assert len(orders) == 25
    assert sorted(epoch_order(4, 10**6, 2**63 - 1)) == [0, 1, 2, 3]


def test_first_places_of_epochs_are_spread():
    firsts = np.bincount([epoch_order(4, epoch, 0)[0] for epoch in range(800)], minlength=4)
    assert abs(firsts - 200).max() < 4 * (800 * 3 / 16) ** 0.5


# --- image sets -----------------------------------------------------------------------------------


def test_training_images_are_the_squares_of_the_photographs(photographs):
    images = square_images(load_photographs(photographs), 96, "center")
    assert images.names == ("0.png", "1.png", "2.png")
    assert len(images) == 3
    for i, pixels in enumerate(images.pixels):
        with Image.open(photographs / f"{i}.png") as picture:
            np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), np.array(picture))
    assert square_images(load_photographs(photographs, limit=2), 64, "squash").pixels.shape == (2, 3, 64, 64)


def test_fingerprint_is_of_pixels_and_captions_not_of_names():
    pixels = torch.stack([photograph(seed=s) for s in range(2)])
    one = ImageSet(pixels, ("a", "b"))
    assert one.fingerprint == ImageSet(pixels.clone(), ("x", "y")).fingerprint
    other = pixels.clone()
    other[1, 2, 63, 63] ^= 1
    different = [
        ImageSet(other, ("a", "b")),
        ImageSet(pixels.flip(0), ("a", "b")),
        ImageSet(pixels[:1], ("a",)),
        ImageSet(pixels.reshape(2, 3, 32, 128), ("a", "b")),
        ImageSet(pixels, ("a", "b"), ("one", "two")),
        ImageSet(pixels, ("a", "b"), ("two", "one")),
    ]
    assert len({one.fingerprint, *(s.fingerprint for s in different)}) == 7
    assert len(one.fingerprint) == 16


# --- batches --------------------------------------------------------------------------------------


def image_set(count, captions=None, first=10):
    """Images of one value each, so that a batch tells which image it drew."""
    pixels = torch.stack([torch.full((3, SIZE, SIZE), first + i, dtype=torch.uint8) for i in range(count)])
    return ImageSet(pixels, tuple(str(i) for i in range(count)), captions)


def batches(source, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [source.draw(step, generator) for step in range(steps)]


def settings(**overrides):
    return TrainSettings(**{"class_noun": "dog", "batch_size": 2, "augment": False, "flip": False, **overrides})


def values(batch):
    return [round((x + 1).mul(127.5).mean().item()) for x in batch.pixels]


def test_a_pass_meets_every_photograph_with_every_template_once():
    drawn = [
        pair
        for batch in batches(TrainingImages(image_set(3), settings(), FACTOR), 60)
        for pair in zip(values(batch), batch.prompts, strict=True)
    ]
    expected = {(10 + i, t.replace("{}", "<new1> dog")) for i in range(3) for t in TEMPLATES}
    assert set(drawn[:60]) == expected
    assert set(drawn[60:]) == expected
    assert drawn[:60] != drawn[60:]


def test_images_with_captions_keep_them():
    source = TrainingImages(image_set(3, ("one", "two", "three")), settings(batch_size=3), FACTOR)
    for batch in batches(source, 5):
        assert dict(zip(values(batch), batch.prompts, strict=True)) == {10: "one", 11: "two", 12: "three"}


def test_without_augmentation_critics_and_teacher_see_the_same():
    for batch in batches(TrainingImages(image_set(2), settings(), FACTOR), 3):
        assert torch.equal(batch.pixels, batch.real)
        assert torch.equal(batch.mask, torch.ones(2, 1, 8, 8))
        assert batch.prompts == batch.student_prompts


def test_critics_see_the_canvas_only_where_they_are_told_to():
    image = ImageSet(brightness()[None], ("a",))
    with_canvas = batches(TrainingImages(image, settings(augment=True), FACTOR), 40)
    without = batches(TrainingImages(image, settings(augment=True, critic_canvas=False), FACTOR), 40)
    assert any((b.real == 0).any() for b in with_canvas)
    for batch in with_canvas:
        assert torch.equal(batch.real, batch.pixels)
        assert batch.student_prompts == batch.prompts
    # The teacher's views are the same draws, and the critics' are whole photographs with captions that fit those.
    for a, b in zip(with_canvas, without, strict=True):
        assert torch.equal(a.pixels, b.pixels)
        assert a.prompts == b.prompts
        assert torch.equal(b.real, to_unit(image.pixels).expand_as(b.real))
        assert all(p.endswith(s) for p, s in zip(b.prompts, b.student_prompts, strict=True))
        assert not any(s.startswith(("close", "zoomed", "far", "very")) for s in b.student_prompts)
    assert any(b.prompts != b.student_prompts for b in without)


def test_words_of_the_view_stand_before_the_caption():
    image = ImageSet(brightness()[None], ("a",))
    prompts = [p for b in batches(TrainingImages(image, settings(augment=True), FACTOR), 60) for p in b.prompts]
    for words in ("far away", "very small", "zoomed in", "close up"):
        assert any(p.startswith(f"{words} ") and "<new1> dog" in p for p in prompts)


def test_a_batch_depends_on_step_seed_and_generator_alone():
    source = TrainingImages(image_set(3), settings(augment=True, flip=True), FACTOR)
    a, b = (source.draw(7, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a.pixels, b.pixels)
    assert a.prompts == b.prompts
    c = TrainingImages(image_set(3), settings(augment=True, flip=True, seed=1), FACTOR)
    assert [x.prompts for x in batches(c, 5)] != [x.prompts for x in batches(source, 5)]


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (1.0, 400, 400), (0.25, 65, 135)])
def test_share_of_the_second_set(share, low, high):
    source = TrainingImages(image_set(4, tuple("abcd")), settings(), FACTOR, image_set(4, first=100), share)
    drawn = batches(source, 200)
    second = [v >= 100 for b in drawn for v in values(b)]
    assert low <= sum(second) <= high  # 100 of 400 have a deviation of 8.7
    for batch in drawn:
        for value, prompt in zip(values(batch), batch.prompts, strict=True):
            assert ("<new1>" in prompt) == (value >= 100)
