"""Settings: what is accepted and refused, what wins, and what counts towards a run's identity."""

import dataclasses

import pytest

from echodistill_core.errors import InputError
from echodistill_core.settings import PRESETS, EchoSettings, TrainSettings, affecting_result, from_options, nearest

ALL = [(cls, f) for cls in (TrainSettings, EchoSettings) for f in dataclasses.fields(cls)]
BOUNDED = [(cls, f) for cls, f in ALL if f.metadata["low"] is not None]


def name(case):
    return f"{case[0].__name__}.{case[1].name}"


# --- every field ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ALL, ids=name)
def test_every_field_has_a_reason_and_the_same_metadata(case):
    _, field = case
    assert field.metadata["reason"]
    assert set(field.metadata) == {"reason", "unit", "low", "high", "choices", "affects_result", "omit_default"}


@pytest.mark.parametrize("case", ALL, ids=name)
def test_every_field_refuses_another_type(case):
    cls, field = case
    wrong = {str: 3, int: 1.5, float: "1.0", bool: 1}[type(field.default)]
    with pytest.raises(InputError, match=f"setting {field.name} is {wrong!r}; expected {type(field.default).__name__}"):
        cls(**{field.name: wrong})


@pytest.mark.parametrize("case", [c for c in ALL if type(c[1].default) in (int, float)], ids=name)
def test_no_number_is_a_truth_value(case):
    cls, field = case
    with pytest.raises(InputError, match=f"setting {field.name} is True"):
        cls(**{field.name: True})


@pytest.mark.parametrize("case", [c for c in ALL if type(c[1].default) in (int, float)], ids=name)
def test_every_number_is_bounded_below(case):
    assert case[1].metadata["low"] is not None


@pytest.mark.parametrize("case", BOUNDED, ids=name)
def test_ranges_include_their_ends_and_nothing_beyond(case):
    cls, field = case
    number = type(field.default)
    low, high = field.metadata["low"], field.metadata["high"]
    step = 1 if number is int else 1e-9
    assert getattr(cls(**{field.name: number(low)}), field.name) == low
    with pytest.raises(InputError, match=f"setting {field.name} is .*; expected {low}"):
        cls(**{field.name: number(low) - step})
    if high is not None:
        assert getattr(cls(**{field.name: number(high)}), field.name) == high
        with pytest.raises(InputError, match=f"setting {field.name} is .*; expected {low} to {high}"):
            cls(**{field.name: number(high) + step})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("case", [c for c in ALL if type(c[1].default) is float], ids=name)
def test_numbers_are_finite(case, value):
    cls, field = case
    with pytest.raises(InputError, match=f"setting {field.name} is {value}"):
        cls(**{field.name: value})


@pytest.mark.parametrize("case", [c for c in ALL if c[1].metadata["choices"]], ids=name)
def test_choices_are_all_accepted_and_a_slip_gets_its_neighbour(case):
    cls, field = case
    for choice in field.metadata["choices"]:
        cls(**{field.name: choice})
    with pytest.raises(InputError, match=f"setting {field.name} .*did you mean {field.default.replace('+', '.')}"):
        cls(**{field.name: field.default[:-1]})


def test_whole_numbers_are_fine_where_fractions_are():
    assert TrainSettings(guidance_scale=3).guidance_scale == 3


def test_units_stand_in_messages():
    with pytest.raises(InputError, match="setting vectors is 17; expected 1 to 16"):
        TrainSettings(vectors=17)


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainSettings().seed = 1  # type: ignore[misc]


# --- the paper's values ---------------------------------------------------------------------------


def test_defaults_are_the_papers():
    s = TrainSettings()
    assert (s.iterations, s.batch_size, s.swd_weight, s.swd_levels, s.swd_projections) == (1000, 2, 0.1, 5, 128)
    assert (s.teacher_lr, s.token_lr, s.student_lr, s.critic_lr) == (1e-5, 1e-5, 2e-5, 1e-4)
    assert (s.weight_decay, s.grad_clip, s.critic_grad_clip, s.guidance_scale) == (1e-2, 1.0, 0.0, 7.5)
    ones = ("teacher", "alignment", "identity", "mse", "adversarial", "dino", "dinov2", "clip")
    assert all(getattr(s, f"{term}_weight") == 1.0 for term in ones)
    assert s.student_reconstruction_weight == 0.0
    assert (s.trainable, s.placeholder, s.vectors, s.share_text_encoder) == ("kv+token", "<new1>", 1, True)


