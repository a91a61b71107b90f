"""How words feel: a small list, looked up, so that the same text always moves the same way."""

from __future__ import annotations

import re

_GLAD = """
amazing beautiful best brilliant cheerful congratulations delight delighted enjoy enjoyed excellent fantastic fun glad good
gorgeous grateful great happy helpful joy joyful kind lovely love loved nice perfect pleased proud relieved smile super sweet
thank thanks thrilled wonderful works worked yay
"""
_SAD = """
afraid alone annoyed annoying anxious awful bad boring broken cry crying dead died disappointed disgusting dreadful fail failed
failure fear frustrated grief hate hated horrible hurt lonely lost miserable mourn pain poor problem sad scared sick sorry
stupid terrible tired ugly unhappy upset useless worried worse worst wrong
"""
_STIRRING = """
amazing angry anxious awesome brilliant danger emergency excited exciting fantastic fear furious hate help horrible hurry
immediately incredible love now panic quick rage scared shocked thrilled urgent wow yay yes
"""
_CALMING = """
bored boring breathe calm calmly easy gentle gently patient peace peaceful quiet relax relaxed rest sleep sleepy slow slowly
tired tranquil
"""
_NEGATING = "no not never without isn't wasn't don't doesn't didn't can't won't hardly isnt dont cant"
_REACH = 3
"""A negation turns the words after it, so far."""


def _each(words: str, value: float) -> dict[str, float]:
    return dict.fromkeys(words.split(), value)


_VALENCE = _each(_GLAD, 1.0) | _each(_SAD, -1.0)
_AROUSAL = _each(_STIRRING, 1.0) | _each(_CALMING, -1.0)
_TURNING = frozenset(_each(_NEGATING, 0.0))
_WORD = re.compile(r"[a-z]+(?:['’][a-z]+)?")


def feel(text: str) -> tuple[float, float]:
    """How a text moves whoever reads it: valence and arousal, each in -1…1; (0, 0) for what has no such words."""
    valence = arousal = 0.0
    negated_for = 0
    found = 0
    for match in _WORD.finditer(text.lower()):
        word = match[0].replace("’", "'")
        if word in _TURNING:
            negated_for = _REACH
            continue
        sign = -1.0 if negated_for else 1.0
        negated_for = max(0, negated_for - 1)
        if word in _VALENCE or word in _AROUSAL:
            found += 1
            valence += sign * _VALENCE.get(word, 0.0)
            arousal += _AROUSAL.get(word, 0.0)
    if found:
        valence, arousal = valence / found, arousal / found
    arousal += 0.2 * min(3, text.count("!"))
    return valence, max(-1.0, min(1.0, arousal))
