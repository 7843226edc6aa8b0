"""Kernels: arrays in, arrays out. They know no files, names or models."""
