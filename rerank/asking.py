"""Answer a question about a picture by scoring the caption that each choice would make true."""

from __future__ import annotations

import re

# A question's beginning, and the caption it turns into. Tried in order.
_RULES = (
    (r"(?:what|which) colou?r (?:is|are|was|were) (?P<thing>.+)", "{choice} {thing}"),
    (r"(?:what|which) colou?r (?P<thing>.+?) (?:is|are) (?P<rest>.+)", "{choice} {thing} {rest}"),
    (r"how many (?P<thing>.+?)(?: (?:are|is) (?:there|shown|visible|in the picture).*)",
     "{choice} {thing}"),
    (r"how many (?P<thing>.+)", "{choice} {thing}"),
    (r"what (?:is|are) (?P<thing>.+?) doing", "{thing} {choice}"),
    (r"what (?:is|are) (?P<thing>.+?) (?P<verb>\w+ing)", "{thing} {verb} {choice}"),
    (r"what (?:is|are) (?P<place>(?:in|on|under|behind|above|below|near|next to) .+)",
     "{choice} {place}"),
    (r"where (?:is|are) (?P<thing>.+)", "{thing} {choice}"),
    (r"who (?:is|are) (?P<rest>.+)", "{choice} {rest}"),
    (r"what (?:is|are) (?:this|that|it|shown)(?: .*)?", "a photo of {choice}"),
    (r"(?:is|are) (?:this|it|there) (?P<rest>.+ or .+)", "{choice}"),
)  # fmt: skip
_ARTICLES = re.compile(r"^(?:the|this|that|these|those|a|an) ")


def fill_in(question: str, choices: list[str]) -> list[str]:
    """Return the caption that each choice makes of a question.

    A question of no known form becomes "QUESTION CHOICE", which is worse but still an answer.

    >>> fill_in("What color is the car?", ["red", "blue"])
    ['red car', 'blue car']
    >>> fill_in("what is the man doing?", ["running", "sitting"])
    ['the man running', 'the man sitting']
    """
    plain = " ".join(question.lower().split()).rstrip("?!. ")
    for pattern, caption in _RULES:
        if found := re.fullmatch(pattern, plain):
            parts = found.groupdict()
            if caption.startswith("{choice} {thing}"):
                parts["thing"] = _ARTICLES.sub("", parts["thing"])
            return [caption.format(choice=choice, **parts) for choice in choices]
    return [f"{plain} {choice}" for choice in choices]
