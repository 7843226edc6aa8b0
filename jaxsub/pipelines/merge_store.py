"""Where merged layers go until the model is whole: what a killed run has finished is found again, and checked.

    OUT.part/           held by one run; OUT is there when the model is whole, and not before
        journal         a line a finished layer: what it is of, a checksum of its bytes, its record
        model/          safetensors files of the new model, filled layer by layer (`formats.frames`)
        layers/         or, of other formats, a file a layer; the format's own writer makes the model of them

A layer is done when its line is there and its bytes have that sum: neither needs to be on the disk before, since what a
power cut takes away is seen and merged again.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import zlib

import numpy as np

from jaxsub import descriptors, formats, reading, rows
from jaxsub.formats import _files, _rewrite, peft, safetensors
from jaxsub.formats._frame import PIECE
from jaxsub.rows import files as row_files

JOURNAL, MODEL, LAYERS = "journal", "model", "layers"
LAYOUTS = ("portable", "exact")  # of PEFT adapters
STEM = "model"  # of the file of a format whose models are single files


class Journal:
    """The lines of finished layers."""

    def __init__(self, path, of):
        """Reads what is there; `of` is a text that says of which models the layers are: others do not count."""
        self.path, self.of, self.lines = path, of, {}
        with contextlib.suppress(FileNotFoundError, ValueError), open(path, encoding="ascii") as file:
            for line in file:
                found = _unsealed(line)
                if found is not None and found["of"] == of:
                    self.lines[found["layer"]] = found

    def add(self, layer, checksum, record):
        """Notes a finished layer."""
        line = {"layer": layer, "of": self.of, "checksum": checksum, "record": record}
        self.lines[layer] = line
        text = json.dumps(line, allow_nan=False)  # the order of a record stays: what goes on gives the same bytes
        with _writing(self.path):
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                os.write(fd, f"{hashlib.sha256(text.encode()).hexdigest()} {text}\n".encode("ascii"))
            finally:
                os.close(fd)


def _unsealed(line):
    """What a line of a journal says, or None where it was not written to its end."""
    digest, _, text = line.rstrip("\n").partition(" ")
    if not line.endswith("\n") or hashlib.sha256(text.encode()).hexdigest() != digest:
        return None
    return json.loads(text)


@contextlib.contextmanager
def _writing(path):
    try:
        yield
    except OSError as error:
        raise _files.failed(path, error) from error


def layout_of(model, layers, wanted):
    """The layout in which a merged model is written: `wanted`, or where that is empty portable for PEFT adapters.

    Exact where they have full values, such as saved heads and biases, which programs load from that layout alone.
    """
    if wanted or model.format != "peft":
        return wanted or "portable"
    is_whole = all(layer.name in model.adapters for layer in layers if layer.is_lora)
    return "exact" if model.tensors and is_whole and peft.can_rewrite(model) else "portable"


def open_store(folder, template, layers, of, layout):
    """The store of a run: `Framed` where the template's format can be filled in place, else `Parts`.

    Args:
        folder: OUT.part, held by this run.
        template: Model whose files are written again.
        layers: merge_layers.Layers.
        of: of what the layers are, see `Journal`.
        layout: of PEFT adapters, "portable" or "exact"; empty: see `layout_of`.

    Raises:
        ConfigError: models of this format cannot be written.
    """
    formats.ending(template)
    journal = Journal(os.path.join(folder, JOURNAL), of)
    if not any(layer.is_lora for layer in layers):
        place = os.path.join(folder, MODEL)
        _files.make_folder(place)
        frames = formats.frames(template, place)
        if frames is not None:
            return Framed(place, template, layers, journal, frames)
    return Parts(folder, template, journal, layout_of(template, layers, layout))


class Framed:
    """Fills the new model's own files."""

    def __init__(self, place, template, layers, journal, frames):
        self.place, self.template, self.journal, self.frames = place, template, journal, frames
        self.layers = {layer.name: layer for layer in layers}
        self.pool = concurrent.futures.ThreadPoolExecutor(reading.threads())

    def kept(self, layer):
        """The record of a layer that is there already, whole; else None."""
        line = self.journal.lines.get(layer.name)
        if line is None:
            return None
        tensor, dtype = layer.group.entries[0], descriptors.numpy_dtype(self.frames.tensors[layer.name].dtype)
        sums = _Sums(tensor.size)
        for position, part in enumerate(self.frames.read(layer.name)):
            first = position * PIECE // dtype.itemsize
            sums.add(first, np.frombuffer(part, np.uint8).view(dtype)[: max(0, tensor.size - first)])  # not the rest
        return line["record"] if sums.hexdigest() == line["checksum"] else None

    def put(self, layer, result, record):
        """Writes a layer in its stored dtype and notes it.

        Raises:
            InputError: numbers that are not finite, or that the dtype cannot hold.
        """
        dtype, size = descriptors.numpy_dtype(self.frames.tensors[layer.name].dtype), layer.group.entries[0].size
        sums, names = _Sums(size), (layer.name, *self._same(layer))

        def write(start, values):
            stored = values
            if values.dtype != dtype or not row_files.is_finite(values):
                stored = _rewrite.cast(values, dtype, self.template, layer.name)
            for name in names:
                self.frames.write(name, start, stored)
            sums.add(start, stored)

        if result.piece is not None and size > result.width:
            self._in_threads(result, size, write)
        else:
            for start, values in result.blocks():
                write(start, values)
        self.journal.add(layer.name, sums.hexdigest(), record)

    def _in_threads(self, result, size, write):
        """Makes and writes the pieces of a result, several at once."""

        def one(start):
            write(start, result.piece(start, min(result.width, size - start)))

        for done in [self.pool.submit(one, start) for start in range(0, size, result.width)]:
            done.result()

    def _same(self, layer):
        """Names that get the layer's numbers too."""
        names = {layer.name, *layer.twins}
        return (*layer.twins, *(twin for twin, other in self.frames.twins.items() if other in names))

    def finish(self):
        """Copies what is not merged and gives the folder of the whole model."""
        merged = {name for layer in self.layers.values() for name in (layer.name, *self._same(layer))}
        for name, tensor in self.frames.tensors.items():
            layer = self.layers.get(name)
            if layer is not None and layer.rest:
                for one in (name, *self._same(layer)):
                    self.frames.copy(one, tensor.size - layer.rest)
            elif name not in merged:
                self.frames.copy(name)
        self.frames.finish()
        return self.place

    def close(self):
        """Lets go of the files."""
        self.pool.shutdown(cancel_futures=True)
        self.frames.close()


