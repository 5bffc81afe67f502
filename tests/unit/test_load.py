"""Families from every kind of source, against models that diffusers and transformers load themselves."""

import copy
import hashlib
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from echodistill_core.errors import InputError
from echodistill_core.models import layout
from echodistill_core.models.architectures import SD1, SD2, TINY, looks_like
from echodistill_core.models.checkpoint import read_checkpoint
from echodistill_core.models.load import load_family
from echodistill_core.models.open import open_family
from echodistill_core.models.sources import ModelSources
from echodistill_core.models.text import clip_tokenizer
from echodistill_core.models.tiny import tiny_checkpoint

SMALL_SD1 = replace(
    TINY,
    name="small SD 1.x",
    unet={**TINY.unet, "cross_attention_dim": 24, "use_linear_projection": False, "attention_head_dim": 2},
    text_encoder={**TINY.text_encoder, "hidden_size": 24, "hidden_act": "quick_gelu", "projection_dim": 24},
    pad_with_end=True,
)
PROMPT = "photo of a dog"
TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def networks(architecture, seed):
    """The three networks from their own libraries, every weight random: a swapped scale or bias would show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet, vae = UNet2DConditionModel(**architecture.unet), AutoencoderKL(**architecture.vae)
        text = CLIPTextModel(CLIPTextConfig(**architecture.text_encoder))
        for module in (unet, vae, text):
            for parameter in module.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)
            module.eval().requires_grad_(False)
    return SimpleNamespace(unet=unet, vae=vae, text_encoder=text)


def parts_of(models):
    return {name: {n: t.clone() for n, t in module.state_dict().items()} for name, module in vars(models).items()}


def single_file(parts, architecture):
    """What a published file holds: the three networks, and much that nobody here needs."""
    tensors = layout.to_original(parts["unet"], parts["text_encoder"], parts["vae"], architecture)
    tensors = {n: t.contiguous() for n, t in tensors.items()}
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    tensors["model_ema.diffusion_modelinput_blocks00weight"] = torch.zeros(32, 4, 3, 3)
    tensors["alphas_cumprod"] = torch.linspace(1, 0, 1000)
    tensors["betas"] = torch.linspace(0, 1, 1000)
    tensors["sqrt_alphas_cumprod"] = torch.zeros(1000)
    if architecture.pad_with_end:
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    else:
        width = architecture.text_encoder["hidden_size"]
        last = f"cond_stage_model.model.transformer.resblocks.{architecture.text_encoder['num_hidden_layers']}."
        for name, shape in {
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width),
            "ln_1.weight": (width,),
        }.items():
            tensors[last + name] = torch.ones(shape)
        tensors["cond_stage_model.model.text_projection"] = torch.eye(width)
        tensors["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)
    return tensors


def save_folder(folder, models, prediction="epsilon", **options):
    models.unet.save_pretrained(folder / "unet", **options)
    models.vae.save_pretrained(folder / "vae", **options)
    models.text_encoder.save_pretrained(folder / "text_encoder", **options)
    DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction
    ).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def models():
    return networks(TINY, 1)


@pytest.fixture(scope="module")
def parts(models):
    return parts_of(models)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, models):
    folder = save_folder(tmp_path_factory.mktemp("folder"), models)
    clip_tokenizer(pad_with_end=False).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("file") / "tiny.safetensors"
    save_file(single_file(parts, TINY), path)
    return path


def assert_holds(family, parts):
    """The family's student, VAE and text encoder hold exactly these tensors."""
    modules = {"unet": family.student.unet, "vae": family.vae, "text_encoder": family.text.model}
    for part, module in modules.items():
        state = module.state_dict()
        assert state.keys() == parts[part].keys()
        for name, tensor in parts[part].items():
            assert state[name].dtype == tensor.dtype, name
            assert torch.equal(state[name], tensor), name


# Both layouts


def test_both_layouts_load_bit_equal_to_what_was_written(folder, file, parts):
    for source in (folder, file, str(file)):
        assert_holds(load_family(source), parts)


