"""Words of ten languages, character by character: the next letter from those before it.

A word is a row of 16 places: an end sign (0), then its letters (1 to 26); what is asked for is the letter that follows,
and the end sign behind the last one. A fifth of the words is held out.
"""

import dataclasses
import functools

import numpy as np

from jaxsub import errors
from jaxsub.tasks import _data, _languages

MODEL, OUTPUTS = "transformer", 27
batches, loss = _data.batches, _data.cross_entropy
LENGTH, HELD_OUT = 16, 0.2
NAMES = tuple(_languages.LANGUAGES)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the task."""

    batch_size: int = 64
    language: str = ""  # spanish, latin, finnish, swahili, ...; empty: the one of number `draw`
    draw: int = 0  # number of the language, from 0 on


def name(options):
    """'words spanish'."""
    return f"words {_language(options)}"


def _language(options):
    if options.language:
        return errors.require_known("language", options.language, NAMES)
    return NAMES[options.draw % len(NAMES)]


def load(options=Options()):
    """(train, held out) as Data; inputs (n, 16) int32, targets (n, 16) int32 with -1 behind the end.

    Raises:
        ConfigError: an unknown language.
    """
    return _split(_language(options))


@functools.cache
def _split(language):
    words = _languages.words(language)
    inputs, targets = np.zeros((len(words), LENGTH), np.int32), np.full((len(words), LENGTH), -1, np.int32)
    for row, word in enumerate(words):
        letters = [ord(letter) - ord("a") + 1 for letter in word]
        inputs[row, 1 : 1 + len(word)] = letters
        targets[row, : 1 + len(word)] = [*letters, 0]
    order = np.random.RandomState(0).permutation(len(words))
    cut = round(len(words) * HELD_OUT)
    return tuple(_data.whole(inputs[rows], targets[rows]) for rows in (order[cut:], order[:cut]))


def score(outputs, targets):
    """Share of each word's letters that are right: outputs (..., n, T, 27), targets (..., n, T); (..., n)."""
    asked = targets >= 0
    return (_data.right(outputs, targets) & asked).sum(axis=-1) / asked.sum(axis=-1)
