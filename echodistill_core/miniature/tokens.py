"""CLIP's tokenizer reduced to the miniature's words, for small text encoders with a small embedding table."""

from __future__ import annotations

import itertools
import re
from functools import lru_cache

from transformers import CLIPTokenizer

from ..models.text import clip_vocabulary
from .world import COLORS, CONTEXTS, EMBLEMS, SHAPES

_OTHERS = """photo of a the my one nice cool clean good cropped snapshot and two-tone striped dotted with white
dark bright close up zoomed in far away very small toy dog bag"""
_WORDS = (*SHAPES, *COLORS, *EMBLEMS, *" ".join(CONTEXTS.values()).split(), *_OTHERS.split())


@lru_cache(maxsize=1)
def reduced_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with only the merges of the domain's words.

    It encodes any text: unknown words become letters.
    """
    words, merges = clip_vocabulary()
    letters = [w for w, i in words.items() if i < 512]
    needed = _merges_of(merges)
    end = "<|endoftext|>"
    vocabulary = [*letters, *(a + b for a, b in needed), "<|startoftext|>", end]
    return CLIPTokenizer(
        vocab={word: i for i, word in enumerate(vocabulary)}, merges=needed, pad_token=end, model_max_length=77
    )


def _merges_of(merges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The merges that byte-pair encoding applies to the domain's words, in CLIP's order."""
    rank = {pair: i for i, pair in enumerate(merges)}
    used = set()
    for word in sorted({part for w in _WORDS for part in re.findall(r"[a-z]+|[^a-z\s]", w)}):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: rank.get(pair, len(rank)))
            if best not in rank:
                break
            used.add(best)
            i = next(i for i, pair in enumerate(itertools.pairwise(parts)) if pair == best)
            parts[i : i + 2] = ["".join(best)]
    return [pair for pair in merges if pair in used]
