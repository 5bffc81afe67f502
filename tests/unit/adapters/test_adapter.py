"""The adapter file: round trip, names, metadata."""

import json
import os
import re
from dataclasses import replace

import pytest
import torch
from adapters_by_hand import KV, drawn, make_adapter, metadata
from safetensors import safe_open
from safetensors.torch import save_file

from echodistill_core.adapter.file import Adapter, read_adapter, write_adapter
from echodistill_core.models.architectures import SD1, SD2, TINY
from echodistill_core.models.assemble import empty_unet
from echodistill_core.models.layout import unet_names

# The file


def test_round_trip_keeps_every_bit_and_all_metadata(family, tmp_path):
    adapter = make_adapter(family, vectors=2, placeholder="<größe>")
    first = next(iter(adapter.deltas))
    adapter.deltas[first].view(-1)[:4] = torch.tensor([1e-42, -0.0, 3.4e38, 1 / 3])  # denormal, signed zero, huge
    write_adapter(tmp_path / "a.safetensors", adapter, TINY)
    back = read_adapter(tmp_path / "a.safetensors")
    assert back.deltas.keys() == adapter.deltas.keys()
    for name, delta in adapter.deltas.items():
        assert torch.equal(back.deltas[name].view(torch.int32), delta.view(torch.int32)), name
    assert torch.equal(back.token_embeddings, adapter.token_embeddings)
    assert back.factors == {}
    assert dict(back.metadata) == dict(adapter.metadata)
    assert (back.placeholder, back.class_noun, back.role) == ("<größe>", "dog", "student")


def test_equal_adapters_give_equal_bytes(family, tmp_path):
    adapter = make_adapter(family)
    write_adapter(tmp_path / "a.safetensors", adapter, TINY)
    turned = replace(adapter, deltas=dict(reversed(adapter.deltas.items())))
    write_adapter(tmp_path / "b.safetensors", turned, TINY)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_low_rank_pairs_and_biases_survive_a_round_trip(family, tmp_path):
    name = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    bias = "middle_block.1.proj_in.bias"
    adapter = Adapter(
        token_embeddings=drawn(1, 32),
        deltas={bias: drawn(64)},
        factors={name: (drawn(64, 4), drawn(4, 32))},
        metadata=metadata(family),
    )
    write_adapter(tmp_path / "a.safetensors", adapter, TINY)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        module = "diffusion_model.middle_block.1"
        assert set(file.keys()) == {
            "clip_h",
            f"{module}.proj_in.diff_b",
            f"{module}.transformer_blocks.0.attn2.to_k.lora_up.weight",
            f"{module}.transformer_blocks.0.attn2.to_k.lora_down.weight",
        }
    back = read_adapter(tmp_path / "a.safetensors")
    assert torch.equal(back.deltas[bias], adapter.deltas[bias])
    assert all(torch.equal(a, b) for a, b in zip(back.factors[name], adapter.factors[name], strict=True))


def test_sd2_file_has_the_32_names_of_the_original_layout(tmp_path):
    # By hand, from the published architecture: levels 0 to 2 have attention and two ResNet blocks on the way down
    # (input blocks 1 2, 4 5, 7 8; 3 and 6 are downsamplers) and three on the way up, levels in reverse order.
    down = {f"input_blocks.{n}.1": f"down_blocks.{i // 2}.attentions.{i % 2}" for i, n in enumerate([1, 2, 4, 5, 7, 8])}
    up = {f"output_blocks.{n}.1": f"up_blocks.{n // 3}.attentions.{n % 3}" for n in range(3, 12)}
    blocks = {**down, "middle_block.1": "mid_block.attentions.0", **up}
    assert len(blocks) == 16
    wanted = {
        f"{there}.transformer_blocks.0.attn2.to_{x}": f"{here}.transformer_blocks.0.attn2.to_{x}.weight"
        for there, here in blocks.items()
        for x in "kv"
    }
    unet = empty_unet(SD2)
    learned = [n for n, _ in unet.named_parameters() if ".attn2.to_k." in n or ".attn2.to_v." in n]
    assert len(learned) == 32
    number = {name: float(i) for i, name in enumerate(learned)}  # tells one matrix from another
    names = unet_names(learned, SD2)
    adapter = Adapter(
        token_embeddings=torch.zeros(1, 1024), deltas={names[n]: torch.tensor([[number[n]]]) for n in learned}
    )
    write_adapter(tmp_path / "a.safetensors", adapter, SD2)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert found.pop("clip_h").shape == (1, 1024)
    assert {k: v.item() for k, v in found.items()} == {
        f"diffusion_model.{there}.diff": number[here] for there, here in wanted.items()
    }