def test_outputs_equal_those_of_models_loaded_by_diffusers_and_transformers(folder, file):
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    text = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    ids = torch.tensor([[49406, 1125, 539, 320, 1929, 49407, *[0] * 71]])
    z, t, x = noise(1, 1, 4, 8, 8), torch.tensor([999]), noise(2, 1, 3, 64, 64).clamp(-1, 1)
    with torch.no_grad():
        features = text(ids).last_hidden_state
        for family in (load_family(folder), load_family(file)):
            assert torch.equal(family.text([PROMPT]), features)
            assert torch.equal(
                family.student.predict(z, t, features), unet(z, t, encoder_hidden_states=features).sample
            )
            assert torch.equal(family.encode(x), vae.encode(x).latent_dist.mode() * 0.18215)
            assert torch.allclose(family.decode(z), vae.decode(z / 0.18215).sample, atol=1e-6)


def test_latents_are_drawn_from_the_posterior(folder):
    family = load_family(folder)
    x = noise(2, 2, 3, 64, 64).clamp(-1, 1)
    unit = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    drawn = family.scaled(family.posterior(x), unit)
    posterior = AutoencoderKL.from_pretrained(folder / "vae").eval().encode(x).latent_dist
    assert torch.allclose(drawn, 0.18215 * posterior.sample(torch.Generator().manual_seed(4)), atol=1e-6)


def test_a_loaded_family_is_frozen_and_in_evaluation(folder):
    family = load_family(folder, tiny_checkpoint("teacher"))
    for module in family.networks().values():
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("variant", ["fp16", None])
def test_sharded_folders_load(tmp_path, models, parts, variant):
    save_folder(tmp_path, models, variant=variant, max_shard_size="200KB")
    for part in ("unet", "text_encoder", "vae"):
        assert len(list((tmp_path / part).glob("*-of-*.safetensors"))) > 1
    assert_holds(load_family(tmp_path), parts)


def test_a_half_precision_variant_loads_in_its_own_precision(tmp_path, models, parts):
    halves = SimpleNamespace(**{name: copy.deepcopy(module).half() for name, module in vars(models).items()})
    save_folder(tmp_path, halves, variant="fp16")
    assert not list(tmp_path.rglob("*model.safetensors"))
    assert_holds(load_family(tmp_path), {p: {n: t.half() for n, t in ts.items()} for p, ts in parts.items()})


@pytest.mark.parametrize("convolution", [False, True], ids=["linear", "1x1 convolution"])
def test_a_vae_folder_with_the_attention_names_of_2022(tmp_path, folder, models, parts, convolution):
    save_folder(tmp_path, models)
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {}
    for name, tensor in load_file(path).items():
        for new, before in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            if ".attentions." in name and f".{new}." in name:
                name = name.replace(f".{new}.", f".{before}.")
                if convolution and tensor.ndim == 2:
                    tensor = tensor[:, :, None, None].contiguous()
        old[name] = tensor
    assert sum(".query." in n for n in old) == 4
    save_file(old, path)
    assert_holds(load_family(tmp_path), parts)
    if not convolution:
        theirs = AutoencoderKL.from_pretrained(tmp_path / "vae").state_dict()  # diffusers renames these itself
        assert all(torch.equal(tensor, theirs[n]) for n, tensor in load_family(tmp_path).vae.state_dict().items())


def test_text_folders_of_transformers_4_load(tmp_path, models, parts):
    save_folder(tmp_path, models)
    path = tmp_path / "text_encoder" / "model.safetensors"
    old = {"text_model." + n.removeprefix("text_model."): t for n, t in load_file(path).items()}
    old["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(old, path)
    assert_holds(load_family(tmp_path), parts)


# Single files


def test_a_single_file_of_sd1(tmp_path):
    models = networks(SMALL_SD1, 2)
    parts = parts_of(models)
    tensors = {n: t for n, t in single_file(parts, SMALL_SD1).items() if not n.startswith("cond_stage_model.")}
    for name, tensor in parts["text_encoder"].items():
        tensors["cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")] = tensor
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, tmp_path / "sd1.safetensors")
    family = load_family(tmp_path / "sd1.safetensors", architecture=SMALL_SD1)
    assert_holds(family, parts)
    ids = torch.tensor([[49406, 1125, 539, 320, 1929, 49407, *[49407] * 71]])
    assert torch.equal(family.text([PROMPT]), models.text_encoder(ids).last_hidden_state)


