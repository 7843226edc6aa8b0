"""Small flax networks for the zoo, the training program and the tests."""
