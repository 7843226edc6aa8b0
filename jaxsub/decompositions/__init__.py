"""Plug-ins: each fits a subspace to the stack of one layer. `Options`, `fit(stack, options, key)`, `REFERENCE`.

A plug-in may also have `BY_ROWS`, where it takes the models as rows of features; `TAKES_LORA`, where it takes a
LoraStack; `SHRINKS`, where each axis is found in what the axes before it have left; `CUTS_RANK`, where it takes a
rank that the models cannot have for the largest that they can.
"""
