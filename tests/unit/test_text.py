"""Prompts to tokens and features, against open_clip's tokenizer and a transformers encoder with an enlarged table."""

import copy
import json
import re
import time
import warnings

import open_clip
import pytest
import torch
from transformers import AddedToken, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from echodistill_core.errors import InputError
from echodistill_core.models.text import (
    TextEncoder,
    check_class_noun,
    check_placeholder,
    check_prompt,
    clip_tokenizer,
    load_tokenizer,
    with_added_tokens,
)

START, END, VOCABULARY, LENGTH = 49406, 49407, 49408, 77
# From CLIP's published vocabulary.
PHOTO, OF, A, DOG, COMMA, STOP = 1125, 539, 320, 1929, 267, 269

PROMPTS = [
    "",
    "a photo of a dog",
    "A DOG'S life: isn't it?!",
    "wow!",
    "!!! a ! b?! (really!)",
    "don't can't we've I'm you'll he'd",
    "café naïve Zürich, Ünïcode É",
    "e\u0301 combining accents",
    "Привет, мир",
    "日本語の写真",
    "مرحبا",
    "emoji 😀 dog 🏳️‍🌈",
    "  hello   world\n\ttabs ",
    "3.14 and 2,718 = 42%",
    "x-ray_vision/under\\slash #hashtag @name $5 ^_^",
    "(masterpiece:1.3), [blurry], {best|worst} <lora:x:1>",
    "photo of a <new1> dog",
    "½ ² ① straße İstanbul",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "a" * 300,
    "word " * 100,
]


def tiny_model(width=16, vocabulary=VOCABULARY):
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act="gelu",
        bos_token_id=START,
        eos_token_id=END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return CLIPTextModel(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(tiny_model(), clip_tokenizer(pad_with_end=False))


def rows(count, width=16):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(8))


def padded(*ids, pad=0):
    return [START, *ids, END, *[pad] * (LENGTH - 2 - len(ids))]


# Tokens


def test_tokens_equal_open_clips(encoder):
    expected = open_clip.get_tokenizer("ViT-H-14")(PROMPTS)
    found = encoder.tokenize(PROMPTS)
    assert found.dtype == torch.long
    for prompt, a, b in zip(PROMPTS, found.tolist(), expected.tolist(), strict=True):
        assert a == b, prompt


def test_padding_is_the_end_token_for_sd1_and_zero_for_sd2():
    for pad_with_end, pad in ((True, END), (False, 0)):
        tokenizer = clip_tokenizer(pad_with_end)
        assert tokenizer.pad_token_id == pad
        assert tokenizer.model_max_length == LENGTH
        text = TextEncoder(tiny_model(), tokenizer)
        assert text.tokenize(["a dog"]).tolist() == [padded(A, DOG, pad=pad)]


def test_words_are_the_same_whatever_pads():
    sd1, sd2 = clip_tokenizer(True), clip_tokenizer(False)
    for prompt in PROMPTS:
        assert sd1(prompt, add_special_tokens=False).input_ids == sd2(prompt, add_special_tokens=False).input_ids


def published_folder(folder, pad):
    """A tokenizer folder as the checkpoints of 2022 have it: vocabulary and merges, and the special tokens apart."""
    source = clip_tokenizer(True)
    model = json.loads(source.backend_tokenizer.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")

    def added(content):
        return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

    ends = {"bos_token": added("<|startoftext|>"), "eos_token": added("<|endoftext|>")}
    ends["unk_token"] = added("<|endoftext|>")
    (folder / "special_tokens_map.json").write_text(json.dumps({**ends, "pad_token": pad}))
    config = {"do_lower_case": True, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("pad", "pad_id"), [("!", 0), ("<|endoftext|>", END)])
def test_a_published_tokenizer_folder_gives_open_clips_words_and_its_own_padding(tmp_path, pad, pad_id):
    tokenizer = load_tokenizer(published_folder(tmp_path / "tokenizer", pad))
    assert tokenizer.pad_token_id == pad_id
    found = TextEncoder(tiny_model(), tokenizer).tokenize(PROMPTS)
    expected = open_clip.get_tokenizer("ViT-H-14")(PROMPTS)
    ended = (expected == END).cumsum(1) > 0
    after = ended & (expected != END)
    assert torch.equal(found, torch.where(after, torch.full_like(expected, pad_id), expected))


@pytest.mark.parametrize("pad_with_end", [True, False])
def test_a_saved_tokenizer_is_read_back(tmp_path, pad_with_end):
    clip_tokenizer(pad_with_end).save_pretrained(tmp_path)
    read = load_tokenizer(tmp_path)
    assert read.pad_token_id == (END if pad_with_end else 0)
    assert read("wow! a dog", add_special_tokens=False).input_ids[1:] == [256, A, DOG]


def test_a_tokenizer_with_words_of_its_own_keeps_them(tmp_path):
    grown = clip_tokenizer(True)
    grown.add_tokens(["<sks>"])
    grown.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("a <sks>", add_special_tokens=False).input_ids == [A, VOCABULARY]


def test_a_tokenizer_folder_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "vocab.json").write_text("{")
    (tmp_path / "broken" / "merges.txt").write_text("{")
    for name in ("empty", "broken", "absent"):
        with pytest.raises(InputError, match=rf"{name} holds .*download"):
            load_tokenizer(tmp_path / name)


