"""Progress on stderr: a bar with time left on a terminal, one plain line a layer elsewhere."""

import contextlib
import sys
import time

from jaxsub import errors
from jaxsub.pipelines import plan


class Progress:
    """Counts bytes of layers; use as a context manager. Silent when `stream` is None."""

    def __init__(self, total_bytes, num_layers, *, stream=None):
        self.total_bytes, self.num_layers, self.stream = total_bytes, num_layers, stream
        self.done, self.layers, self.started, self.bar, self.task = 0, 0, time.monotonic(), None, None
        self.read = 0  # bytes of `done` that were read, not found in the workdir: only these take time

    def __enter__(self):
        if self.stream is not None and self.stream.isatty():
            with contextlib.suppress(ImportError):
                from rich import console, progress

                columns = (
                    progress.TextColumn("{task.description}", markup=False),
                    progress.BarColumn(),
                    progress.DownloadColumn(binary_units=True),
                    progress.TextColumn("{task.fields[figures]}", markup=False),
                )
                self.bar = progress.Progress(*columns, console=console.Console(file=self.stream), transient=True)
                self.bar.start()
                self.task = self.bar.add_task("reading", total=max(self.total_bytes, 1), figures="")
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.stop()

    def more(self, num_bytes, num_layers):
        """Another pass than were foreseen is begun."""
        self.total_bytes, self.num_layers = self.total_bytes + num_bytes, self.num_layers + num_layers
        if self.bar is not None:
            self.bar.update(self.task, total=max(self.total_bytes, 1))

    def layer(self, name, num_bytes, text="", *, read=None):
        """One layer is finished.

        Args:
            name: of the layer.
            num_bytes: its share of the total.
            text: more to say of it.
            read: bytes of them that were read; None for all.
        """
        self.done, self.layers = self.done + num_bytes, self.layers + 1
        self.read += num_bytes if read is None else min(read, num_bytes)
        if self.stream is None:
            return
        figures = self._figures()
        if self.bar is not None:
            said = "  ".join(figures)
            self.bar.update(self.task, completed=self.done, description=errors.quote(name, 40), figures=said)
            return
        width, total = len(str(self.num_layers)), plan.size(self.total_bytes)
        amount = f"{plan.size(self.done)} of {total}" if self.total_bytes else ""
        parts = [errors.quote(name, 60), text, amount, *figures]
        self.stream.write(f"[{self.layers:{width}}/{self.num_layers}] {'  '.join(p for p in parts if p)}\n")

    def _figures(self):
        """Texts: rate, time left, peak memory, as far as they are known."""
        spent = max(time.monotonic() - self.started, 1e-6)
        # The first layers compile: a twentieth of the bytes must be through before their rate means anything.
        known = self.done > self.total_bytes / 20 and self.read
        left = spent / self.read * (self.total_bytes - self.done) if known else 0
        return [
            *([plan.rate(self.read / spent)] if self.read else []),
            *([f"{plan.duration(left)} left"] if known else []),
            f"peak {plan.size(plan.peak_resident())}",
        ]


def stderr():
    """The stream programs report progress on."""
    return sys.stderr
