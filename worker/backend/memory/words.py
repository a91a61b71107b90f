"""What a person types into a search, as a query of SQLite's FTS5 that can't be anything else."""

from __future__ import annotations

import re

_MAX_WORDS = 24
_PREFIX_FROM = 3
"""Words of at least so many characters find longer ones as well."""
_TERM = re.compile(r'"([^"]*)"|([^\W_]+)', re.UNICODE)
_COMMON_WORDS = """
a an and are as at be been but by can did do does for from had has have he her his how i if in is it its me my no not of
on or our she so that the their them there they this to us was we were what when where which who why will with would you
your
"""
_COMMON = frozenset(_COMMON_WORDS.split())


def query(text: str) -> str | None:
    """Finds what has any of the words, best fit first; a part in double quotes only as it stands. None: no word."""
    terms: list[str] = []
    for phrase, word in _TERM.findall(text):
        words = re.findall(r"[^\W_]+", phrase)
        if words:
            terms.append(f'"{" ".join(words)}"')
        elif word:
            terms.append(f'"{word}"*' if len(word) >= _PREFIX_FROM else f'"{word}"')
    # common words find everything; they are left out unless there is nothing else
    telling = [term for term in terms if term.strip('"*').lower() not in _COMMON] or terms
    return " OR ".join(dict.fromkeys(telling[:_MAX_WORDS])) or None
