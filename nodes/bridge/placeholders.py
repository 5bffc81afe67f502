"""Placeholder words in a CLIP: any stock node that encodes text then understands them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ...echodistill_core.concept.prompts import same_word
from ...echodistill_core.errors import InputError
from ...echodistill_core.models.text import mean_embeddings, with_added_tokens
from .weights import clip_name, embedding_table

WORDS = "echodistill_words"  # attribute of a tokenizer of ours: placeholder -> class noun
ROWS = "echodistill_rows"  # the same: token id -> embedding
IDS = "echodistill_ids"  # the same: placeholder -> token ids of its rows


def with_placeholder(clip: Any, placeholder: str, class_noun: str, token_embeddings: Tensor) -> Any:
    """A clone of the CLIP that reads `placeholder` as these embeddings (n, width); the given one stays as it is.

    ComfyUI lets a list of tokens hold embeddings in place of ids, so the word becomes ids past the vocabulary's end,
    and those become the rows. Weights such as (<new1>:1.3) and any punctuation around it then work as for other words.
    Raises InputError for a word that cannot be a placeholder, or is one already.
    """
    taught = clip.clone()
    name = clip_name(clip)
    outer = copy.copy(clip.tokenizer)
    inner = copy.copy(getattr(outer, name))
    words = known_placeholders(clip)
    if same_word(placeholder) in map(same_word, words):
        raise InputError(
            f"the placeholder {placeholder} is in use by another adapter on this CLIP; train one of the two with "
            "another placeholder."
        )
    tokenizer = with_added_tokens(getattr(inner.tokenizer, "tokenizer", inner.tokenizer), [placeholder])
    known: dict[int, Tensor] = dict(getattr(inner, ROWS, {}))
    # Ids of rows lie past those of every added word, of which there will never be so many.
    first = 1_000_000 + len(known)
    ids = list(range(first, first + len(token_embeddings)))
    expansions = dict(getattr(inner.tokenizer, "expansions", {}))
    expansions[tokenizer.convert_tokens_to_ids(placeholder)] = ids
    known.update(zip(ids, token_embeddings.detach().clone().cpu(), strict=True))
    inner.tokenizer = _Expanding(tokenizer, expansions)
    setattr(inner, ROWS, known)
    setattr(inner, WORDS, {**words, placeholder: class_noun})
    setattr(inner, IDS, {**getattr(inner, IDS, {}), placeholder: ids})
    inner.tokenize_with_weights = partial(_tokenize, inner)
    setattr(outer, name, inner)
    taught.tokenizer = outer
    return taught


def known_placeholders(clip: Any) -> Mapping[str, str]:
    """The placeholders that a CLIP was taught, with their class nouns."""
    tokenizer = clip.tokenizer
    words: Mapping[str, str] = getattr(getattr(tokenizer, getattr(tokenizer, "clip", ""), None), WORDS, {})
    return words


def placeholders_read(clip: Any, prompt: str) -> list[str]:
    """Those of a CLIP's placeholders that it reads in this prompt: their rows are among its tokens."""
    tokenizer = getattr(clip.tokenizer, clip_name(clip))
    embeddings: Mapping[int, Tensor] = getattr(tokenizer, ROWS, {})
    found = {id(token) for batch in tokenizer.tokenize_with_weights(prompt) for token, *_ in batch}
    ids_of: Mapping[str, Sequence[int]] = getattr(tokenizer, IDS, {})
    return [word for word in known_placeholders(clip) if any(id(embeddings[i]) in found for i in ids_of.get(word, ()))]


def noun_embeddings(clip: Any, class_noun: str, count: int) -> Tensor:
    """What the placeholder began as in training: the mean embedding of the class noun, (count, width), float32."""
    ids = getattr(clip.tokenizer, clip_name(clip)).tokenizer(class_noun)["input_ids"][1:-1]
    return mean_embeddings(embedding_table(clip), ids, count).cpu()


class _Expanding:
    """A tokenizer whose placeholders come out as one id for each of their rows, so that lengths are counted right."""

    def __init__(self, tokenizer: Any, expansions: dict[int, list[int]]) -> None:
        self.tokenizer = tokenizer
        self.expansions = expansions

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        found = self.tokenizer(text, **options)["input_ids"]
        return {"input_ids": [row for token in found for row in self.expansions.get(token, [token])]}

    def __getattr__(self, name: str) -> Any:
        if name == "tokenizer":  # not yet there while it is being copied
            raise AttributeError(name)
        return getattr(self.tokenizer, name)


def _tokenize(inner: Any, text: str, *arguments: Any, **options: Any) -> list[list[tuple[Any, ...]]]:
    """The tokenizer's own result with rows in place of their ids."""
    token_embeddings: dict[int, Tensor] = getattr(inner, ROWS)
    batches = type(inner).tokenize_with_weights(inner, text, *arguments, **options)
    return [[(_row(token, token_embeddings), *rest) for token, *rest in batch] for batch in batches]


def _row(token: Any, token_embeddings: Mapping[int, Tensor]) -> Any:
    # A textual inversion's embedding is a tensor already.
    return token if isinstance(token, Tensor) else token_embeddings.get(token, token)
