"""The text encoder that teacher and student share, with placeholder tokens; checks of placeholders and prompts."""

from __future__ import annotations

import copy
import gzip
import re
import unicodedata
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AddedToken, CLIPTextModel, CLIPTokenizer

from ..concept.prompts import subject
from ..devices import to_device
from ..errors import InputError, Notice
from ..messages import quoted

# Placeholders occur in prompts, file names and ComfyUI's prompt syntax: no characters that have a meaning there.
_PLACEHOLDER = re.compile(r"[^\s():,|\\/\"']+")


@lru_cache(maxsize=1)
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte-pair vocabulary, word -> id, and merges, read from the file in the package open_clip."""
    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    # After a header line, CLIP uses the first 49152 - 256 (bytes) - 2 (begin and end of text) merges of the file.
    merges = [(a, b) for a, b in (line.split() for line in lines[1 : 49152 - 256 - 2 + 1])]
    letters = list(bytes_to_unicode().values())
    words = letters + [w + "</w>" for w in letters] + [a + b for a, b in merges] + ["<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}, merges


def clip_tokenizer(pad_with_end: bool) -> CLIPTokenizer:
    """CLIP's tokenizer (vocabulary of 49408, 77 tokens per prompt), built without a download.

    pad_with_end: pad with the end-of-text token, as SD 1.x; False pads with token 0, "!", as SD 2.x.
    """
    vocabulary, merges = clip_vocabulary()
    end = "<|endoftext|>"
    tokenizer = CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), pad_token=end, model_max_length=77)
    if not pad_with_end:
        # Set after construction. Passed to the constructor, "!" would become a special token, which is split off words
        # such as "?!". In OpenCLIP's tokenizer, with which SD 2.x was trained, it is an ordinary word.
        tokenizer.pad_token = "!"
    return tokenizer


def check_placeholder(tokenizer: CLIPTokenizer, placeholder: str) -> None:
    """Raise InputError unless the placeholder is one word, without prompt syntax, that the vocabulary does not have."""
    check_text(placeholder, "placeholder")
    if not _PLACEHOLDER.fullmatch(placeholder) or not placeholder.isprintable():
        raise InputError(
            f"placeholder {quoted(placeholder)} cannot be a word of a prompt; expected no spaces, brackets, commas, "
            "colons, quotes, slashes or invisible characters, for instance <new1>."
        )
    ids = tokenizer(placeholder, add_special_tokens=False).input_ids
    if len(ids) == 1:
        raise InputError(
            f"placeholder {quoted(placeholder)} is already a word of the vocabulary (token {ids[0]}) and would lose "
            "its meaning; choose a word that does not exist, for instance <new1>."
        )


def add_placeholder(tokenizer: CLIPTokenizer, placeholder: str) -> None:
    """Add the placeholder to the tokenizer as one token. Raises InputError as `check_placeholder` does."""
    check_placeholder(tokenizer, placeholder)
    # A placeholder of letters and digits only matches whole words; <new1> may be adjacent to other characters.
    letters = all(c.isalnum() or unicodedata.combining(c) for c in placeholder)
    tokenizer.add_tokens([AddedToken(placeholder, normalized=True, single_word=letters)])


def with_added_tokens(tokenizer: CLIPTokenizer, placeholders: Iterable[str]) -> CLIPTokenizer:
    """A copy of the tokenizer with these placeholders added as tokens. Tokens cannot be removed from a tokenizer again.

    Raises InputError as `check_placeholder` does.
    """
    copied = _copied(tokenizer)
    for word in placeholders:
        add_placeholder(copied, word)
    return copied


def placeholders_read(tokenizer: CLIPTokenizer, prompt: str, placeholders: Iterable[str]) -> list[str]:
    """The placeholders that occur in the prompt as tokens. The tokenizer must have them as tokens.

    A search in the text would be wrong: "fidozqdog" does not contain the token "fidozq", and the tokenizer treats all
    Unicode forms and cases of a placeholder as equal.
    """
    found = set(tokenizer(prompt, add_special_tokens=False).input_ids)
    return [word for word in placeholders if tokenizer.convert_tokens_to_ids(word) in found]


def check_prompt(prompt: str, placeholders: Mapping[str, str]) -> None:
    """Raise InputError unless the prompt contains a placeholder of an adapter as a word.

    placeholders: placeholder -> class noun, of every adapter in use. Without adapters every prompt is accepted.
    """
    check_text(prompt, "the prompt")
    if not placeholders or placeholders_read(_tokenizer_with(tuple(placeholders)), prompt, placeholders):
        return
    name, noun = next(iter(placeholders.items()))
    raise InputError(
        f"the prompt {quoted(prompt)} does not contain the placeholder {name} as a word of its own; write it before "
        f'the class noun, for instance "photo of a {subject(name, noun)}".'
    )


def check_class_noun(class_noun: str, placeholder: str) -> None:
    """Raise InputError for an empty class noun, and for one that contains the placeholder."""
    check_text(class_noun, "class_noun")
    if not class_noun.strip():
        raise InputError(
            "class_noun is empty; write what the photographs show, in one or a few words: dog, coffee mug "
            "(--class-noun dog)."
        )
    if placeholders_read(_tokenizer_with((placeholder,)), class_noun, [placeholder]):
        raise InputError(
            f"class_noun {quoted(class_noun)} holds the placeholder {placeholder}, which is written before it anyway; "
            "leave it out."
        )


def check_text(text: str, what: str) -> None:
    """Raise InputError for text with lone surrogates, which Python makes of bytes that are not UTF-8.

    what: name of the text in the error message.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} {quoted(text)} is not valid UTF-8; type it again.") from error


