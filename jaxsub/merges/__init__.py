"""Merge methods: N models of a layer become one. One plug-in a file: `Options`, `merge(rows, options, key) -> result`.

`rows` is `jaxsub.rows.Rows`, the result what its methods return. `NEEDS_UPDATES` says that rows must be differences to
a base; low-rank updates, and coefficients of a bundle, are. `REFERENCE` names the source, `NOTE` is told to the user.
`merge` is called with x64 on: small matrices and sums are float64.

A method may also have, for the plan: `READS`, how often it reads a layer, `BLOCKS`, how many of its blocks it holds,
`held(shape, count, itemsize)`, bytes of the host for a matrix; for what is said: `IS_LINEAR` in the models,
`leaves_base(shape, count)`, whether it takes nothing of a layer; `TAKES_STATISTICS`; `MANY`, where it gives several
models; `merge_models(whole, loss, options, key)` of all layers at once instead of `merge`.
"""
