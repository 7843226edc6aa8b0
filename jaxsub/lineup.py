"""Which layers of different models are the same layer, which are chosen, and which models do not fit the rest.

Names and shapes only.

Layers are the same if they agree in name, parametrisation and shape. Frameworks that number their layers by run
(Keras: dense_12 in one file, dense_31 in the next) need `by_place`, which renames them by their order in the model.
"""

import collections
import difflib
import math
import re

from jaxsub import descriptors, errors

SMALLEST_GROUP = 3  # models; fewer have no held-out error worth the name
TOO_FEW = f"fewer than {SMALLEST_GROUP} models have it in this shape"
DENSE, LORA = "dense", "lora"
_RUN_NUMBER = re.compile(r"(?:(?:^|_)\d+)+$")
_SEPARATOR = re.compile(r"([/.])")


def natural(name):
    """Sort key of a name in which numbers compare as numbers."""
    parts = re.split(r"(\d{1,18})", name)
    return [(1, int(p), p) if i % 2 else (0, 0, p) for i, p in enumerate(parts)]


def layers_of(model):
    """(name, parametrisation) -> Tensor or LoraPair."""
    dense = {(name, DENSE): tensor for name, tensor in model.tensors.items()}
    return dense | {(name, LORA): pair for name, pair in model.adapters.items()}


def form_of(entry):
    """(shape, whether it is a weight): layers of one form can be stacked."""
    return (entry.shape, isinstance(entry, descriptors.LoraPair) or entry.is_float)


# Choosing layers --------------------------------------------------------------------------------------------------


def flat_shape(shape):
    """(o, i) of a weight as a matrix, all axes but the first flattened."""
    return shape[0], math.prod(shape[1:])


def layer_filter(layers, exclude):
    """Whether a layer's name is chosen, as a function of the name.

    Args:
        layers: regular expressions, one or several or None; one of them must be found in the name.
        exclude: the same; none of them may be.

    Raises:
        ConfigError: an expression that is none.
    """
    wanted, unwanted = _patterns(layers, "layers"), _patterns(exclude, "exclude_layers")
    return lambda name: (
        (not wanted or any(p.search(name) for p in wanted)) and not any(p.search(name) for p in unwanted)
    )


def _patterns(texts, option):
    texts = (texts,) if isinstance(texts, str) else tuple(texts or ())
    try:
        return [re.compile(text) for text in texts]
    except re.error as error:
        raise errors.ConfigError(f"--{option}: {error.pattern!r} is no regular expression: {error}") from error


def nothing_chosen(layers, exclude, every):
    """What is wrong with expressions that leave no layer of any model; arguments as `layer_filter` and `by_place`."""
    names = _names(every)
    wanted = list(filter(layer_filter(layers, None), names))
    if wanted:
        chosen = f" of {len(names)} that {_flags(layers, 'layers', 'selects')}" if layers else ""
        left_out = "the only layer" if len(wanted) == 1 else f"all {len(wanted)} layers"
        return f"{_flags(exclude, 'exclude_layers', 'leaves')} out {left_out}{chosen}: {listed(wanted)}"
    near = _nearest(_patterns(layers, "layers"), names)
    near = f"; the nearest: {listed(near)}" if near else ""
    return f"{_flags(layers, 'layers', 'matches')} none of the {len(names)} layers: {listed(names)}{near}"


def unmatched(layers, exclude, every):
    """One sentence for each expression that matches no layer."""
    names = _names(every) if layers or exclude else []
    return [
        f"{_flags(pattern.pattern, option, 'matches')} none of the {len(names)} layers"
        for option, texts in (("layers", layers), ("exclude_layers", exclude))
        for pattern in _patterns(texts, option)
        if not any(pattern.search(name) for name in names)
    ]


def listed(names, most=5):
    """The first names in one line, quoted."""
    return ", ".join(errors.quote(n, 60) for n in names[:most]) + (", ..." if len(names) > most else "")


