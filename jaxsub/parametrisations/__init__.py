"""What is trained in place of a network's weights: one module a parametrisation, pure functions over {layer: array}.

    Options, NEEDS_SPACES
    init(key, start, spaces, options)    -> (trainable, frozen)                    trees of arrays, {layer: ...}
    params(trainable, frozen, options)   -> {layer: array or one of `_values`}     all weights of the network

`start` is where training begins, {layer: array} with every layer of the network; what is not parametrised stays there.
`spaces` are those of a bundle, {layer: Space}; a module that cannot do without them has NEEDS_SPACES = True. With
`trainable` as `init` gives it the network is the one at `start`, unless a module says otherwise.
"""
