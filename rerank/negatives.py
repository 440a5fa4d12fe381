"""Captions that are wrong by one rule: swapped attributes, swapped things, changed relations.

A head that only counts which words find something in the picture cannot tell "a red ball left of a
blue cup" from "a blue ball left of a red cup". Captions made wrong by such rules, shown beside the
right one, ask it to bind (NegCLIP, arXiv 2210.01936, does so with a parser).
"""

from __future__ import annotations

import itertools
import random
import re

from .phrases import BREAKS, DETERMINERS, NUMBERS

_COLOURS = "red orange yellow green blue purple pink brown black white grey gray golden silver tan"
_SIZES = "big small large little tiny huge tall short long young old"
_LOOKS = "striped spotted plain dark bright wet dry snowy sandy grassy wooden metal rocky muddy"
ATTRIBUTES = tuple(frozenset(group.split()) for group in (_COLOURS, _SIZES, _LOOKS))
OPPOSITES = {
    "left": "right", "right": "left", "above": "below", "below": "above", "over": "under",
    "under": "over", "inside": "outside", "outside": "inside", "behind": "before", "on": "under",
    "top": "bottom", "bottom": "top", "into": "out of", "up": "down", "down": "up",
    "with": "without", "sitting": "standing", "standing": "sitting", "sits": "stands",
    "stands": "sits", "running": "lying", "runs": "lies", "man": "woman", "woman": "man",
    "boy": "girl", "girl": "boy", "men": "women", "women": "men", "one": "two", "two": "three",
    "day": "night", "indoors": "outdoors", "outdoors": "indoors",
}  # fmt: skip
# "a and b" says what "b and a" says, so things are not swapped across these.
SYMMETRIC = frozenset("and or beside besides with near next between amid among".split())  # noqa: SIM905


def wrong_captions(text: str, rng: random.Random) -> list[str]:
    """Return captions that each break one rule, in random order; none if no rule applies."""
    words = re.findall(r"[\w'’-]+|[^\w\s]", text.lower())
    found = [
        *_swapped_attributes(words),
        *_other_attributes(words, rng),
        *_swapped_things(words),
        *_changed_relations(words),
    ]
    same = " ".join(words)
    wrong = [each for each in dict.fromkeys(found) if each != same]
    rng.shuffle(wrong)
    return wrong


def _swapped_attributes(words: list[str]) -> list[str]:
    """ "a red ball and a blue cup" -> "a blue ball and a red cup"."""
    out = []
    for group in ATTRIBUTES:
        places = [at for at, word in enumerate(words) if word in group]
        for first, second in itertools.pairwise(places):
            if words[first] != words[second] and second > first + 1:
                out.append(_swap(words, first, second))
    return out


def _other_attributes(words: list[str], rng: random.Random) -> list[str]:
    """ "a red ball" -> "a green ball"."""
    out = []
    for at, word in enumerate(words):
        for group in ATTRIBUTES:
            if word in group:
                others = sorted(group - set(words))
                if others:
                    out.append(" ".join([*words[:at], rng.choice(others), *words[at + 1 :]]))
    return out


def _swapped_things(words: list[str]) -> list[str]:
    """ "a dog on a big cat" -> "a cat on a big dog": the last words of neighbouring phrases."""
    spans: list[tuple[int, bool]] = []  # (place of a phrase's last word, phrase says more)
    start, between = 0, set()
    out = []
    for at, word in enumerate([*words, "."]):
        ends = word in BREAKS or word in DETERMINERS or not word[0].isalnum()
        phrase = [each for each in words[start:at] if each not in NUMBERS]
        if ends and phrase:
            if spans and (not (between & SYMMETRIC) or len(phrase) > 1 or spans[-1][1]):
                last = spans[-1][0]
                if words[last] != words[at - 1]:
                    out.append(_swap(words, last, at - 1))
            spans.append((at - 1, len(phrase) > 1))
            between = set()
        if ends:
            between.add(word)
            start = at + 1
    return out


def _changed_relations(words: list[str]) -> list[str]:
    """ "left of" -> "right of", "a man" -> "a woman"."""
    return [
        " ".join([*words[:at], OPPOSITES[word], *words[at + 1 :]])
        for at, word in enumerate(words)
        if word in OPPOSITES
    ]


def _swap(words: list[str], first: int, second: int) -> str:
    swapped = list(words)
    swapped[first], swapped[second] = words[second], words[first]
    return " ".join(swapped)