def _nearest(patterns, names):
    """At most three names that, whole or in a part, look like one of the patterns."""
    known = {part: name for name in reversed(names) for part in (*re.split(r"[/._:]", name), name)}
    close = [p for x in patterns for p in difflib.get_close_matches(x.pattern, known, n=3, cutoff=0.6)]
    return list(dict.fromkeys(known[part] for part in close))[:3]


def _names(every):
    return sorted({name: True for own in every for name, _ in own}, key=natural)


def _flags(texts, option, verb):
    """'--layers='a' matches', with the verb in the plural for several expressions."""
    texts = (texts,) if isinstance(texts, str) else texts
    flags = [f"--{option}='{errors.quote(text, 80)}'" for text in texts]
    plural = {"matches": "match", "leaves": "leave", "selects": "select"}[verb]
    return f"{' and '.join(flags)} {verb if len(flags) == 1 else plural}"


# Run-numbered names -----------------------------------------------------------------------------------------------


def by_place(all_layers):
    """The layers of every model under names that do not depend on run numbers.

    dense_12, dense_13 of one model and dense_31, dense_32 of another become dense#0, dense#1; a part of a name that
    all models write alike stays as it is.

    Args:
        all_layers: for each model, (name, parametrisation) -> entry.

    Returns:
        The same list with new names; layers and order of models unchanged.
    """
    places = [_places({name for name, _ in layers}) for layers in all_layers]
    spellings = collections.defaultdict(dict)  # canonical prefix -> how models write its last part
    for found in places:
        for name, parts in found.items():
            for depth, own in enumerate(_SEPARATOR.split(name), 1):
                spellings[parts[:depth]][own] = True

    def shown(parts):
        agreed = [spellings[parts[:depth]] for depth in range(1, len(parts) + 1)]
        return "".join(next(iter(s)) if len(s) == 1 else part for s, part in zip(agreed, parts, strict=True))

    canonical = {parts for found in places for parts in found.values()}
    names = {parts: shown(parts) for parts in canonical}
    if len({*names.values()}) < len(canonical):
        names = {parts: "".join(parts) for parts in canonical}
    return [
        {(names[found[name]], kind): entry for (name, kind), entry in layers.items()}
        for found, layers in zip(places, all_layers, strict=True)
    ]


def _places(names):
    """Map name -> its parts, run numbers replaced by the rank of the number among siblings of the same stem."""
    families = collections.defaultdict(dict)  # (prefix, stem) -> parts
    split = {name: tuple(_SEPARATOR.split(name)) for name in names}
    for parts in split.values():
        for depth, part in enumerate(parts):
            families[parts[:depth], _RUN_NUMBER.sub("", part)][part] = True
    canonical = {}
    for (prefix, stem), parts in families.items():
        for rank, part in enumerate(sorted(parts, key=lambda p: (_numbers(p), p))):
            canonical[prefix, part] = stem if len(parts) == 1 else f"{stem}#{rank}"
    return {n: tuple(canonical[p[:d], part] for d, part in enumerate(p)) for n, p in split.items()}


def _numbers(part):
    tail = _RUN_NUMBER.search(part)
    return [int(n[:18]) for n in re.findall(r"\d+", tail[0])] if tail else []


