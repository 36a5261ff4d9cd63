"""The tool of the chat model: parsed arithmetic and string counting. Nothing is evaluated as Python.

calculate("12 * (3 + 4)") -> "84"; calculate("'strawberry'.count('r')") -> "3"; calculate("import os") -> None
"""

import math
import re

MAX_LENGTH = 256  # characters of an expression
MAX_DEPTH = 32  # nested parentheses and signs
MAX_MAGNITUDE = 10**30  # of an intermediate integer or float

_COUNT = re.compile(r"""\s*(?P<q>['"])(?P<text>[^'"\\\n]*)(?P=q)\s*\.\s*count\s*\(\s*(?P<r>['"])(?P<part>[^'"\\\n]*)(?P=r)
                        \s*\)\s*""", re.VERBOSE)
_TOKEN = re.compile(r"\s*(?:(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])|\d+\.?\d*|\.\d+)|(?P<op>//|[-+*/%()]))", re.ASCII)


class _NoResult(Exception):
    pass


def calculate(expression: str) -> str | None:
    """Result of an expression as text, None if it is not one or exceeds the bounds. Safe in any thread.

    Arithmetic: + - * / // % ( ) and numbers, thousands commas allowed. Strings: 'text'.count('x').
    """
    if len(expression) > MAX_LENGTH:
        return None
    count = _COUNT.fullmatch(expression)
    if count:
        return str(count["text"].count(count["part"]))
    try:
        tokens = _tokenize(expression)
        value, end = _sum(tokens, 0, 0)
        if end != len(tokens):
            raise _NoResult
        return _format(value)
    except (_NoResult, ZeroDivisionError, OverflowError):
        return None


def _tokenize(expression: str) -> list:
    """Numbers as int or float, operators as str."""
    tokens, position, text = [], 0, expression.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match:
            raise _NoResult
        position = match.end()
        if match["op"]:
            tokens.append(match["op"])
        else:
            digits = match["number"].replace(",", "")
            tokens.append(_bounded(float(digits) if "." in digits else int(digits)))
    return tokens


def _bounded(value):
    if abs(value) > MAX_MAGNITUDE or (isinstance(value, float) and not math.isfinite(value)):
        raise _NoResult
    return value


def _sum(tokens, i, depth):
    value, i = _product(tokens, i, depth)
    while i < len(tokens) and tokens[i] in ("+", "-"):
        right, after = _product(tokens, i + 1, depth)
        value, i = _bounded(value + right if tokens[i] == "+" else value - right), after
    return value, i


def _product(tokens, i, depth):
    value, i = _signed(tokens, i, depth)
    while i < len(tokens) and tokens[i] in ("*", "/", "//", "%"):
        right, after = _signed(tokens, i + 1, depth)
        operation = {"*": lambda a, b: a * b, "/": lambda a, b: a / b, "//": lambda a, b: a // b,
                     "%": lambda a, b: a % b}[tokens[i]]
        value, i = _bounded(operation(value, right)), after
    return value, i


def _signed(tokens, i, depth):
    if depth > MAX_DEPTH or i >= len(tokens):
        raise _NoResult
    token = tokens[i]
    if token in ("+", "-"):
        value, i = _signed(tokens, i + 1, depth + 1)
        return (-value if token == "-" else value), i
    if token == "(":
        value, i = _sum(tokens, i + 1, depth + 1)
        if i >= len(tokens) or tokens[i] != ")":
            raise _NoResult
        return value, i + 1
    if isinstance(token, str):
        raise _NoResult
    return token, i + 1


def _format(value) -> str:
    """Integers plainly; floats with up to 10 significant decimals and no trailing zeros, 3.0 as "3.0"."""
    if isinstance(value, int):
        return str(value)
    rounded = round(value, 10)
    return str(rounded if abs(rounded) < 1e15 else value)
