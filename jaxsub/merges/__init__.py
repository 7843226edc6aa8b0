"""Merge methods: N models of a layer become one. One plug-in a file: `Options`, `merge(rows, options, key) -> result`.

`rows` is `jaxsub.rows.Rows`, the result what its methods return. `NEEDS_UPDATES` says that rows must be differences to
a base; low-rank updates, and coefficients of a bundle, are. `REFERENCE` names the source, `NOTE` is told to the user.
`merge` is called with x64 on: small matrices and sums are float64.
"""
