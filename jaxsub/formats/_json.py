"""Strict JSON: what the standard parser accepts or dies of, and a header must not hold, is refused by name.

Refused: anything but UTF-8, byte order marks, repeated keys, NaN and Infinity, numbers out of range, lone
surrogates, deep nesting (bounded before parsing), text after the end. Every fault is an InputError.
"""

import json
import math
import re

from jaxsub import errors

MAX_DEPTH = 64  # a safetensors header needs 3
MAX_VALUES = 3_000_000  # between commas; parsing them takes a second or two
MAX_TEXTS = 2_000_000  # five a tensor
MAX_ESCAPES = 1_000_000  # each costs a text of its own while it is parsed; quotes in metadata need some thousands
MAX_DIGITS = 19  # integers up to 64 bits
_BRACKETS = b"[]{}"
_OTHER = bytes(c for c in range(256) if c not in _BRACKETS)
_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _Fault(Exception):
    """Raised inside the parser's hooks; carries the reason and the key."""

    def __init__(self, reason, key=None):
        self.reason, self.key = reason, key


def parse(data, file, *, rule="H2"):
    """The value of a JSON text in bytes.

    Args:
        data: bytes of the whole text.
        file: path for the message.
        rule: class of fault, for the quarantine list.

    Raises:
        InputError: naming the file, with the position or the key.
    """
    try:
        return _parse(data)
    except _Fault as fault:
        raise errors.InputError(
            file, fault.reason, key=fault.key, hint="the file is damaged; get it again", rule=rule
        ) from None


def _parse(data):
    if data[:3] == b"\xef\xbb\xbf" or data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:4]:
        raise _Fault("the JSON text does not start as plain UTF-8 (byte order mark or UTF-16)")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Fault(f"the JSON text is not UTF-8 at byte {error.start}") from None
    _bound_depth(data)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _Fault(f"is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise _Fault("is nested too deeply") from None
    if _SURROGATE.search(text):
        _refuse_lone_surrogates(value)
    return value


def _bound_depth(data):
    """Refuses nesting beyond about 2 * MAX_DEPTH; linear in time, no recursion.

    Strings are cut out, then matching empty pairs are removed once for each level: what is left over is deeper
    than MAX_DEPTH, or unbalanced by so little that the parser can meet it safely.
    """
    escapes = data.count(b"\\")
    if escapes > MAX_ESCAPES:
        raise _Fault(f"holds more than {MAX_ESCAPES} escapes")
    if data.count(b'"') > 2 * MAX_TEXTS:
        raise _Fault(f"holds more than {MAX_TEXTS} texts")
    if escapes:
        data = _ESCAPE.sub(b"", data)
    rest = b"".join(data.split(b'"')[::2])
    if rest.count(b",") > MAX_VALUES:
        raise _Fault(f"holds more than {MAX_VALUES} values")
    rest = rest.translate(None, _OTHER)
    for _ in range(MAX_DEPTH):
        if not rest:
            return
        rest = rest.replace(b"[]", b"").replace(b"{}", b"")
    if len(rest) > MAX_DEPTH:
        raise _Fault(f"is nested more than {MAX_DEPTH} deep, or its brackets do not match")


def _object(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise _Fault("the key appears twice in one object", key)
            seen.add(key)
    return found


def _integer(text):
    if len(text) > MAX_DIGITS + 1:
        raise _Fault(f"holds a number of {len(text)} digits, more than {MAX_DIGITS}")
    return -0.0 if text == "-0" else int(text)  # as the reference reader: minus zero is no integer


def _real(text):
    number = float(text) if len(text) <= 64 else math.inf
    if not math.isfinite(number):
        raise _Fault(f"holds a number out of range: {errors.quote(text, 40)}")
    return number


def _constant(name):
    raise _Fault(f"holds {name}, which is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_real, parse_constant=_constant)


def _refuse_lone_surrogates(value):
    """Walks the value (depth is bounded already) and refuses text that cannot be encoded."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError:
                raise _Fault("holds a lone surrogate, which is not text", item) from None
        elif isinstance(item, dict):
            todo.extend(item)
            todo.extend(item.values())
        elif isinstance(item, list):
            todo.extend(item)
