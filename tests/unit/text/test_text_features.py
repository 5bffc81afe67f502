"""Text features and initial embeddings, against an encoder with an enlarged table."""

import copy
import time

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
    START,
    STOP,
    VOCABULARY,
    A,
    padded,
    published_folder,
    rows,
    tiny_model,
)
from transformers import AddedToken, CLIPTokenizer

from echodistill_core.errors import InputError
from echodistill_core.models.text import (
    TextEncoder,
    clip_tokenizer,
    with_added_tokens,
)

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


def test_gradients_reach_only_the_rows_and_equal_those_of_the_enlarged_table(encoder):
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


def test_hooks_are_removed_even_after_a_failure(encoder):
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
    with pytest.raises(InputError, match="token embeddings were not given"):
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


def with_words_by_hand(folder, *words):
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
        expected = with_words_by_hand(folder, *words)
        assert len(found) == len(expected) == VOCABULARY + len(words)
        assert found.convert_tokens_to_ids(words) == expected.convert_tokens_to_ids(words)
        for prompt in prompts:
            for how in ({}, {"add_special_tokens": False}, {"padding": "max_length", "truncation": True}):
                assert found(prompt, **how).input_ids == expected(prompt, **how).input_ids, (prompt, how)


def test_adding_placeholders_does_not_copy_the_vocabulary():
    tokenizer = clip_tokenizer(False)
    # Copying 49152 words takes far longer than adding placeholders ten times.
    began = time.perf_counter()
    copy.deepcopy(tokenizer)
    copying = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(10):
        with_added_tokens(tokenizer, ["<new1>"])
    assert time.perf_counter() - began < copying