@lru_cache(maxsize=8)
def _tokenizer_with(placeholders: tuple[str, ...]) -> CLIPTokenizer:
    """CLIP's tokenizer with these placeholders. Padding does not affect the tokens of a prompt's words."""
    return with_added_tokens(clip_tokenizer(pad_with_end=False), placeholders)


def _copied(tokenizer: CLIPTokenizer) -> CLIPTokenizer:
    """A copy of the tokenizer that shares its vocabulary, which adding tokens does not change.

    Copying the vocabulary as well would take 0.3 to 1 s, more than generating a picture.
    """
    attributes = vars(tokenizer).values()
    # deepcopy's memo: objects that it holds are shared instead of copied.
    memo: dict[int, object] = {id(v): v for v in attributes if isinstance(v, (dict, list)) and len(v) > 1000}
    # From transformers 5 on, the vocabulary is in a Rust object; before, it is in dictionaries.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        other = Tokenizer(backend.model)
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            setattr(other, part, getattr(backend, part))
        for _, token in sorted(backend.get_added_tokens_decoder().items()):
            (other.add_special_tokens if token.special else other.add_tokens)([token])
        memo[id(backend)] = other
    return copy.deepcopy(tokenizer, memo)


def mean_embeddings(table: Tensor, ids: Sequence[int], count: int) -> Tensor:
    """The mean of the table's embeddings at `ids`, repeated: (count, width), float32. table: (vocabulary, width)."""
    return table[torch.tensor(ids, device=table.device)].detach().float().mean(dim=0).repeat(count, 1)


