"""What a written answer comes to: the piece that states it, its text, its number or quantity, the letter chosen."""

import re
import unicodedata
from fractions import Fraction

_NUMBER = re.compile(r"(?<![\w.)}])[-+]?\s*\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|(?<!\w)[-+]?\.\d+")
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_ANSWER_IS = re.compile(r"\banswer(?:\s+is|\s*[:=])[ \t]*:?[ \t]*(?=\S)", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_LETTER = re.compile(
    r"^[^A-Za-z]*(?:\\text(?:bf)?\{|\\mathrm\{)?(?:(?i:option|choice)\s+)?[(\[]*([A-Z])(?=\s*$|\s*[)\].:,;}*$])"
)
_LAST_LETTER = re.compile(r"\(([A-Z])\)|^[^\w\n]*([A-Z])[^\w\n]*$", re.MULTILINE)
_THIN = re.compile(r"\{,\}|\\[,!;]")  # what TeX writes between thousands
_SPACED = re.compile(r"(?<![\d.,])\d{1,3}(?:[ \u2009\u202f\u00a0]\d{3})+(?![\d])")
_MINUS = str.maketrans({c: "-" for c in "\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d"} | {"\u2044": "/"})
_AROUND = " \t\n\"'`\u2018\u2019\u201c\u201d*_"
_CLOCK = re.compile(r"(?<!\d)0(\d:\d\d)(?!\d)")
_QUANTITY = re.compile(r"^([-+]?[\d.,/ ]*\d)\s*(%|\u00b0|[a-z][a-z .^0-9/]*)?$")
_TEX_WORD = re.compile(r"\\[a-zA-Z]+")
_SPEAKS = re.compile(r"[^\W\d_]{2,}")
_FUNCTIONS = {"sin", "cos", "tan", "log", "ln", "exp", "sqrt", "pi", "inf", "infty", "infinity", "or", "and", "mod"}
# Units, each with its other names: two of different lines are different units.
_UNITS = (
    "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre", "km kilometer kilometre", "in inch inche",
    "ft foot feet", "yd yard", "mi mile", "g gram", "mg milligram", "kg kilogram", "lb pound", "oz ounce", "ton tonne",
    "ms millisecond", "sec second", "min minute", "h hr hour", "day", "week", "month", "year", "l liter litre",
    "ml milliliter millilitre", "% percent", "\u00b0 degree", "dollar", "euro", "cent", "mph", "km/h kmh",
)  # fmt: skip
UNITS = {name: line.split()[0] for line in _UNITS for name in line.split()}
_TAIL = 50_000  # letters from the end of an answer that are read: what it states stands there


def stated(text: str) -> str | None:
    """What an answer states as its result: the last `\\boxed{x}`, else the last `#### x`, else what follows the last
    "answer is". None where it states nothing.
    """
    text = text[-_TAIL:]
    box = last_boxed(text)
    if box is not None:
        return box
    if pieces := _HASHES.findall(text):
        return str(pieces[-1]).strip(" \t*")
    ends = [match.end() for match in _ANSWER_IS.finditer(text)]
    if not ends:
        return None
    line = text[ends[-1] :].partition("\n")[0]
    sentence = re.split(r"\.\s", line, maxsplit=1)[0]
    return sentence.rstrip().rstrip("*").removesuffix(".").strip(" \t*")


def last_boxed(text: str) -> str | None:
    """What the last whole `\\boxed{...}` holds, braces within it included. None where there is none."""
    boxes = {match.end() - 1 for match in _BOX.finditer(text)}
    best, open_at = (-1, -1), []
    for brace in re.finditer(r"[{}]", text):
        if brace.group() == "{":
            open_at.append(brace.start())
        elif open_at:
            start = open_at.pop()
            if start in boxes and start > best[0]:
                best = (start, brace.start())
    return None if best[0] < 0 else text[best[0] + 1 : best[1]].strip()


def plain_text(text: str) -> str:
    """A text as it is compared: one kind of minus, space and case; no quotes, dollars, box or full stop around it."""
    text = unicodedata.normalize("NFKC", text[-_TAIL:]).translate(_MINUS)
    text = " ".join(text.split()).strip(_AROUND)
    box = last_boxed(text)
    if box is not None and text.startswith("\\") and text.endswith("}"):
        text = box
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text.strip("$")
    inner = re.fullmatch(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", text.strip(_AROUND))
    text = (inner.group(1) if inner else text).strip(_AROUND).removesuffix(".").strip(_AROUND)
    return _CLOCK.sub(r"\1", text).casefold()


def number_of(text: str) -> Fraction | None:
    """The number an answer comes to: the first of what it states, else the last of all.

    It may be written `1,234`, `1 234`, `-5` with any minus, `$3.50` or `3/4`.
    """
    text = unicodedata.normalize("NFKC", text[-_TAIL:]).translate(_MINUS)
    piece = stated(text)
    whole = text if piece is None else piece
    if piece is not None or len(whole) < 40:  # in running text two numbers may stand side by side
        whole = _SPACED.sub(lambda match: re.sub(r"\D", "", match.group()), whole)
    numbers = _NUMBER.findall(_THIN.sub("", whole))
    return None if not numbers else _fraction(numbers[-1 if piece is None else 0])


def _fraction(written: str) -> Fraction | None:
    above, slash, below = re.sub(r"[,$\s+]", "", written).partition("/")
    if max(len(above), len(below)) > 1_000:
        return None
    try:
        return Fraction(above) / Fraction(below) if slash else Fraction(above)
    except (ValueError, ZeroDivisionError):
        return None


def quantity_of(text: str) -> tuple[Fraction, str] | None:
    """A number and its unit, of a text that is nothing else: `5 cm`, `50%`, `3 apples`."""
    match = _QUANTITY.match(_THIN.sub("", plain_text(text)).replace("\\%", "%").removeprefix("$"))
    if match is None:
        return None
    number, unit = _fraction(match.group(1).replace(" ", "")), (match.group(2) or "").strip()
    if number is None:
        return None
    return number, UNITS.get(unit) or UNITS.get(unit.removesuffix("s")) or unit.removesuffix("s")


def letter_of(text: str) -> str | None:
    """The letter an answer chooses: of what it states, else the last in round brackets or alone on its line."""
    text = text[-_TAIL:]
    piece = stated(text)
    if piece is not None:
        match = _LETTER.match(piece)
        return match.group(1) if match else None
    letters = [a or b for a, b in _LAST_LETTER.findall(text)]
    return letters[-1] if letters else None


def is_mathematics(gold: str) -> bool:
    """Is an answer a number, a quantity or a formula, and no words? A time of day is words."""
    text = plain_text(gold)
    if re.fullmatch(r"\d{1,2}:\d\d(:\d\d)?( ?[ap]\.?m\.?)?", text):
        return False
    if quantity_of(gold) is not None:
        return True
    if _TEX_WORD.search(gold) and not re.fullmatch(r"\\(text|mathrm|textbf)\{[^{}]*\}", gold.strip()):
        return True
    if set(_SPEAKS.findall(text)) - _FUNCTIONS:
        return False
    return bool(re.search(r"[\d+*/^=<>|()\[\]{},]", text)) or len(text) == 1
