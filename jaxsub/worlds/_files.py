"""How a world is written: one file or folder a model, and its labels beside them."""

import json
import os

import numpy as np

from jaxsub.formats import peft, safetensors

MODELS, LABELS = "models", "labels.json"


def names(num_models):
    """Model ids: '000', '001', ...; sorted as numbered."""
    width = max(3, len(str(num_models - 1)))
    return [f"{i:0{width}d}" for i in range(num_models)]


def write_models(folder, layers, labels):
    """Writes `folder`/models/NNN.safetensors and `folder`/labels.json.

    Args:
        folder: an existing folder.
        layers: name -> (N, *shape), one array a layer; stored as float32.
        labels: N dicts of strings, written into the headers too.
    """
    os.makedirs(os.path.join(folder, MODELS))
    stored = {name: np.asarray(array, np.float32) for name, array in layers.items()}
    for i, name in enumerate(names(len(labels))):
        path = os.path.join(folder, MODELS, f"{name}.safetensors")
        safetensors.write(path, {layer: array[i] for layer, array in stored.items()}, labels[i])
    write_labels(folder, labels)


def write_adapters(folder, layers, labels, *, alpha, base_model=None):
    """Writes `folder`/models/NNN as LoRA folders and `folder`/labels.json.

    Args:
        folder: an existing folder.
        layers: name -> (a (N, r, i), b (N, o, r)).
        labels: N dicts of strings.
        alpha: numerator of the scale alpha / r.
        base_model: name of the base network, or None.
    """
    for i, name in enumerate(names(len(labels))):
        pairs = {layer: (a[i], b[i], alpha, a.shape[1]) for layer, (a, b) in layers.items()}
        peft.write(os.path.join(folder, MODELS, name), pairs, base_model=base_model, labels=labels[i])
    write_labels(folder, labels)


def write_labels(folder, labels):
    """`folder`/labels.json: model id -> labels."""
    by_name = dict(zip(names(len(labels)), labels, strict=True))
    with open(os.path.join(folder, LABELS), "w", encoding="utf-8") as file:
        json.dump(by_name, file, indent=1, sort_keys=True, allow_nan=False)
        file.write("\n")