def test_sd1_token_is_called_clip_l(tmp_path):
    write_adapter(tmp_path / "a.safetensors", Adapter(token_embeddings=torch.zeros(1, 768)), SD1)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert list(file.keys()) == ["clip_l"]


def test_a_run_writes_differences_from_the_weights_it_started_from(train_tiny, tiny_family, tmp_path):
    # A learning rate of 0.01 makes AdamW's first step 0.01 a number (its normalised gradient is +-1), decay off.
    run = train_tiny(
        tmp_path / "run", iterations=1, trainable="kv+token", student_lr=0.01, grad_clip=0.0, weight_decay=0.0
    )
    adapter = read_adapter(run.path("distil", "student.safetensors"))
    assert set(adapter.deltas) == set(KV)
    sizes = torch.cat([d.abs().flatten() for d in adapter.deltas.values()])
    assert sizes.max() <= 0.01 + 1e-6
    assert sizes.median() == pytest.approx(0.01, rel=1e-3)
    text = tiny_family().text
    start = text.table[text.tokenizer("dog", add_special_tokens=False).input_ids].mean(0)
    assert (adapter.token_embeddings[0] - start).abs().median() == pytest.approx(1e-5, rel=0.1)  # token_lr


def test_files_in_half_precision_are_read_as_float32(family, tmp_path):
    adapter = make_adapter(family)
    half = {f"diffusion_model.{n.removesuffix('.weight')}.diff": d.half() for n, d in adapter.deltas.items()}
    save_file(
        {**half, "clip_h": adapter.token_embeddings.bfloat16()}, tmp_path / "a.safetensors", dict(adapter.metadata)
    )
    back = read_adapter(tmp_path / "a.safetensors")
    assert torch.equal(back.token_embeddings, adapter.token_embeddings.bfloat16().float())
    assert all(torch.equal(back.deltas[n], d.half().float()) for n, d in adapter.deltas.items())


# What it says about itself


def test_metadata_is_for_users_and_tells_nothing_private(train_tiny, family, tmp_path):
    run = train_tiny(tmp_path / "run", iterations=1)
    again = train_tiny(tmp_path / "elsewhere", iterations=1)
    for role in ("student", "teacher"):
        path = run.path("distil", f"{role}.safetensors")
        # Neither time nor place of the run is in the file, so the same run elsewhere gives the same bytes.
        assert path.read_bytes() == again.path("distil", f"{role}.safetensors").read_bytes()
        facts = read_adapter(path).metadata
        text = json.dumps(dict(facts))
        assert str(tmp_path) not in text
        assert not re.search(rf'["\s]{re.escape(os.sep)}\w+{re.escape(os.sep)}', text)
        assert not re.search(r"\b20\d\d-\d\d-\d\d|\b1[789]\d{8}\b", text)
        assert "photographs" in facts["notice"]
        assert "licence" in facts["notice"]
        assert json.loads(facts["base_licences"]) == {
            "student": family.student.licence,
            "teacher": family.teacher.licence,
        }
        assert (facts["role"], facts["placeholder"], facts["class_noun"]) == (role, "<new1>", "dog")
        assert (facts["stage"], facts["iterations"], facts["seed"], facts["vectors"]) == ("distil", "1", "0", "1")
        assert facts["base_model"] == f"tiny {role}"
        assert json.loads(facts["settings"])["trainable"] == "kv+token"


@pytest.mark.parametrize(
    ("origin", "name"),
    [
        ("hub/models--stabilityai--sd-turbo/snapshots/0123abcd", "stabilityai/sd-turbo"),
        ("checkpoints/sd_turbo.safetensors", "sd_turbo.safetensors"),
    ],
)
def test_base_model_is_named_as_its_owner_names_it(family, tmp_path, origin, name):
    path = tmp_path / origin
    path.parent.mkdir(parents=True)
    path.touch()
    student = replace(family.student, origin=str(path), licence="Stability's community licence")
    facts = metadata(replace(family, student=student, teacher=None))
    assert facts["base_model"] == name
    assert json.loads(facts["base_licences"]) == {"student": "Stability's community licence"}
    assert str(tmp_path) not in json.dumps(facts)
