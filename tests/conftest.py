"""Strict settings for the whole suite: 8 fake CPU devices, no silent rank promotion, shapes checked
against their annotations. XLA optimises less than for users: the suite compiles more than it runs.

Compiled programs are kept from run to run, and are shared by the workers and by the processes that
tests start: in JAX_COMPILATION_CACHE_DIR, or else in the user's cache folder (`compiling.py`).
"""

import functools
import gc
import importlib
import inspect
import itertools
import os
import pathlib
import sys

import compiling
import jax
import jaxtyping
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, by lsg_flax
jax.config.update("jax_numpy_rank_promotion", "raise")
jaxtyping.install_import_hook("lsg_flax", "beartype.beartype")

# Inner functions are left out: the hook would decorate them anew in each call of the outer ones.
_jaxtyped = jaxtyping.jaxtyped


def _jaxtyped_where_checked(function=None, *, typechecker):
    if function is None:
        return functools.partial(_jaxtyped_where_checked, typechecker=typechecker)
    if inspect.isfunction(function):
        inner = "<locals>" in function.__qualname__
        if inner or not function.__annotations__:
            return function
    return _jaxtyped(function, typechecker=typechecker)


jaxtyping.jaxtyped = _jaxtyped_where_checked

# JAX and Flax make many objects that live as long as the process; looking through all of them again
# and again was a tenth of the suite's time.
gc.set_threshold(50_000, 20, 50)

MAPS, MOST_PIECES = pathlib.Path("/proc/self/maps"), 30_000
_finished = itertools.count(1)  # tests


def pytest_sessionstart(session):
    if not hasattr(session.config, "workerinput"):  # not in each worker of pytest-xdist
        compiling.prune()


def pytest_collection_finish():
    gc.freeze()


def pytest_runtest_logfinish():
    """Lets go of compiled programs in time. Each takes pieces of memory, of which Linux gives a
    process 65,530: a worker of the whole suite came to that, and jaxlib then ends it."""
    if next(_finished) % 50 or not MAPS.exists():
        return
    with MAPS.open("rb") as lines:
        pieces = sum(1 for _ in lines)
    if pieces > MOST_PIECES:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True, scope="session")
def few_progress_lines():
    """On a busy machine a line every ten seconds would be in outputs that tests compare."""
    importlib.import_module("lsg_flax.progress").INTERVAL = 3600.0


@pytest.fixture
def script(monkeypatch):
    """A module of examples/ or benchmarks/ by its name, imported anew."""
    for folder in ("examples", "benchmarks"):
        monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / folder))

    def load(name):
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    return load


@pytest.fixture
def unchecked():
    """Without the annotation checks, which would come before our messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
