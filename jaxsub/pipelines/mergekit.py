"""mergekit's YAML recipes, the part that says: these models, this method, these numbers. What is beyond it is refused.

    merge_method: ties                 linear, task_arithmetic, ties, dare_linear, dare_ties, breadcrumbs,
    base_model: path                   breadcrumbs_ties, slerp, model_stock, karcher
    models:
      - model: path
        parameters: {weight: 0.5, density: 0.2}
    parameters: {normalize: true, lambda: 1.0}
    dtype: bfloat16                    the models' own: results are written in it

Gradients (lists of numbers), filters, slices, modules, tokenizers and `+lora` models are not taken. Results equal
mergekit's but for DARE, whose coins fall elsewhere and which mergekit scales by sums of magnitudes, not by 1 / density.
"""

import dataclasses
import math
import os

from jaxsub import errors

MAX_BYTES, MAX_DEPTH = 1 << 20, 16
# method -> (ours, its parameters, those of each model, their defaults, whether it needs a base)
_COMMON = {"normalize": None, "lambda": 1.0, "int8_mask": False}
METHODS = {
    "linear": ("weighted", {"normalize": True}, {"weight": None}, False),
    "task_arithmetic": ("task_arithmetic", _COMMON | {"normalize": False}, {"weight": None}, True),
    "ties": ("ties", _COMMON | {"normalize": True}, {"weight": None, "density": 1.0}, True),
    "dare_linear": (
        "dare_linear", _COMMON | {"normalize": False, "rescale": True}, {"weight": None, "density": 1.0}, True,
    ),
    "dare_ties": ("dare_ties", _COMMON | {"normalize": False, "rescale": True}, {"weight": None, "density": 1.0}, True),
    "breadcrumbs": (
        "breadcrumbs", _COMMON | {"normalize": False}, {"weight": None, "density": 1.0, "gamma": 0.01}, True,
    ),
    "breadcrumbs_ties": (
        "breadcrumbs", _COMMON | {"normalize": False}, {"weight": None, "density": 1.0, "gamma": 0.01}, True,
    ),
    "slerp": ("slerp", {"t": None}, {}, True),
    "model_stock": ("model_stock", {"filter_wise": False}, {}, True),
    "karcher": ("spherical", {"max_iter": 10, "tol": 1e-5}, {}, False),
}  # fmt: skip
_TOP = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype")


def apply(config):
    """The merge's Config with what its recipe `config.mergekit_yaml` says, and the dtype it asks for ("" for none).

    Raises:
        ConfigError: no such file, not YAML, keys that are not taken (by name), or options that the recipe sets.
    """
    path = config.mergekit_yaml
    recipe = read(path)
    for name in ("collection", "method", "options", "base", "weights"):
        if getattr(config, name):
            raise errors.ConfigError(f"mergekit_yaml: the recipe sets {name}; leave --{name} out")
    found = _Recipe(path, recipe)
    return dataclasses.replace(config, mergekit_yaml="", **found.options()), found.dtype


def require_dtype(opened, dtype):
    """Raises ConfigError where a recipe asks for another dtype than the models have."""
    stored = sorted({t.dtype: True for model in opened.models for t in model.tensors.values() if t.is_float})
    if stored != [dtype]:
        raise errors.ConfigError(
            f"dtype: {errors.quote(dtype, 40)}: the models are {' and '.join(stored)}, and results are written so; "
            "leave it out of the recipe"
        )


def read(path):
    """The mapping in a recipe: plain YAML without anchors, tags or repeated keys.

    Raises:
        ConfigError: no such file, too large or too deep, or not that.
    """
    import yaml

    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise errors.ConfigError(f"{errors.quote(path)}: is too large for a recipe")
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise errors.ConfigError(f"{errors.quote(path)}: cannot be read: {errors.quote(error, 200)}") from error
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
                raise errors.ConfigError(f"{errors.quote(path)}: anchors and tags are not taken in a recipe")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise errors.ConfigError(f"{errors.quote(path)}: is nested too deep for a recipe")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        found = _plain(node, path) if node is not None else None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        said = errors.quote(getattr(error, "problem", None) or "cannot be parsed", 200)
        raise errors.ConfigError(f"{errors.quote(path)}{line}: is no YAML: {said}") from error
    if not isinstance(found, dict):
        raise errors.ConfigError(f"{errors.quote(path)}: is no recipe: a mapping with merge_method and models is")
    return found


