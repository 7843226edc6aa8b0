"""What the standard JSON parser lets through, or dies of, must come out as an InputError with its place."""

import json
import time

import pytest

from jaxsub import errors
from jaxsub.formats import _json

REFUSED = {
    "byte order mark": (b'\xef\xbb\xbf{"a": 1}', "UTF-8"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "UTF-8"),
    "utf-16 without mark": ('{"a": 1}'.encode("utf-16-le"), "UTF-8"),
    "bad utf-8": (b'{"\xff": 1}', "byte 2"),
    "repeated key": (b'{"k": 1, "k": 1}', "k: the key appears twice"),
    "repeated by escape": (b'{"k": 1, "\\u006b": 2}', "k: the key appears twice"),
    "repeated below": (b'{"a": [{"k": 1, "k": 1}]}', "twice"),
    "nan": (b'{"a": NaN}', "NaN"),
    "infinity": (b'{"a": -Infinity}', "Infinity"),
    "overflow": (b'{"a": 1e999}', "out of range"),
    "long real": (b'{"a": 0.' + b"1" * 100_000 + b"}", "out of range"),
    "long integer": (b'{"a": ' + b"1" * 5000 + b"}", "5000 digits"),
    "lone surrogate": (b'{"a": "\\ud800"}', "surrogate"),
    "lone surrogate key": (b'{"\\udfff": 1}', "surrogate"),
    "trailing text": (b'{"a": 1} x', "Extra data"),
    "cut": (b'{"a": ', "character 6"),
    "control character": (b'{"a": "\x01"}', "control character"),
    "deep list": (b"[" * 200_000 + b"]" * 200_000, "deep"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "deep"),
    "brackets only": (b"[" * 200_000, "deep"),
    "mixed brackets": (b"[}" * 100_000, "deep"),
    "empty": (b"", "character 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_place(name):
    data, text = REFUSED[name]
    with pytest.raises(errors.InputError) as caught:
        _json.parse(data, "dir/header.json")
    assert text in str(caught.value)
    assert str(caught.value).startswith("dir/header.json")
    assert str(caught.value).isascii()


@pytest.mark.parametrize(
    "value", [{}, [], {"a": [1, -2, 1.5, None, True, 2**63 - 1]}, {"é": '\\"[{'}, "x", json.loads("[" * 40 + "]" * 40)]
)
def test_accepts_what_json_is(value):
    for ascii_only in (True, False):
        assert _json.parse(json.dumps(value, ensure_ascii=ascii_only).encode(), "f") == value


def test_surrogate_pairs_are_text():
    assert _json.parse(b'"\\ud83d\\ude00"', "f") == "\U0001f600"


def test_minus_zero_is_no_integer():
    assert type(_json.parse(b"-0", "f")) is float


@pytest.mark.parametrize(
    "data", [b'"' + b'\\"' * 1_000_000, b'"' * 1_000_001, b"\\" * 2_000_001, b"[0" + b",0" * 5_100_000 + b"]"]
)
def test_hostile_text_costs_no_more_than_reading_it(data):
    start = time.perf_counter()
    with pytest.raises(errors.InputError):
        _json.parse(data, "f")
    assert time.perf_counter() - start < 2
