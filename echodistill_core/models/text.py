"""The text encoder that teacher and student share, and the placeholder tokens it learns to read."""

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

# A placeholder is written into prompts, file names and ComfyUI's prompt syntax, so it is kept to what survives them.
_PLACEHOLDER = re.compile(r"[^\s():,|\\/\"']+")


@lru_cache(maxsize=1)
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte-pair vocabulary and merges, read from the file that open_clip's package carries."""
    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    # The published file lists more merges than CLIP uses: 49152 - 256 byte tokens - 2 ends, after a header line.
    merges = [(a, b) for a, b in (line.split() for line in lines[1 : 49152 - 256 - 2 + 1])]
    letters = list(bytes_to_unicode().values())
    words = letters + [w + "</w>" for w in letters] + [a + b for a, b in merges] + ["<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}, merges


def clip_tokenizer(pad_with_end: bool) -> CLIPTokenizer:
    """CLIP's tokenizer (49408 words, 77 tokens), built without any download.

    pad_with_end: pad with the end token as SD 1.x does; otherwise with token 0, "!", as SD 2.x does.
    """
    vocabulary, merges = clip_vocabulary()
    end = "<|endoftext|>"
    tokenizer = CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), pad_token=end, model_max_length=77)
    if not pad_with_end:
        # Declared at construction, "!" would be cut out of prompts as padding, and "?!" apart; SD 2.x was trained with
        # OpenCLIP's tokenizer, to which it is a word like any other.
        tokenizer.pad_token = "!"
    return tokenizer


def check_placeholder(tokenizer: CLIPTokenizer, placeholder: str) -> None:
    """Raise InputError unless `placeholder` can become a new word: one word, no prompt syntax, not known already."""
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
    """Make `placeholder` one new word of the tokenizer. Raises InputError as `check_placeholder` does."""
    check_placeholder(tokenizer, placeholder)
    # A placeholder of letters alone must not be found inside a longer word; <new1> may touch its neighbours.
    letters = all(c.isalnum() or unicodedata.combining(c) for c in placeholder)
    tokenizer.add_tokens([AddedToken(placeholder, normalized=True, single_word=letters)])


def with_added_tokens(tokenizer: CLIPTokenizer, placeholders: Iterable[str]) -> CLIPTokenizer:
    """A copy of the tokenizer that knows these words: it could not forget them itself.

    Raises InputError as `check_placeholder` does.
    """
    copied = _copied(tokenizer)
    for word in placeholders:
        add_placeholder(copied, word)
    return copied


def placeholders_read(tokenizer: CLIPTokenizer, prompt: str, placeholders: Iterable[str]) -> list[str]:
    """Those of the placeholders that the tokenizer, which knows them as words, finds in the prompt.

    The tokens decide, since the letters do not: "fidozq" stands in "fidozqdog", but is no word of it, and the tokenizer
    reads every Unicode form and case of a placeholder as the same word.
    """
    found = set(tokenizer(prompt, add_special_tokens=False).input_ids)
    return [word for word in placeholders if tokenizer.convert_tokens_to_ids(word) in found]


def check_prompt(prompt: str, placeholders: Mapping[str, str]) -> None:
    """Raise InputError unless the prompt uses one of the adapters' placeholders.

    placeholders: placeholder -> class noun, of every adapter in use. Without adapters every prompt is right.
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
    """Raise InputError for an empty class noun, and for one that holds the placeholder, which stands before it."""
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
    """Raise InputError for text that is no Unicode text, as a terminal gives bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} {quoted(text)} is no UTF-8 text; write it anew.") from error


@lru_cache(maxsize=8)
def _tokenizer_with(placeholders: tuple[str, ...]) -> CLIPTokenizer:
    """CLIP's tokenizer that knows these words. What it pads with makes no difference to a prompt's words."""
    return with_added_tokens(clip_tokenizer(pad_with_end=False), placeholders)


def _copied(tokenizer: CLIPTokenizer) -> CLIPTokenizer:
    """A tokenizer to which words can be added apart from this one. They share the vocabulary, which adding only reads:
    copied, it would take longer than a picture (0.3 to 1 s).
    """
    held = vars(tokenizer).values()
    kept: dict[int, object] = {id(v): v for v in held if isinstance(v, (dict, list)) and len(v) > 1000}
    # transformers from 5 on, where the vocabulary is in Rust; before, it is dictionaries alone.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        other = Tokenizer(backend.model)
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            setattr(other, part, getattr(backend, part))
        for _, token in sorted(backend.get_added_tokens_decoder().items()):
            (other.add_special_tokens if token.special else other.add_tokens)([token])
        kept[id(backend)] = other
    return copy.deepcopy(tokenizer, kept)


