"""Exports, loaded by diffusers itself: a LoRA with its token file, and a merged folder."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from echodistill_core.adapter.apply import personalised
from echodistill_core.adapter.export import export_lora, export_merged, low_rank, token_path
from echodistill_core.adapter.file import Adapter, describe_run, read_adapter, write_adapter
from echodistill_core.errors import InputError, StorageError
from echodistill_core.models.layout import unet_names
from echodistill_core.sampling import denoise, draw_noise, sample
from echodistill_core.settings import TrainSettings, affecting_result

PROMPT = "a photo of a <new1> dog"
# diffusers' one step of DDIM from t = 999 is the one-step map: it starts from unit noise and ends at abar = 1. (Its
# Euler scheduler would start from noise of standard deviation 0.9977, because it divides by sqrt(sigma^2 + 1).)
TRAILING = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,  # what diffusers expects; trailing spacing does not read it
}


@pytest.fixture(scope="module")
def family(tiny_family):
    return tiny_family()


@pytest.fixture(scope="module")
def make_adapter(family):
    """make_adapter(vectors=1, role="student"): random differences of keys and values, of clearly different sizes."""

    def make(vectors=1, role="student"):
        chosen = TrainSettings(class_noun="dog", vectors=vectors)
        unet = (family.student if role == "student" else family.teacher).unet
        generator = torch.Generator().manual_seed(4)
        weights = {n: p for n, p in unet.state_dict().items() if ".attn2.to_k." in n or ".attn2.to_v." in n}
        names = unet_names(weights, family.architecture)
        return Adapter(
            token_embeddings=torch.randn(vectors, 32, generator=generator),
            deltas={names[n]: 0.1 * torch.randn(p.shape, generator=generator) for n, p in weights.items()},
            metadata=describe_run(family, role, affecting_result(chosen), "distil", 3),
        )

    return make


def names_of(family):
    return family.student.unet.state_dict()


def pipeline_of(family, **changes):
    """diffusers' own pipeline around the family's networks."""
    parts = {
        "vae": family.vae,
        "text_encoder": family.text.model,
        "tokenizer": family.text.tokenizer,
        "unet": family.student.unet,
        "scheduler": DDIMScheduler(**TRAILING),
        **changes,
    }
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def one_step(pipeline, noise, prompt=PROMPT, **options):
    options = {"output_type": "latent", "height": 64, "width": 64, **options}
    return pipeline(prompt, num_inference_steps=1, guidance_scale=0.0, latents=noise.clone(), **options).images


def our_step(family, adapter, noise, prompt=PROMPT):
    with personalised(family, [adapter], role=adapter.role) as model:
        return denoise(model.denoiser, noise, model.text([prompt]), 1)


def singular_cut(delta, rank):
    """The best approximation of this rank and its relative error, by numpy (Eckart & Young)."""
    u, s, vh = np.linalg.svd(delta.double().numpy(), full_matrices=False)
    cut = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return torch.from_numpy(cut).float(), float(np.sqrt((s[rank:] ** 2).sum()) / np.sqrt((s**2).sum()))


# The approximation


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (1, 5)])
@pytest.mark.parametrize("rank", [1, 4, 32, 1000])
def test_low_rank_is_the_best_one_and_knows_its_error(shape, rank):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    matrix = low_rank(delta, rank)
    assert matrix.up.shape == (shape[0], min(rank, *shape))
    assert matrix.down.shape == (min(rank, *shape), shape[1])
    best, error = singular_cut(delta, rank)
    torch.testing.assert_close(matrix.up @ matrix.down, best, rtol=0, atol=1e-5)
    assert matrix.error == pytest.approx(error, abs=1e-6)
    measured = (delta - matrix.up @ matrix.down).norm() / delta.norm()
    assert matrix.error == pytest.approx(float(measured), abs=1e-5)


def test_a_matrix_of_zeros_has_no_error():
    matrix = low_rank(torch.zeros(4, 3), 2)
    assert matrix.error == 0
    assert torch.equal(matrix.up @ matrix.down, torch.zeros(4, 3))


# LoRA


@pytest.mark.parametrize("rank", [2, 8, 32, 500])
def test_lora_in_diffusers_draws_what_the_cut_adapter_draws(family, tiny_family, make_adapter, tmp_path, rank):
    adapter = make_adapter()
    errors = export_lora(tmp_path / "dog.safetensors", adapter, family.architecture, names_of(family), rank)
    cuts = {n: singular_cut(d, rank) for n, d in adapter.deltas.items()}
    original = unet_names(names_of(family), family.architecture)
    assert {original[n]: e for n, e in errors.items()} == {n: pytest.approx(e, abs=1e-6) for n, (_, e) in cuts.items()}

    noise = draw_noise(family, 1, 64, 64, seed=3)
    pipeline = pipeline_of(tiny_family())  # a family of its own: diffusers changes networks in place
    pipeline.load_lora_weights(tmp_path / "dog.safetensors")
    pipeline.load_textual_inversion(tmp_path / "dog_token.safetensors")
    found = one_step(pipeline, noise)
    cut = replace(adapter, deltas={n: d for n, (d, _) in cuts.items()})
    expected = our_step(family, cut, noise)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
    whole = our_step(family, adapter, noise)
    if rank >= 32:
        assert max(errors.values()) < 1e-6
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=2e-4)
    else:
        assert not torch.allclose(found, whole, rtol=1e-2, atol=1e-2)


def test_lora_file_has_the_names_that_tools_know_and_alpha_equal_to_rank(family, make_adapter, tmp_path):
    adapter = make_adapter()
    export_lora(tmp_path / "dog.safetensors", adapter, family.architecture, names_of(family), 4)
    tensors = load_file(tmp_path / "dog.safetensors")
    modules = [
        f"lora_unet_{block}_transformer_blocks_0_attn2_to_{x}"
        for block in (
            "down_blocks_0_attentions_0",
            "down_blocks_1_attentions_0",
            "mid_block_attentions_0",
            "up_blocks_1_attentions_0",
            "up_blocks_1_attentions_1",
            "up_blocks_2_attentions_0",
            "up_blocks_2_attentions_1",
        )
        for x in "kv"
    ]
    assert set(tensors) == {f"{m}.{part}" for m in modules for part in ("lora_up.weight", "lora_down.weight", "alpha")}
    for module in modules:
        assert tensors[f"{module}.alpha"].item() == tensors[f"{module}.lora_down.weight"].shape[0] == 4
    delta = adapter.deltas["middle_block.1.transformer_blocks.0.attn2.to_k.weight"]
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    product = tensors[f"{module}.lora_up.weight"] @ tensors[f"{module}.lora_down.weight"]
    torch.testing.assert_close(product, singular_cut(delta, 4)[0], rtol=0, atol=1e-5)


def test_token_file_holds_the_rows_under_the_placeholder(family, make_adapter, tmp_path):
    adapter = make_adapter(vectors=2)
    export_lora(tmp_path / "my.dog.safetensors", adapter, family.architecture, names_of(family), 4)
    assert token_path(tmp_path / "my.dog.safetensors") == tmp_path / "my.dog_token.safetensors"
    tensors = load_file(tmp_path / "my.dog_token.safetensors")
    assert list(tensors) == ["<new1>"]
    assert torch.equal(tensors["<new1>"], adapter.token_embeddings)


def test_exported_files_keep_the_notice_and_are_no_adapters(family, make_adapter, tmp_path):
    from safetensors import safe_open

    export_lora(tmp_path / "dog.safetensors", make_adapter(), family.architecture, names_of(family), 4)
    for name in ("dog", "dog_token"):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            facts = file.metadata()
        assert "photographs" in facts["notice"]
        assert "student" in json.loads(facts["base_licences"])
        assert str(tmp_path) not in json.dumps(facts)
        with pytest.raises(InputError, match="no EchoDistill adapter"):
            read_adapter(tmp_path / f"{name}.safetensors")


def test_a_low_rank_adapter_is_exported_without_loss_at_its_own_rank(family, make_adapter, tmp_path):
    generator = torch.Generator().manual_seed(8)
    name = "middle_block.1.transformer_blocks.0.attn1.to_out.0.weight"
    factors = {name: (torch.randn(64, 3, generator=generator), torch.randn(3, 64, generator=generator))}
    adapter = replace(make_adapter(), deltas={}, factors=factors)
    errors = export_lora(tmp_path / "a.safetensors", adapter, family.architecture, names_of(family), 3)
    assert list(errors) == ["mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.weight"]
    assert max(errors.values()) < 1e-6
    tensors = load_file(tmp_path / "a.safetensors")
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
    up, down = factors[name]
    torch.testing.assert_close(
        tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"], up @ down, rtol=1e-5, atol=1e-4
    )


def test_lora_refuses_what_it_cannot_hold(family, make_adapter, tmp_path):
    out, names = tmp_path / "a.safetensors", names_of(family)
    full = replace(make_adapter(), deltas={"input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3)})
    with pytest.raises(InputError, match=r"conv_in\.weight is no matrix.*--to merged"):
        export_lora(out, full, family.architecture, names, 4)
    with pytest.raises(InputError, match="rank is 0; expected 1 or more"):
        export_lora(out, make_adapter(), family.architecture, names, 0)
    with pytest.raises(InputError, match=r"does not end in \.safetensors"):
        export_lora(tmp_path / "a.pt", make_adapter(), family.architecture, names, 4)
    assert list(tmp_path.iterdir()) == []


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
        expected = model.text(["a photo of a <new1> dog"])
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
        with pytest.raises(InputError, match="exists already; choose a new folder"):
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
