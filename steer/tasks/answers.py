"""What a written answer comes to: the piece that states it, the number in it, the letter chosen."""

import re
from fractions import Fraction

_NUMBER = re.compile(r"(?<![\w.)}])-?\s*\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|(?<!\w)-?\.\d+")
_HASHES = re.compile(r"####[ \t]*(.+)")
_ANSWER_IS = re.compile(
    r"\banswer(?:\s+is|\s*[:=])[ \t]*:?[ \t]*(.+?)(?:\.\s|\.?\**\s*$|\n)", re.IGNORECASE | re.MULTILINE
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_LETTER = re.compile(
    r"^[^A-Za-z]*(?:\\text(?:bf)?\{|\\mathrm\{)?(?:(?i:option|choice)\s+)?[(\[]*([A-Z])(?=\s*$|\s*[)\].:,;}*$])"
)
_LAST_LETTER = re.compile(r"\(([A-Z])\)|^\W*([A-Z])\W*$", re.MULTILINE)
_THIN = re.compile(r"\{,\}|\\[,!;]")  # what TeX writes between thousands


def stated(text: str) -> str | None:
    """What an answer states as its result: the last `\\boxed{x}`, else the last `#### x`, else what follows the last
    "answer is". None where it states nothing.
    """
    box = last_boxed(text)
    if box is not None:
        return box
    for pattern in (_HASHES, _ANSWER_IS):
        if pieces := pattern.findall(text):
            return str(pieces[-1]).strip(" \t*")
    return None


def last_boxed(text: str) -> str | None:
    """What the last whole `\\boxed{...}` holds, braces within it included. None where there is none."""
    for start in reversed([match.end() for match in _BOX.finditer(text)]):
        depth = 1
        for at in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                return text[start:at].strip()
    return None


def number_of(text: str) -> Fraction | None:
    """The number an answer comes to: the first of what it states, else the last of all.

    It may be written `1,234`, `-5`, `$3.50` or `3/4`.
    """
    piece = stated(text)
    numbers = _NUMBER.findall(_THIN.sub("", text if piece is None else piece))
    if not numbers:
        return None
    digits = re.sub(r"[,$\s]", "", numbers[-1 if piece is None else 0])
    try:
        return (
            Fraction(digits) if "/" not in digits else Fraction(digits.split("/")[0]) / Fraction(digits.split("/")[1])
        )
    except ZeroDivisionError:
        return None


def letter_of(text: str) -> str | None:
    """The letter an answer chooses: of what it states, else the last in round brackets or alone on its line."""
    piece = stated(text)
    if piece is not None:
        match = _LETTER.match(piece)
        return match.group(1) if match else None
    letters = [a or b for a, b in _LAST_LETTER.findall(text)]
    return letters[-1] if letters else None