class _Sums:
    """What tells a layer's bytes from others: checksums of its chunks, which may come in any order.

    CRC-32, 4 GB/s, and not sha256, 2 GB/s: what it is to find are pages that a power cut took away.
    """

    def __init__(self, size):
        self.found = [None] * -(-size // rows.CHUNK)

    def add(self, start, stored):
        """Adds numbers from flat index `start`, a multiple of CHUNK, on."""
        for first in range(0, stored.size, rows.CHUNK):
            part = np.ascontiguousarray(stored[first : first + rows.CHUNK]).view(np.uint8)
            self.found[(start + first) // rows.CHUNK] = zlib.crc32(part)

    def hexdigest(self):
        """Of all chunks; one that is missing is a bug."""
        if None in self.found:
            raise ValueError("a merged layer has a gap")
        return hashlib.sha256(np.array(self.found, "<u4").tobytes()).hexdigest()


class Parts:
    """Keeps a file a layer, and lets the format's writer make the model of them."""

    def __init__(self, folder, template, journal, layout):
        self.folder, self.template, self.journal, self.layout = folder, template, journal, layout
        self.done = {}
        _files.make_folder(os.path.join(folder, LAYERS))

    def kept(self, layer):
        """See `Framed`."""
        line, path = self.journal.lines.get(layer.name), self._path(layer.name)
        if line is None or not os.path.exists(path) or _digest(path) != line["checksum"]:
            return None
        self.done[layer.name] = layer
        return line["record"]

    def put(self, layer, result, record):
        """See `Framed`; numbers are cast in the end, by the format's writer."""
        path = self._path(layer.name)
        if isinstance(result, rows.Factors):
            tensors = {"a": result.a, "b": result.b}
        else:
            tensors = {"x": result.array((layer.group.entries[0].size,))}
        safetensors.write(path, tensors)
        self.done[layer.name] = layer
        self.journal.add(layer.name, _digest(path), record)

    def _path(self, name):
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:24]
        return os.path.join(self.folder, LAYERS, f"{digest}.safetensors")

    def finish(self):
        """See `Framed`."""
        place, ending = os.path.join(self.folder, MODEL), formats.ending(self.template)
        if os.path.lexists(place):
            _files.remove(place)  # of a run that was killed while it wrote it
        values = _Loaded(self)
        if self.template.format == "peft" and self.layout == "portable":
            pairs = {name: layer.group.entries[0] for name, layer in self.done.items() if layer.is_lora}
            peft.rewrite_portable(self.template, place, values, {**self.template.adapters, **pairs})
        elif ending:
            _files.make_folder(place)
            formats.rewrite(self.template, os.path.join(place, STEM + ending), values)
        else:
            formats.rewrite(self.template, place, values)
        return place

    def close(self):
        """Nothing is open."""


class _Loaded(dict):
    """Layer -> what `formats.rewrite` takes, read when it is asked for."""

    def __init__(self, store):
        super().__init__()
        self.store = store
        for layer in store.done.values():
            for name in (layer.name, *layer.twins):
                super().__setitem__(name, layer)

    def __getitem__(self, name):
        layer, path = super().__getitem__(name), self.store._path(super().__getitem__(name).name)
        tensors = safetensors.read(path)
        if layer.is_lora:
            return tensors["a"], tensors["b"]
        x = tensors["x"]
        if layer.rest:
            whole = formats.read(self.store.template, self.store.template.tensors[name]).reshape(-1)
            x = np.concatenate([x, whole[x.size :].astype(x.dtype)])
        return x.reshape(self.store.template.tensors[name].shape)

    def items(self):
        """Pairs, one value in memory at a time."""
        return ((name, self[name]) for name in self)


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def install(place, out):
    """Gives the finished folder its name."""
    with _writing(out):
        os.rename(place, out)
        _files.sync_folder(os.path.dirname(os.path.abspath(out)))
