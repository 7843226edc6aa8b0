"""What kernels are foretold to communicate is what their compiled programs do, on eight devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxsub import placement, plugins
from jaxsub.linalg import collectives, gram, incremental, modes, orth, pairs, range_finder, svd
from tests.linalg.compiled import collective_sizes, executed

pytestmark = pytest.mark.usefixtures("x64")
FEATURES = "features"
WIDE, TALL = P(None, FEATURES), P(FEATURES, None)


def array(shape, spec=None, devices=8):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(placement.make_mesh(devices), spec or P()))


def mapped(function, specs, out):
    run = jax.shard_map(function, mesh=placement.make_mesh(8), in_specs=specs, out_specs=out, check_vma=False)
    return jax.jit(run)


def gram_pca(o, devices=8):
    mesh = placement.make_mesh(devices)
    x = array((o.models, o.features), WIDE, devices)
    mixtures = array((4, o.models), P(), devices)  # as an analysis takes along; they stay sharded
    given = {"width": o.features // mesh.size, "mesh": mesh, "dtype": "float32"}
    return [gram._dense_gram.lower(x, mixtures, jnp.int32(0), **given)]


def gram_pca_basis(o):
    x, weights = array((o.models, o.features), WIDE), array((o.rank, o.models))
    given = {"width": o.features // 8, "mesh": placement.make_mesh(8), "dtype": "float32"}
    return [*gram_pca(o), gram._combinations.lower(x, weights, jnp.int32(0), **given)]


def lora_gram(o, devices=8):
    mesh, dealt = placement.make_mesh(devices), pairs.Deal.create(o.models, o.rank, devices)
    held = [array((devices * dealt.held, o.rank, d), P(FEATURES), devices) for d in (o.inputs, o.outputs)]
    table = jax.ShapeDtypeStruct(dealt.table().shape, jnp.int32, sharding=NamedSharding(mesh, P(FEATURES)))
    given = {"size": dealt.size, "own": dealt.own, "mesh": mesh, "dtype": "float32", "factor": o.stored}
    return [gram._lora_gram.lower(*held, table, **given)]


def orthonormalise(o):
    run = mapped(functools.partial(orth.cholesky_qr2, axis=FEATURES), TALL, (TALL, P()))
    return [run.lower(array((o.rows, o.columns), TALL))]


def tall_pca(o):
    local = functools.partial(svd.gram_svd, rank=o.rank, axis=FEATURES)
    run = mapped(local, WIDE, svd.GramSvd(P(), P(), WIDE, P(), P(), P()))
    return [run.lower(array((o.columns, o.rows), WIDE))]


def tall_directions(o):
    run = mapped(functools.partial(orth.gram, axis=FEATURES, dtype="float32"), TALL, P())
    return [run.lower(array((o.rows, o.columns), TALL))]


def skinny_products(o):
    size = o.rank + o.oversample

    def both(x, y, z):
        return range_finder.tests_times(y, x), range_finder.times_tests(x, z, FEATURES)

    run = mapped(both, (WIDE, P(), WIDE), (WIDE, P()))
    return [run.lower(array((o.rows, o.columns), WIDE), array((o.rows, size)), array((size, o.columns), WIDE))]


def randomized_svd(o):
    options = {"rank": o.rank, "oversample": o.oversample, "passes": o.passes, "axis": FEATURES}
    options["range_finder"] = o.range_finder
    out = svd.RandomizedSvd(P(), P(), WIDE, P(), P(), P())
    run = mapped(lambda x, key: svd.randomized_svd(x, key, **options), (WIDE, P()), out)
    return [run.lower(array((o.rows, o.columns), WIDE), jax.random.key(0))]


def incremental_(o):
    mesh = placement.make_mesh(8)
    stream = jax.tree.map(
        lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)),
        incremental.start(o.features, rows=2 * o.rank, dtype="float32"),
        incremental._SPECS,
    )
    update = incremental._update.lower(stream, array((o.batch, o.features), WIDE), mesh=mesh)
    return [update] * (o.models // o.batch) + [incremental._finish.lower(stream, rank=o.rank, mesh=mesh)]


WIDTH = 8 * 512
SVD = {"rows": 128, "columns": WIDTH, "rank": 8, "oversample": 16, "range_finder": "power"}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
CASES = [  # workload, how it is lowered, options other than its quick ones
    ("gram_pca", gram_pca, {"models": 50, "features": WIDTH}),
    ("gram_pca", gram_pca, {"models": 160, "features": 8 * 4096 * 3}),  # a loop, and two row blocks
    ("gram_pca_basis", gram_pca_basis, {"models": 20, "features": 8 * 4096, "rank": 4}),
    ("lora_gram", lora_gram, {"models": 70, "rank": 16, "inputs": 64, "outputs": 96}),
    ("lora_gram", lora_gram, {"models": 6, "rank": 4, "inputs": 64, "outputs": 96}),
    ("lora_gram_bfloat16", lora_gram, {"models": 70, "rank": 16, "inputs": 64, "outputs": 96}),
    slow("orthonormalise", orthonormalise, {"rows": WIDTH, "columns": 16}),
    slow("orthonormalise", orthonormalise, {"rows": WIDTH, "columns": 130}),
    slow("tall_pca", tall_pca, {"rows": WIDTH, "columns": 16, "rank": 5}),
    ("tall_directions", tall_directions, {"rows": WIDTH, "columns": 160, "rank": 5}),
    ("skinny_products", skinny_products, {"rows": 96, "columns": WIDTH, "rank": 8}),
    *[slow("randomized_svd", randomized_svd, {**SVD, "passes": passes}) for passes in (2, 3, 4, 5, 10)],
    slow("randomized_svd", randomized_svd, {**SVD, "rank": 120, "rows": 200}),
    slow("incremental", incremental_, {"models": 8, "batch": 4, "rank": 8, "features": 8 * 4096 * 2}),
]


@pytest.mark.parametrize("name, lowered, changes", CASES, ids=lambda v: str(v) if isinstance(v, (str, dict)) else "")
def test_a_workload_communicates_what_it_says(name, lowered, changes):
    module = plugins.load("workloads", name)
    options = dataclasses.replace(module.QUICK, **changes)
    found = [c for one in lowered(options) for c in executed(one.compile().as_text())]
    assert sorted(found) == sorted(module.communication(options))


def test_every_workload_has_a_formula_that_is_checked_or_says_none():
    modules = {name: plugins.load("workloads", name) for name in plugins.available("workloads")}
    said = {name for name, module in modules.items() if module.communication(module.QUICK) is not None}
    assert said == {getattr(case, "values", case)[0] for case in CASES}


@pytest.mark.parametrize("devices", [2, 4])
def test_a_gram_matrix_is_as_large_on_fewer_devices(devices):
    module = plugins.load("workloads", "gram_pca")
    options = dataclasses.replace(module.QUICK, models=20, features=WIDTH)
    assert executed(gram_pca(options, devices)[0].compile().as_text()) == module.communication(options)


@pytest.mark.parametrize("models, features", [(5, 64), (50, 64), (50, 8 * 4096 * 2)])
def test_a_gram_matrix_sends_at_most_twice_itself_whatever_the_features(models, features):
    module = plugins.load("workloads", "gram_pca")
    found = executed(gram_pca(module.Options(models=models, features=features))[0].compile().as_text())
    assert len(found) == 1 and found[0][1] / 8 <= 2 * models**2


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_inner_products_of_low_rank_updates_send_nothing(devices):
    module = plugins.load("workloads", "lora_gram")
    options = module.Options(models=37, rank=4, inputs=64, outputs=96)
    assert collective_sizes(lora_gram(options, devices)[0]) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_a_randomized_svd_sends_short_sides_only(iterations):
    rows, rank, size, passes = 128, 8, 24, 2 * iterations + 2
    module = plugins.load("workloads", "randomized_svd")
    counts = []
    for columns in (8 * 512, 8 * 2048):
        sizes = {"rows": rows, "columns": columns, "rank": rank, "oversample": size - rank, "passes": passes}
        options = module.Options(**sizes, range_finder="power")
        (lowered,) = randomized_svd(options)
        found = [num_bytes for _, num_bytes in executed(lowered.compile().as_text())]
        counts.append(found)
        assert sum(size**2 * 8 <= b < rows * size * 4 for b in found) == 2 * iterations + 2
        assert sum(b == rows * size * 4 for b in found) == iterations + 1
        assert sum(b for b in found if b < size**2 * 8) <= 16 * rank
        # Of the branches for hard inputs too: none as long as the columns of a device.
        assert max(collective_sizes(lowered)) <= max(rows * size, 8 * size**2) < columns // 8 * size
    assert counts[0] == counts[1]


@pytest.mark.slow
@pytest.mark.parametrize("passes", [2, 4, 6])
def test_a_krylov_space_sends_what_it_says(passes):
    module = plugins.load("workloads", "randomized_svd")
    options = dataclasses.replace(module.QUICK, rows=300, columns=WIDTH, rank=20, passes=passes)
    found = executed(randomized_svd(options)[0].compile().as_text())
    # The next block is a branch, not taken at the last turn: `executed` counts the empty one.
    if passes > 2:
        turn = collectives.times_tests(options.rows, options.rank) + collectives.short_gram(options.rank, 2)
        found += turn * (passes // 2 - 1)
    assert sorted(found) == sorted(module.communication(options))


@pytest.mark.parametrize("models, axis, devices", [(16, 0, 8), (5, 1, 8), (5, 1, 2)])
def test_mode_grams_deal_out_models(models, axis, devices):
    shape, mesh = (64, 48), placement.make_mesh(devices)
    x = array((models, 64 * 48), WIDE, devices)
    text = modes.mode_gram.lower(x, shape=shape, axis=axis, dtype="float32", mesh=mesh).compile().as_text()
    assert executed(text) == sorted(collectives.mode_gram(models, shape, axis, devices))


def test_what_leaves_a_device():
    both = [("all-reduce", 800), ("all-to-all", 80)]
    assert collectives.sent(both, 1) == 0
    assert collectives.sent(both, 2) == 800 + 40
    assert collectives.sent(both, 8) == 1400 + 70


def test_the_count_follows_loops_and_takes_the_branch_that_sends_least():
    mesh = placement.make_mesh(8)

    def local(x):
        def one(_, y):
            return jax.lax.psum(y, FEATURES) / 3

        y = jax.lax.fori_loop(0, 5, one, x)
        return jax.lax.cond(y.sum() > 7, lambda y: jax.lax.psum(jnp.outer(y, y), FEATURES)[0], lambda y: y, y)

    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(FEATURES), out_specs=P(FEATURES), check_vma=False))
    assert executed(run.lower(array((8 * 6,), P(FEATURES))).compile().as_text()) == [("all-reduce", 24)] * 5
    turns = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: jax.lax.psum(y, FEATURES), x),
            mesh=mesh, in_specs=P(FEATURES), out_specs=P(FEATURES), check_vma=False,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="unknown length"):
        executed(turns.lower(array((48,), P(FEATURES))).compile().as_text())