def test_open_clips_last_layer_and_other_extras_are_ignored(file):
    read = read_checkpoint(file)
    layers = {n.split(".")[2] for n in read.text_encoder if n.startswith("encoder.layers.")}
    assert layers == {"0", "1"}
    assert len(load_file(file)) > len(read.unet) + len(read.vae) + len(read.text_encoder) - 8


def test_the_text_encoder_under_stabilitys_later_names(parts, tmp_path):
    renamed = {
        n.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): t
        for n, t in single_file(parts, TINY).items()
    }
    save_file(renamed, tmp_path / "sd_turbo.safetensors")
    assert_holds(load_family(tmp_path / "sd_turbo.safetensors"), parts)


def test_fingerprints_are_of_the_model_not_of_its_precision_or_layout(tmp_path, folder, file, parts):
    save_file({n: t.half() for n, t in load_file(file).items()}, tmp_path / "half.safetensors")
    whole, half_family = load_family(file), load_family(tmp_path / "half.safetensors")
    assert half_family.student.unet.dtype == torch.float16
    for family in (half_family, load_family(folder)):
        assert family.student.fingerprint == whole.student.fingerprint
        assert family.text_fingerprint == whole.text_fingerprint
    assert re.fullmatch("[0-9a-f]{16}", whole.student.fingerprint)


def test_fingerprints_tell_other_weights(parts):
    whole = load_family(parts)
    changed = {**parts, "unet": {**parts["unet"], TO_K: parts["unet"][TO_K] * 1.01}}
    other = load_family(changed)
    assert other.student.fingerprint != whole.student.fingerprint
    assert other.text_fingerprint == whole.text_fingerprint
    name = "final_layer_norm.bias"
    changed = {**parts, "text_encoder": {**parts["text_encoder"], name: parts["text_encoder"][name] + 0.01}}
    other = load_family(changed)
    assert other.student.fingerprint == whole.student.fingerprint
    assert other.text_fingerprint != whole.text_fingerprint


# Tensors that a caller hands over


def given(parts, kind):
    original = single_file(parts, TINY)
    if kind == "flat":
        return original

    def under(prefix):
        return {n.removeprefix(prefix): t for n, t in original.items() if n.startswith(prefix)}

    if kind == "original names":
        unet, vae = under("model.diffusion_model."), under("first_stage_model.")
        return {"unet": unet, "vae": vae, "text_encoder": under("cond_stage_model.model.")}
    if kind == "longer text encoder":
        text = {"text_model." + n.removeprefix("text_model."): t for n, t in parts["text_encoder"].items()}
        for name in [n for n in text if ".layers.1." in n]:
            text[name.replace(".layers.1.", ".layers.2.")] = torch.ones_like(text[name])
        text["text_projection.weight"] = torch.eye(32)
        text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        return {**parts, "text_encoder": text}
    assert kind == "diffusers names"
    return parts


KINDS = ["flat", "diffusers names", "original names", "longer text encoder"]


@pytest.mark.parametrize("kind", KINDS)
def test_given_tensors_load(parts, kind):
    assert_holds(load_family(given(parts, kind)), parts)


@pytest.mark.parametrize("with_lora", [False, True], ids=["plain", "with a LoRA"])
@pytest.mark.parametrize("kind", KINDS)
def test_given_tensors_are_not_modified(tmp_path, parts, kind, with_lora):
    source = given(copy.deepcopy(parts), kind)
    groups = [source] if kind == "flat" else list(source.values())
    before = [{n: t.clone() for n, t in group.items()} for group in groups]
    lora = write_lora(tmp_path / "lora.safetensors", {TO_K: 1.0}) if with_lora else None
    family = load_family(source, student_lora=lora)
    family.to("cpu", torch.float16)
    for group, original in zip(groups, before, strict=True):
        assert group.keys() == original.keys()
        for name, tensor in original.items():
            assert group[name].dtype == tensor.dtype
            assert torch.equal(group[name], tensor), name


