"""Which way the modules import, read from their syntax trees, and what an import costs."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
LEVELS = [
    ["errors", "cgroups"],
    ["precision", "plugins", "config", "descriptors", "hubcache", "launcher", "hostmemory", "solvers"],
    ["distributed"],
    ["linalg", "formats", "finding", "lineup"],
    ["spectrum", "statistics", "collection", "views", "placement", "reading", "stacks", "subspace", "estimators"],
    ["rows"],
    [
        "heldout",
        "lineage",
        "verdict",
        "nulls",
        "tasks",
        "models",
        "report",
        "decompositions",
        "workloads",
        "bundle",
        "optimizers",
        "merges",
    ],
    ["parametrisations"],
    ["training", "worlds"],
    ["pipelines"],
    ["cli"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
# Modules that stand on others of their level.
NAMED_SIBLINGS = {
    ("finding", "formats"),
    ("statistics", "spectrum"),
    ("stacks", "spectrum"),
    ("reading", "placement"),
    ("bundle", "decompositions"),
}
NO_JAX = (
    "errors", "cgroups", "launcher", "plugins", "config", "descriptors", "formats", "finding", "hubcache", "lineup",
    "collection", "report", "spectrum", "solvers", "heldout", "lineage", "verdict", "nulls", "cli",
)  # fmt: skip
TRAINING_LIBRARIES = ("flax", "optax", "orbax")
MAY_TRAIN = ("models", "tasks", "training", "worlds", "optimizers")
MAY_WRITE = ("jaxsub/formats/orbax.py",)  # formats read without jax; this one writes with the library itself
NEVER = ("pickle", "torch", "joblib", "dill", "cloudpickle", "marshal", "shelve")


def modules():
    return sorted(p for p in (ROOT / "jaxsub").rglob("*.py") if "__pycache__" not in p.parts)


def part_of(path):
    """'formats' for jaxsub/formats/peft.py, 'config' for jaxsub/config.py, '' for the package itself."""
    parts = path.relative_to(ROOT / "jaxsub").with_suffix("").parts
    return "" if parts in (("__init__",), ("__main__",)) else parts[0]


@functools.cache
def imports(path):
    """[(dotted name, line, whether at module level)] of everything a file imports."""
    tree = ast.parse(path.read_text())
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [(name, node.lineno, id(node) not in inner) for name in names]
    return found


def test_every_module_has_a_level():
    assert {part_of(p) for p in modules()} - {""} <= {*LEVEL}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_lead_downwards(path):
    own = part_of(path)
    for name, line, _ in imports(path):
        parts = name.split(".")
        if not own or parts[0] != "jaxsub" or len(parts) == 1:
            continue
        target = parts[1]
        if target not in LEVEL:  # a name of the package itself, such as __version__
            continue
        is_allowed = target == own or LEVEL[target] < LEVEL[own] or (own, target) in NAMED_SIBLINGS
        assert is_allowed, f"{path}:{line}: {own} (level {LEVEL[own]}) imports {target} (level {LEVEL[target]})"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_libraries_stay_where_they_belong(path):
    own = part_of(path)
    for name, line, at_top in imports(path):
        library = name.split(".")[0]
        where = f"{path}:{line}: imports {name}"
        is_peer = own == "workloads" and library == "torch" and not at_top  # timed beside, never read files with
        assert library not in NEVER or is_peer, where
        if own in NO_JAX and not (str(path.relative_to(ROOT)) in MAY_WRITE and library == "orbax" and not at_top):
            assert library not in ("jax", "jaxlib", *TRAINING_LIBRARIES), where
        if library in TRAINING_LIBRARIES:
            assert own in MAY_TRAIN or not at_top, where
        if library == "absl":
            assert own == "cli" or (own == "" and not at_top), where
        if library == "ml_collections":
            assert own in ("config", "cli") and not at_top, where


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_prints_or_configures_at_import(path):
    tree = ast.parse(path.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in calls:
        text = ast.unparse(call.func)
        assert text not in ("print", "eval", "breakpoint"), f"{path}:{call.lineno}: {text}"
        assert text != "exec" or part_of(path) == "config", f"{path}:{call.lineno}: {text}"
        assert text != "jax.config.update", f"{path}:{call.lineno}: {text}"
    has_set = any(ast.unparse(c.func) in ("set", "frozenset") for c in calls) or any(
        isinstance(node, ast.SetComp) for node in ast.walk(tree)
    )
    assert not (has_set and path.stem == "collection"), f"{path}: the order of a set is no order"


def test_plugins_do_not_import_each_other():
    for path in modules():
        own = part_of(path)
        of = ("views", "nulls", "tasks", "worlds", "parametrisations", "optimizers", "merges")
        if own in of and not path.stem.startswith("_"):
            for name, line, _ in imports(path):
                inside = name.split(".")[2:]
                is_plugin = name.startswith(f"jaxsub.{own}.") and not inside[0].startswith("_")
                assert not is_plugin, f"{path}:{line}: imports the plug-in {name}"


def loaded_after(code):
    """Top-level modules loaded once `code` has run in a fresh process."""
    script = f"import sys\n{code}\nsys.stdout.write(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    return {*found.stdout.split()}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import jaxsub", ("jax", "flax", "optax", "orbax", "matplotlib", "torch", "absl", "numpy")),
        ("import jaxsub.cli", ("jax", "absl", "numpy")),
        ("import jaxsub.collection", ("jax", "flax", "absl", "h5py", "torch")),
        ("import jaxsub.report", ("jax", "matplotlib")),
        *[
            (f"import jaxsub.cli.{name}, jaxsub.cli._run, jaxsub.cli.flags", ("jax", "flax", "optax", "orbax"))
            for name in ("analyze", "inspect", "demo", "zoo")
        ],
    ],
    ids=lambda value: value.partition(",")[0] if isinstance(value, str) else "",
)
def test_import_leaves_the_heavy_ones_out(code, absent):
    assert not loaded_after(code) & {*absent}


@pytest.mark.slow
def test_import_takes_less_than_a_second():
    code = "import time; t = time.perf_counter(); import jaxsub.collection; assert time.perf_counter() - t < 1"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_files_are_short_enough_to_read():
    plugins = ("views", "nulls", "tasks", "parametrisations", "optimizers", "merges")
    for path in modules():
        most = 150 if part_of(path) in plugins and not path.stem.startswith("_") else 400
        lines = len(path.read_text().splitlines())
        assert lines <= most, f"{path}: {lines} lines, at most {most}: split it"
