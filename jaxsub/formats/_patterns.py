"""PEFT's rank_pattern and alpha_pattern: regular expressions from a file, matched under a bound on the work.

A key matches a module name as `(.*\\.)?(key)$` from the start; the first key in file order wins. A hostile pattern
can keep a backtracking matcher busy for years, so what it may cost is estimated from its form beforehand.
"""

import math
import re

from jaxsub import errors

MAX_LENGTH = 512  # characters of a pattern
MAX_PATTERNS = 20_000  # each takes a tenth of a millisecond to compile
MAX_TEXT = 1 << 20  # characters of all of them
MAX_QUANTIFIERS = 4
MAX_WORK = 5e8  # steps of the matcher, some seconds
_QUANTIFIER = re.compile(r"[*+?{]")
_ODD = re.compile(r"\(\?(?!:)|\\[1-9]|\)[*+?{]")  # lookaround, back references, repeated groups


def table(patterns, names, path, field):
    """{name: value} of the names that a pattern matches.

    Args:
        patterns: {regular expression: value}, in file order.
        names: module names.
        path, field: for messages.

    Raises:
        InputError: a pattern that is no regular expression, or that could run for too long.
    """
    if not patterns:
        return {}
    if len(patterns) > MAX_PATTERNS or sum(map(len, patterns)) > MAX_TEXT:
        raise _refuse(path, field, f"has {len(patterns)} keys: more than {MAX_PATTERNS}, or too long all together")
    for pattern in patterns:
        _check(pattern, path, field)
    work = sum(_work(pattern, len(name)) for pattern in patterns for name in names)
    if work > MAX_WORK:
        raise _refuse(path, field, f"could take {work:.0e} steps to match")
    compiled = [(_compile(p, path, field), value) for p, value in patterns.items()]
    found = {}
    for name in names:
        for pattern, value in compiled:
            if pattern.match(name):
                found[name] = value
                break
    return found


def _refuse(path, field, reason):
    return errors.InputError(path, reason, key=field, hint="use plain module names as keys", rule="H13")


def _check(pattern, path, field):
    if len(pattern) > MAX_LENGTH or len(_QUANTIFIER.findall(pattern)) > MAX_QUANTIFIERS or _ODD.search(pattern):
        raise _refuse(path, field, f"has a key that is too involved: {errors.quote(pattern, 60)}")


def _compile(pattern, path, field):
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise _refuse(path, field, f"has a key that is no regular expression ({error})") from None


def _work(pattern, length):
    """Steps to match at worst: every quantifier multiplies by the length, every choice by its branches."""
    loops = len(_QUANTIFIER.findall(pattern)) + 1
    bars = pattern.count("|")
    choices = (bars + 1) ** min(max(1, pattern.count("(")), bars) if bars else 1
    return (1 + length) ** loops / math.factorial(loops) * choices
