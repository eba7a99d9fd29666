r"""What is said without LaTeX: numbers in every usual spelling, units, and text such as Python writes it.

Each function returns None for text that it does not understand completely; such text is LaTeX, or words.
"""

from __future__ import annotations

import ast
import re
import unicodedata
from fractions import Fraction
from typing import Any, NamedTuple

import sympy

_LARGEST_EXPONENT = 1000  # of ten
_MOST_BITS = 4000  # of a power that is computed; a longer one is left to the LaTeX parser and its time limit

# --- typography ------------------------------------------------------------------------------------------------------

_TYPOGRAPHY = str.maketrans(
    dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\ufe63\uff0d", "-")
    | dict.fromkeys("\u00a0\u2002\u2003\u2007\u2009\u202f", " ")
    | {"×": "*", "⋅": "*", "·": "*", "÷": "/", "⁄": "/", "∕": "/", "π": r"\pi", "∞": r"\infty", "°": r"^\circ"}
)
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
_VULGAR = re.compile("[¼½¾⅐-⅞]")
_DELIMITED = re.compile(r"\$\$(.*)\$\$|\$(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)


def tidy(text: str) -> str:
    """Return the text in ASCII where that says the same, without the signs that open and close LaTeX, and without a
    full stop at its end."""
    text = _VULGAR.sub(lambda found: " " + unicodedata.normalize("NFKC", found.group()), text)
    text = _SUPERSCRIPT.sub(lambda found: f"^{{{unicodedata.normalize('NFKC', found.group())}}}", text)
    text = re.sub("π(?=[A-Za-z])", "π ", text).translate(_TYPOGRAPHY).strip()
    if (found := _DELIMITED.fullmatch(text)) and "$" not in (inner := next(filter(None, found.groups()), "")):
        text = inner.strip()
    return text.removesuffix(".").strip()


# --- numbers ---------------------------------------------------------------------------------------------------------

_THOUSANDS = re.compile(r"(?<=\d)(?:,?\\[,!;:]|\{,\}\\?!?)(?=\d{3})")
_REPEATING = re.compile(r"([-+]?)(\d+)\.(\d*)\\overline ?\{?(\d+)\}?")
_SPACE = re.compile(r"\\[,;:! ]|~")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+"
_TEN_TO = r"10 ?(?:\^|\*\*) ?[({]?([-+]?\d+)[)}]?"
_NUMBER = re.compile(rf"([-+]?) ?({_DIGITS})(?:[eE]([-+]?\d+)| ?(?:\*|x|\\times|\\cdot) ?{_TEN_TO})?")
_POWER_OF_TEN = re.compile(rf"([-+]?)(){_TEN_TO}")
_FRACTION = re.compile(
    r"([-+]?) ?(?:(\d+)(?: | ?(?=\\)))?"  # the whole part of a mixed number
    r"(?:(-?\d+) ?/ ?(\d+)|\\[dtc]?frac ?\{ ?(-?\d+) ?\} ?\{ ?(\d+) ?\}|\\[dtc]?frac ?(\d) ?(\d))"
)


def number(text: str) -> Fraction | None:
    """Read one number: 1234.5, 1,234.5, 1 234.5, 1.5e9, 1.5 * 10^9, 3/4, 1 3/4; each also as LaTeX writes it."""
    text = spaced(text)
    if repeating := _REPEATING.fullmatch(text):
        sign, whole, digits, period = repeating.groups()
        value = Fraction(f"{whole}.{digits or 0}") + Fraction(int(period), 10 ** len(digits) * (10 ** len(period) - 1))
    elif found := _NUMBER.fullmatch(text) or _POWER_OF_TEN.fullmatch(text):
        sign, digits, *exponents = found.groups()
        exponent = int(next(filter(None, exponents), "0"))
        if abs(exponent) > _LARGEST_EXPONENT:
            return None
        value = Fraction(re.sub("[ ,]", "", digits) or "1") * Fraction(10) ** exponent
    elif found := _FRACTION.fullmatch(text):
        sign, whole, *parts = found.groups()
        above, below = (int(part) for part in parts if part is not None)
        if not below or (whole and not 0 < above < below):
            return None
        value = int(whole or 0) + Fraction(above, below)
    else:
        return None
    return -value if sign == "-" else value


def spaced(text: str) -> str:
    """Return the text with a comma for every sign that separates thousands, and a blank for every other space."""
    return re.sub(" +", " ", _SPACE.sub(" ", _THOUSANDS.sub(",", text))).strip()


# --- units -----------------------------------------------------------------------------------------------------------

_UNITS = {
    name: names.split()[0]
    for names in (
        "mm millimeter millimetre",
        "cm centimeter centimetre",
        "m meter metre",
        "km kilometer kilometre",
        "in inch inche",
        "ft foot feet",
        "yd yard",
        "mi mile",
        "mg milligram",
        "g gram",
        "kg kilogram",
        "lb pound",
        "oz ounce",
        "ms millisecond",
        "s sec second",
        "min minute",
        "h hr hour",
        "day",
        "week",
        "month",
        "year yr",
        "ml milliliter millilitre",
        "l liter litre",
        "degree deg",
        "radian rad",
        "dollar usd",
        "cent",
        "euro eur",
        "percent",
    )
    for name in names.split()
}
_WRAPPED = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|operatorname) ?\{([^{}]*)\}")
_CURRENCY = {"$": "dollar", "€": "euro", "£": "sterling", "¥": "yen"}
_PRICE = re.compile(r"([-+]?) ?\\?([$€£¥]) ?(.+)")
_SUFFIX = re.compile(
    r"(?P<number>.*[\d.})])(?: ?(?P<percent>\\?%)| ?(?P<degree>\^ ?\{? ?\\circ ?\}? ?[CF]?|\\degree)"
    r"|(?P<space> *)(?P<unit>[A-Za-z][A-Za-z ]*(?: ?(?:\^ ?\{?[23]\}?|/ ?[A-Za-z]+))*))"
)