class TextEncoder(nn.Module):
    """tau: prompts to text features. The embeddings of placeholders are separate from the vocabulary's table.

    The table is frozen, so that training, and AdamW's weight decay, change the placeholders' embeddings only.
    placeholders: placeholder -> number of its embeddings.
    """

    def __init__(self, model: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.placeholders: dict[str, int] = {}
        self._plain_tokenizer = tokenizer

    @property
    def table(self) -> Tensor:
        """The vocabulary's embedding table, (49408, width)."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def width(self) -> int:
        """Width of a token embedding and of a text feature."""
        return self.table.shape[1]

    def with_placeholders(self, placeholders: dict[str, int]) -> TextEncoder:
        """This encoder with other placeholders, in place of the present ones. It shares the weights.

        placeholders: placeholder -> number of its embeddings. Raises InputError as `check_placeholder` does.
        """
        encoder = TextEncoder(self.model, self._plain_tokenizer)
        encoder.tokenizer = with_added_tokens(self._plain_tokenizer, placeholders)
        encoder.placeholders = dict(placeholders)
        return encoder

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Padded token ids (B, 77) of B prompts. Ids from 49408 on are placeholders' embeddings, in order.

        Longer prompts are truncated. Raises InputError if a placeholder would be cut off.
        """
        vocabulary, most = self.table.shape[0], self.most_tokens
        embedding_ids = self._placeholder_ids()
        batch = []
        for prompt in prompts:
            ids = [i for token in self._words(prompt) for i in embedding_ids.get(token, [token])]
            if any(i >= vocabulary for i in ids[most:]):
                raise InputError(
                    f"the prompt {quoted(prompt)} has {len(ids)} tokens and its placeholder would be cut off; "
                    f"expected it within the first {most}: shorten the prompt."
                )
            ids = [self.tokenizer.bos_token_id, *ids[:most], self.tokenizer.eos_token_id]
            batch.append(ids + [self.tokenizer.pad_token_id] * (most + 2 - len(ids)))
        return torch.tensor(batch, dtype=torch.long)

    @property
    def most_tokens(self) -> int:
        """The maximum number of a prompt's tokens: 75, which is 77 without begin and end of text."""
        return int(self.model.config.max_position_embeddings) - 2

    def warn_truncated(self, prompts: Iterable[str]) -> None:
        """Warn about each prompt that `tokenize` truncates, naming the words that are cut off."""
        embedding_ids = self._placeholder_ids()

        def count(text: str) -> int:
            return sum(len(embedding_ids.get(token, [token])) for token in self._words(text))

        for prompt in dict.fromkeys(prompts):
            warn_truncated(prompt, self.most_tokens, count)

    def _words(self, prompt: str) -> list[int]:
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=False).input_ids
        return ids

    def _placeholder_ids(self) -> dict[int, list[int]]:
        """The tokenizer's id of a placeholder -> ids of its embeddings, which follow those of the vocabulary."""
        embedding_ids: dict[int, list[int]] = {}
        next_id = self.table.shape[0]
        for name, count in self.placeholders.items():
            embedding_ids[self.tokenizer.convert_tokens_to_ids(name)] = list(range(next_id, next_id + count))
            next_id += count
        return embedding_ids

    def forward(self, prompts: Sequence[str], token_embeddings: Tensor | None = None) -> Tensor:
        """Text features (B, 77, width) of B prompts.

        token_embeddings: of all placeholders, in order, (n, width); the only input that gets gradients. None is allowed
        if no prompt uses a placeholder.
        Raises InputError if they are missing or have another shape, and if a placeholder would be cut off.
        """
        vocabulary = self.table.shape[0]
        ids = self.tokenize(prompts)
        expected = sum(self.placeholders.values())
        if token_embeddings is None:
            # Checked before the ids are moved to the device, for which the host would have to wait.
            if bool((ids >= vocabulary).any()):
                raise InputError("a prompt uses a placeholder whose token embeddings were not given; load its adapter.")
            return self.model(to_device(ids, self.table.device)).last_hidden_state
        ids = to_device(ids, self.table.device)
        if token_embeddings.shape != (expected, self.width):
            raise InputError(
                f"token embeddings have shape {tuple(token_embeddings.shape)}; expected ({expected}, {self.width})."
            )

        def insert(_: nn.Module, __: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
            own = token_embeddings.to(embedded)[(ids - vocabulary).clamp_min(0)]
            return torch.where((ids >= vocabulary)[..., None], own, embedded)

        handle = self.model.get_input_embeddings().register_forward_hook(insert)
        try:
            return self.model(ids.clamp_max(vocabulary - 1)).last_hidden_state
        finally:
            handle.remove()

    def noun_embeddings(self, class_noun: str, count: int) -> Tensor:
        """Initial token embeddings (count, width), float32: the mean embedding of the class noun's tokens, repeated.

        Raises InputError for an empty class noun.
        """
        ids = self.tokenizer(class_noun, add_special_tokens=False).input_ids
        if not ids:
            raise InputError("class_noun is empty; expected what the photographs show, for instance dog.")
        return mean_embeddings(self.table, ids, count)


def warn_truncated(prompt: str, most: int, count: Callable[[str], int]) -> None:
    """Warn, naming the words that are cut off, if a prompt has more than `most` tokens.

    count: text -> number of its tokens.
    """
    if count(prompt) <= most:
        return
    read = bisect_right(range(len(prompt) + 1), most, key=lambda n: count(prompt[:n])) - 1
    warnings.warn(
        f"the prompt {quoted(prompt)} has more than the {most} tokens that the text encoder reads: "
        f"{quoted(prompt[read:].strip())} at its end has no effect; shorten the prompt",
        category=Notice,
        stacklevel=4,
    )


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer in the subfolder `tokenizer` of a diffusers folder.

    Raises InputError if it cannot be read, or if its vocabulary is smaller than CLIP's.
    """
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers passes on the exceptions of several parsers
        raise InputError(f"{folder} holds no CLIP tokenizer ({error}); download the checkpoint again.") from error
    words, known = tokenizer.get_vocab(), clip_vocabulary()[0]
    if len(words) < len(known):
        raise InputError(
            f"{folder} holds a vocabulary of {len(words)} words; expected CLIP's {len(known)} in "
            "vocab.json and merges.txt, or tokenizer.json; download the checkpoint again."
        )
    if words != known:
        return tokenizer
    return clip_tokenizer(tokenizer.pad_token_id == tokenizer.eos_token_id)  # in which "!" is an ordinary word
