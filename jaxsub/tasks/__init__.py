"""Small training tasks on data that ships with the package or is generated: one module a task.

A task has `Options` with at least `batch_size` and `draw` (the number of a variation: which half of the classes, which
language), and

    MODEL, OUTPUTS                      the model it is meant for (a module of `models`), and the width of its outputs
    name(options)                       what the variation is called, as in the labels of a zoo
    load(options)                       (train, held out), two `Data` without a row in common
    batches(rows, num_rows, options, key)   row numbers of a batch, inside jit
    loss(outputs, targets)              a scalar
    score(outputs, targets)             (..., n) in 0..1 a row, higher is better; its mean is the score of a model
"""