# Placeholders


def test_a_placeholder_becomes_its_rows_numbered_in_order_of_declaration(encoder):
    text = encoder.with_placeholders({"<new1>": 3, "<other>": 2})
    ids = text.tokenize(["photo of a <new1> dog", "<other> <new1>", "a dog"]).tolist()
    first, second = [49408, 49409, 49410], [49411, 49412]
    assert ids == [padded(PHOTO, OF, A, *first, DOG), padded(*second, *first), padded(A, DOG)]


AROUND = [
    ("a {} dog", [A], [DOG]),
    ("{}, dog", [], [COMMA, DOG]),
    ("dog,{}", [DOG, COMMA], []),
    ("a {}.", [A], [STOP]),
    ("({})", [263], [264]),
    ("{}'s dog", [], [568, DOG]),
    ("{}", [], []),
    ("  {}  dog", [], [DOG]),
]


@pytest.mark.parametrize("word", ["<new1>", "zxq1", "V*"])
def test_punctuation_around_a_placeholder_is_left_alone(encoder, word):
    text = encoder.with_placeholders({word: 2})
    for prompt, before, after in AROUND:
        found = text.tokenize([prompt.format(word)]).tolist()
        assert found == [padded(*before, 49408, 49409, *after)], prompt


def test_a_placeholder_of_letters_is_not_found_inside_a_longer_word(encoder):
    text = encoder.with_placeholders({"zxq1": 1})
    for prompt in ("xzxq1y", "zxq12", "azxq1", "zxq1zxq1"):
        assert text.tokenize([prompt]).tolist() == encoder.tokenize([prompt]).tolist()
    assert text.tokenize(["zxq1 zxq12"])[0, 1] == VOCABULARY


def test_a_bracketed_placeholder_may_touch_its_neighbours(encoder):
    text = encoder.with_placeholders({"<new1>": 1})
    assert text.tokenize(["a<new1>dog<new1>"]).tolist() == [padded(A, 49408, DOG, 49408)]


@pytest.mark.parametrize("prompt", ["a <new1> dog", "<NEW1> dog", "dog<new1>", "<new1>"])
def test_prompts_with_the_placeholder_pass(prompt):
    check_prompt(prompt, {"<new1>": "dog"})


@pytest.mark.parametrize("prompt", ["a dog", "", "a new1 dog", "a <new2> dog"])
def test_prompts_without_it_are_refused_with_an_example(prompt):
    with pytest.raises(InputError, match=r"does not contain the placeholder <new1>.*\"photo of a <new1> dog\""):
        check_prompt(prompt, {"<new1>": "dog"})


def test_one_of_several_placeholders_is_enough_and_none_is_asked_for_without_adapters():
    check_prompt("a <cat1> cat", {"<new1>": "dog", "<cat1>": "cat"})
    check_prompt("a dog", {})


@pytest.mark.parametrize(
    ("placeholder", "prompt", "is_read"),
    [
        ("fidozq", "a fidozqdog", False),
        ("fidozq", "a prefidozq dog", False),
        ("fidozq", "a fidozq's bowl, FIDOZQ dog", True),
        ("newzq1", "renewzq1 the dog", False),
        ("caf\u00e9zq", "a cafe\u0301zq dog", True),
        ("cafe\u0301zq", "a caf\u00e9zq dog", True),
        ("<caf\u00e9>", "a <cafe\u0301> dog", True),
        ("<new1>", "a <new12> dog", False),
        ("ha\u0308schen", "x\u00e4schenxha\u0308schenx", False),
    ],
)
def test_a_prompt_is_checked_by_what_the_encoder_reads(encoder, placeholder, prompt, is_read):
    """Letters alone do not tell: the row must be among the ids that the network is given."""
    text = encoder.with_placeholders({placeholder: 1})
    assert bool((text.tokenize([prompt]) >= 49408).any()) == is_read
    if is_read:
        check_prompt(prompt, {placeholder: "dog"})
    else:
        with pytest.raises(InputError, match="does not contain the placeholder"):
            check_prompt(prompt, {placeholder: "dog"})