def _plain(node, path):
    """A composed node as Python values; keys that are repeated or no texts are refused."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        found = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is None or name in found:
                what = "a key that is no text" if name is None else f"{errors.quote(name, 60)} twice"
                raise errors.ConfigError(f"{errors.quote(path)}, line {key.start_mark.line + 1}: {what}")
            found[name] = _plain(value, path)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_plain(one, path) for one in node.value]
    return yaml.SafeLoader("").construct_object(node) if node.tag != "tag:yaml.org,2002:str" else node.value


class _Recipe:
    def __init__(self, path, recipe):
        self.path = path
        self._known(recipe, _TOP, "")
        method = recipe.get("merge_method")
        if not isinstance(method, str) or method not in METHODS:
            near = errors.nearest(method, METHODS)
            raise self._wrong("merge_method", f"{errors.quote(method, 60)} is none of {', '.join(METHODS)}{near}")
        self.method = method
        self.ours, self.own, self.each, self.needs_base = METHODS[method]
        self.parameters = self._mapping(recipe.get("parameters"), "parameters")
        self._known(self.parameters, (*self.own, *self.each), "parameters.")
        self.base = recipe.get("base_model")
        self.models = self._models(recipe.get("models"))
        self.dtype = self._dtype(recipe)

    def _wrong(self, key, what):
        return errors.ConfigError(f"{errors.quote(self.path)}: {key}: {what}")

    def _known(self, mapping, names, prefix):
        for key in mapping:
            if key not in names:
                taken = ", ".join(prefix + name for name in names)
                raise self._wrong(
                    prefix + errors.quote(key, 60), f"is not taken{errors.nearest(key, names)}; {taken} are"
                )

    def _mapping(self, value, key):
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._wrong(key, "is no mapping")
        return value

    def _models(self, value):
        if not isinstance(value, list) or not value:
            raise self._wrong("models", "is no list of models")
        found = []
        for position, entry in enumerate(value):
            key = f"models[{position}]"
            entry = self._mapping(entry, key)
            self._known(entry, ("model", "parameters"), key + ".")
            name = entry.get("model")
            if not isinstance(name, str) or "+" in name:
                raise self._wrong(key + ".model", "a path of a whole model is needed")
            parameters = self._mapping(entry.get("parameters"), key + ".parameters")
            self._known(parameters, self.each, key + ".parameters.")
            if name != self.base or self.method in ("slerp", "karcher", "linear"):
                found.append((name, parameters))
        return found

    def _dtype(self, recipe):
        dtypes = {recipe[key] for key in ("dtype", "out_dtype") if recipe.get(key) is not None}
        if len(dtypes) > 1 or not all(isinstance(d, str) for d in dtypes):
            raise self._wrong("out_dtype", "differs from dtype; results are written in the models' own")
        return dtypes.pop() if dtypes else ""

    def _number(self, value, key, kind=float):
        is_bool = isinstance(value, bool)
        if isinstance(value, (list, dict)):
            raise self._wrong(key, "gradients and filters are not taken; give one number")
        if kind is bool:
            if not is_bool:
                raise self._wrong(key, f"true or false expected, {errors.quote(value, 40)} found")
            return value
        try:
            number = float(value) if not is_bool else math.nan
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise self._wrong(key, f"a number expected, {errors.quote(value, 40)} found")
        return number

    def _value(self, name):
        """A parameter of the whole method."""
        default = self.own[name]
        value = self.parameters.get(name, default)
        if value is None:
            raise self._wrong(f"parameters.{name}", f"is missing; {self.method} needs it")
        kind = bool if isinstance(default, bool) else float
        return self._number(value, f"parameters.{name}", kind)

    def _of_each(self, name):
        """A parameter of every model, in their order."""
        found = []
        for position, (_, own) in enumerate(self.models):
            value = own.get(name, self.parameters.get(name, self.each[name]))
            if value is None:
                raise self._wrong(f"models[{position}].parameters.{name}", f"is missing; {self.method} needs it")
            found.append(self._number(value, f"models[{position}].parameters.{name}"))
        return found

    def _same_of_each(self, name):
        values = {*self._of_each(name)}
        if len(values) > 1:
            raise self._wrong(f"models.parameters.{name}", "differs between models; one for all is taken")
        return values.pop()

    def options(self):
        """Fields of the merge's Config."""
        if self.needs_base and not isinstance(self.base, str):
            raise self._wrong("base_model", f"is missing; {self.method} needs it")
        if not self.needs_base and self.base is not None:
            raise self._wrong("base_model", f"is not taken by {self.method}")
        names = [name for name, _ in self.models]
        if len({*names}) < len(names):
            raise self._wrong("models", "names a model twice")
        own = {name: self._value(name) for name in self.own}
        if own.get("rescale") is False or own.get("filter_wise") is True:
            raise self._wrong("parameters", "rescale: false and filter_wise: true are not taken")
        fields = {"collection": tuple(names), "method": self.ours, "base": self.base or ""}
        options = getattr(self, f"_{self.ours}")(own)
        if "weight" in self.each:
            weights = dict(zip(names, self._of_each("weight"), strict=True))
            fields["weights"] = tuple(f"{name}={weight!r}" for name, weight in weights.items())
        if self.method == "slerp":  # from the base to the other one
            names = [self.base, *(name for name in names if name != self.base)]
            shares = dict(zip(names, (1 - own["t"], own["t"]), strict=False))
            fields |= {"base": "", "collection": tuple(names)}
            fields["weights"] = tuple(f"{name}={share!r}" for name, share in shares.items())
        return fields | {"options": tuple(f"{name}={_text(value)}" for name, value in options.items())}

    def _weighted(self, own):
        return {"normalize": own["normalize"]}

    def _task_arithmetic(self, own):
        total = sum(self._of_each("weight"))
        return {"scaling": own["lambda"] / (total if own["normalize"] and abs(total) >= 1e-8 else 1.0)}

    def _ties(self, own):
        return {
            "density": self._same_of_each("density"),
            "scaling": own["lambda"],
            "function": "mean" if own["normalize"] else "sum",
        }

    def _dare_ties(self, own):
        return self._ties(own)

    def _dare_linear(self, own):
        return {"density": self._same_of_each("density"), **self._task_arithmetic(own)}

    def _breadcrumbs(self, own):
        if own["normalize"]:
            raise self._wrong("parameters.normalize", "true is not taken by breadcrumbs")
        return {
            "density": self._same_of_each("density"),
            "gamma": self._same_of_each("gamma"),
            "scaling": own["lambda"],
            "elect": self.method == "breadcrumbs_ties",
        }

    def _slerp(self, own):
        return {}

    def _model_stock(self, own):
        return {}

    def _spherical(self, own):
        return {}


def _text(value):
    """A value as an option's text."""
    return str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, float) else str(value)