def unwrapped(text: str) -> str:
    r"""Return the text with ``\text{...}`` and its kin replaced by what is inside."""
    return re.sub(" +", " ", _WRAPPED.sub(r" \1 ", text)).strip()


class Quantity(NamedTuple):
    """A number and its unit in one spelling: "" for none, "?..." for another word than a unit of measurement."""

    value: Fraction
    unit: str


def quantity(text: str) -> Quantity | None:
    """Read a number with or without a unit."""
    text = spaced(unwrapped(text))
    if (value := number(text)) is not None:
        return Quantity(value, "")
    if (price := _PRICE.fullmatch(text)) and (value := number(price[1] + price[3])) is not None:
        return Quantity(value, _CURRENCY[price[2]])
    found = _SUFFIX.fullmatch(text)
    if found is None or (value := number(found["number"])) is None:
        return None
    if found["percent"]:
        return Quantity(value, "percent")
    if found["degree"]:
        return Quantity(value, "degree")
    unit = _unit(found["unit"])
    # 5m and 3abc are products; 5 m may be a length
    attached = not found["space"] and (unit[0] == "?" or len(unit) == 1)
    if attached or (unit[0] == "?" and re.search(r"\b[a-z]{1,2}\b", unit)):
        return None
    return Quantity(value, unit)


def _unit(text: str) -> str:
    text = re.sub(r"[ {}]+", " ", text.lower()).replace(" ^", "^").replace("^ ", "^").replace(" per ", "/").strip()
    text = re.sub(r"\b(?:square|sq) (\w+)", r"\1^2", re.sub(r"\bcubic (\w+)", r"\1^3", text))
    text = text.replace(" squared", "^2").replace(" cubed", "^3")
    parts = [part.strip() for part in re.split(r"([/^])", text)]
    known = [
        _UNITS.get(part) or _UNITS.get(part.removesuffix("s")) or (part if part in "/^23" else "") for part in parts
    ]
    return "".join(known) if all(known) else f"?{text}"