@pytest.mark.parametrize("other", ["<NEW1>", "caf\u00e9zq"])
def test_two_forms_of_one_placeholder_are_one_word(encoder, other):
    first = {"<NEW1>": "<new1>", "caf\u00e9zq": "cafe\u0301zq"}[other]
    with pytest.raises(InputError, match="already a word"):
        encoder.with_placeholders({first: 1, other: 1})


def test_placeholders_leave_other_prompts_and_the_first_encoder_alone(encoder):
    before = encoder.tokenize(["photo of a <new1> dog"])
    text = encoder.with_placeholders({"<new1>": 1})
    assert torch.equal(encoder.tokenize(["photo of a <new1> dog"]), before)
    assert int(before.max()) < VOCABULARY
    assert encoder.placeholders == {}
    assert text.model is encoder.model
    others = [p for p in PROMPTS if "<new1>" not in p]
    assert torch.equal(text.tokenize(others), encoder.tokenize(others))
    assert torch.equal(text(others[:3]), encoder(others[:3]))


@pytest.mark.parametrize("word", ["dog", "Dog", "!", "sks", "cafe"])
def test_a_word_of_the_vocabulary_is_refused(encoder, word):
    with pytest.raises(InputError, match="already a word of the vocabulary"):
        encoder.with_placeholders({word: 1})


def test_another_set_of_placeholders_replaces_the_first(encoder):
    text = encoder.with_placeholders({"<new1>": 1, "<old>": 1}).with_placeholders({"<other>": 2, "<new1>": 1})
    prompts = ["<other> <new1>", "a <old> dog"]
    assert text.tokenize(prompts).tolist() == [padded(49408, 49409, 49410), *encoder.tokenize(prompts[1:]).tolist()]


@pytest.mark.parametrize(
    "word", ["", "<|endoftext|>", "my dog", "a,b", "(x1)", "a:b", "a|b", "a/b", "a\\b", '"x1"', "x1'", "a\tb", "x\n"]
)
def test_prompt_syntax_in_a_placeholder_is_refused(word):
    with pytest.raises(InputError, match="cannot be a word of a prompt"):
        check_placeholder(clip_tokenizer(False), word)


def test_a_prompt_is_cut_at_77_tokens_but_never_through_a_placeholder(encoder):
    text = encoder.with_placeholders({"<new1>": 2})
    fits = "dog " * 73 + "<new1>"
    assert text.tokenize([fits]).tolist() == [padded(*[DOG] * 73, 49408, 49409)]
    late = "<new1> " + "dog " * 200
    assert text.tokenize([late]).tolist() == [padded(49408, 49409, *[DOG] * 73)]
    for words in (74, 75, 100):
        with pytest.raises(InputError, match=rf"{words + 2} tokens .* within the first 75"):
            text.tokenize(["a dog", "dog " * words + "<new1>"])


def test_the_words_that_are_cut_are_named(encoder):
    """What is lost is what two prompts of equal features differ by."""
    text = encoder.with_placeholders({"<new1>": 2})
    # 2 rows and 73 words are 75 tokens; the next ones are lost.
    prompt = "<new1> " + "very " * 73 + "wooden boat"
    assert torch.equal(text.tokenize([prompt]), text.tokenize([prompt.replace("boat", "ship")]))
    with pytest.warns(UserWarning, match=r"more than the 75 tokens .* 'wooden boat' at its end has no effect"):
        text.warn_of_unread([prompt, prompt])


@pytest.mark.parametrize("prompt", [",".join(f"word{i}" for i in range(60)), "写真" * 60, "🐕" * 80, "a," * 70])
def test_what_is_lost_without_spaces_is_named_and_no_more(encoder, prompt):
    """What is named is the end behind the longest beginning that fits."""
    with pytest.warns(UserWarning, match="at its end has no effect") as caught:
        encoder.warn_of_unread([prompt])
    named = re.search(r"reads: '(.*)' at its end", str(caught[0].message))[1]
    fits = max(
        n for n in range(len(prompt)) if len(encoder.tokenizer(prompt[:n], add_special_tokens=False).input_ids) <= 75
    )
    assert 0 < fits < len(prompt)
    start, *end = named.split("...")
    assert prompt[fits:].strip().startswith(start)
    assert prompt.endswith(end[-1] if end else start)


