r"""Mathematical equivalence of an answer and a label.

Numbers, units, words, and text such as Python writes it are read by :mod:`miles_spmd.rewards.notation`, exactly;
everything else is LaTeX, which math-verify reads and compares (https://github.com/huggingface/Math-Verify).

What a policy writes is arbitrary, so nothing that it writes is an error here: an answer that cannot be parsed, or not
compared in time, is wrong. math-verify limits its time by SIGALRM, which works in the main thread of a process only and
does not interrupt a long computation inside C; the reward pool therefore runs this in the main thread of its processes,
and an answer whose process it has to kill counts as wrong, too.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import product
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import convert_to_pct
from math_verify import parse, verify
from math_verify.errors import TimeoutException
from math_verify.grader import get_pct_val, is_assignment_relation, is_equation, take_last_relation
from math_verify.utils import timeout

from miles_spmd.rewards.labels import last_boxed, math_label
from miles_spmd.rewards.notation import Quantity, expression, nearly_same, quantity, same_quantity, same_words, tidy

_TAIL = 2000  # characters at the end of a response that are searched for an answer outside a box
_LONGEST = 1000  # characters of a boxed answer; the parser's time grows faster than its length
_LONGEST_LINE = 200  # characters of an answer outside a box
_SECONDS = 5  # for one comparison
_TAG = re.compile(r"</?[A-Za-z_]{2,}>")  # of <answer>, say
_SIGNS = re.compile(r": |\b(?:is|are)\b"), re.compile(r"[=:]|\b(?:is|are)\b")  # of equality; 7:30 is one answer
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}(?:[ ,]+[A-Za-z]{2,}){2}")  # three words in a row


def math(text: str, label: Any) -> float:
    r"""Return 1.0 if the answer in ``text`` equals ``label`` as mathematics, else 0.0.

    The answer is the content of the last ``\boxed{...}``, or without one what the response ends with: its last line,
    what follows its last sign of equality, or else the last number or LaTeX formula. The label is a number, or a string
    with a number, formula or words; of GSM8K's solutions only the text after ``####`` counts. Raises ValueError for any
    other label.
    """
    gold = math_label(label)
    answer = last_boxed(text)
    if answer is not None and answer.strip() == gold:
        return 1.0
    if answer is not None and len(answer) > _LONGEST:
        return 0.0
    try:
        return float(_ends_with(text, gold) if answer is None else _equals(answer, gold))
    except (Exception, TimeoutException):  # sympy raises anything; TimeoutException is a BaseException
        return 0.0


def _equals(answer: str, gold: str) -> bool:
    found, gold = tidy(answer), tidy(gold)
    if (a := quantity(gold)) and (b := quantity(found)):
        return same_quantity(a, b)
    named = same_words(gold, found)
    return _equal(_read(gold), _read.__wrapped__(found)) if named is None else named


def _ends_with(text: str, gold: str) -> bool:
    """Compare with what a response without a box ends with: all of its last line, what follows the last sign or word
    of equality in it, an expression that is its last word; otherwise the last number or formula anywhere."""
    text = _TAG.sub("\n", text[-_TAIL:]).strip()
    gold, line = tidy(gold), _bare(text.rpartition("\n")[2])
    ends = dict.fromkeys([line, *(_bare(sign.split(line)[-1]) for sign in _SIGNS)])
    if any(end == gold or same_words(gold, end) for end in ends):
        return True
    for end in ends:
        if (a := quantity(gold)) and (b := quantity(end)):
            return same_quantity(a, b)
        if re.search(r"[\d*/^+]|pi$", end) and (value := expression(end)) is not None:
            return _equal(_read(gold), [value]) or any(_is_answer(one, gold) for one in ends)
    if any(_is_answer(end, gold) for end in ends):
        return True
    last = line.split()[-1] if line else ""
    if re.search(r"\d.*[*^/]|[*^/].*\d", last) and (value := expression(last)) is not None:
        return _equal(_read(gold), [value])
    return _equal(_read(gold), parse(_in_latex(text), raise_on_error=True))


def _bare(line: str) -> str:
    return tidy(line.strip("*_#` "))


def _is_answer(line: str, gold: str) -> bool:
    """Whether a line is nothing but an answer, and equals the label as one in a box does."""
    if not line or len(line) > _LONGEST_LINE or _PROSE.search(line):
        return False
    try:
        return _equals(line, gold)
    except (Exception, TimeoutException):  # a number may stand in it
        return False


# --- reading ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)  # the samples of a group share their label
def _read(text: str) -> list[Any]:
    """Return what the text says as sympy objects, or as a string where nothing can parse it."""
    found = quantity(text)
    if found is not None and found.unit in ("", "percent"):
        value = sympy.Rational(found.value.numerator, found.value.denominator)
        return [convert_to_pct(value) if found.unit else value]
    if (value := expression(text)) is not None:
        return [value]
    text = _in_latex(text)
    return parse(f"\\boxed{{{text}}}", raise_on_error=True) or parse(text, raise_on_error=True)


def _in_latex(text: str) -> str:
    """Return the text with what only Python writes as LaTeX writes it: 1e-5, 2**10, and elements of a tuple."""
    if found := re.fullmatch(r"([(\[]|\\\{)(.*)([)\]]|\\\})", text, re.DOTALL):
        elements = re.split(r",(?![^()\[\]{}]*[)\]}])", found[2])
        values = [expression(one.strip()) for one in elements]
        if len(elements) > 1:
            elements = [one if value is None else sympy.latex(value) for one, value in zip(elements, values)]
            text = found[1] + ", ".join(elements) + found[3]
    text = re.sub(r"(?<![\w.])(?:\d+\.?\d*|\.\d+)[eE][-+]?\d{1,3}(?!\w)", lambda n: f"{Decimal(n.group()):f}", text)
    return re.sub(r"\*\* ?(-?\w+|\([^()]*\))", r"^{\1}", text)


# --- comparing -------------------------------------------------------------------------------------------------------


@timeout(_SECONDS)
def _equal(gold: list[Any], found: list[Any]) -> bool:
    return any(_same(a, b) for a, b in product(gold, found))


def _same(gold: Any, found: Any) -> bool:
    if isinstance(gold, sympy.Basic) and isinstance(found, sympy.Basic):
        if is_equation(found) and not is_equation(gold):
            found = take_last_relation(found).rhs
        elif is_assignment_relation(gold) and not is_equation(found):
            gold = take_last_relation(gold).rhs
        a, b = _number(gold), _number(found)
        if a is not None and b is not None:
            return _same_number(*a, *b)
    return bool(verify([gold], [found], timeout_seconds=_SECONDS, raise_on_error=True))


def _number(parsed: sympy.Basic) -> tuple[sympy.Expr, str] | None:
    """Return a real number, exactly, and the unit "percent" or ""; None for anything else."""
    if not isinstance(parsed, sympy.Expr) or parsed.free_symbols:
        return None
    share = get_pct_val(parsed)
    value = (parsed if share is None else share).doit()
    value = value.xreplace({number: sympy.Rational(str(number)) for number in value.atoms(sympy.Float)})
    if not value.is_number or value.is_real is not True or not value.is_finite:
        return None
    return value, "" if share is None else "percent"


def _same_number(a: sympy.Expr, unit: str, b: sympy.Expr, other: str) -> bool:
    """math-verify rounds to six decimals, with which 1e-7 equals 2e-7. Here numbers are equal, or one is irrational and
    the other a decimal that agrees in its first six decimals and digits."""
    if a.is_Rational and b.is_Rational:
        return same_quantity(Quantity(_fraction(a), unit), Quantity(_fraction(b), other))
    a, b = (a / 100 if unit else a), (b / 100 if other else b)
    near, close = (_fraction(sympy.Rational(str(sympy.N(value, 30)))) for value in (a, b))
    if abs(sympy.N(a - b, 30, maxn=200)) <= 1e-20 * max(abs(near), abs(close)):
        return True
    is_decimal = any(value.is_Rational and not value.is_Integer for value in (a, b))
    return is_decimal and nearly_same(near, close)


def _fraction(value: sympy.Rational) -> Fraction:
    return Fraction(int(value.p), int(value.q))
