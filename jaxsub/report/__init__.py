"""The report of an analysis: report.json for machines, report.html and a terminal table for people."""

import collections.abc
import os


class Report(collections.abc.Mapping):
    """An analysis' result; `data` is what report.json holds.

    report["layers"] reads like the dict; `table()` is the terminal table, `save(folder)` writes report.json and
    report.html.
    """

    def __init__(self, data):
        self.data = data

    def __getitem__(self, key):
        return self.data[key]

    def __iter__(self):
        return iter(self.data)

    def __len__(self):
        return len(self.data)

    def __repr__(self):
        models = self.data["collection"]["num_models"]
        return f"<jaxsub report: {models} models, {len(self.layers)} layers; .table() shows it>"

    @property
    def layers(self):
        """The records of all layers, in order."""
        return self.data["layers"]

    def verdicts(self):
        """Layer name -> verdict."""
        return {layer["name"]: layer["verdict"] for layer in self.layers}

    def table(self, width=100):
        """The terminal table as text, at most `width` columns."""
        from jaxsub.report import table

        return table.render(self.data, width)

    def html(self):
        """One self-contained page."""
        from jaxsub.report import html

        return html.render(self.data)

    def save(self, folder):
        """Writes report.json, report.html, log.txt and quarantine.json, each whole or not at all; returns `folder`."""
        from jaxsub.formats import _files
        from jaxsub.report import _write

        _files.make_folder(folder)
        _write.write_json(os.path.join(folder, "report.json"), self.data)
        _write.write_json(os.path.join(folder, "quarantine.json"), self.data["collection"]["quarantined"])
        _write.write_text(os.path.join(folder, "report.html"), self.html())
        _write.write_text(os.path.join(folder, "log.txt"), self.table() + "\n")
        return folder
