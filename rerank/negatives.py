"""Captions that are wrong by one rule: swapped attributes, swapped things, changed relations.

A head that only counts which words find something in the picture cannot tell "a red ball left of a
blue cup" from "a blue ball left of a red cup". Captions made wrong by such rules, shown beside the
right one, ask it to bind (NegCLIP, arXiv 2210.01936, does so with a parser).

The rest of the caption stays as written, capitals and spaces too: a wrong caption that could be
told by its spelling would teach nothing about pictures.
"""

from __future__ import annotations

import itertools
import random
import re

from .phrases import BREAKS, DETERMINERS, NUMBERS

# Each entry is a respect in which things differ. Its words contradict each other, except those
# between the same commas: one writer's "grey" is another's "silver". "tan" and "golden" are like
# both yellow and brown, which are not like each other.
_ATTRIBUTES = (
    "red, orange yellow golden tan, tan golden brown, green, blue, purple, pink, black, white, "
    "grey gray silver",
    "big large huge, small little tiny",
    "tall, short",
    "long, short",
    "young, old",
    "striped, spotted, plain",
    "dark, bright",
    "wet, dry",
    "snowy, sandy rocky muddy, grassy",
    "wooden, metal",
)
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
# Nor attributes: "a black and white dog", "a black dog next to a white dog".
JOINING = SYMMETRIC | DETERMINERS | NUMBERS | {"to", ",", "&", "/"}

Edit = dict[int, str]  # a word's place among the words, and what is to stand there


def _contraries() -> dict[str, frozenset[str]]:
    """Return for each attribute those that contradict it."""
    found: dict[str, frozenset[str]] = {}
    for respect in _ATTRIBUTES:
        groups = [group.split() for group in respect.split(",")]
        for word in itertools.chain(*groups):
            alike = [group for group in groups if word in group]
            others = {*itertools.chain(*groups)}.difference(*alike)
            found[word] = found.get(word, frozenset()) | others
    return found


CONTRARIES = _contraries()


def wrong_captions(text: str, rng: random.Random) -> list[str]:
    """Return captions that each break one rule, in random order; none if no rule applies.

    >>> wrong_captions("A young dog.", random.Random(0))
    ['An old dog.']
    """
    places = list(re.finditer(r"[\w'’-]+|[^\w\s]", text))
    words = [place.group().lower() for place in places]
    edits = [
        *_swapped_attributes(words),
        *_other_attributes(words, rng),
        *_swapped_things(words),
        *_changed_relations(words),
    ]
    found = dict.fromkeys(_edited(text, places, edit) for edit in edits)
    wrong = [each for each in found if each != text]
    rng.shuffle(wrong)
    return wrong


def _swapped_attributes(words: list[str]) -> list[Edit]:
    """ "a red ball and a blue cup" -> "a blue ball and a red cup"."""
    out = []
    for first, word in enumerate(words):
        contraries = CONTRARIES.get(word, frozenset())
        second = next((at for at in range(first + 1, len(words)) if words[at] in contraries), first)
        # Without the second's thing, as in "a black dog and a white dog"; nothing if none follows.
        between = {*words[first + 1 : second]} - {*words[second + 1 : second + 2]}
        if not between <= JOINING:
            out.append(_swap(words, first, second))
    return out


def _other_attributes(words: list[str], rng: random.Random) -> list[Edit]:
    """ "a red ball" -> "a green ball"."""
    out = []
    for at, word in enumerate(words):
        others = sorted(CONTRARIES.get(word, frozenset()) - set(words))
        if others:
            out.append({at: rng.choice(others)})
    return out


def _swapped_things(words: list[str]) -> list[Edit]:
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


def _changed_relations(words: list[str]) -> list[Edit]:
    """ "left of" -> "right of", "a man" -> "a woman"."""
    return [{at: OPPOSITES[word]} for at, word in enumerate(words) if word in OPPOSITES]


def _swap(words: list[str], first: int, second: int) -> Edit:
    return {first: words[second], second: words[first]}


def _edited(text: str, places: list[re.Match[str]], edit: Edit) -> str:
    """Return a text with other words in some of its places, and "a" or "an" as they need it."""
    said = dict(edit)
    for at, word in edit.items():
        before = places[at - 1].group() if at else ""
        if before.lower() in ("a", "an") and _opens(word) != _opens(places[at].group()):
            said[at - 1] = "an" if _opens(word) else "a"
    for at in sorted(said, reverse=True):  # from the end, so that what is ahead stays in its place
        start, end = places[at].span()
        text = text[:start] + _cased(said[at], text[start:end]) + text[end:]
    return text


def _opens(word: str) -> bool:
    """Whether a word begins with a vowel, going by its letters."""
    return word[0].lower() in "aeiou"


def _cased(word: str, like: str) -> str:
    """Give a lower-case word the capitals of the one it replaces."""
    if like.isupper() and len(like) > 1:
        return word.upper()
    return word[0].upper() + word[1:] if like[0].isupper() else word
