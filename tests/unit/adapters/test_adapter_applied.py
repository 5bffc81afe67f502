"""Adapters on a model, against base plus difference; and adapters that do not fit it."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from adapters_by_hand import KV, NAMED, PLAIN, drawn, make_adapter, metadata, picture, weights_of
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from echodistill_core.adapter.apply import personalised
from echodistill_core.adapter.file import read_adapter
from echodistill_core.errors import InputError
from echodistill_core.models.conditioning import TextConditioning
from echodistill_core.sampling import sample

# On a model


def test_on_a_model_it_is_base_plus_difference(family):
    adapter = make_adapter(family)
    by_hand = copy.deepcopy(family.student.unet)
    for original, name in KV.items():
        by_hand.get_parameter(name).data += adapter.deltas[original]
    z, t, text = drawn(2, 4, 8, 8), torch.tensor([999, 500]), drawn(2, 77, 32)
    before = family.student.predict(z, t, TextConditioning(text))
    with personalised(family, [adapter]) as model:
        assert model.denoiser is family.student
        result = model.denoiser.predict(z, t, TextConditioning(text))
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
        text = model.condition(["<new1> dog beside a <cat-toy> cat"]).features
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
    with pytest.raises(InputError, match="<new1>"), personalised(family, two):
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
    refuse(family, adapter, "(sd_turbo.safetensors, fingerprint 0123456789abcdef)")
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
    refuse(other, make_adapter(family), "another base model")


def test_another_text_width_is_refused_even_if_any_base_is_allowed(family):
    adapter = replace(make_adapter(family), token_embeddings=torch.zeros(1, 1024))
    refuse(family, adapter, "width 1024", any_base=True)


def test_another_role_is_refused(family):
    refuse(family, make_adapter(family), "belongs to the student", role="teacher")


def test_shapes_that_do_not_fit_are_refused(family):
    adapter = make_adapter(family)
    adapter.deltas["middle_block.1.transformer_blocks.0.attn2.to_k.weight"] = torch.zeros(1280, 1024)
    refuse(family, adapter, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight has shape (1280, 1024)")


def test_weights_that_this_model_has_not_are_refused(family):
    adapter = make_adapter(family)
    adapter.deltas["input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight"] = torch.zeros(64, 32)
    refuse(family, adapter, "input_blocks.8.1")


def test_an_adapter_for_a_teacher_that_is_not_loaded_is_refused(tiny_family):
    with pytest.raises(InputError, match="teacher"):
        personalised(tiny_family(teacher=None), role="teacher").__enter__()


def test_strengths_have_to_match_adapters(family):
    with pytest.raises(InputError, match=r"2 strengths .*1 adapters"):
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
