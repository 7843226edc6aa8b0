"""Every figure of a layer from its Statistics alone: spectra, nulls, held-out errors, the verdict. No weights."""

import dataclasses
import itertools
import threading
import zlib
from concurrent import futures

import numpy as np

from jaxsub import heldout, hostmemory, lineage, plugins, precision, spectrum, verdict
from jaxsub.nulls import _observed
from jaxsub.pipelines import remarks

HELD_OUT = (1, 2, 4, 8, 16, 32)
STABILITY = (1, 2, 4, 8, 16)
KEPT_VALUES = 512  # singular values written to the report


@dataclasses.dataclass(frozen=True)
class Options:
    """Null models, draws and splits."""

    nulls: tuple[str, ...] = ("permutation", "gaussian", "strength", "shuffle", "fresh_init")
    draws: int = 20  # at most: see verdict.settled
    splits: int = 20
    seed: int = 0


def layer(stats, lineages, options, is_own=False):
    """The report's record of one layer.

    Args:
        stats: Statistics of the distinct models.
        lineages: index lists into the layer's models; two or more each.
        options: Options.
        is_own: whether the lineages are of this layer alone.

    Returns:
        dict as in report.json, "layers".
    """
    with futures.ThreadPoolExecutor(threads(stats.num_models)) as cores:
        return _Layer(stats, lineages, options, cores, is_own).record()


def threads(num_models):
    """Threads that draws of so many models, and layers of them, are worked on by.

    One for few models: their operations are so short that threads wait for the interpreter lock, and take longer.
    """
    return 1 if num_models <= heldout.WHOLE else hostmemory.cores()


def generator(seed, *names):
    """NumPy generator of a layer's draw; depends on the names alone, not on what was drawn before."""
    return np.random.default_rng([seed, *(zlib.crc32(n.encode("utf-8", "surrogatepass")) for n in names)])


