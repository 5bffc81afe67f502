"""Tokens and placeholders, against OpenCLIP's tokenizer."""

import re
import warnings

import open_clip
import pytest
import torch
from text_encoders import (
    COMMA,
    DOG,
    END,
    LENGTH,
    OF,
    PHOTO,
    PROMPTS,
    STOP,
    VOCABULARY,
    A,
    padded,
    published_folder,
    tiny_model,
)

from echodistill_core.errors import InputError
from echodistill_core.models.text import (
    TextEncoder,
    check_class_noun,
    check_placeholder,
    check_prompt,
    clip_tokenizer,
    load_tokenizer,
)

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
    with pytest.raises(InputError, match=r"placeholder <new1>.*\"photo of a <new1> dog\""):
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
        with pytest.raises(InputError, match=rf"{words + 2} tokens .* first 75"):
            text.tokenize(["a dog", "dog " * words + "<new1>"])


def test_the_words_that_are_cut_are_named(encoder):
    """The named words are those whose removal leaves the features unchanged."""
    text = encoder.with_placeholders({"<new1>": 2})
    # 2 rows and 73 words are 75 tokens; the next ones are lost.
    prompt = "<new1> " + "very " * 73 + "wooden boat"
    assert torch.equal(text.tokenize([prompt]), text.tokenize([prompt.replace("boat", "ship")]))
    with pytest.warns(UserWarning, match=r"75 tokens .*'wooden boat' at its end"):
        text.warn_truncated([prompt, prompt])


@pytest.mark.parametrize("prompt", [",".join(f"word{i}" for i in range(60)), "写真" * 60, "🐕" * 80, "a," * 70])
def test_what_is_lost_without_spaces_is_named_and_no_more(encoder, prompt):
    """What is named is the end behind the longest beginning that fits."""
    with pytest.warns(UserWarning, match="at its end has no effect") as caught:
        encoder.warn_truncated([prompt])
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
    with pytest.raises(InputError, match="is not valid UTF-8"):
        check_class_noun(text, "<new1>")
    with pytest.raises(InputError, match="is not valid UTF-8"):
        check_prompt(text, {"<new1>": "dog"})


@pytest.mark.parametrize("placeholder", ["<new1>\u200b", "new\u00ad1", "\u202enew1"])
def test_invisible_characters_in_a_placeholder_are_refused(placeholder):
    with pytest.raises(InputError, match="invisible characters"):
        check_placeholder(clip_tokenizer(False), placeholder)


def test_a_prompt_that_just_fits_is_read_without_a_warning(encoder):
    text, longest = encoder.with_placeholders({"<new1>": 2}), "<new1> " + "very " * 72 + "wooden"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.warn_truncated([longest, "", "a <new1> dog"])
    assert int(text.tokenize([longest])[0, -1]) == encoder.tokenizer.eos_token_id  # 77 tokens, none cut off
    assert int(text.tokenize([longest])[0, -2]) == int(encoder.tokenize(["wooden"])[0, 1])