def test_given_parameters_keep_their_own_gradients_on(parts):
    live = {n: torch.nn.Parameter(t.clone()) for n, t in parts["unet"].items()}
    family = load_family({**parts, "unet": live})
    assert all(p.requires_grad for p in live.values())
    assert not any(p.requires_grad for p in family.student.unet.parameters())


def test_files_are_not_modified(tmp_path, file, folder):
    lora = write_lora(tmp_path / "lora.safetensors", {TO_K: 1.0})
    paths = [file, lora, *sorted(p for p in folder.rglob("*") if p.is_file())]
    digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in paths]
    for source in (file, folder):
        family = load_family(source, student_lora=lora)
        for parameter in family.student.unet.parameters():  # files may be mapped into memory
            parameter.data += 1
    assert [hashlib.sha256(p.read_bytes()).hexdigest() for p in paths] == digests


# A LoRA that makes the student one-step


def write_lora(path, alphas, rank=4):
    """A LoRA in kohya's names, as Hyper-SD's: down, up, and alpha where it is a number."""
    tensors = {}
    for i, (name, alpha) in enumerate(alphas.items()):
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        out_features, in_features = {TO_K: (32, 32)}.get(name, (64, 64))
        tensors[f"{key}.lora_down.weight"] = noise(20 + i, rank, in_features)
        tensors[f"{key}.lora_up.weight"] = noise(40 + i, out_features, rank)
        tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, path)
    return path


def test_a_lora_is_merged_with_its_alpha_over_rank(tmp_path, parts):
    q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    out = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.weight"
    alphas = {TO_K: 2.0, q: 4.0, out: 8.0}
    path = write_lora(tmp_path / "lora.safetensors", alphas)
    given_lora = load_file(path)
    family = load_family(parts, parts, student_lora=path)
    merged = family.student.unet.state_dict()
    assert merged.keys() == parts["unet"].keys()
    for name, weight in parts["unet"].items():
        expected = weight
        if name in alphas:
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            up, down = given_lora[f"{key}.lora_up.weight"], given_lora[f"{key}.lora_down.weight"]
            expected = weight + alphas[name] / 4 * up @ down
            assert not torch.allclose(expected, weight, atol=0.1)
        assert torch.allclose(merged[name], expected, atol=1e-5, rtol=1e-5), name
    assert all(torch.equal(t, parts["unet"][n]) for n, t in family.teacher.unet.state_dict().items())
    assert family.student.fingerprint != family.teacher.fingerprint
    assert not any(p.requires_grad for p in family.student.unet.parameters())


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 32)}, "does not fit the student"),
        ({"something": (3,)}, "nothing for the UNet"),
        (
            {
                "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 77),
                "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight": (32, 4),
            },
            "size mismatch",
        ),
    ],
    ids=["text encoder only", "no LoRA", "other width"],
)
def test_a_lora_that_does_not_fit_is_refused(tmp_path, parts, tensors, expected):
    path = tmp_path / "lora.safetensors"
    save_file({n: torch.zeros(shape) for n, shape in tensors.items()}, path)
    with pytest.raises(InputError, match=expected) as refusal:
        load_family(parts, student_lora=path)
    assert str(path) in str(refusal.value)


# What the UNet predicts, and the schedule


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_folders_scheduler_says_what_is_predicted(tmp_path, folder, models, prediction):
    save_folder(tmp_path, models, prediction)
    assert load_family(tmp_path).student.schedule.prediction_type == prediction


def sd2_unet_with_bias(values, architecture=SD2):
    """A UNet with all the names and shapes of SD 2.x and no memory, but for the tensor that tells v from epsilon."""
    with torch.device("meta"):
        shapes = UNet2DConditionModel(**architecture.unet).state_dict()
    unet = {n: torch.zeros(1).expand(t.shape) for n, t in shapes.items()}
    unet["up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"] = values
    return unet