@pytest.mark.parametrize("noun", ["my <new1> dog", "<NEW1>", "a dog<new1>"])
def test_a_class_noun_with_the_placeholder_in_it_is_refused(noun):
    with pytest.raises(InputError, match="holds the placeholder <new1>"):
        check_class_noun(noun, "<new1>")
    check_class_noun("fidozqdog", "fidozq")


@pytest.mark.parametrize("text", ["a \udcff dog", "\udc80"])
def test_bytes_that_are_no_text_are_refused(text):
    with pytest.raises(InputError, match="no UTF-8 text"):
        check_class_noun(text, "<new1>")
    with pytest.raises(InputError, match="no UTF-8 text"):
        check_prompt(text, {"<new1>": "dog"})


@pytest.mark.parametrize("placeholder", ["<new1>\u200b", "new\u00ad1", "\u202enew1"])
def test_invisible_characters_in_a_placeholder_are_refused(placeholder):
    with pytest.raises(InputError, match="invisible characters"):
        check_placeholder(clip_tokenizer(False), placeholder)


def test_a_prompt_that_just_fits_is_read_without_a_warning(encoder):
    text = encoder.with_placeholders({"<new1>": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.warn_of_unread(["<new1> " + "very " * 72 + "wooden", "", "a <new1> dog"])


# Features


def by_hand(model, learned, ids):
    """Features of a transformers encoder whose own table was enlarged by the learned rows."""
    grown = copy.deepcopy(model)
    with torch.no_grad():
        table = torch.cat([model.get_input_embeddings().weight, learned])
        grown.resize_token_embeddings(len(table), mean_resizing=False)
        grown.get_input_embeddings().weight.copy_(table)
    return grown(torch.tensor(ids)).last_hidden_state


def test_features_equal_an_encoder_whose_table_holds_the_rows(encoder):
    text = encoder.with_placeholders({"<new1>": 2, "<other>": 1})
    learned = rows(3)
    prompts = ["photo of a <new1> dog", "<other>, <new1>.", "a dog"]
    ids = [
        padded(PHOTO, OF, A, 49408, 49409, DOG),
        padded(49410, COMMA, 49408, 49409, STOP),
        padded(A, DOG),
    ]
    found = text(prompts, learned)
    assert found.shape == (3, LENGTH, 16)
    assert torch.allclose(found, by_hand(encoder.model, learned, ids), atol=1e-6, rtol=0)


def test_features_equal_transformers_own_without_placeholders(encoder):
    expected = encoder.model(open_clip.get_tokenizer("ViT-H-14")(PROMPTS)).last_hidden_state
    assert torch.equal(encoder(PROMPTS), expected)


def test_gradients_reach_the_rows_alone_and_equal_those_of_the_enlarged_table(encoder):
    model = copy.deepcopy(encoder.model)
    text = TextEncoder(model, encoder.tokenizer).with_placeholders({"<new1>": 2})
    before = {n: t.clone() for n, t in model.state_dict().items()}
    learned = rows(2).requires_grad_()
    weight = torch.randn(1, LENGTH, 16, generator=torch.Generator().manual_seed(1))
    (text(["a <new1> <new1> dog"], learned) * weight).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

    grown = copy.deepcopy(model)
    grown.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    table = grown.get_input_embeddings().weight
    with torch.no_grad():
        table.copy_(torch.cat([model.get_input_embeddings().weight, learned]))
    table.requires_grad_()
    ids = torch.tensor([padded(A, 49408, 49409, 49408, 49409, DOG)])
    (grown(ids).last_hidden_state * weight).sum().backward()
    assert learned.grad.abs().min() > 0
    assert torch.allclose(learned.grad, table.grad[VOCABULARY:], rtol=1e-4, atol=1e-6)


def test_no_hook_stays_behind_even_after_a_failure(encoder):
    text = encoder.with_placeholders({"<new1>": 1})
    plain = encoder(["a dog"])
    text(["a <new1> dog"], rows(1))
    with pytest.raises(InputError):
        text(["a <new1> dog", "dog " * 80 + "<new1>"], rows(1))
    assert not encoder.model.get_input_embeddings()._forward_hooks
    assert torch.equal(encoder(["a dog"]), plain)


def test_rows_are_read_in_the_tables_precision():
    model = tiny_model().to(torch.bfloat16)
    text = TextEncoder(model, clip_tokenizer(False)).with_placeholders({"<new1>": 1})
    learned = rows(1).requires_grad_()
    features = text(["a <new1>"], learned)
    assert features.dtype == torch.bfloat16
    assert torch.equal(features, by_hand(model, learned.detach().bfloat16(), [padded(A, 49408)]))
    features.float().sum().backward()
    assert learned.grad.dtype == torch.float32


def test_a_placeholder_without_rows_and_wrong_rows_are_refused(encoder):
    text = encoder.with_placeholders({"<new1>": 2})
    with pytest.raises(InputError, match="rows were not given"):
        text(["a <new1> dog"])
    for wrong in (rows(1), rows(3), rows(2, width=8)):
        with pytest.raises(InputError, match=r"expected \(2, 16\)"):
            text(["a <new1> dog"], wrong)
    assert torch.equal(text(["a dog"]), encoder(["a dog"]))


# The first rows


def test_noun_rows_are_the_mean_of_the_nouns_tokens(encoder):
    table = encoder.model.get_input_embeddings().weight
    assert torch.equal(encoder.noun_embeddings("dog", 1), table[DOG][None])
    assert torch.equal(encoder.noun_embeddings("Dog", 3), table[DOG].expand(3, -1))
    words = open_clip.get_tokenizer("ViT-H-14").encoder
    coffee, mug = words["coffee</w>"], words["mug</w>"]
    found = encoder.noun_embeddings("coffee mug", 2)
    assert torch.allclose(found, ((table[coffee] + table[mug]) / 2).expand(2, -1), atol=1e-7)
    odd = "zorbleflux thingamajig"
    tokens = [t for t in open_clip.get_tokenizer("ViT-H-14")([odd])[0].tolist() if t not in (0, START, END)]
    assert len(tokens) > 3
    assert torch.allclose(encoder.noun_embeddings(odd, 1)[0], sum(table[t] for t in tokens) / len(tokens), atol=1e-7)


def test_noun_rows_are_float32_and_apart_from_the_table():
    model = tiny_model().to(torch.bfloat16)
    text = TextEncoder(model, clip_tokenizer(False))
    before = text.table.clone()
    first = text.noun_embeddings("dog", 2)
    assert first.dtype == torch.float32
    first += 1
    assert torch.equal(text.table, before)


@pytest.mark.parametrize("noun", ["", "   "])
def test_an_empty_noun_is_refused(encoder, noun):
    with pytest.raises(InputError, match="class_noun is empty"):
        encoder.noun_embeddings(noun, 1)


def test_the_vocabulary_is_clips():
    tokenizer = clip_tokenizer(False)
    assert isinstance(tokenizer, CLIPTokenizer)
    assert len(tokenizer) == VOCABULARY
    words = {"photo</w>": PHOTO, "dog</w>": DOG, "!": 0, "<|startoftext|>": START, "<|endoftext|>": END}
    assert {w: tokenizer.get_vocab()[w] for w in words} == words


def taught_by_hand(folder, *words):
    """A tokenizer of its own vocabulary, to which the words are added."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    for word in words:
        tokenizer.add_tokens([AddedToken(word, normalized=True, single_word=word.isalnum())])
    return tokenizer


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_a_with_added_tokens_is_one_to_which_the_words_were_added_and_leaves_the_first_as_it_was(tmp_path, pad):
    folder = published_folder(tmp_path / "tokenizer", pad)
    plain = CLIPTokenizer.from_pretrained(folder)
    one = with_added_tokens(plain, ["<new1>"])
    two = with_added_tokens(one, ["qwvx"])
    prompts = [*PROMPTS, "a <new1>!, dog", "<new1><new1> qwvx", "qwvxs isn't qwvx", "é <NEW1>"]
    for found, words in ((plain, []), (one, ["<new1>"]), (two, ["<new1>", "qwvx"])):
        expected = taught_by_hand(folder, *words)
        assert len(found) == len(expected) == VOCABULARY + len(words)
        assert found.convert_tokens_to_ids(words) == expected.convert_tokens_to_ids(words)
        for prompt in prompts:
            for how in ({}, {"add_special_tokens": False}, {"padding": "max_length", "truncation": True}):
                assert found(prompt, **how).input_ids == expected(prompt, **how).input_ids, (prompt, how)


def test_teaching_does_not_copy_the_vocabulary():
    tokenizer = clip_tokenizer(False)
    # Copying 49152 words takes far longer than ten teachings do.
    began = time.perf_counter()
    copy.deepcopy(tokenizer)
    copying = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(10):
        with_added_tokens(tokenizer, ["<new1>"])
    assert time.perf_counter() - began < copying
