"""Split a query into the phrases that name something, by a small grammar of English.

CLIP's text towers align a whole text with a picture; single token states are not aligned. So a
phrase that is to be looked for in the picture is encoded as a text of its own.
"""

from __future__ import annotations

import re

# Words that stand between two phrases and belong to neither.
_BREAKS = """
about above across after against along amid among and around as at before behind below beneath
beside besides between beyond but by during for from in inside into near of off on onto or out
outside over past through throughout to toward towards under underneath up upon via while with
within without

am are be been being is was were has have having had do does did that which who whose where when

left right top bottom next front back middle
"""
_DETERMINERS = "a an the this these those some its his her their another"
_NUMBERS = "one two three four five six seven eight nine ten several many"

BREAKS = frozenset(_BREAKS.split())
DETERMINERS = frozenset(_DETERMINERS.split())
NUMBERS = frozenset(_NUMBERS.split())


def split_phrases(text: str) -> list[str]:
    """Return the phrases of ``text`` in order, without the text itself; at most one means none.

    >>> split_phrases("a red ball left of a blue cup")
    ['a red ball', 'a blue cup']
    >>> split_phrases("two dogs running on the wet beach")
    ['two dogs running', 'the wet beach']
    """
    phrases: list[list[str]] = [[]]
    for word in re.findall(r"[^\W_]+(?:['’-][^\W_]+)*|[,;:.!?()]", text.lower()):
        if word in BREAKS or not word[0].isalnum():
            phrases.append([])
        elif word in DETERMINERS:  # opens a phrase even where no word divides: "man throws a ball"
            phrases.append([word])
        else:
            phrases[-1].append(word)
    joined = [" ".join(words) for words in phrases if set(words) - DETERMINERS - NUMBERS]
    distinct = list(dict.fromkeys(joined))
    return distinct if len(distinct) > 1 else []
