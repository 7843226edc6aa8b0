"""Figures that tests measure, one JSON line each, in the file that JAXSUB_FIGURES names."""

import json
import os


def record(test, figure, value):
    """Appends {test, figure, value}; does nothing where JAXSUB_FIGURES is not set."""
    path = os.environ.get("JAXSUB_FIGURES")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"test": test, "figure": figure, "value": value}) + "\n")
