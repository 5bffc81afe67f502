"""Exports as a merged diffusers folder, against diffusers and base plus difference."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from exports_by_hand import PROMPT, TRAILING, one_step, our_step, pipeline_of
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from echodistill_core.adapter.apply import personalised
from echodistill_core.adapter.export import export_merged
from echodistill_core.adapter.file import read_adapter, write_adapter
from echodistill_core.errors import InputError, StorageError
from echodistill_core.sampling import draw_noise, sample

# Merged


def load_merged(folder, **options):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def merged(family, make_adapter, tmp_path_factory):
    """(adapter with two rows, its merged folder). Read only."""
    folder, adapter = tmp_path_factory.mktemp("merged") / "dog", make_adapter(vectors=2)
    export_merged(folder, adapter, family)
    return adapter, folder


def test_merged_folder_in_diffusers_draws_our_picture(family, merged):
    adapter, folder = merged
    noise = draw_noise(family, 1, 64, 64, seed=7)
    expected = our_step(family, adapter, noise)
    pipeline = load_merged(folder)
    sigma = pipeline.scheduler.init_noise_sigma
    assert float(sigma) == pytest.approx(14.61465, rel=1e-4)
    # Euler multiplies given latents by sigma and the UNet's input by 1 / sqrt(sigma^2 + 1); with this factor the UNet
    # sees the noise itself, and z - sigma * eps is then exactly (n - sqrt(1 - abar) eps) / sqrt(abar).
    found = one_step(pipeline, noise * (sigma**2 + 1) ** 0.5 / sigma)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    # Without the factor, as users call it, the noise is 0.23 % weaker and the picture all but the same.
    plain = one_step(pipeline, noise)
    assert 0 < (plain - expected).norm() / expected.norm() < 0.02

    pipeline.scheduler = DDIMScheduler(**TRAILING)
    with personalised(family, [adapter]) as model:
        pixels = sample(model, [PROMPT], seed=7)
    found = one_step(pipeline, noise, output_type="pt")
    torch.testing.assert_close(found, (pixels + 1) / 2, rtol=0, atol=1e-3)
    base = one_step(pipeline_of(family), noise, "a photo of a dog", output_type="pt")
    assert not torch.allclose(found, base, atol=1e-2)


def test_merged_words_stand_for_the_learned_rows(family, merged):
    adapter, folder = merged
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = CLIPTextModel.from_pretrained(folder / "text_encoder")
    assert len(tokenizer) == 49408 + 2 == text.get_input_embeddings().weight.shape[0]
    table = text.get_input_embeddings().weight
    assert torch.equal(table[:49408], family.text.table)
    assert torch.equal(table[49408:], adapter.token_embeddings)
    with personalised(family, [adapter]) as model:
        expected = model.condition(["a photo of a <new1> dog"]).features
    ids = tokenizer("a photo of a <new1> <new1>_1 dog", padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (1, 77)
    torch.testing.assert_close(text(ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    # diffusers writes the further words itself.
    assert load_merged(folder).maybe_convert_prompt("a <new1> dog", tokenizer) == "a <new1> <new1>_1 dog"


def test_merged_weights_are_base_plus_difference_in_the_dtype_of_the_base(tiny_family, make_adapter, tmp_path):
    family, adapter = tiny_family(), make_adapter()
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    whole = family.student.unet.get_parameter(key).detach().clone()
    family.to("cpu", torch.float16)
    export_merged(tmp_path / "half", adapter, family)
    files = {
        "unet": "diffusion_pytorch_model.safetensors",
        "vae": "diffusion_pytorch_model.safetensors",
        "text_encoder": "model.safetensors",
    }
    for part, name in files.items():
        assert {t.dtype for t in load_file(tmp_path / "half" / part / name).values()} == {torch.float16}, part
    unet = load_file(tmp_path / "half" / "unet" / files["unet"])
    base = family.student.unet.state_dict()
    delta = adapter.deltas["middle_block.1.transformer_blocks.0.attn2.to_k.weight"]
    # Added before rounding, as loaded: a difference may be finer than what half precision resolves.
    assert torch.equal(unet[key], (whole + delta).half())
    assert all(torch.equal(unet[n], base[n]) for n in base if ".attn2.to_k." not in n and ".attn2.to_v." not in n)


def test_merged_folder_reads_in_older_transformers_too(merged):
    # Version 4 wants vocab.json and merges.txt, finds new words in added_tokens.json, and text_model. before names.
    _, folder = merged
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert len(vocabulary) == 49408
    assert (vocabulary["!"], vocabulary["dog</w>"], vocabulary["<|endoftext|>"]) == (0, 1929, 49407)
    lines = (folder / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("#version")
    assert lines[1:3] == ["i n", "t h"]
    assert len(lines) == 1 + 48894
    added = json.loads((folder / "tokenizer" / "added_tokens.json").read_text(encoding="utf-8"))
    assert added == {"<new1>": 49408, "<new1>_1": 49409}
    names = load_file(folder / "text_encoder" / "model.safetensors")
    assert {n.split(".")[0] for n in names} == {"text_model"}


def test_merged_folder_carries_the_notice_and_no_local_path(merged):
    _, folder = merged
    notice = (folder / "NOTICE.txt").read_text(encoding="utf-8")
    assert "photographs" in notice
    assert "MIT (random weights)" in notice
    for path in folder.rglob("*.json"):
        assert str(folder.parent) not in path.read_text(encoding="utf-8"), path.name


def test_a_merged_folder_is_itself_a_checkpoint(merged, family):
    from echodistill_core.models.load import load_family

    adapter, folder = merged
    again = load_family(folder)
    assert again.student.schedule.prediction_type == "epsilon"
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    delta = adapter.deltas["middle_block.1.transformer_blocks.0.attn2.to_v.weight"]
    found = again.student.unet.get_parameter(name)
    assert torch.equal(found, family.student.unet.get_parameter(name) + delta)


def test_the_teacher_merges_with_its_own_prediction_type(family, make_adapter, tmp_path):
    adapter = make_adapter(role="teacher")
    export_merged(tmp_path / "teacher", adapter, family)
    pipeline = load_merged(tmp_path / "teacher")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    noise = draw_noise(family, 1, 64, 64, seed=7)
    pipeline.scheduler = DDIMScheduler(**TRAILING, prediction_type="v_prediction")
    found = one_step(pipeline, noise)
    torch.testing.assert_close(found, our_step(family, adapter, noise), rtol=1e-3, atol=1e-3)


def test_an_adapter_file_without_a_notice_merges(family, make_adapter, tmp_path):
    adapter = make_adapter()
    kept = {k: v for k, v in adapter.metadata.items() if k not in ("notice", "base_licences", "settings")}
    write_adapter(tmp_path / "bare.safetensors", replace(adapter, metadata=kept), family.architecture)
    export_merged(tmp_path / "out", read_adapter(tmp_path / "bare.safetensors"), family)
    assert "photographs" in (tmp_path / "out" / "NOTICE.txt").read_text(encoding="utf-8")


def test_merged_replaces_nothing(family, make_adapter, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "full", tmp_path / "file"):
        with pytest.raises(InputError, match=r"out .* exists"):
            export_merged(out, make_adapter(), family)
    assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
    (tmp_path / "empty").mkdir()
    export_merged(tmp_path / "empty", make_adapter(), family)
    assert (tmp_path / "empty" / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StorageError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failure_in_the_middle_leaves_nothing(family, make_adapter, tmp_path, monkeypatch, failure, expected):
    before = dict(family.student.unet.named_parameters())

    def fail(self, folder, **options):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "half.safetensors").write_bytes(b"half")
        raise failure

    monkeypatch.setattr(AutoencoderKL, "save_pretrained", fail)
    with pytest.raises(expected) as caught:
        export_merged(tmp_path / "deep" / "out", make_adapter(), family)
    if expected is StorageError:
        assert str(tmp_path / "deep" / "out") in str(caught.value)
        assert "No space left" in str(caught.value)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert not (tmp_path / "deep" / "out").exists()
    assert all(p is before[n] for n, p in family.student.unet.named_parameters())


def test_a_word_of_letters_is_found_as_a_whole_word_only(family, make_adapter, tmp_path):
    adapter = make_adapter()
    adapter = replace(adapter, metadata={**adapter.metadata, "placeholder": "zwx"})
    export_merged(tmp_path / "out", adapter, family)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    with personalised(family, [adapter]) as model:
        for prompt in ("a zwx dog", "zwx", "a zwxling dog", "a ZWX dog"):
            ours = model.encoder.tokenize([prompt])[0].tolist()
            assert tokenizer(prompt, padding="max_length").input_ids == ours
            assert (49408 in ours) == (prompt != "a zwxling dog")
