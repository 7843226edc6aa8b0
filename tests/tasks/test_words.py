"""Words of ten languages: forms that grammars list, and rows that say them."""

import numpy as np
import pytest

from jaxsub import errors
from jaxsub.tasks import _languages, words

KNOWN = {
    "spanish": ("hablamos", "cantando"),
    "italian": ("parlavano", "ascoltato"),
    "portuguese": ("trabalhavam", "fechou"),
    "french": ("travaillerons", "donnez"),
    "german": ("gesagt", "verkauft"),
    "latin": ("amaverunt", "portabam"),
    "esperanto": ("lernanta", "malamas"),
    "finnish": ("talossa", "kirjat"),
    "swedish": ("arbetade", "svarar"),
    "swahili": ("ninasoma", "walicheza"),
}
KNOWN["esperanto"] = ("lernanta", "rekomprenas")


@pytest.mark.parametrize("language", words.NAMES)
def test_word_forms(language):
    found = _languages.words(language)
    assert {*KNOWN[language]} <= {*found}
    assert 600 < len(found) < 2000
    assert all(word.isascii() and word.isalpha() and word.islower() and len(word) < words.LENGTH for word in found)


def test_rows_say_the_words():
    train, held_out = words.load(words.Options(language="latin"))
    spelt = []
    for data in (train, held_out):
        for row, targets in zip(data.inputs, data.targets, strict=True):
            length = int((targets >= 0).sum()) - 1
            assert row[0] == 0 and targets[length] == 0
            np.testing.assert_array_equal(row[1 : 1 + length], targets[:length])
            spelt.append("".join(chr(ord("a") + int(c) - 1) for c in targets[:length]))
    assert sorted(spelt) == _languages.words("latin")
    assert len(held_out.targets) == round(0.2 * len(spelt))


def test_score_is_the_share_of_each_words_letters():
    targets = np.array([[1, 2, 0, -1], [3, 0, -1, -1]])
    outputs = np.zeros((2, 4, 27))
    for row, place, letter in [(0, 0, 1), (0, 1, 5), (0, 2, 0), (1, 0, 3), (1, 1, 0)]:
        outputs[row, place, letter] = 1.0
    outputs[:, :, 26] += 0.5  # behind the end of a word nothing counts
    np.testing.assert_allclose(words.score(outputs, targets), [2 / 3, 1.0])


def test_languages_are_named_or_numbered():
    assert words.name(words.Options(draw=5)) == "words latin" == words.name(words.Options(language="latin"))
    with pytest.raises(errors.ConfigError, match="did you mean 'latin'"):
        words.load(words.Options(language="latn"))
