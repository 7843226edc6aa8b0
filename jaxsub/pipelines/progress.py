"""Progress on stderr: a bar with time left on a terminal, one plain line a layer elsewhere."""

import contextlib
import sys
import time

from jaxsub import errors


class Progress:
    """Counts bytes of layers; use as a context manager. Silent when `stream` is None."""

    def __init__(self, total_bytes, num_layers, *, stream=None):
        self.total_bytes, self.num_layers, self.stream = max(total_bytes, 1), num_layers, stream
        self.done, self.layers, self.started, self.bar, self.task = 0, 0, time.monotonic(), None, None

    def __enter__(self):
        if self.stream is not None and self.stream.isatty():
            with contextlib.suppress(ImportError):
                from rich import console, progress

                columns = (
                    progress.TextColumn("{task.description}"),
                    progress.BarColumn(),
                    progress.DownloadColumn(),
                    progress.TransferSpeedColumn(),
                    progress.TimeRemainingColumn(),
                )
                self.bar = progress.Progress(*columns, console=console.Console(file=self.stream), transient=True)
                self.bar.start()
                self.task = self.bar.add_task("reading", total=self.total_bytes)
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.stop()

    def layer(self, name, num_bytes, text=""):
        """One layer is finished."""
        self.done, self.layers = self.done + num_bytes, self.layers + 1
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, description=errors.quote(name, 40))
        elif self.stream is not None:
            spent = time.monotonic() - self.started
            # The first layers compile: a twentieth of the bytes must be through before their rate means anything.
            known = self.done > self.total_bytes / 20
            left = f"{spent * (self.total_bytes - self.done) / self.done:.0f} s left" if known else ""
            width = len(str(self.num_layers))
            self.stream.write(
                f"[{self.layers:{width}}/{self.num_layers}] {errors.quote(name, 60)}  {text}  {left}".rstrip() + "\n"
            )


def stderr():
    """The stream programs report progress on."""
    return sys.stderr
