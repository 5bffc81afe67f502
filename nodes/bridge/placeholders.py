"""Adds placeholder words to a CLIP, for every stock node that encodes text."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ...echodistill_core.concept.prompts import normalised_placeholder
from ...echodistill_core.errors import InputError
from ...echodistill_core.models.text import mean_embeddings, with_added_tokens
from .weights import clip_name, embedding_table

WORDS = "echodistill_words"  # attribute of the extended tokenizer: placeholder -> class noun
ROWS = "echodistill_rows"  # attribute of the extended tokenizer: token id -> embedding
IDS = "echodistill_ids"  # attribute of the extended tokenizer: placeholder -> token ids of its embeddings


def with_placeholder(clip: Any, placeholder: str, class_noun: str, token_embeddings: Tensor) -> Any:
    """A clone of the CLIP that encodes `placeholder` as these embeddings (n, width); the given CLIP is unchanged.

    ComfyUI accepts embeddings instead of ids in a token list. So the tokenizer maps the word to ids beyond the
    vocabulary, and these are replaced by the embeddings. Weights such as (<new1>:1.3) and adjacent punctuation work as
    for other words. Raises InputError for a word that cannot be a placeholder, or is already one of this CLIP.
    """
    result = clip.clone()
    name = clip_name(clip)
    outer = copy.copy(clip.tokenizer)
    inner = copy.copy(getattr(outer, name))
    existing = known_placeholders(clip)
    if normalised_placeholder(placeholder) in map(normalised_placeholder, existing):
        raise InputError(
            f"the placeholder {placeholder} is in use by another adapter on this CLIP; train one of the two with "
            "another placeholder."
        )
    tokenizer = with_added_tokens(getattr(inner.tokenizer, "tokenizer", inner.tokenizer), [placeholder])
    known: dict[int, Tensor] = dict(getattr(inner, ROWS, {}))
    # Far above the ids of the vocabulary and of every added word.
    first = 1_000_000 + len(known)
    ids = list(range(first, first + len(token_embeddings)))
    expansions = dict(getattr(inner.tokenizer, "expansions", {}))
    expansions[tokenizer.convert_tokens_to_ids(placeholder)] = ids
    known.update(zip(ids, token_embeddings.detach().clone().cpu(), strict=True))
    inner.tokenizer = _Expanding(tokenizer, expansions)
    setattr(inner, ROWS, known)
    setattr(inner, WORDS, {**existing, placeholder: class_noun})
    setattr(inner, IDS, {**getattr(inner, IDS, {}), placeholder: ids})
    inner.tokenize_with_weights = partial(_tokenize, inner)
    setattr(outer, name, inner)
    result.tokenizer = outer
    return result


def known_placeholders(clip: Any) -> Mapping[str, str]:
    """The placeholders of a CLIP, with their class nouns."""
    tokenizer = clip.tokenizer
    known: Mapping[str, str] = getattr(getattr(tokenizer, getattr(tokenizer, "clip", ""), None), WORDS, {})
    return known


def placeholders_read(clip: Any, prompt: str) -> list[str]:
    """The placeholders of a CLIP whose embeddings are among the tokens of this prompt."""
    tokenizer = getattr(clip.tokenizer, clip_name(clip))
    embeddings: Mapping[int, Tensor] = getattr(tokenizer, ROWS, {})
    found = {id(token) for batch in tokenizer.tokenize_with_weights(prompt) for token, *_ in batch}
    ids_of: Mapping[str, Sequence[int]] = getattr(tokenizer, IDS, {})
    return [word for word in known_placeholders(clip) if any(id(embeddings[i]) in found for i in ids_of.get(word, ()))]


def noun_embeddings(clip: Any, class_noun: str, count: int) -> Tensor:
    """The placeholder's initial value in training: the class noun's mean embedding, (count, width), float32."""
    ids = getattr(clip.tokenizer, clip_name(clip)).tokenizer(class_noun)["input_ids"][1:-1]
    return mean_embeddings(embedding_table(clip), ids, count).cpu()


class _Expanding:
    """A tokenizer that returns one id per embedding of a placeholder, so that token counts are correct."""

    def __init__(self, tokenizer: Any, expansions: dict[int, list[int]]) -> None:
        self.tokenizer = tokenizer
        self.expansions = expansions

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        found = self.tokenizer(text, **options)["input_ids"]
        return {"input_ids": [row for token in found for row in self.expansions.get(token, [token])]}

    def __getattr__(self, name: str) -> Any:
        if name == "tokenizer":  # not set yet while the object is being copied
            raise AttributeError(name)
        return getattr(self.tokenizer, name)


def _tokenize(inner: Any, text: str, *arguments: Any, **options: Any) -> list[list[tuple[Any, ...]]]:
    """The tokenizer's result with embeddings instead of placeholder ids."""
    token_embeddings: dict[int, Tensor] = getattr(inner, ROWS)
    batches = type(inner).tokenize_with_weights(inner, text, *arguments, **options)
    return [[(_row(token, token_embeddings), *rest) for token, *rest in batch] for batch in batches]


def _row(token: Any, token_embeddings: Mapping[int, Tensor]) -> Any:
    # Textual inversion embeddings are tensors already.
    return token if isinstance(token, Tensor) else token_embeddings.get(token, token)
