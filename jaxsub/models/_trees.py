"""Parameters of a flax network as {layer name: array}, names joined by slashes, and back."""


def flat(tree, prefix=""):
    """{name: array} of nested dicts."""
    found = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return found


def nested(arrays):
    """Nested dicts of {name: array}."""
    found = {}
    for name, value in arrays.items():
        *folders, last = name.split("/")
        place = found
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return found
