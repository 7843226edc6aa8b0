"""Kernels are compiled once a shape, not once a layer."""

import jaxsub
from jaxsub.linalg import gram, modes
from tests.programs import worlds


def test_layers_of_one_shape_share_their_executables(tmp_path):
    stacks = {f"layer.{n}.weight": worlds.noise(9, (12, 10), seed=n) for n in range(6)}
    stacks |= {f"layer.{n}.bias": worlds.noise(9, (12,), seed=50 + n) for n in range(6)}
    folder = worlds.write(tmp_path / "c", stacks)
    before = gram._dense_gram._cache_size(), modes.mode_gram._cache_size()
    jaxsub.analyze(str(folder), draws=2, splits=2)
    after = gram._dense_gram._cache_size(), modes.mode_gram._cache_size()
    assert after[0] - before[0] <= 2 and after[1] - before[1] <= 2
