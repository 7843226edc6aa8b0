"""Which layers of several models are merged with which, and what becomes of those that do not fit. From headers alone.

One model is the template: its files are written again, with merged numbers in the layers that all models have. Low-rank
updates that a model lacks are updates of zero. Tensors with the same numbers under two names (tied weights) are merged
once. Dense layers that differ in their first axis (vocabularies) are merged in their common rows if the user says so.
"""

import dataclasses
import logging

import numpy as np

from jaxsub import collection, descriptors, errors, formats, lineup
from jaxsub.formats import _torch
from jaxsub.pipelines import aside

POLICIES = ("fail", "copy", "crop")
MOST_SHOWN = 5
log = logging.getLogger("jaxsub")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer that is merged.

    Attributes:
        group: LayerGroup of its models; entries cut to their common rows where these differ.
        twins: names of the template's other tensors with the same numbers, which get the same result.
        rest: entries of the template behind the merged ones, which stay as they are.
    """

    group: collection.LayerGroup
    twins: tuple[str, ...] = ()
    rest: int = 0

    @property
    def name(self):
        """Of the layer."""
        return self.group.name

    @property
    def is_lora(self):
        """Whether it is one of low-rank updates."""
        return self.group.parametrisation == lineup.LORA


@dataclasses.dataclass(frozen=True)
class Lineup:
    """Layers to merge, the position of the template, and what is said of tensors that are not merged.

    Attributes:
        layers: in the order of their names.
        template: position in the collection.
        copied: name -> why it is the template's as it is.
        said: sentences for the user.
    """

    layers: tuple[Layer, ...]
    template: int
    copied: dict
    said: tuple[str, ...]

    @property
    def merged(self):
        """Names of all tensors that get a result, twins too."""
        return {name for layer in self.layers for name in (layer.name, *layer.twins)}


def line_up(opened, base, policy, chosen):
    """The Lineup of a Collection.

    Args:
        opened: Collection, its layers not filtered.
        base: Model that dense layers are to be less of, or None.
        policy: what to do with layers that do not fit: "fail", "copy" the template's, or "crop" to common rows and copy
            those that have none.
        chosen: function of a layer's name, whether it is to be merged.

    Raises:
        InputError: layers that do not fit, under "fail"; names them, and the cures.
        ConfigError: nothing is left to merge.
    """
    errors.require_known("mismatched", policy, POLICIES)
    layers = opened.layers
    counts = [sum(kind == lineup.LORA for _, kind in own) for own in layers]
    template = counts.index(max(counts))  # the first that has most of the updates; the first of dense models
    work = _Work(opened, base, template, policy, chosen)
    keys = sorted({key: True for own in layers for key in own}, key=lambda k: (lineup.natural(k[0]), k[1]))
    work.find_twins()
    for name, kind in keys:
        work.lora(name) if kind == lineup.LORA else work.dense(name)
    if work.misfits:
        raise work.refusal()
    if not work.found:
        raise errors.ConfigError("no layer to merge: none that the models share matches --layers, --exclude_layers")
    work.say_dtypes()
    if base is not None and all(layer.is_lora for layer in work.found):
        work.said.append("base: not used, as low-rank updates are differences already")
    skipped, merged = opened.models[template].skipped, {layer.name for layer in work.found}
    tied = {n: of for n, why in skipped.items() if (of := why.removeprefix(_torch.TWIN)) in merged}
    work.said += [f"{errors.quote(n)}: tied to {errors.quote(of)}, and merged with it" for n, of in tied.items()]
    copied = {**{n: why for n, why in skipped.items() if n not in tied}, **work.copied}
    return Lineup(tuple(work.found), template, copied, tuple(work.said))


def without_odd(opened, base, chosen, config):
    """The Collection without models of another architecture, or lacking a layer that nearly all agree on, set aside.

    As an analysis sets them aside, but only where the layers of all do not fit. Arguments as in `line_up`, and the
    program's configuration.

    Raises:
        InputError: more are odd than may be set aside.
    """
    try:
        line_up(opened, base, "fail", chosen)
        return opened
    except errors.InputError:
        own = [{key: entry for key, entry in layers.items() if chosen(key[0])} for layers in opened.layers]
        odd = lineup.odd_models(own, max(1, opened.num_candidates // 20))
    for ref, (layer, what) in [(opened.refs[position], found) for position, found in odd.items()]:
        error = collection.odd_error(ref.path, layer, what)
        log.warning("set aside %s: %s", errors.quote(ref.id), error.message())
        opened = aside.without(opened, ref.id, error, config, least=1)
    return opened


class _Work:
    def __init__(self, opened, base, template, policy, chosen):
        self.opened, self.base, self.template, self.policy, self.chosen = opened, base, template, policy, chosen
        self.found, self.copied, self.said, self.misfits, self.twins = [], {}, [], [], {}

    def entries(self, name, kind):
        """[entry or None] of each model."""
        return [own.get((name, kind)) for own in self.opened.layers]

    def lora(self, name):
        entries = self.entries(name, lineup.LORA)
        if not self.chosen(name):
            if entries[self.template] is not None:
                self.copied[name] = "not chosen"
            return
        forms = {e.shape for e in entries if e is not None}
        if len(forms) > 1:
            shapes = " and ".join(str(list(shape)) for shape in sorted(forms))
            self._misfit(name, f"updates of shapes {shapes}", entries[self.template] is not None)
            return
        members = tuple(n for n, e in enumerate(entries) if e is not None)
        kept = tuple(entries[n] for n in members)
        self._add(collection.LayerGroup(name, forms.pop(), lineup.LORA, members, kept))

    def dense(self, name):
        entries = self.entries(name, lineup.DENSE)
        own = entries[self.template]
        if name in self.twins:
            return  # merged with the one that it equals
        if own is not None and not self.chosen(name):
            self.copied[name] = "not chosen"
            return
        if not self.chosen(name):
            return
        lacking = [n for n, e in enumerate(entries) if e is None]
        if lacking and self._is_tied(name, entries):
            if own is not None:
                return
            self.said.append(f"{errors.quote(name)}: tied to another tensor in the models that store it, and left out")
            return
        if own is None:
            shown = lineup.listed([self.opened.refs[n].id for n, e in enumerate(entries) if e is not None], 2)
            self._misfit(name, f"is in {shown} but not in {self._template_id()}", False)
            return
        if not own.is_float or not own.size:
            self.copied[name] = f"not a weight: {own.dtype}" if own.size else "has no entries"
            return
        if lacking:
            shown = lineup.listed([self.opened.refs[n].id for n in lacking], 2)
            self._misfit(name, f"is missing in {shown}", True)
            return
        wrong = [e.dtype for e in entries if not e.is_float]
        if wrong:
            self._misfit(name, f"has dtype {wrong[0]} in some models", True)
            return
        self._stack(name, own, entries)

    def _stack(self, name, own, entries):
        """Adds a layer that all models have as floats."""
        twins = tuple(other for other, first in self.twins.items() if first == name)
        if self.base is not None and name not in self.base.tensors:
            self._misfit(name, "is not in the base", True)
            return
        shapes = {e.shape for e in entries} | ({self.base.tensors[name].shape} if self.base is not None else set())
        rows = min((shape[0] for shape in shapes if shape), default=0)
        said = "has shapes " + ", ".join(str(list(shape)) for shape in sorted(shapes))
        if len(shapes) == 1:
            group = collection.LayerGroup(name, own.shape, lineup.DENSE, tuple(range(len(entries))), tuple(entries))
            self._add(group, twins)
        elif all(shape and shape[1:] == own.shape[1:] for shape in shapes) and rows:
            if self.policy != "crop":
                self._misfit(name, said, True, crops=True)
                return
            cut = tuple(cropped(e, rows) for e in entries)
            group = collection.LayerGroup(name, cut[0].shape, lineup.DENSE, tuple(range(len(cut))), cut)
            rest = own.size - cut[0].size
            more = f"; the {own.shape[0] - rows} behind them are those of {self._template_id()}" if rest else ""
            self.said.append(f"{errors.quote(name)}: {said}; the first {rows} rows are merged{more}")
            self._add(group, twins, rest)
        else:
            self._misfit(name, said, True)

    def _add(self, group, twins=(), rest=0):
        self.found.append(Layer(group, twins, rest))

    def say_dtypes(self):
        """Says in what results are written where models are stored in several dtypes."""
        mixed = [layer for layer in self.found if len(layer.group.dtypes) > 1]
        if mixed:
            stored = " and ".join(sorted({d for layer in mixed for d in layer.group.dtypes}))
            self.said.append(
                f"{len(mixed)} of {len(self.found)} layers are stored as {stored}; results are written as those of "
                f"{self._template_id()} are"
            )

    def _misfit(self, name, what, is_kept, crops=False):
        if self.policy == "fail":
            self.misfits.append((name, what, crops))
            return
        if is_kept:
            self.copied[name] = what
        whose = f"it stays that of {self._template_id()}" if is_kept else "it is left out"
        self.said.append(f"{errors.quote(name)}: {what}; {whose}")

    def _template_id(self):
        return errors.quote(self.opened.refs[self.template].id, 60)

    def refusal(self):
        """The InputError about all layers that do not fit."""
        shown = "; ".join(f"{errors.quote(name, 80)} {what}" for name, what, _ in self.misfits[:MOST_SHOWN])
        more = f"; and {len(self.misfits) - MOST_SHOWN} more" if len(self.misfits) > MOST_SHOWN else ""
        crop = ", --config.mismatched=crop merges the rows they share" if any(c for *_, c in self.misfits) else ""
        hint = (
            "move models of another architecture out of the collection, or let --max_quarantined=1 set one aside; "
            f"--config.mismatched=copy takes those of {self._template_id()}{crop}, --exclude_layers leaves layers out"
        )
        name = self.misfits[0][0]
        path = self.opened.models[self.template].path
        return errors.InputError(path, f"layers do not fit: {shown}{more}", key=name, hint=hint, rule="N2")

    # Tied weights -------------------------------------------------------------------------------------------------

    def find_twins(self):
        """Finds names whose numbers are those of another name, in every model that has both."""
        model, alike = self.opened.models[self.template], {}
        for name, tensor in model.tensors.items():
            if len(tensor.shape) > 1 and tensor.is_float and tensor.extent is not None and tensor.size:
                head = next(formats.blocks(model, tensor)).tobytes()
                alike.setdefault((tensor.shape, tensor.dtype, head), []).append(name)
        for names in alike.values():
            names = sorted(
                names, key=lambda n: (sum(e is None for e in self.entries(n, lineup.DENSE)), lineup.natural(n))
            )
            for name in names[1:]:
                if self.chosen(name) and self.chosen(names[0]) and self._are_equal(name, names[0]):
                    self.twins[name] = names[0]
                    self.said.append(f"{errors.quote(name)}: tied to {errors.quote(names[0])}, and merged with it")

    def _are_equal(self, name, other):
        """Whether two tensors hold the same numbers in every model that has both, the template among them."""
        for model in self.opened.models:
            pair = model.tensors.get(name), model.tensors.get(other)
            if None not in pair and not is_copy(model, *pair):
                return False
        return True

    def _is_tied(self, name, entries):
        """Whether a layer that some models lack equals, in each that has it, a tensor that all have."""
        for n, entry in enumerate(entries):
            if entry is None:
                continue
            model = self.opened.models[n]
            like = [t for t in model.tensors.values() if t.name != entry.name and t.shape == entry.shape]
            everywhere = [t for t in like if all(t.name in m.tensors for m in self.opened.models)]
            if not any(is_copy(model, entry, t) for t in everywhere):
                return False
        return True


def is_copy(model, one, other):
    """Whether two tensors of a model hold the same bytes; stops at the first that differ."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    pairs = zip(formats.blocks(model, one), formats.blocks(model, other), strict=True)
    return all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in pairs)


def cropped(tensor, rows):
    """The first rows of a stored tensor: they are its first bytes."""
    shape = (rows, *tensor.shape[1:])
    return tensor if tensor.shape == shape else descriptors.Tensor(tensor.name, shape, tensor.dtype, tensor.extent)