def mean_embeddings(table: Tensor, ids: Sequence[int], count: int) -> Tensor:
    """What a placeholder begins as: the mean of the class noun's rows of the table, (count, width), float32."""
    return table[torch.tensor(ids, device=table.device)].detach().float().mean(dim=0).repeat(count, 1)


class TextEncoder(nn.Module):
    """tau(y): prompts to text features, with placeholder words whose embedding rows live outside the table.

    The table of the vocabulary stays frozen and untouched, so that what is learned, and what AdamW decays, is the rows
    of the placeholder alone.
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
        """Width of an embedding row and of a text feature."""
        return self.table.shape[1]

    def with_placeholders(self, placeholders: dict[str, int]) -> TextEncoder:
        """The same encoder reading these words, and no others, as new: name -> number of rows. Weights are shared.

        Raises InputError for a word that cannot be a placeholder.
        """
        encoder = TextEncoder(self.model, self._plain_tokenizer)
        encoder.tokenizer = with_added_tokens(self._plain_tokenizer, placeholders)
        encoder.placeholders = dict(placeholders)
        return encoder

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, 77), padded; ids from 49408 on are the placeholders' rows, in order of declaration.

        Raises InputError where a prompt is so long that a placeholder in it would be cut off.
        """
        vocabulary, most = self.table.shape[0], self.most_tokens
        rows_of = self._placeholder_ids()
        batch = []
        for prompt in prompts:
            ids = [row for token in self._words(prompt) for row in rows_of.get(token, [token])]
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
        """Tokens of a prompt that the encoder reads: 75, since begin and end of text take two of its 77."""
        return int(self.model.config.max_position_embeddings) - 2

    def warn_truncated(self, prompts: Iterable[str]) -> None:
        """Warn once for each prompt that is longer than the encoder reads, naming the words that are lost."""
        rows_of = self._placeholder_ids()

        def count(text: str) -> int:
            return sum(len(rows_of.get(token, [token])) for token in self._words(text))

        for prompt in dict.fromkeys(prompts):
            warn_truncated(prompt, self.most_tokens, count)

    def _words(self, prompt: str) -> list[int]:
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=False).input_ids
        return ids

    def _placeholder_ids(self) -> dict[int, list[int]]:
        """The tokenizer's id of each placeholder -> ids of its rows, which begin past the vocabulary's end."""
        rows_of: dict[int, list[int]] = {}
        next_row = self.table.shape[0]
        for name, count in self.placeholders.items():
            rows_of[self.tokenizer.convert_tokens_to_ids(name)] = list(range(next_row, next_row + count))
            next_row += count
        return rows_of

    def forward(self, prompts: Sequence[str], token_embeddings: Tensor | None = None) -> Tensor:
        """Text features (B, 77, width).

        token_embeddings: the placeholders' (n, width), in order of declaration; gradients reach them and nothing else.
        Raises InputError where a prompt uses a placeholder and no rows are given, or the count differs.
        """
        vocabulary = self.table.shape[0]
        ids = self.tokenize(prompts)
        expected = sum(self.placeholders.values())
        if token_embeddings is None:
            # Asked on the CPU, where the ids are made: a device would have to be waited for.
            if bool((ids >= vocabulary).any()):
                raise InputError("a prompt uses a placeholder whose learned rows were not given; load its adapter.")
            return self.model(to_device(ids, self.table.device)).last_hidden_state
        ids = to_device(ids, self.table.device)
        if token_embeddings.shape != (expected, self.width):
            raise InputError(
                f"placeholder rows have shape {tuple(token_embeddings.shape)}; expected ({expected}, {self.width})."
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
        """Initial placeholder rows (count, width), float32: the mean embedding of the class noun's tokens, repeated.

        Raises InputError for an empty noun.
        """
        ids = self.tokenizer(class_noun, add_special_tokens=False).input_ids
        if not ids:
            raise InputError("class_noun is empty; expected what the photographs show, for instance dog.")
        return mean_embeddings(self.table, ids, count)


def warn_truncated(prompt: str, most: int, count: Callable[[str], int]) -> None:
    """Warn, naming the words that are lost, where a prompt has more than the `most` tokens that its encoder reads.

    count: a text to the number of its tokens.
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
    """The tokenizer of a diffusers folder (its `tokenizer` subfolder). Raises InputError where it cannot be read."""
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers do
        raise InputError(f"{folder} holds no CLIP tokenizer ({error}); download the checkpoint again.") from error
    words, known = tokenizer.get_vocab(), clip_vocabulary()[0]
    if len(words) < len(known):
        raise InputError(
            f"{folder} holds a vocabulary of {len(words)} words; expected CLIP's {len(known)} in "
            "vocab.json and merges.txt, or tokenizer.json; download the checkpoint again."
        )
    if words != known:
        return tokenizer
    return clip_tokenizer(tokenizer.pad_token_id == tokenizer.eos_token_id)  # which knows "!" as a word
