"""Views: what a row is. One plug-in a file, with `groups(collection)` and whether a base is subtracted.

Groups of too few models are among them: who analyses them lists them as skipped.
"""
