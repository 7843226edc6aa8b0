"""Optimizers that optax lacks: one module each, `make(learning_rate, ...)` gives an optax transformation."""