@pytest.mark.parametrize(
    ("deviation", "expected"),
    [(0.02, "epsilon"), (0.0899, "epsilon"), (0.08995, "epsilon"), (0.0901, "v_prediction"), (0.15, "v_prediction")],
)
def test_a_single_file_of_sd2_tells_its_prediction_by_one_bias(deviation, expected):
    # Half the values at +a and half at -a have the population deviation a; 0.08995 has a sample deviation over 0.09.
    values = torch.cat([torch.full((160,), deviation), torch.full((160,), -deviation)]) + 0.3
    unet = sd2_unet_with_bias(values)
    there = layout.unet_names(unet, SD2)
    bias = there["up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"]
    assert bias == "output_blocks.11.1.transformer_blocks.0.norm1.bias"  # the tensor ComfyUI looks at
    for source in ({"unet": unet}, {"model.diffusion_model." + there[n]: t for n, t in unet.items()}):
        assert read_checkpoint(source).schedule.prediction_type == expected
    assert read_checkpoint({"unet": unet}, prediction="sample").schedule.prediction_type == "sample"


def test_sd1_predicts_noise_whatever_its_bias():
    unet = sd2_unet_with_bias(torch.linspace(-1, 1, 320), SD1)
    assert read_checkpoint({"unet": unet}).architecture is SD1
    assert read_checkpoint({"unet": unet}).schedule.prediction_type == "epsilon"


def test_prediction_can_be_overridden_for_teacher_and_student(parts, folder):
    for source in (parts, folder):
        family = load_family(source, source, student_prediction="sample", teacher_prediction="v_prediction")
        assert family.student.schedule.prediction_type == "sample"
        assert family.teacher.schedule.prediction_type == "v_prediction"


def test_an_unknown_prediction_is_refused(parts):
    with pytest.raises(InputError, match=r"'flow' is unknown; expected one of epsilon"):
        load_family(parts, student_prediction="flow")


def test_the_schedule_is_the_closed_form(folder, file, parts):
    betas = [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2 for i in range(1000)]
    product, expected = 1.0, []
    for beta in betas:
        product *= 1 - beta
        expected.append(product)
    assert expected[999] == pytest.approx(0.0046601, abs=5e-8)
    for source in (folder, file, parts):
        schedule = load_family(source).student.schedule
        assert schedule.timesteps == 1000
        assert schedule.alphas_cumprod.dtype == torch.float32
        assert torch.allclose(schedule.alphas_cumprod.double(), torch.tensor(expected).double(), rtol=2e-5, atol=0)


# Teacher and student


def test_teacher_and_student_keep_their_own_unets_and_share_the_rest(parts):
    other = parts_of(networks(TINY, 9))
    family = load_family(parts, {**other, "text_encoder": parts["text_encoder"]}, licences={"teacher": "its own"})
    assert_holds(family, parts)  # the student's UNet and VAE
    assert all(torch.equal(t, other["unet"][n]) for n, t in family.teacher.unet.state_dict().items())
    assert (family.teacher.licence, family.student.licence) == ("its own", "unknown")
    assert len(family.networks()) == 4


def test_equal_text_encoders_are_silent_and_different_ones_warn(parts):
    assert load_family(parts, parts).warnings == []
    rounded = {**parts, "text_encoder": {n: t.half() for n, t in parts["text_encoder"].items()}}
    assert load_family(parts, rounded).warnings == []
    other = copy.deepcopy(parts)
    other["text_encoder"]["encoder.layers.1.mlp.fc1.bias"][3] += 0.01
    family = load_family(parts, other)
    (warning,) = family.warnings
    assert "text encoders of teacher (teacher) and student (student) differ" in warning
    assert_holds(family, {**parts, "text_encoder": other["text_encoder"]})  # the teacher's is the one that is read


def test_without_a_teacher_its_text_encoder_is_still_read(parts):
    other = parts_of(networks(TINY, 9))
    family = load_family(parts, other, with_teacher=False)
    assert family.teacher is None
    assert_holds(family, {**parts, "text_encoder": other["text_encoder"]})
    assert len(family.warnings) == 1


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_a_part_that_one_lacks_is_taken_from_the_other(parts, part):
    lacking = {n: t for n, t in parts.items() if n != part}
    other = {**parts_of(networks(TINY, 9)), "text_encoder": parts["text_encoder"]}
    expected = {**parts, part: other[part]}
    assert_holds(load_family(lacking, other), expected)
    assert_holds(load_family(parts, {n: t for n, t in other.items() if n != part}), parts)


