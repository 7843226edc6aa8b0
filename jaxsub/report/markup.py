"""Elements and escaping: text becomes markup only through `tag`, which escapes whatever is not markup already."""

import html
import re
import unicodedata


class Markup(str):
    """Text that is markup already; anything else is escaped when it is put inside an element."""

    __slots__ = ()


def visible(text):
    """`text` with every character that cannot be seen (controls, bidi marks, surrogates) written as an escape.

    Stacks of more than two combining marks are cut open the same way, since they paint over other lines.
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    shown, stacked = [], 0
    for character in text:
        stacked = stacked + 1 if unicodedata.combining(character) else 0
        plain = character.isprintable() and stacked <= 2
        shown.append(character if plain else ascii(character)[1:-1])
    return "".join(shown)


def escape(text):
    """`text` safe inside elements and quoted attributes; markup passes unchanged."""
    return text if isinstance(text, Markup) else Markup(html.escape(visible(text), quote=True))


def join(parts):
    """The parts one after another, each escaped unless it is markup; None is left out."""
    return Markup("".join([escape(part) for part in parts if part is not None]))


def attributes(named):
    """` key="value"` for each; `class_` is class, `data_x` is data-x; None and False are left out, True is bare."""
    written = []
    for key, value in named.items():
        if value is None or value is False:
            continue
        name = key.rstrip("_").replace("_", "-")
        written.append(f" {name}" if value is True else f' {name}="{escape(value)}"')
    return "".join(written)


_OPEN = ("br", "hr", "input", "meta", "wbr")  # never closed in HTML
_VOID = frozenset({*_OPEN, "line", "circle", "path", "rect", "image"})
_LONG_WORD = 16  # characters; a longer one may break anywhere, since a phone's column may be narrower
_BREAKS = re.compile(r"(?<=[/._])(?=[^/._])")


def tag(element, /, *children, **named):
    """`<element attributes>children</element>`; children that are lists are joined, None is left out."""
    opened = f"<{element}{attributes(named)}>"
    if element in _VOID and not children:
        return Markup(opened if element in _OPEN else f"{opened[:-1]}/>")
    inner = [join(child) if isinstance(child, (list, tuple)) else child for child in children]
    return Markup(f"{opened}{join(inner)}</{element}>")


def shorten(text, limit):
    """`text` cut in the middle to `limit` characters; the end of a layer's name tells more than its start."""
    text = visible(text)
    if len(text) <= limit:
        return text
    head = max((limit - 1) * 2 // 5, 1)
    tail = max(limit - 1 - head, 1)
    return f"{text[:head]}…{text[-tail:]}"


def name(text, limit=56, shown=None):
    """A name from the data: isolated from the text around it, shortened, whole in the tooltip (up to 600).

    `shown` is what to show of it, where the caller knows better than to shorten it.
    """
    shown = shorten(text, limit) if shown is None else shown
    whole = None if shown == str(text) else shorten(text, 600)
    return tag("bdi", breakable(shown), class_="name", title=whole)


def breakable(text):
    """`text` that breaks after "/", "." and "_", and inside a word only where the word is very long."""
    words = [tag("span", word, class_="long") if len(word) > _LONG_WORD else word for word in _BREAKS.split(text)]
    return join([words[0], *[join([tag("wbr"), word]) for word in words[1:]]])
