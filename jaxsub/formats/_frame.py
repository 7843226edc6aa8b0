"""Safetensors files of known tensors that are filled one tensor at a time, in any order, by one run or several.

The header, and with it every tensor's place, is written first; what is not filled yet reads as zeros. Whether a tensor
is there only its writer knows. Such files belong in a folder that is not yet a model; `finish` puts them on the disk.
"""

import contextlib
import os
import threading

import numpy as np

from jaxsub import descriptors
from jaxsub.formats import _output, safetensors

PIECE = 1 << 24  # bytes written at once
FLUSH = 1 << 26  # bytes after which what is written begins its way to the disk, so that `finish` has less to wait for


class Frame:
    """One file."""

    def __init__(self, path, tensors, metadata=None):
        """Makes the file, or finds the one that a run before this has made.

        Args:
            path: of the file; its folder exists.
            tensors: Tensors; only names, shapes and dtypes are used.
            metadata: strings by name.

        Raises:
            ResourceError: no room on the disk.
        """
        header, self.places, size = safetensors.layout({t.name: (t.shape, t.dtype) for t in tensors}, metadata or {})
        self.path, self._unsynced, self._flushing = os.fspath(path), 0, None
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                if os.pread(self._fd, len(header), 0) != header or os.fstat(self._fd).st_size != size:
                    os.ftruncate(self._fd, 0)
                    os.ftruncate(self._fd, size)
                    os.pwrite(self._fd, header, 0)
            except BaseException:
                os.close(self._fd)
                raise
        except OSError as error:
            raise _output.failed(path, error, size) from error

    def write(self, name, start, data):
        """Writes bytes from byte `start` of a tensor on."""
        offset, num_bytes = self.places[name]
        view = memoryview(data).cast("B")
        num_bytes_written = view.nbytes
        if start + view.nbytes > num_bytes:
            raise ValueError(f"{name}: {start + view.nbytes} bytes of {num_bytes}")
        try:
            while view.nbytes:
                count = os.pwrite(self._fd, view[:PIECE], offset + start)
                start, view = start + count, view[count:]
        except OSError as error:
            raise _output.failed(self.path, error) from error
        self._unsynced += num_bytes_written
        if self._unsynced > FLUSH and (self._flushing is None or not self._flushing.is_alive()):
            self._unsynced = 0
            self._flushing = threading.Thread(target=self._flush, daemon=True)
            self._flushing.start()

    def _flush(self):
        with contextlib.suppress(OSError):  # `finish` meets the fault again, and says so
            os.fdatasync(self._fd)

    def read(self, name):
        """Yields the bytes of a tensor as they are in the file, in pieces."""
        offset, num_bytes = self.places[name]
        for start in range(0, num_bytes, PIECE):
            yield os.pread(self._fd, min(PIECE, num_bytes - start), offset + start)

    def finish(self):
        """All that was written is on the disk when this returns; nothing can be written any more."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise _output.failed(self.path, error) from error
        finally:
            self.close()

    def close(self):
        """Lets go of the file; may be called more than once."""
        if self._flushing is not None:
            self._flushing.join()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Frames:
    """The files of one model that is written anew with other values: tensors are filled, the rest is copied.

    Attributes:
        tensors: name -> Tensor of all that the model's files hold.
        twins: name -> name of the tensor with the same stored numbers, for names of one storage.
    """

    def __init__(self, folder, files, twins, complete):
        """Makes or finds the files.

        Args:
            folder: exists; becomes the model's folder.
            files: [(name in it, Tensors, metadata, function that yields the original arrays of a Tensor in pieces)].
            twins: see above.
            complete: called with the folder in the end, to write what is beside the weights.
        """
        self.folder, self.twins, self._complete, self._where = folder, twins, complete, {}
        self.tensors, self._frames = {}, []
        try:
            for name, tensors, metadata, pieces in files:
                frame = Frame(os.path.join(folder, name), tensors, metadata)
                self._frames.append(frame)
                for tensor in tensors:
                    self._where[tensor.name] = frame, pieces
                    self.tensors[tensor.name] = tensor
        except BaseException:
            self.close()
            raise

    def write(self, name, start, array):
        """Writes a row-major array, of the tensor's dtype, from its flat index `start` on."""
        tensor = self.tensors[name]
        if array.dtype != descriptors.numpy_dtype(tensor.dtype):
            raise ValueError(f"{name}: {array.dtype} for {tensor.dtype}")
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._where[name][0].write(name, start * array.dtype.itemsize, data)

    def read(self, name):
        """Yields the bytes of a tensor as they are in the file now."""
        return self._where[name][0].read(name)

    def original(self, name):
        """Yields the arrays that together are a tensor of the original, flat, in order."""
        return self._where[name][1](self.tensors[name])

    def copy(self, name, start=0):
        """Fills a tensor with the original's numbers from flat index `start` on."""
        position = 0
        for piece in self.original(name):
            flat = piece.reshape(-1)
            first = max(start - position, 0)
            if first < flat.size:
                self.write(name, position + first, flat[first:])
            position += flat.size

    def finish(self):
        """Puts the files on the disk and writes what belongs beside them."""
        for frame in self._frames:
            frame.finish()
        self._complete(self.folder)
        _output.sync_folder(self.folder)

    def close(self):
        """Lets go of the files."""
        for frame in self._frames:
            frame.close()
