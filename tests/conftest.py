"""Eight host devices for every test, strict promotion, and the folders of optional data."""

import os
import pathlib
import tempfile

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# Programs that tests start keep their compiled kernels here, not in the user's cache.
os.environ.setdefault("XDG_CACHE_HOME", os.path.join(tempfile.gettempdir(), f"jaxsub-tests-{os.getuid()}"))

import pytest


def _skipping_what_is_not_there():
    """On an accelerator, tests that want more devices than there are are skipped."""
    try:
        return (yield)
    except Exception as error:
        import jax

        if "but JAX sees" in str(error) and jax.default_backend() != "cpu":
            pytest.skip(str(error))
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup():
    return (yield from _skipping_what_is_not_there())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    return (yield from _skipping_what_is_not_there())


@pytest.fixture(scope="module", autouse=True)
def few_compiled_kernels():
    """Each compiled kernel takes five memory maps; at the system's limit, 65,530, XLA's compiler crashes."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        import jax

        jax.clear_caches()


def shared_folder():
    """Folder of real collections beside the checkout, or None."""
    here = pathlib.Path(__file__).resolve().parents[1]
    for folder in (os.environ.get("JAXSUB_SHARED", ""), here.parent / "shared"):
        if folder and pathlib.Path(folder, "data").is_dir():
            return pathlib.Path(folder)
    return None


@pytest.fixture(scope="session")
def shared():
    """The folder of real collections; skips where it is not there."""
    folder = shared_folder()
    if folder is None:
        pytest.skip("no real collections: set JAXSUB_SHARED")
    return folder


@pytest.fixture
def mesh1():
    """A mesh of one device."""
    from jaxsub import placement

    return placement.make_mesh(1)