def test_teacher_and_student_of_different_widths_are_refused(tmp_path, folder, parts):
    narrow = save_folder(tmp_path / "narrow", networks(SMALL_SD1, 2))
    with pytest.raises(InputError, match=r"different widths: \S*folder\S* reads 32, \S*narrow reads 24"):
        load_family(narrow, folder)
    with pytest.raises(InputError, match=r"text encoder is 32 wide, but the student \S*narrow reads 24"):
        load_family(narrow, folder, with_teacher=False)


def test_a_folder_without_a_tokenizer_pads_as_its_width_says(tmp_path, folder):
    """SD 1.x, 768 wide, pads with the end token; SD 2.x with token 0."""
    assert not (save_folder(tmp_path / "plain", networks(TINY, 1)) / "tokenizer").exists()
    assert load_family(tmp_path / "plain").text.tokenize([""])[0, -1] == 0
    config = json.loads((tmp_path / "plain" / "unet" / "config.json").read_text())
    config["cross_attention_dim"] = 768
    (tmp_path / "plain" / "unet" / "config.json").write_text(json.dumps(config))
    assert read_checkpoint(tmp_path / "plain").architecture.pad_with_end
    assert not read_checkpoint(folder).architecture.pad_with_end


# Bad input


def refusal(source, *args, **options):
    with pytest.raises(InputError) as caught:
        load_family(source, *args, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_a_missing_path_is_named(tmp_path):
    assert f"{tmp_path / 'nowhere'} does not exist" in refusal(tmp_path / "nowhere")


def test_a_folder_without_a_unet_is_refused(tmp_path):
    (tmp_path / "vae").mkdir()
    assert "no subfolder unet" in refusal(tmp_path)


@pytest.mark.parametrize("part", ["unet/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json"])
def test_a_folder_with_a_missing_or_broken_configuration_is_refused(tmp_path, models, part):
    save_folder(tmp_path, models)
    for text, expected in (("{", "cannot be read as JSON"), ("[]", "no JSON object"), (None, "is missing")):
        (tmp_path / part).unlink() if text is None else (tmp_path / part).write_text(text)
        message = refusal(tmp_path)
        assert str(tmp_path / part) in message
        assert expected in message


def test_a_folder_with_pickles_only_is_refused(tmp_path, models):
    save_folder(tmp_path, models)
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    message = refusal(tmp_path)
    assert "pickle (diffusion_pytorch_model.bin)" in message
    assert "convert" in message
    weights.with_suffix(".bin").unlink()
    assert "holds no .safetensors weights" in refusal(tmp_path)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": "absent.safetensors"}}'])
def test_a_broken_index_of_shards_is_refused(tmp_path, models, index):
    save_folder(tmp_path, models)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    message = refusal(tmp_path)
    assert "weight_map" in message or "absent.safetensors does not exist" in message


def test_an_index_cannot_lead_out_of_its_folder(tmp_path, models, parts):
    save_folder(tmp_path / "model", models)
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(parts["unet"], "../../outside.safetensors")}
    weights.with_suffix(".safetensors.index.json").write_text(json.dumps(index))
    assert "unet/outside.safetensors does not exist" in refusal(tmp_path / "model")


def test_a_truncated_file_is_refused(tmp_path, file):
    whole = file.read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert str(path) in refusal(path)


def test_a_pickle_is_refused_unopened(tmp_path, parts):
    path = tmp_path / "model.ckpt"
    torch.save(parts, path)
    message = refusal(path)
    assert "pickle" in message
    assert "convert" in message


def test_missing_superfluous_and_misshapen_tensors_are_named(parts):
    for part, module in (("unet", "UNet"), ("vae", "VAE"), ("text_encoder", "text encoder")):
        name = list(parts[part])[-2]
        message = refusal({**parts, part: {n: t for n, t in parts[part].items() if n != name}})
        assert f"1 tensors are missing (the first is {name})" in message
        assert message.startswith(module)
        message = refusal({**parts, part: {**parts[part], name: torch.zeros(3, 5)}})
        assert f"tensor {name} has shape (3, 5); expected {tuple(parts[part][name].shape)}" in message
    message = refusal({**parts, "unet": {**parts["unet"], "add.weight": torch.zeros(1)}})
    assert "1 are superfluous (the first is add.weight)" in message


