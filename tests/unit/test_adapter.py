"""Adapter files and adapters on a model, against names derived by hand and sums made in plain torch."""

import copy
import json
import os
import re
import struct
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from echodistill_core.adapter.apply import personalised
from echodistill_core.adapter.file import Adapter, describe_run, read_adapter, write_adapter
from echodistill_core.errors import InputError
from echodistill_core.models.architectures import SD1, SD2, TINY
from echodistill_core.models.assemble import empty_unet
from echodistill_core.models.layout import unet_names
from echodistill_core.sampling import sample
from echodistill_core.settings import TrainSettings, affecting_result

# Where the cross-attentions of the tiny family lie in the original layout. By hand: input block 0 is conv_in, and each
# level has one ResNet block and one downsampler; the output side has two blocks a level, the first level without
# attention.
TINY_BLOCKS = {
    "input_blocks.1.1": "down_blocks.0.attentions.0",
    "input_blocks.3.1": "down_blocks.1.attentions.0",
    "middle_block.1": "mid_block.attentions.0",
    "output_blocks.2.1": "up_blocks.1.attentions.0",
    "output_blocks.3.1": "up_blocks.1.attentions.1",
    "output_blocks.4.1": "up_blocks.2.attentions.0",
    "output_blocks.5.1": "up_blocks.2.attentions.1",
}
KV = {
    f"{there}.transformer_blocks.0.attn2.to_{x}.weight": f"{here}.transformer_blocks.0.attn2.to_{x}.weight"
    for there, here in TINY_BLOCKS.items()
    for x in "kv"
}
PLAIN, NAMED = "a photo of a dog", "a photo of a <new1> dog"


@pytest.fixture(scope="module")
def family(tiny_family):
    """One tiny family for the whole file: applying adapters must leave it as it is."""
    return tiny_family()


