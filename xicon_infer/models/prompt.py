"""Prompts as text: the official cleaning, and an optional syntax for several weighted prompts.

Cleaning always happens. The syntax does not, because a "|" or a "(16:9)" in a user's prompt is
otherwise ordinary text. Nothing here knows about tokens; no torch.
"""

from __future__ import annotations

import html
import re
from typing import NamedTuple

import ftfy

_WEIGHT = re.compile(r"\((.*?):(\d+\.?\d*|\.\d+)\)")
"""`(text:1.3)`: the shortest text up to a colon and a plain decimal number."""


class WeightedPrompt(NamedTuple):
    """One prompt and the factor its whole embedding is multiplied by."""

    text: str
    weight: float


def clean_prompt(text: str) -> str:
    """Returns the text as the official tokenizer sees it.

    Broken encodings are repaired, HTML entities resolved (twice, as scraped captions carry
    doubly escaped ones), every run of white space becomes one space, the ends are stripped.
    Lone surrogates become U+FFFD, so the result can always be encoded as UTF-8.

    Args:
        text: any text.

    Returns:
        The cleaned text; may be empty.

    Source: Wan-Video/Wan2.1: wan/modules/tokenizers.py
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def split_prompts(text: str) -> list[str]:
    """Returns the prompts between the "|" signs, stripped; an empty one keeps its place.

    Args:
        text: the prompt field; without "|" it is one prompt.

    Source: rookiestar28/ComfyUI-WanVideoWrapper: nodes.py, WanVideoTextEncode
    """
    return [part.strip() for part in text.split("|")]


def extract_weight(text: str) -> WeightedPrompt:
    """Returns the prompt without its `(text:1.3)` marks, and the product of their numbers.

    A mark does not weight its own words: as in the reference, it scales the whole embedding.

    Args:
        text: one prompt.

    Returns:
        The words of every mark stay, its parentheses and number go; weight 1.0 without marks.

    Source: rookiestar28/ComfyUI-WanVideoWrapper: nodes.py, parse_prompt_weights.
        Differs from it: words marked twice count twice (there, once), and a number with two
        points is left as text (there, it raises).
    """
    weight = 1.0
    for match in _WEIGHT.finditer(text):
        weight *= float(match.group(2))
    return WeightedPrompt(_WEIGHT.sub(r"\1", text), weight)


def parse_prompt(text: str, *, syntax: bool = False) -> list[WeightedPrompt]:
    """Returns the prompts of a prompt field, each with its weight.

    Args:
        text: the prompt field.
        syntax: whether "|" separates prompts and `(text:1.3)` weights them; if not, the field
            is one prompt of weight 1.

    Returns:
        At least one prompt, not yet cleaned.
    """
    if not syntax:
        return [WeightedPrompt(text, 1.0)]
    return [extract_weight(part) for part in split_prompts(text)]