def test_a_checkpoint_without_text_encoder_or_vae_is_refused(parts):
    for part in ("text_encoder", "vae"):
        lacking = {n: t for n, t in parts.items() if n != part}
        assert f"student holds no {part}" in refusal(lacking)
        assert f"holds no {part}" in refusal(lacking, lacking)


FOREIGN = {
    "SDXL file": (
        {
            "conditioner.embedders.1.model.ln_final.weight": (1280,),
            "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
            "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
            "model.diffusion_model.input_blocks.4.1.proj_in.weight": (640, 640),
        },
        "an SDXL checkpoint",
    ),
    "SDXL UNet": (
        {
            "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
            "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        },
        "an SDXL UNet",
    ),
    "Flux": ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (9216, 3072)}, "a Flux transformer"),
    "bare Flux": ({"double_blocks.0.img_attn.qkv.weight": (9216, 3072)}, "a Flux transformer"),
    "SD 3": ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (9, 3)}, "an SD 3 transformer"),
    "ControlNet": (
        {
            "control_model.input_hint_block.0.weight": (16, 3, 3, 3),
            "control_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        },
        "a ControlNet",
    ),
    "diffusers ControlNet": (
        {
            "controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3),
            "conv_in.weight": (320, 4, 3, 3),
            "down_blocks.0.attentions.0.proj_in.weight": (320, 320),
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        },
        "a ControlNet",
    ),
    "LoRA": ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 320)}, "a LoRA"),
    "diffusers LoRA": ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": (4, 320)}, "a LoRA"),
    "VAE": ({"decoder.conv_in.weight": (512, 4, 3, 3), "encoder.conv_in.weight": (128, 3, 3, 3)}, "a VAE alone"),
    "UNet alone": (
        {
            "conv_in.weight": (320, 4, 3, 3),
            "down_blocks.0.attentions.0.proj_in.weight": (320, 320),
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        },
        "a UNet of width 320 with text features of width 1024 and 4 input channels",
    ),
    "inpainting": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3),
            "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320),
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        },
        "an inpainting UNet (9 input channels)",
    ),
    "text encoder": ({"text_model.embeddings.token_embedding.weight": (49408, 768)}, "a text encoder alone"),
    "image encoder": ({"vision_model.embeddings.class_embedding": (1280,)}, "a CLIP image encoder"),
    "anything": ({"some.weight": (2, 2)}, "no model known here (1 tensors, the first named 'some.weight')"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused_by_what_it_looks_like(tmp_path, kind):
    shapes, expected = FOREIGN[kind]
    path = tmp_path / "foreign.safetensors"
    save_file({n: torch.zeros(1, dtype=torch.uint8).expand(s).contiguous() for n, s in shapes.items()}, path)
    message = refusal(path)
    assert str(path) in message
    assert f"looks like {expected};" in message


def test_given_foreign_tensors_are_refused_too(parts):
    controlnet = {**parts["unet"], "controlnet_cond_embedding.conv_in.weight": torch.zeros(1)}
    assert "looks like a ControlNet" in refusal({**parts, "unet": controlnet})
    assert "looks like an empty file" in refusal({})
    assert looks_like({"down_blocks.0.attn2.to_k.diff": (2, 2)}) == "an EchoDistill adapter"


def test_a_folder_of_sdxl_is_refused(tmp_path):
    (tmp_path / "unet").mkdir()
    config = {"_class_name": "UNet2DConditionModel", "addition_embed_type": "text_time", "in_channels": 4}
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    save_file({"add_embedding.linear_1.weight": torch.zeros(2, 2)}, tmp_path / "unet" / "model.safetensors")
    assert "looks like an SDXL UNet" in refusal(tmp_path)


# Families by name


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.mark.parametrize(
    ("family", "repo"),
    [
        ("sd-turbo", "sd-turbo"),
        ("sd-turbo-base", "sd-turbo"),
        ("hyper-sd15", "Hyper-SD"),
    ],
)
def test_a_family_not_in_the_hub_cache_names_the_command_that_gets_it(empty_cache, family, repo):
    with pytest.raises(InputError, match=rf"{repo} is not in the hub cache .* echodistill download {family}-family"):
        open_family(ModelSources(family=family))


def test_the_teacher_that_is_not_cached_is_named_where_the_student_is_given(empty_cache, file):
    with pytest.raises(InputError, match=r"stable-diffusion-2-1 is not in the hub cache"):
        open_family(ModelSources(student=str(file)))


def test_wrong_paths_are_named_and_the_nearest_name_suggested(empty_cache, file):
    with pytest.raises(InputError, match=r"'sd-turbo1' does not exist; .* did you mean sd-turbo\?"):
        open_family(ModelSources(student="sd-turbo1"))
    with pytest.raises(InputError, match=r"student_lora .*none\.safetensors does not exist"):
        open_family(ModelSources(family="tiny", student_lora="none.safetensors"))


def test_own_files_take_the_place_of_a_familys_parts(empty_cache, tmp_path, file, parts):
    other = tmp_path / "other.safetensors"
    save_file(single_file({**parts_of(networks(TINY, 9)), "text_encoder": parts["text_encoder"]}, TINY), other)
    family = open_family(ModelSources(student=str(file), teacher=str(other), teacher_prediction="v_prediction"))
    assert_holds(family, parts)
    assert family.teacher.fingerprint != family.student.fingerprint
    assert family.teacher.schedule.prediction_type == "v_prediction"
    assert family.student.licence.startswith(
        "that of the checkpoint tiny.safetensors; Stability AI Community License if"
    )
    assert family.teacher.licence.startswith("that of the checkpoint other.safetensors; CreativeML Open RAIL++-M if")
    assert family.student.origin == str(file)


# The tiny family


def test_the_tiny_family_is_always_the_same_and_leaves_the_generator_alone():
    families = []
    for seed in range(2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        families.append(open_family(ModelSources(family="tiny")))
        assert torch.equal(torch.get_rng_state(), before)
    a, b = families
    for x, y in zip(a.networks().values(), b.networks().values(), strict=True):
        assert all(torch.equal(t, y.state_dict()[n]) for n, t in x.state_dict().items())
    assert a.student.fingerprint == b.student.fingerprint != a.teacher.fingerprint


def test_the_tiny_family_is_sd21_and_sd_turbo_in_small():
    family = open_family(ModelSources(family="tiny"))
    assert family.teacher.schedule.prediction_type == "v_prediction"
    assert family.student.schedule.prediction_type == "epsilon"
    assert family.warnings == []
    assert family.latent_factor == 8
    assert open_family(ModelSources(family="tiny"), with_teacher=False).teacher is None
    z, t = noise(1, 2, 4, 8, 8), torch.tensor([999, 3])
    for denoiser in (family.student, family.teacher):
        assert denoiser.predict(z, t, family.text([PROMPT, ""])).isfinite().all()
    assert family.decode(z).shape == (2, 3, 64, 64)


def test_what_a_user_says_counts_for_the_tiny_family_too(tmp_path, file, parts):
    lora = write_lora(tmp_path / "lora.safetensors", {TO_K: 1.0})
    plain = open_family(ModelSources(family="tiny"))
    said = open_family(
        ModelSources(family="tiny", teacher_prediction="epsilon", student_prediction="sample", student_lora=str(lora))
    )
    assert said.teacher.schedule.prediction_type == "epsilon"
    assert said.student.schedule.prediction_type == "sample"
    assert said.student.fingerprint != plain.student.fingerprint
    own = open_family(ModelSources(family="tiny", student=str(file)))
    assert all(torch.equal(t, parts["unet"][n]) for n, t in own.student.unet.state_dict().items())
    assert own.teacher.fingerprint == plain.teacher.fingerprint
    assert own.teacher.schedule.prediction_type == "v_prediction"