class _Layer:
    def __init__(self, stats, lineages, options, cores, is_own):
        self.stats, self.options, self.cores, self.is_own = stats, options, cores, is_own
        self.num_models, self.num_features = stats.num_models, stats.num_features
        self.uncentred, self.gram = stats.uncentred(), stats.centred()
        total = float(np.trace(self.uncentred))
        least = precision.CONSTANT[stats.dtype]
        if stats.parametrisation == "lora":  # made before it could be centred: see Statistics.floor
            least = 64 * max(stats.num_models, 1) * (precision.EPS32 if stats.dtype == "float32" else precision.EPS64)
        self.constant = not float(np.trace(self.gram)) > least * max(total, 0.0)
        if self.constant:
            self.gram = np.zeros_like(self.gram)
        self.ks = [k for k in HELD_OUT if k <= self.num_models - 2]
        self.lineages = [g for g in lineages if len(g) > 1]
        self.one_lineage = len(self.lineages) == 1 and len(self.lineages[0]) == self.num_models
        alone = sorted({*range(self.num_models)}.difference(*self.lineages))
        self.groups = [*self.lineages, alone] if len(alone) > 1 else self.lineages
        self.same_a = 0
        if stats.a_cosines is not None:
            others = np.abs(stats.a_cosines - np.diag(np.diag(stats.a_cosines))).max(axis=1, initial=0.0)
            self.same_a = int((others > lineage.SAME_START).sum())
        values = np.zeros(self.num_models) if self.constant else stats.centred_energies()
        self.values = values[: max(self.num_models - 1, 0)]
        self.total = float(np.trace(self.gram))
        self.mean = self.num_models * float(self.uncentred.mean()) / total if total > 0 else None

    def record(self):
        stats, n = self.stats, self.num_models
        first = float(np.sqrt(self.values[0])) if len(self.values) else 0.0
        floor = stats.floor(first) if not self.constant else 0.0
        above = self.values[np.sqrt(self.values) > floor] if not self.constant else self.values[:0]
        ranks = spectrum.rank_at(above, self.total)
        within, leverage = self._within()
        with futures.ThreadPoolExecutor(1) as beside:
            pending = beside.submit(self._nulls, within, leverage)
            held_out, stability = self._curve(self.gram), self._stability()
        nulls = pending.result()
        k = verdict.deciding_rank(n)
        if k and stats.entries is not None:
            self._confirm(nulls, held_out, k)
        held_within = None
        if within is not None and not self.one_lineage:
            held_within = self._curve(within, leverage, self.gram.max())
        if self.one_lineage:
            held_within = held_out
        saturated = not self.constant and ranks["0.9"] is None
        overall = verdict.gain(held_out, nulls, k) if k else None
        inner = k_within = None
        if held_within and within is not None:
            k_within = verdict.deciding_rank(min(n, len(within)))
            inner = verdict.gain(held_within, nulls, k_within, "held_out_within") if k_within else None
        families = self._families()
        word, why = verdict.decide(
            num_models=n,
            num_features=self.num_features,
            saturated=saturated,
            constant=self.constant,
            families=families,
            overall=overall,
            within=inner,
            mean=self.mean,
            mean_chance=max(
                [1.0 / max(n, 1), *(nulls[name]["mean_energy"] for name in verdict.DECIDING if name in nulls)]
            ),
            k=k,
            k_within=k_within,
            same_a=self.same_a,
        )
        grouped = bool(self.lineages) and not self.one_lineage
        return {
            "name": stats.name,
            "shape": list(stats.shape),
            "parametrisation": stats.parametrisation,
            "num_models": n,
            "num_features": self.num_features,
            "mean_energy": self.mean,
            "mean_energy_chance": 1.0 / max(n, 1),
            "singular_values": _roots(self.values[:KEPT_VALUES], stats.exponent),
            "uncentred_singular_values": _roots(spectrum.energies(self.uncentred)[:KEPT_VALUES], stats.exponent),
            "floor": float(np.ldexp(floor, stats.exponent)),
            "total_energy": _known(_scaled(self.total, 2 * stats.exponent)),
            "rank_at": ranks,
            "energy_at": spectrum.energy_at(self.values, self.total),
            "held_out": held_out,
            "held_out_within": held_within,
            "held_out_lineage": self._lineage_curve() if grouped else None,
            "lineage_energy": families.energy,
            "lineage_energy_chance": families.chance,
            "lineages": len(self.lineages),
            "own_lineages": [[stats.model_ids[m] for m in g] for g in self.lineages] if self.is_own else None,
            "modes": [_mode(m) for m in stats.modes],
            "effective_rank": spectrum.effective_ranks(self.values),
            "mp_count": spectrum.marchenko_pastur_count(self._unit_energies(), n, self.num_features),
            "stability": stability,
            "nulls": nulls,
            "deciding_rank": k,
            "gain": dataclasses.asdict(overall) if overall else None,
            "gain_within": dataclasses.asdict(inner) if inner else None,
            "storage_dtype": stats.storage,
            "compute_dtype": stats.dtype,
            "verdict": word,
            "why": why,
            "flags": remarks.flags(self, saturated, above, nulls, held_out, k),
            "warnings": remarks.warnings(self, nulls),
        }

    def _families(self):
        if not self.lineages or self.constant or self.num_models < 3:
            return verdict.Families(len(self.lineages), self.one_lineage, is_own=self.is_own)
        outside = self.num_models - sum(map(len, self.lineages))
        energy = lineage.group_energy(self.gram, self.lineages)
        chance = lineage.group_energy_chance(self.gram, self.lineages, self.num_features)
        return verdict.Families(len(self.lineages), self.one_lineage, energy, *chance, outside, self.is_own)

    def _unit_energies(self):
        """Energies of the centred rows at unit norm: unequal norms alone would lift values over the edge."""
        return spectrum.energies(lineage.cosines(self.gram))[: max(self.num_models - 1, 0)]

    def _curve(self, gram, leverage=None, largest=0.0, way=heldout.leave_one_out):
        ks = [k for k in self.ks if k <= len(gram) - 2]
        if not ks or not float(np.trace(gram)) > 0:
            return {}
        values = way(gram, ks, leverage=leverage, largest=largest)
        return {str(k): float(v) for k, v in zip(ks, values, strict=True)}

    def _within(self):
        """Residuals about the means of the lineages, and of the models that are in none, as one more group."""
        if not self.lineages or self.constant or sum(map(len, self.groups)) < 4:
            return None, None
        return heldout.within_groups(self.gram, self.groups)

    def _lineage_curve(self):
        outside = self.num_models - max(map(len, self.lineages))
        ks = [k for k in self.ks if k <= outside - 2]
        if not ks or self.constant:
            return None
        values = heldout.leave_group_out(self.gram, self.lineages, ks)
        return {str(k): float(v) for k, v in zip(ks, values, strict=True)}

    def _stability(self):
        ks = [k for k in STABILITY if k <= self.num_models // 2 - 2]
        if not ks or self.constant:
            return {}
        rng = generator(self.options.seed, self.stats.name, "stability")
        found = heldout.split_half(self.gram, ks, self.num_features, num_splits=self.options.splits, rng=rng)
        return {str(k): {n: float(x) for n, x in v.items()} for k, v in found.items()}

    def _observed(self, norms=None):
        stats = self.stats
        lora = stats.parametrisation == "lora"
        plain = norms is None
        return _observed.Observed(
            num_features=self.num_features,
            shape=stats.shape,
            norms=stats.norms() if plain else norms,
            entry_means=stats.row_sums / self.num_features if plain else np.zeros(len(norms)),
            mean_energy_total=float(self.uncentred.mean()) if plain else 0.0,
            variance_total=self.total / self.num_models,
            variance_squares=_known(stats.variance_squares),
            deviation_fourths=_known(stats.deviation_fourths),
            entries=stats.entries if plain else None,
            tails=stats.tails() if plain else 0.0,
            model_singular_values=stats.model_singular_values if plain else None,
            parametrisation=stats.parametrisation,
            lora_ranks=stats.ranks if lora else None,
            b_overlap=stats.b_overlap if lora and plain else None,
            a_width=stats.a_width,
            b_norms=stats.b_norms if lora and plain else None,
        )

    def _nulls(self, within, leverage):
        if self.constant or not self.ks:
            return {}
        observed, drawn, pending, inner = self._observed(), {}, {}, None
        with futures.ThreadPoolExecutor(len(self.options.nulls) + 1) as waiting:  # for draws made on self.cores
            for given in self.options.nulls:
                module = plugins.load("nulls", given)
                if module.applies(observed) is not None:
                    continue
                name = module.__name__.rpartition(".")[2]
                drawn[name] = getattr(module, "same_as", lambda _: None)(observed) or name
                if drawn[name] not in pending:
                    module = plugins.load("nulls", drawn[name])
                    rng = generator(self.options.seed, self.stats.name, drawn[name])
                    draws = module.sample(observed, module.Options(draws=self.options.draws), rng)
                    pending[drawn[name]] = waiting.submit(self._summary, draws)
            if within is not None and not self.one_lineage and "gaussian" in drawn:
                inner = waiting.submit(self._null_within, within, leverage)
        self.cores.submit(hostmemory.trim)  # beside what is left
        found = {name: {**pending[source].result(), "drawn_as": source} for name, source in drawn.items()}
        if "permutation" in found and self.stats.is_heavy():
            spread = plugins.load("nulls", "permutation").spread(observed)
            wider = {k: sd * spread for k, sd in found["permutation"]["held_out_sd"].items()}
            found["permutation"] |= {"held_out_sd": wider, "spread": spread}
        if inner is not None:
            found["gaussian"] |= inner.result()
        return found

    def _confirm(self, nulls, held_out, k):
        """Draws many literal permutations where a finding would rest on a few: see `nulls.permutation`."""
        overall, module = verdict.gain(held_out, nulls, k), plugins.load("nulls", "permutation")
        if overall is None or not overall.beats or "permutation" not in nulls:
            return
        draws = max(self.options.draws, module.LITERAL_DRAWS)
        rng = generator(self.options.seed, self.stats.name, "permutation")
        found = self._summary(module.sample(self._observed(), module.Options(draws=draws), rng), whole=True)
        nulls["permutation"] = {**nulls["permutation"], **found}

    def _null_within(self, within, leverage):
        """Gaussian rows whose residuals about the lineage means have the norms of the real ones."""
        module = plugins.load("nulls", "gaussian")
        ends = np.cumsum([len(g) for g in self.groups])
        groups = [list(range(end - len(g), end)) for g, end in zip(self.groups, ends, strict=True)]
        norms = np.sqrt(np.maximum(np.diag(within), 0.0) * leverage)
        rng = generator(self.options.seed, self.stats.name, "gaussian", "within")

        def one(gram):
            gram = spectrum.centred(gram)
            residual, alpha = heldout.within_groups(gram, groups)
            return self._curve(residual, alpha, gram.max(), heldout.leave_one_out_of_draw)

        draws = module.sample(self._observed(norms), module.Options(draws=self.options.draws), rng)
        curves = self._until_settled(one, draws, lambda curve: curve)
        mean, sd = _mean_sd(curves)
        return {"held_out_within": mean, "held_out_within_sd": sd, "held_out_within_least": _least(curves)}

    def _summary(self, draws, whole=False):
        def one(uncentred):
            gram = spectrum.centred(uncentred)
            eigen = heldout.decompose(gram)
            held = heldout.leave_one_out_of_draw(gram, self.ks, eigen=eigen)
            mean = self.num_models * uncentred.mean() / np.trace(uncentred)
            curve = {str(k): float(v) for k, v in zip(self.ks, held, strict=True)}
            return curve, mean, eigen[0][: self.num_models - 1]

        found = self._parallel(one, draws) if whole else self._until_settled(one, draws, lambda figures: figures[0])
        curves, means, values = zip(*found, strict=True)
        held, sd = _mean_sd(curves)
        energy = np.mean(values, axis=0)
        roots = np.sqrt(values)
        return {
            "draws": len(curves),
            "mean_energy": float(np.mean(means)),
            "rank_at": spectrum.rank_at(energy),
            "energy_at": spectrum.energy_at(energy),
            "held_out": held,
            "held_out_sd": sd,
            "held_out_least": _least(curves),
            "singular_values": _unscaled(roots.mean(axis=0)[:KEPT_VALUES], self.stats.exponent),
            "singular_values_sd": _unscaled(roots.std(axis=0)[:KEPT_VALUES], self.stats.exponent),
        }

    def _until_settled(self, work, draws, curve_of):
        """[work(draw), ...] of the fewest draws, and of the others too unless those agree on the verdict's curve."""
        draws = iter(draws)
        found = self._parallel(work, itertools.islice(draws, verdict.FEWEST_DRAWS))
        return found if verdict.settled([curve_of(f) for f in found]) else found + self._parallel(work, draws)

    def _parallel(self, work, items):
        """[work(item) ...], in order, by all cores; items are made one at a time, as they are asked for.

        LAPACK and NumPy release the interpreter lock. Cores without an item left go on to what others asked for.
        """
        lock, numbered, results = threading.Lock(), enumerate(items), {}

        def run():
            while True:
                with lock:
                    index, item = next(numbered, (None, None))
                if index is None:
                    return
                results[index] = work(item)

        for runner in [self.cores.submit(run) for _ in range(threads(self.num_models))]:
            runner.result()
        return [results[i] for i in range(len(results))]


def _mode(mode):
    return {
        "axis": mode.axis,
        "size": mode.size,
        "rank_at": spectrum.rank_at(mode.values, mode.total),
        "energy_at": spectrum.energy_at(mode.values, mode.total),
        "sketched": {"columns": mode.columns} if mode.columns else False,
        "centred": mode.centred,
    }


def _known(value):
    """`value`, or None where it is not a number that JSON can hold."""
    return value if np.isfinite(value) else None


def _scaled(value, exponent):
    with np.errstate(over="ignore"):
        return float(np.ldexp(value, exponent))


def _roots(values, exponent):
    return _unscaled(np.sqrt(values), exponent)


def _unscaled(values, exponent):
    """values * 2**exponent as a list; JSON has no infinity and axes need room, so none is over 2**1000."""
    with np.errstate(over="ignore"):
        return np.minimum(np.ldexp(values, exponent), 2.0**1000).tolist()


def _least(curves):
    """The best that any draw had, k by k."""
    return {key: float(min(c[key] for c in curves)) for key in curves[0]} if curves else {}


def _mean_sd(curves):
    keys = curves[0].keys() if curves else ()
    mean = {key: float(np.mean([c[key] for c in curves])) for key in keys}
    return mean, {key: float(np.std([c[key] for c in curves])) for key in keys}
