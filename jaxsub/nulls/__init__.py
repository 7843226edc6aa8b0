"""Null models of a layer: what its statistics would be if the models shared nothing but what the null keeps.

Plug-ins, one a module: `Options`, `applies(observed)`, `sample(observed, options, rng)`, `REFERENCE`. All draw (N, N)
Gram matrices directly, so that a draw costs O(N^3) whatever the number of features. NumPy float64 on the host.
"""
