"""Small training tasks on data that ships with the package: one module a task."""
