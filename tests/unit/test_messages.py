"""What files say is cut and made printable before it stands in a message."""

import json

import pytest
import torch
from checkpoints import refused, single_file, write_folder

from echodistill_core.messages import listed, shortened

NASTY = "a\nb\x1b[31m\u202e\udc80" + "é" * 1_000_000


def test_short_printable_text_stays_as_it_is():
    for text in ("", "conv_in.weight", "größe 漢字", "x" * 200):
        assert shortened(text) == text
    assert shortened(("a", 1)) == "('a', 1)"
    assert shortened("a\nb") == r"a\nb"
    assert shortened("a" * 50 + "z" * 50, 11) == "aaa...zzz"


def test_the_rest_is_one_short_printable_line():
    line = shortened(NASTY)
    assert line.isprintable()
    assert line.startswith(r"a\nb\x1b[31m\u202e\udc80é")
    assert line.endswith("é")
    assert "..." in line
    for text in (NASTY, "\x00" * 500, "y" * 201):
        assert len(shortened(text)) <= 200
        assert len(shortened(text, 20)) <= 20


def test_a_list_names_the_first_and_says_that_there_are_more():
    assert listed(["a", "b", "c"]) == "a, b, c"
    assert listed(["a", "b", "c", "d"]) == "a, b, c and 1 more"
    assert len(listed([NASTY] * 10)) < 640


LONG = "\x1b[31m\n" + "x" * 1_000_000


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("scheduler/scheduler_config.json", "prediction_type"),
        ("scheduler/scheduler_config.json", "beta_schedule"),
        ("scheduler/scheduler_config.json", "num_train_timesteps"),
        ("scheduler/scheduler_config.json", "beta_start"),
        ("unet/config.json", "_class_name"),
        ("unet/config.json", "sample_size"),
        ("unet/config.json", "quantization_config"),
        ("unet/config.json", "block_out_channels"),
        ("unet/config.json", "down_block_types"),
        ("vae/config.json", "_class_name"),
        ("vae/config.json", "scaling_factor"),
        ("vae/config.json", "act_fn"),
        ("text_encoder/config.json", "hidden_act"),
        ("text_encoder/config.json", "num_hidden_layers"),
        ("text_encoder/config.json", "max_position_embeddings"),
    ],
)
@pytest.mark.parametrize("value", [LONG, [LONG]], ids=["text", "list"])
def test_long_values_of_configurations(tmp_path, parts, file, key, value):
    folder = write_folder(tmp_path / "folder", parts)
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, key: value}))
    message = refused(folder)
    assert len(message) < 1000
    assert message.isprintable()


def test_long_names_of_tensors(parts):
    tensors = {**parts["unet"], LONG: torch.ones(1)}
    for source in (
        {**parts, "unet": tensors},
        {LONG: torch.ones(1)},
        {**single_file(parts), f"{LONG}.SCB": torch.ones(1)},
        {**single_file(parts), f"{LONG}.scale_weight": torch.ones(1)},
        {**parts, "vae": {**parts["vae"], LONG: torch.ones(1)}},
    ):
        message = refused(source)
        assert len(message) < 1000
        assert message.isprintable()