def drawn(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def metadata(family, **settings):
    chosen = TrainSettings(**{"class_noun": "dog", **settings})
    return describe_run(family, "student", affecting_result(chosen), "distil", 3)


def make_adapter(family, seed=0, scale=0.1, **settings):
    """Random differences of all keys and values, and random rows."""
    weights = family.student.unet.state_dict()
    deltas = {o: drawn(*weights[d].shape, seed=seed + i, scale=scale) for i, (o, d) in enumerate(KV.items())}
    rows = drawn(settings.get("vectors", 1), 32, seed=seed + 99)
    return Adapter(token_embeddings=rows, deltas=deltas, metadata=metadata(family, **settings))


def weights_of(unet):
    return {n: p.detach().clone() for n, p in unet.named_parameters()}


def picture(family, adapters=(), strengths=(), prompt=PLAIN):
    with personalised(family, adapters, strengths) as model:
        return sample(model, [prompt], seed=5)


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


# What the reader refuses


def spoilt(family, path, change):
    """A good file's tensors and metadata, spoilt by `change` and written with safetensors' own writer."""
    adapter = make_adapter(family)
    tensors = {f"diffusion_model.{n.removesuffix('.weight')}.diff": d for n, d in adapter.deltas.items()}
    tensors["clip_h"] = adapter.token_embeddings
    facts = dict(adapter.metadata)
    change(tensors, facts)
    save_file(tensors, path, facts)
    return path


KEY = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k"


def put(name, tensor):
    return lambda tensors, facts: tensors.update({name: tensor})


def drop(name):
    return lambda tensors, facts: (tensors.pop(name, None), facts.pop(name, None))


def say(name, text):
    return lambda tensors, facts: facts.update({name: text})


def pair(*names, shapes=((64, 4), (4, 32))):
    def change(tensors, facts):
        del tensors[f"{KEY}.diff"]
        for name, shape in zip(names, shapes, strict=False):
            tensors[f"{KEY}.{name}.weight"] = torch.zeros(shape)

    return change


def nan(tensors, facts):
    tensors[f"{KEY}.diff"][3, 5] = float("nan")


def infinite(tensors, facts):
    tensors["clip_h"] = tensors["clip_h"].half()
    tensors["clip_h"][0, 0] = float("inf")


REFUSED = {
    "other format": (say("format", "kohya"), "no EchoDistill adapter"),
    "no metadata": (lambda tensors, facts: facts.clear(), "no EchoDistill adapter"),
    "other version": (say("format_version", "2"), "format version '2'; this program reads version 1"),
    "no placeholder": (drop("placeholder"), "lacks the metadata placeholder"),
    "no fingerprint": (drop("base_fingerprint"), "lacks the metadata base_fingerprint"),
    "no role": (drop("role"), "lacks the metadata role"),
    "unknown role": (say("role", "critic"), "'critic'; expected student or teacher"),
    "unknown name": (put("diffusion_model.middle_block.1.alpha", torch.zeros(1)), "middle_block.1.alpha"),
    "foreign name": (put("text_model.weight", torch.zeros(1)), "text_model.weight"),
    "integers": (put(f"{KEY}.diff", torch.zeros(64, 32, dtype=torch.int32)), f"{KEY}.diff is of type I32"),
    "doubles": (put("clip_h", torch.zeros(1, 32, dtype=torch.float64)), "clip_h is of type F64"),
    "NaN": (nan, f"{KEY}.diff"),
    "infinity": (infinite, "clip_h"),
    "flat token": (put("clip_h", torch.zeros(32)), "clip_h has shape (32,); expected (1, text width)"),
    "too many rows": (put("clip_h", torch.zeros(2, 32)), "clip_h has shape (2, 32); expected (1, text width)"),
    "no token": (drop("clip_h"), "0 token tensors"),
    "two tokens": (put("clip_l", torch.zeros(1, 32)), "2 token tensors"),
    "up alone": (pair("lora_up"), "to_k has no matching pair"),
    "down alone": (pair("lora_down", shapes=((4, 32),)), "to_k.lora_down.weight has no lora_up"),
    "unequal ranks": (pair("lora_up", "lora_down", shapes=((64, 4), (3, 32))), "to_k has no matching pair"),
    "changed twice": (
        lambda t, f: t.update(
            {f"{KEY}.lora_up.weight": torch.zeros(64, 4), f"{KEY}.lora_down.weight": torch.ones(4, 32)}
        ),
        "attn2.to_k.weight twice",
    ),
}


def check_refusal(path, reason):
    with pytest.raises(InputError) as caught:
        read_adapter(path)
    message = str(caught.value)
    assert str(path) in message
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize("case", REFUSED)
def test_reader_names_the_file_and_the_flaw(family, tmp_path, case):
    change, reason = REFUSED[case]
    check_refusal(spoilt(family, tmp_path / "bad.safetensors", change), reason)


def test_the_file_that_the_refusals_spoil_is_good(family, tmp_path):
    path = spoilt(family, tmp_path / "good.safetensors", lambda tensors, facts: None)
    assert set(read_adapter(path).deltas) == set(KV)


def test_reader_refuses_a_missing_file_and_a_folder(tmp_path):
    check_refusal(tmp_path / "none.safetensors", "does not exist")
    check_refusal(tmp_path, "expected a .safetensors file")


def test_reader_refuses_a_truncated_file_at_every_kind_of_place(family, tmp_path):
    whole = spoilt(family, tmp_path / "a.safetensors", lambda tensors, facts: None).read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    for length in (0, 5, 8, 8 + header // 2, 8 + header, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        check_refusal(tmp_path / "cut.safetensors", "expected")


def test_reader_refuses_headers_that_lie(family, tmp_path):
    entry = {"dtype": "F32", "shape": [1, 32], "data_offsets": [0, 128]}
    facts = metadata(family)
    attacks = {
        "overlap": json.dumps({"__metadata__": facts, "clip_h": entry, f"{KEY}.diff": entry}),
        "hole": json.dumps({"__metadata__": facts, "clip_h": {**entry, "data_offsets": [4, 132]}}),
        "offset": json.dumps({"__metadata__": facts, "clip_h": {**entry, "data_offsets": [0, 2**40]}}),
        "twice": '{"__metadata__": %s, "clip_h": %s, "clip_h": %s}' % ((json.dumps(facts),) + (json.dumps(entry),) * 2),
        "deep": '{"a":' * 5000 + "1" + "}" * 5000,
    }
    for name, header in attacks.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(132))
        check_refusal(path, "expected")
    path = tmp_path / "long.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    check_refusal(path, "expected")


# On a model


def test_on_a_model_it_is_base_plus_difference(family):
    adapter = make_adapter(family)
    by_hand = copy.deepcopy(family.student.unet)
    for original, name in KV.items():
        by_hand.get_parameter(name).data += adapter.deltas[original]
    z, t, text = drawn(2, 4, 8, 8), torch.tensor([999, 500]), drawn(2, 77, 32)
    before = family.student.predict(z, t, text)
    with personalised(family, [adapter]) as model:
        assert model.denoiser is family.student
        result = model.denoiser.predict(z, t, text)
        for name, value in by_hand.named_parameters():
            assert torch.equal(model.denoiser.unet.get_parameter(name), value), name
    with torch.no_grad():
        expected = by_hand(z, t, encoder_hidden_states=text).sample
    assert torch.equal(result, expected)
    assert not torch.allclose(before, expected)


def test_afterwards_every_parameter_is_the_very_one_it_was(family):
    unet, text = family.student.unet, family.text.model
    objects = {n: p for m in (unet, text) for n, p in m.named_parameters()}
    bits = {n: p.detach().clone() for n, p in objects.items()}
    with personalised(family, [make_adapter(family)]):
        assert unet.get_parameter(KV[next(iter(KV))]) is not objects[KV[next(iter(KV))]]
    with pytest.raises(ZeroDivisionError), personalised(family, [make_adapter(family)]):
        raise ZeroDivisionError
    for m in (unet, text):
        for n, p in m.named_parameters():
            assert p is objects[n], n
            assert torch.equal(p, bits[n]), n
    assert family.text.placeholders == {}


def test_an_adapter_that_fits_halfway_leaves_the_model_alone(family):
    good, bad = make_adapter(family), make_adapter(family, seed=7, placeholder="<other>")
    last = list(KV)[-1]
    bad.deltas[last] = torch.zeros(3, 3)
    before = dict(family.student.unet.named_parameters())
    with pytest.raises(InputError, match=re.escape(KV[last])), personalised(family, [good, bad]):
        pass
    assert all(p is before[n] for n, p in family.student.unet.named_parameters())


def test_strength_0_is_the_base_model_exactly(family):
    adapter = make_adapter(family)
    assert torch.equal(picture(family, [adapter], [0.0]), picture(family))
    assert not torch.equal(picture(family, [adapter], [1.0]), picture(family))


@pytest.mark.parametrize("noun", ["dog", "coffee mug"])
def test_strength_0_reads_the_placeholder_as_the_mean_of_the_noun(family, noun):
    adapter = make_adapter(family, class_noun=noun, vectors=2)
    ids = family.text.tokenizer(noun, add_special_tokens=False).input_ids
    assert len(ids) == len(noun.split())
    mean = torch.stack([family.text.table[i] for i in ids]).sum(0) / len(ids)
    untrained = replace(adapter, token_embeddings=torch.stack([mean, mean]), deltas={})
    with personalised(family, [untrained]) as model:
        expected = sample(model, [NAMED], seed=5)
    assert torch.equal(picture(family, [adapter], [0.0], NAMED), expected)
    assert not torch.equal(picture(family, [adapter], [1.0], NAMED), expected)


@pytest.mark.parametrize("strength", [0.5, 0.25, 1.5, -1.0])
def test_strength_is_linear_in_weights_and_rows(family, strength):
    adapter = make_adapter(family)
    base = weights_of(family.student.unet)
    mean = family.text.table[family.text.tokenizer("dog", add_special_tokens=False).input_ids].mean(0)
    with personalised(family, [adapter], [strength]) as model:
        for original, name in KV.items():
            expected = base[name].double() + strength * adapter.deltas[original].double()
            torch.testing.assert_close(model.denoiser.unet.get_parameter(name).double(), expected, rtol=0, atol=1e-6)
        expected = mean.double() + strength * (adapter.token_embeddings[0].double() - mean.double())
        torch.testing.assert_close(model.token_embeddings[0].double(), expected, rtol=0, atol=1e-6)


def test_two_adapters_add_up_and_both_words_are_read(family):
    a = make_adapter(family, vectors=2)
    b = make_adapter(family, seed=50, placeholder="<cat-toy>", class_noun="cat")
    base = weights_of(family.student.unet)
    with personalised(family, [a, b], [1.0, 0.5]) as model:
        for original, name in KV.items():
            expected = base[name] + a.deltas[original] + 0.5 * b.deltas[original]
            torch.testing.assert_close(model.denoiser.unet.get_parameter(name), expected)
        text = model.text(["<new1> dog beside a <cat-toy> cat"])
        ids = model.encoder.tokenize(["<new1> dog beside a <cat-toy> cat"])[0].tolist()
        assert model.placeholders == {"<new1>": "dog", "<cat-toy>": "cat"}
    # By hand: embeddings looked up one by one, three rows standing where the words are.
    cat = family.text.table[family.text.tokenizer("cat", add_special_tokens=False).input_ids].mean(0)
    rows = [a.token_embeddings[0], a.token_embeddings[1], cat + 0.5 * (b.token_embeddings[0] - cat)]
    assert [i - 49408 for i in ids if i >= 49408] == [0, 1, 2]
    embedded = torch.stack([rows[i - 49408] if i >= 49408 else family.text.table[i] for i in ids])
    copied = copy.deepcopy(family.text.model)
    copied.get_input_embeddings().weight.data[: len(ids)] = embedded
    torch.testing.assert_close(text[0], copied(torch.arange(len(ids))[None]).last_hidden_state[0])


def test_adapters_of_one_placeholder_are_refused(family):
    two = [make_adapter(family), make_adapter(family, seed=1)]
    with pytest.raises(InputError, match="two adapters share the placeholder <new1>"), personalised(family, two):
        pass


def test_a_low_rank_adapter_adds_the_product(family):
    name = "output_blocks.5.1.transformer_blocks.0.attn1.to_out.0.weight"
    here = "up_blocks.2.attentions.1.transformer_blocks.0.attn1.to_out.0.weight"
    up, down = drawn(32, 4), drawn(4, 32, seed=1)
    adapter = replace(make_adapter(family), deltas={}, factors={name: (up, down)})
    base = weights_of(family.student.unet)
    with personalised(family, [adapter], [0.5]) as model:
        after = weights_of(model.denoiser.unet)
    torch.testing.assert_close(after[here], base[here] + 0.5 * up @ down)
    assert all(torch.equal(after[n], base[n]) for n in base if n != here)


def test_a_full_adapter_changes_convolutions_and_biases(train_tiny, tiny_family, tmp_path):
    run = train_tiny(tmp_path / "run", iterations=1, trainable="full+token", student_lr=1e-3)
    adapter = read_adapter(run.path("distil", "student.safetensors"))
    fresh = tiny_family()
    base = weights_of(fresh.student.unet)
    assert len(adapter.deltas) == len(base)
    with personalised(fresh, [adapter]) as model:
        after = weights_of(model.denoiser.unet)
    moved = {n for n in base if not torch.equal(base[n], after[n])}
    assert {"conv_in.weight", "conv_in.bias", "mid_block.resnets.0.norm1.weight"} <= moved
    torch.testing.assert_close(after["conv_in.bias"], base["conv_in.bias"] + adapter.deltas["input_blocks.0.0.bias"])


def test_a_run_of_low_rank_updates_gives_the_weights_it_trained(train_tiny, tiny_family, tmp_path):
    fresh, trained = tiny_family(), {}

    def listen(event):
        if type(event).__name__ == "StepDone":
            queries = {n: m for n, m in fresh.student.unet.named_modules() if n.endswith("attn1.to_q")}
            trained.update({f"{n}.weight": m.weight.detach().clone() for n, m in queries.items()})

    run = train_tiny(
        tmp_path / "run", fresh, listen, iterations=2, trainable="lora+token", lora_rank=3, student_lr=0.01
    )
    adapter = read_adapter(run.path("distil", "student.safetensors"))
    assert not adapter.deltas
    assert {up.shape[1] for up, _ in adapter.factors.values()} == {3}
    assert len(trained) == len(KV) / 2
    base = weights_of(tiny_family().student.unet)
    with personalised(tiny_family(), [adapter]) as model:
        for name, weight in trained.items():
            torch.testing.assert_close(model.denoiser.unet.get_parameter(name), weight)
            assert not torch.equal(weight, base[name])


# Fit with the base model


def refuse(family, adapter, reason, **options):
    with pytest.raises(InputError, match=re.escape(reason)) as caught, personalised(family, [adapter], **options):
        pass
    assert adapter.origin in str(caught.value)


def test_another_checkpoint_is_refused_unless_allowed(family):
    facts = {**metadata(family), "base_fingerprint": "0123456789abcdef", "base_model": "sd_turbo.safetensors"}
    adapter = replace(make_adapter(family), metadata=facts, origin="mine.safetensors")
    refuse(family, adapter, "trained on another base model (sd_turbo.safetensors, fingerprint 0123456789abcdef)")
    expected = picture(family, [make_adapter(family)])
    with personalised(family, [adapter], any_base=True) as model:
        assert torch.equal(sample(model, [PLAIN], seed=5), expected)


def test_another_text_encoder_is_refused_unless_allowed(family):
    facts = {**metadata(family), "text_fingerprint": "0123456789abcdef"}
    adapter = replace(make_adapter(family), metadata=facts)
    refuse(family, adapter, "than this text encoder")
    with personalised(family, [adapter], any_base=True):
        pass


def test_a_retrained_base_has_another_fingerprint(family, tiny_family):
    other = tiny_family()
    changed = UNet2DConditionModel.from_config(other.student.unet.config)
    from echodistill_core.models.fingerprint import unet_fingerprint

    other = replace(
        other, student=replace(other.student, unet=changed, fingerprint=unet_fingerprint(changed.state_dict()))
    )
    refuse(other, make_adapter(family), "trained on another base model")


def test_another_text_width_is_refused_even_if_any_base_is_allowed(family):
    adapter = replace(make_adapter(family), token_embeddings=torch.zeros(1, 1024))
    refuse(family, adapter, "token rows 1024 wide, but this model reads text 32 wide", any_base=True)


def test_another_role_is_refused(family):
    refuse(family, make_adapter(family), "belongs to the student, but the teacher is to use it", role="teacher")


def test_shapes_that_do_not_fit_are_refused(family):
    adapter = make_adapter(family)
    adapter.deltas["middle_block.1.transformer_blocks.0.attn2.to_k.weight"] = torch.zeros(1280, 1024)
    refuse(family, adapter, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight has shape (1280, 1024)")


def test_weights_that_this_model_has_not_are_refused(family):
    adapter = make_adapter(family)
    adapter.deltas["input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight"] = torch.zeros(64, 32)
    refuse(family, adapter, "1 tensors without a place in this model, the first is input_blocks.8.1")


def test_a_teacher_that_is_not_loaded_cannot_wear_an_adapter(tiny_family):
    with pytest.raises(InputError, match="the teacher was asked for but not loaded"):
        personalised(tiny_family(teacher=None), role="teacher").__enter__()


def test_strengths_have_to_match_adapters(family):
    with pytest.raises(InputError, match="2 strengths were given for 1 adapters"):
        personalised(family, [make_adapter(family)], [1.0, 0.5]).__enter__()


def test_what_a_file_says_is_cut_and_escaped_in_messages_and_facts(tmp_path, train_tiny, capsys):
    """A megabyte in a metadata value gave a message of a megabyte, and an escape sequence reached the terminal."""
    from echodistill_core.cli import main

    path = train_tiny(tmp_path / "run", iterations=1).path("distil", "student.safetensors")
    tensors, facts = load_file(path), read_adapter(path).metadata
    flood = "\x1b[2J\r\n" + "x" * 1_000_000
    for changes in (
        {"format_version": flood},
        {"role": flood},
        {"placeholder": flood},
        {"class_noun": flood},
        {"vectors": flood},
    ):
        save_file(tensors, tmp_path / "odd.safetensors", {**facts, **changes})
        with pytest.raises(InputError) as error:
            read_adapter(tmp_path / "odd.safetensors")
        assert len(str(error.value)) < 600
        assert str(error.value).isprintable()
    save_file({**tensors, flood: tensors["clip_h"].clone()}, tmp_path / "odd.safetensors", facts)
    with pytest.raises(InputError) as error:
        read_adapter(tmp_path / "odd.safetensors")
    assert len(str(error.value)) < 600
    assert str(error.value).isprintable()
    save_file(tensors, tmp_path / "odd.safetensors", {**facts, "base_model": flood, "remark": flood, flood[:9000]: "1"})
    assert main(["info", str(tmp_path / "odd.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert len(printed) < 8000
    assert printed.replace("\n", "").isprintable()
