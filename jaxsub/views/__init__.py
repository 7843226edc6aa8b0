"""Views: what a row is. One plug-in a file, with `groups(collection)` and whether a base is subtracted."""
