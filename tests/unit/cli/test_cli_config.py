"""--config: options from a TOML file or from the record of a run."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import QUICK, adapter_of, refused, train_command

from echodistill_core.cli import arguments, main
from echodistill_core.errors import InputError
from echodistill_core.training.run import open_run


def options(*words):
    return vars(arguments.parse(arguments.build_parser(), list(words)))


def write(text, name="options.toml"):
    Path(name).write_text(text, encoding="utf-8")
    return name


def test_a_file_sets_flags_of_every_kind():
    write(
        """
        photos = ["a.png", "b.png"]
        class-noun = "coffee mug"
        student_lr = 1e-4
        guidance-scale = 3
        iterations = 7
        augment = false
        trainable = "lora"
        out = "--odd"
        verbose = true
        """
    )
    found = options("train", "--config", "options.toml")
    expected = {
        "photos": ["a.png", "b.png"],
        "class_noun": "coffee mug",
        "student_lr": 1e-4,
        "guidance_scale": 3.0,
        "iterations": 7,
        "augment": False,
        "trainable": "lora",
        "out": "--odd",
        "verbose": True,
    }
    assert {name: found[name] for name in expected} == expected
    assert "seed" not in found  # left to presets and families


def test_flags_win_over_the_file():
    write('photos = "a"\niterations = 7\naugment = false\nclass_noun = "dog"')
    found = options("train", "--augment", "--config=options.toml", "--iterations", "9", "--photos", "b", "c")
    assert (found["iterations"], found["augment"], found["class_noun"]) == (9, True, "dog")
    assert found["photos"] == ["b", "c"]


@pytest.mark.parametrize("command", ["demo", "train", "echo", "sample", "info", "export", "bench", "download"])
def test_every_command_has_a_config(command):
    required = {"echo": ["RUN"], "sample": ["RUN", "--prompt", "x"], "download": ["dino"]}
    required |= {"train": ["--photos", "x"], "export": ["RUN", "--to", "lora", "--out", "a"]}
    write("verbose = true")
    assert options(command, *required.get(command, []), "--config", "options.toml")["verbose"] is True


def test_one_text_fills_a_flag_that_takes_several():
    write('prompt = "a <new1> dog"')
    assert options("sample", "RUN", "--config", "options.toml")["prompt"] == ["a <new1> dog"]


def test_texts_of_a_list_may_begin_with_dashes_and_a_byte_order_mark_is_read():
    write("\ufeffphotos = ['--a', '-b', 'c']\naugment = false\nflip = true\n")
    found = options("train", "--config", "options.toml")
    assert (found["photos"], found["augment"], found["flip"]) == (["--a", "-b", "c"], False, True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("iteratoins = 5", ["options.toml", "'iteratoins'", "did you mean iterations?"]),
        ("config = 'x'", ["'config'"]),
        ("run = 'x'", ["'run'"]),
        ("iterations = '5'", ["options.toml", "'iterations'", "expected a whole number"]),
        ("iterations = true", ["'iterations'", "expected a whole number"]),
        ("iterations = 1.5", ["'iterations'", "expected a whole number"]),
        ("placeholder = 5", ["'placeholder'", "expected a text"]),
        ("augment = 1", ["'augment'", "expected true or false"]),
        ("no-augment = false", ["'no-augment'", "augment"]),
        ("trainable = 'everything'", ["'trainable'", "invalid choice", "kv+token"]),
        ("iterations = [5]", ["'iterations'"]),
        ("photos = [1]", ["'photos'", "expected a text"]),
        ("[train]\nseed = 1", ["'train'"]),
        ("student-lr = 1.0\nstudent_lr = 2.0", ["student-lr", "student_lr", "keep one"]),
        ("seed = ", ["options.toml is not TOML"]),
    ],
)
def test_mistakes_name_the_file_and_the_key(text, words):
    write(text)
    with pytest.raises(InputError) as caught:
        options("train", "--photos", "x", "--config", "options.toml")
    for word in words:
        assert word in str(caught.value)


def test_files_that_cannot_be_read(capsys):
    refused(capsys, ["train", "--config", "none.toml"], "none.toml does not exist", out=None)
    refused(capsys, ["train", "--config", "."], "cannot be read", out=None)
    refused(capsys, ["train", "--config"], "--config", "expected one argument", out=None)
    Path("bytes.toml").write_bytes(b"seed = 1 # \xff")
    refused(capsys, ["train", "--config", "bytes.toml"], "bytes.toml is not TOML", out=None)
    refused(capsys, ["train", "--config", "other.json"], "other.json", "run.json", out=None)
    refused(capsys, ["echo", "RUN", "--config", "run.json"], "run.json", "train", out=None)


def test_training_from_toml_is_training_from_flags(photographs):
    assert main(train_command(photographs, "FLAGS", "--seed", 3)) == 0
    numbers = {"batch-size": 1, "swd-projections": 8, "log_every": 1, "preview_every": 0, "iterations": 1, "seed": 3}
    texts = {"family": "tiny", "class-noun": "dog", "device": "cpu", "photos": str(photographs), "out": "TOML"}
    write("".join(f"{key} = {json.dumps(value)}\n" for key, value in {**texts, **numbers}.items()))
    assert main(["train", "--config", "options.toml"]) == 0
    flags, toml = open_run("FLAGS"), open_run("TOML")
    assert toml.record == flags.record
    assert adapter_of(toml.folder).read_bytes() == adapter_of(flags.folder).read_bytes()


def test_a_record_repeats_its_run(undisturbed):
    assert main(["train", "--config", str(undisturbed / "run.json"), "--out", "AGAIN"]) == 0
    first, again = open_run(undisturbed), open_run("AGAIN")
    assert again.fingerprint("distil") == first.fingerprint("distil")
    assert again.record["settings"] == first.record["settings"]
    assert adapter_of(again.folder).read_bytes() == adapter_of(first.folder).read_bytes()


def test_a_flag_changes_a_repeated_run(undisturbed):
    command = ["train", "--config", str(undisturbed / "run.json"), "--out", "OTHER", "--iterations", "1", "--seed", "5"]
    assert main(command) == 0
    first, other = open_run(undisturbed), open_run("OTHER")
    differing = {n for n, v in other.record["identity"].items() if first.record["identity"][n] != v}
    assert differing == {"iterations", "seed"}


def test_a_preset_does_not_change_a_repeated_run(undisturbed, capsys):
    command = ["train", "--config", undisturbed / "run.json", "--preset", "tuned", "--out", "AGAIN"]
    refused(capsys, command, "--preset", "run.json", out="AGAIN")


def test_a_record_of_other_models_is_refused(undisturbed, capsys):
    run = shutil.copytree(undisturbed, Path("OTHER"))
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    record["identity"]["student_weights"] = "0" * 16
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    refused(capsys, ["train", "--config", run / "run.json", "--out", "AGAIN"], "OTHER", "student_weights", out="AGAIN")


def test_a_record_with_changed_photographs_is_refused(undisturbed, capsys):
    run = shutil.copytree(undisturbed, Path("CHANGED"))
    shutil.copy(run / "photographs" / "000.png", run / "photographs" / "001.png")
    refused(capsys, ["train", "--config", run / "run.json", "--out", "AGAIN"], "CHANGED", "was changed", out="AGAIN")


def test_a_record_repeats_a_run_that_began_from_adapters(undisturbed, photographs):
    start = ["--start-from", adapter_of(undisturbed, role="teacher"), "--teacher-weight", 0, "--vectors", 1]
    assert main(train_command(photographs, "FIRST", *start)) == 0
    shutil.copytree("FIRST", "MOVED")
    assert main(["train", "--config", "MOVED/run.json", "--out", "AGAIN", *QUICK]) == 0
    assert open_run("AGAIN").fingerprint("distil") == open_run("FIRST").fingerprint("distil")