def test_tuned_departs_from_paper_in_exactly_what_it_names():
    paper, tuned = (from_options(TrainSettings, {"preset": p}) for p in ("paper", "tuned"))
    differing = {n: v for n, v in dataclasses.asdict(tuned).items() if getattr(paper, n) != v}
    assert differing == {
        "preset": "tuned",
        "backbone_normalisation": True,
        "image_every": 3,
    }
    assert paper == TrainSettings()
    assert set(PRESETS) == {"paper", "tuned"}


# --- from options ---------------------------------------------------------------------------------


def test_an_explicit_option_wins_over_the_preset_and_the_preset_over_the_default():
    s = from_options(TrainSettings, {"preset": "tuned", "critic_canvas": False, "seed": 7})
    assert (s.critic_canvas, s.seed, s.backbone_normalisation, s.image_every) == (False, 7, True, 3)
    assert from_options(TrainSettings, {"image_every": 5, "preset": "tuned"}).image_every == 5
    # Even an option that is equal to the default.
    assert from_options(TrainSettings, {"preset": "tuned", "image_every": 1}).image_every == 1


@pytest.mark.parametrize("slip", ["swd_wieght", "swd-weight", "swdweight"])
def test_unknown_setting_gets_the_nearest(slip):
    with pytest.raises(InputError, match=rf"'{slip}'; did you mean swd_weight\?"):
        from_options(TrainSettings, {slip: 1.0})


def test_unknown_setting_like_no_other_gets_no_suggestion():
    with pytest.raises(InputError, match=r"^there is no setting 'qqq'\.$"):
        from_options(TrainSettings, {"qqq": 1})


def test_unknown_preset_gets_the_nearest():
    with pytest.raises(InputError, match=r"setting preset is 'tunned'; .*did you mean tuned\?"):
        from_options(TrainSettings, {"preset": "tunned"})


def test_echo_has_no_presets():
    assert from_options(EchoSettings, {"pool_size": 5}) == EchoSettings(pool_size=5)
    with pytest.raises(InputError, match="there is no setting 'preset'"):
        from_options(EchoSettings, {"preset": "tuned"})


def test_settings_survive_a_round_trip_through_their_fields():
    s = from_options(TrainSettings, {"preset": "tuned", "image_every": 4, "class_noun": "dog"})
    assert from_options(TrainSettings, dataclasses.asdict(s)) == s


def test_nearest_is_a_clause_or_nothing():
    assert nearest("tunde", ["paper", "tuned"]) == "; did you mean tuned?"
    assert nearest("zzz", ["paper", "tuned"]) == ""


# --- what determines the result -------------------------------------------------------------------


def test_determining_leaves_out_what_cannot_change_a_result():
    left_out = {f.name for f in dataclasses.fields(TrainSettings)} - affecting_result(TrainSettings()).keys()
    assert left_out == {
        "preset",
        *("extra_losses", "extra_critics"),  # empty here
        "device",
        "memory_mode",
        "log_every",
        "checkpoint_every",
        "preview_every",
    }
    assert affecting_result(EchoSettings()) == dataclasses.asdict(EchoSettings())


def test_a_preset_is_determined_by_its_values_not_by_its_name():
    by_name = from_options(TrainSettings, {"preset": "tuned"})
    by_hand = TrainSettings(**PRESETS["tuned"])
    assert by_name != by_hand
    assert affecting_result(by_name) == affecting_result(by_hand)
    assert affecting_result(by_name) != affecting_result(TrainSettings())


# --- what the settings switch on ------------------------------------------------------------------


def test_critic_weights_are_the_critics_that_are_on():
    assert TrainSettings().critic_weights == {"dino": 1.0, "dinov2": 1.0, "clip": 1.0}
    assert TrainSettings(dino_weight=0.0, clip_weight=0.5).critic_weights == {"dinov2": 1.0, "clip": 0.5}
    assert TrainSettings(adversarial_weight=0.0).critic_weights == {}


@pytest.mark.parametrize(
    ("off", "aligns", "teaches", "generates"),
    [
        ({}, True, True, True),
        ({"alignment_weight"}, False, True, True),
        ({"identity_weight", "mse_weight"}, True, True, True),
        ({"identity_weight", "mse_weight", "swd_weight"}, False, True, True),
        ({"teacher_weight"}, True, False, True),
        ({"adversarial_weight"}, True, True, True),
        ({"adversarial_weight", "alignment_weight"}, False, True, False),
        ({"dino_weight", "dinov2_weight", "clip_weight", "alignment_weight"}, False, True, False),
    ],
)
def test_weights_of_zero_switch_parts_off(off, aligns, teaches, generates):
    s = TrainSettings(**dict.fromkeys(off, 0.0))
    assert (s.aligns, s.teaches, s.generates) == (aligns, teaches, generates)