def same_quantity(gold: Quantity, found: Quantity) -> bool:
    """Whether two quantities are equal. A unit that is left out, or another word than a unit of measurement, makes no
    difference. 50 % is 0.5, and also 50, but 0.5 % is not 0.5: a share above 1 is a number of per cents."""
    (a, unit), (b, other) = gold, found
    if unit == other:
        return same_number(a, b)
    if "percent" not in (unit, other):
        return same_number(a, b) and (not unit or not other or "?" in unit[0] + other[0])
    if unit and other:
        return False
    return (abs(a) > 1 and same_number(a, b)) or same_number(a / 100 if unit else a, b / 100 if other else b)


def same_number(a: Fraction, b: Fraction) -> bool:
    """Whether two numbers are equal, or one is the other as a decimal with at least six places and digits."""
    if a == b:
        return True
    if a.denominator == 1 and b.denominator == 1:
        return False
    if _terminates(a) and _terminates(b):  # 0.1 + 0.2 in floating point is 0.3 in decimals
        return abs(a - b) <= Fraction(1, 10**14) * max(abs(a), abs(b))
    return nearly_same(a, b)


def nearly_same(a: Fraction, b: Fraction) -> bool:
    """Whether two numbers agree in their first six decimal places and in about six digits."""
    return abs(a - b) <= min(Fraction(1, 2 * 10**6), Fraction(2, 10**6) * max(abs(a), abs(b)))


def _terminates(value: Fraction) -> bool:
    return pow(10, value.denominator.bit_length(), value.denominator) == 0


# --- text such as Python writes it -----------------------------------------------------------------------------------

_FUNCTIONS = {
    name: getattr(sympy, name)
    for name in ("sqrt", "sin", "cos", "tan", "asin", "acos", "atan", "exp", "log", "factorial", "binomial")
} | {"ln": sympy.log, "abs": sympy.Abs, "cbrt": sympy.cbrt}
_CONSTANTS = {"pi": sympy.pi, "e": sympy.E}
_OPERATORS: dict[type, Any] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: _power(a, b),
}


def expression(text: str) -> sympy.Expr | None:
    """Read an expression in Python's syntax, with ``^`` as another sign for ``**``. Names of one letter are real
    variables, ``pi`` and ``e`` the constants."""
    try:
        tree = ast.parse(text.replace("^", "**").replace("\\pi", "pi").strip(), mode="eval")
        value = _evaluated(tree.body)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return None
    return value if isinstance(value, sympy.Expr) and not value.has(sympy.zoo, sympy.nan, sympy.oo) else None


def _evaluated(node: ast.expr) -> sympy.Expr:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return sympy.Rational(repr(value))
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.Name(id=name) if len(name) == 1 and name not in "iIE":
            return sympy.Symbol(name, real=True)  # as math-verify's
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
            return -_evaluated(operand) if isinstance(op, ast.USub) else _evaluated(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_evaluated(left), _evaluated(right))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            values = [_evaluated(argument) for argument in arguments]
            if name in ("factorial", "binomial") and any(value > _LARGEST_EXPONENT for value in values):
                raise ValueError("a factorial that is too large")
            return _FUNCTIONS[name](*values)
    raise ValueError("not an expression of arithmetic")


def _power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    if base.is_Rational and exponent.is_Rational:
        size = max(abs(base.p), base.q).bit_length() * abs(exponent)
        if size > _MOST_BITS:
            raise ValueError("a power that is too large")
    return base**exponent


# --- words -----------------------------------------------------------------------------------------------------------


def same_words(gold: str, found: str) -> bool | None:
    """Whether two names, choices, or lists of such are the same, whatever their case and order. Returns None where they
    may be something else: letters are variables unless there are four in a row or LaTeX marks them as text."""
    inners = [re.sub(r"^\(([A-Za-z])\)$", r"\1", unwrapped(text).strip("\"'`* ")) for text in (gold, found)]
    marked = bool(_WRAPPED.search(gold) or _WRAPPED.search(found))
    if not all(map(_WORDS.fullmatch, inners)) or not (marked or any(map(_WORD.search, inners))):
        return None
    first, second = (
        sorted(" ".join(part.split()).casefold() for part in re.split(r"[,;]|\band\b", inner) if part.strip())
        for inner in inners
    )
    return first == second


_WORD = re.compile(r"[^\W\d_]{4}")
_WORDS = re.compile(r"[^\W\d_](?:[^\W\d_]|[ ,;'.-])*")
