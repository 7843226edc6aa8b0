"""Energy is not function: AUC of peptide-binding networks rebuilt from the subspace of all the others.

    pip download --no-deps --no-binary :all: mhcnuggets==2.4.1 && tar xf mhcnuggets-2.4.1.tar.gz
    python scripts/mhcnuggets_auc.py --data=mhcnuggets-2.4.1/mhcnuggets

The package's metadata says Apache, the licence file inside academic and non-commercial: nothing of it is part of
jaxsub.

Class I networks (LSTM 21 > 64, dense 64, 1; names *_BA.h5), every layer by itself: mean and first k components of the
other networks, the network projected on them. AUC on the package's own quantitative measurements, binders under 500 nM
against others, mean over alleles with at least 40 of each; peptides of at most 15 residues.
"""

import argparse
import csv
import os

import numpy as np

RANKS = (4, 8, 16, 32, 64)
EXPECTED = {"original": 0.958, "mean": 0.570, 4: 0.630, 8: 0.663, 16: 0.707, 32: 0.747, 64: 0.808}
LETTERS, LENGTH, BINDER, LEAST = "ACDEFGHIKLMNPQRSTVWYX", 15, 500.0, 40
SOFT = np.full((21, 21), 0.1 / 20, np.float32) + np.eye(21, dtype=np.float32) * (0.9 - 0.1 / 20)  # as the package


def measurements(path):
    """allele -> (peptides, is a binder); the package's file names alleles with a star."""
    found = {}
    with open(path, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if len(row["peptide"]) <= LENGTH and row["measurement_type"] == "quantitative":
                one = found.setdefault(row["mhc"].replace("*", ""), ([], []))
                one[0].append(row["peptide"].upper())
                one[1].append(float(row["IC50(nM)"]) < BINDER)
    return found


def encoded(peptides):
    """(n, 15, 21) residues and (n, 15) where there is one."""
    index = {letter: i for i, letter in enumerate(LETTERS)}
    x = np.zeros((len(peptides), LENGTH, 21), np.float32)
    is_there = np.zeros((len(peptides), LENGTH), bool)
    for n, peptide in enumerate(peptides):
        x[n, : len(peptide)] = SOFT[[index.get(letter, 20) for letter in peptide]]
        is_there[n, : len(peptide)] = True
    return x, is_there


def predicted(weights, x, is_there):
    """Outputs (n,) of an LSTM with hard sigmoid gates (Keras 2.2), tanh, linear output (order is enough)."""
    kernel, recurrent, bias = (weights[f"lstm/{name}"] for name in ("kernel", "recurrent_kernel", "bias"))
    h = c = np.zeros((len(x), 64), np.float32)
    for t in range(LENGTH):
        i, f, g, o = np.split(x[:, t] @ kernel + h @ recurrent + bias, 4, axis=1)
        i, f, o = (np.clip(0.2 * gate + 0.5, 0, 1) for gate in (i, f, o))
        new = f * c + i * np.tanh(g)
        now = is_there[:, t, None]
        c, h = np.where(now, new, c), np.where(now, o * np.tanh(new), h)
    hidden = np.tanh(h @ weights["dense1/kernel"] + weights["dense1/bias"])
    return (hidden @ weights["dense2/kernel"] + weights["dense2/bias"])[:, 0]


def auc(values, labels):
    """Share of pairs in the right order, ties one half."""
    from scipy import stats

    ranks, count = stats.rankdata(values), labels.sum()
    return float((ranks[labels].sum() - count * (count + 1) / 2) / (count * (len(labels) - count)))


def layer_name(name):
    """'lstm_3/lstm_3/kernel:0' -> 'lstm/kernel'; the numbers are those of a training run."""
    part, tensor = name.split("/")[0], name.rsplit("/", 1)[-1].partition(":")[0]
    kind, _, number = part.rpartition("_")
    return f"{kind}{number if kind == 'dense' else ''}/{tensor}"


def read(folder, alleles):
    """(model ids, {layer: (N, *shape)}) of the class I networks by jaxsub's reader."""
    import jaxsub
    from jaxsub import bundle

    paths = [os.path.join(folder, f"{a}_BA.h5") for a in alleles]
    opened = jaxsub.open_collection([p for p in paths if os.path.exists(p)], match="order")
    stacks = {layer_name(g.name): np.asarray(bundle.read(g, opened)) for g in opened.groups}
    return [ref.id.rpartition("/")[2].removesuffix("_BA") for ref in opened.refs], stacks


def left_out(stack, member):
    """k -> the member rebuilt from mean and k components of all others; 0 is their mean alone."""
    from jaxsub import estimators

    rows = stack.reshape(len(stack), -1)
    others = np.delete(rows, member, axis=0)
    rank = min(max(RANKS), rows.shape[1], len(others) - 1)
    pca = estimators.GramPCA(n_components=rank).fit(others)
    basis, mean = np.asarray(pca.components_), np.asarray(pca.mean_)
    values = (rows[member] - mean) @ basis.T
    return {k: (mean + values[:k] @ basis[:k]).reshape(stack.shape[1:]) for k in (0, *RANKS)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder 'mhcnuggets' of the unpacked package")
    data = parser.parse_args().data
    place = os.path.join(data, "data", "production", "mhcI")
    with open(os.path.join(place, "alleles_with_trained_models.txt"), encoding="utf-8") as file:
        alleles = file.read().split()
    ids, stacks = read(os.path.join(data, "saves", "production"), alleles)
    known, found = measurements(os.path.join(place, "curated_training_data.csv")), {}
    for member, allele in enumerate(ids):
        peptides, labels = known.get(allele, ([], []))
        labels = np.array(labels, bool)
        if min(labels.sum(), (~labels).sum()) < LEAST:
            continue
        x, is_there = encoded(peptides)
        rebuilt = {name: left_out(stack, member) for name, stack in stacks.items()}
        kinds = {"original": {name: stack[member] for name, stack in stacks.items()}}
        kinds |= {k or "mean": {name: one[k] for name, one in rebuilt.items()} for k in (0, *RANKS)}
        for kind, weights in kinds.items():
            found.setdefault(kind, []).append(auc(predicted(weights, x, is_there), labels))
    print(f"{len(ids)} class I networks, {len(found['original'])} alleles; mean AUC")
    print(f"{'':>10} {'measured':>9} {'expected':>9}")
    for kind, values in found.items():
        print(f"{kind!s:>10} {np.mean(values):>9.3f} {EXPECTED[kind]:>9.3f}")


if __name__ == "__main__":
    main()