def would_match_by_place(all_layers):
    """Whether exact names match few layers while names without run numbers match them all, in equal shapes."""
    if len(all_layers) < SMALLEST_GROUP:
        return False
    counts = collections.Counter((key, form_of(e)) for layers in all_layers for key, e in layers.items())
    if 2 * sum(c for c in counts.values() if c >= SMALLEST_GROUP) >= sum(counts.values()):
        return False
    seen = collections.Counter(
        frozenset((key, form_of(e)) for key, e in layers.items()) for layers in by_place(all_layers)
    )
    return seen.most_common(1)[0][1] >= len(all_layers) - max(1, len(all_layers) // 20)


# Models that do not fit -------------------------------------------------------------------------------------------


def odd_models(all_layers, limit):
    """Models that lack, or hold in another form, a layer that all but a few others hold in one form.

    Such a model is a truncated or transposed export. Three that deviate alike are a group of their own, and more
    than `limit` odd models are how the collection was made: then nobody is odd.

    Args:
        all_layers: for each model, (name, parametrisation) -> entry.
        limit: most odd models.

    Returns:
        model's position -> (layer name or None, what was found).
    """
    count = len(all_layers)
    forms = collections.defaultdict(collections.Counter)
    for layers in all_layers:
        for key, entry in layers.items():
            forms[key][form_of(entry)] += 1
    odd = {}
    for key in sorted(forms, key=lambda k: (natural(k[0]), k[1])):
        usual, most = max(forms[key].items(), key=lambda item: item[1])
        if most == count or most < max(SMALLEST_GROUP, count - limit) or not usual[1]:
            continue
        found = {i: layers.get(key) for i, layers in enumerate(all_layers)}
        found = {i: e for i, e in found.items() if e is None or form_of(e) != usual}
        alike = collections.Counter(None if e is None else form_of(e) for e in found.values())
        for position, entry in found.items():
            if alike[None if entry is None else form_of(entry)] < SMALLEST_GROUP:
                odd.setdefault(position, (key[0], _deviation(entry, usual, most)))
    for position in _strangers(all_layers, forms):
        odd[position] = (None, "shares no layer with any other model")
    return odd if len(odd) <= limit else {}


def _deviation(entry, usual, most):
    others = f"the {most} other{'s' if most > 1 else ''}"
    if entry is None:
        return f"is missing; {others} have it with shape {list(usual[0])}"
    if entry.shape != usual[0]:
        return f"has shape {list(entry.shape)}, {others} have shape {list(usual[0])}"
    return f"has dtype {entry.dtype}, which is no weight; {others} hold floats"


def _strangers(all_layers, forms):
    """Positions of models that share no layer's name with another, if there are others that do share."""
    alone = [i for i, layers in enumerate(all_layers) if all(forms[key].total() == 1 for key in layers)]
    return alone if len(alone) + SMALLEST_GROUP <= len(all_layers) else []


def kinds(count, groups):
    """Positions of models that are connected by common layers, largest part first; a model in no group is alone.

    Args:
        count: number of models.
        groups: for each layer, the positions of the models that have it.
    """
    part_of = list(range(count))

    def root(i):
        while part_of[i] != i:
            part_of[i] = part_of[part_of[i]]
            i = part_of[i]
        return i

    for members in groups:
        for member in members:
            part_of[root(member)] = root(members[0])
    parts = collections.defaultdict(list)
    for position in range(count):
        parts[root(position)].append(position)
    return sorted(parts.values(), key=lambda part: (-len(part), part))


# Groups -----------------------------------------------------------------------------------------------------------


def stacks(all_layers, smallest=SMALLEST_GROUP):
    """Splits the layers of all models into those that can be analysed and those that cannot.

    Args:
        all_layers: a dict for each model, (name, kind) -> Tensor or LoraPair.
        smallest: models that a layer must have.

    Returns:
        groups: [(name, shape, parametrisation, members, entries)], by name with numbers as numbers, then shape.
        skipped: [{"name", "shape", "num_models", "reason"}].
    """
    found = collections.defaultdict(list)
    for member, layers in enumerate(all_layers):
        for (name, kind), entry in layers.items():
            found[name, kind, form_of(entry)].append((member, entry))
    groups, skipped = [], []
    for (name, kind, (shape, is_weight)), pairs in sorted(
        found.items(), key=lambda item: (natural(item[0][0]), item[0][2], item[0][1])
    ):
        members, entries = zip(*pairs, strict=True)
        reason = ""
        if not is_weight:
            reason = f"not a weight: {entries[0].dtype}"
        elif math.prod(shape) == 0:
            reason = "has no entries"
        elif len(pairs) < smallest:
            reason = TOO_FEW
        if reason:
            skipped.append({"name": name, "shape": list(shape), "num_models": len(pairs), "reason": reason})
        else:
            groups.append((name, shape, kind, members, entries))
    return groups, skipped
