"""Plug-ins: each fits a subspace to the stack of one layer. `Options`, `fit(stack, options, key)`, `REFERENCE`."""
