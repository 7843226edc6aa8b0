"""Small flax networks for the zoo, the training program and the tests; `Model` of a module is its network."""
