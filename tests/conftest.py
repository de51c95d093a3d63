"""What many tests share: checkpoints, which are small, random and made once."""

import os
import sys
import tempfile

# Programs that several tests need are compiled once: all processes share a folder, which goes when
# the first of them ends. Set before jax is imported.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory()
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": compiled.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

import jax
import pytest
import torch
from helpers.families import EVERY_CONFIG, FAMILIES, GPT2
from helpers.reference import Case, write_random

import sample

# GPUs and TPUs round the inputs of a float32 product unless told otherwise; parity needs all bits.
jax.config.update("jax_default_matmul_precision", "highest")
# The reference models are tiny: threads that wait for each other take longer than their work.
torch.set_num_threads(1)


def pytest_configure(config):
    """Most tests compile more than they compute: XLA optimises little, in 0.7 of the time."""
    if config.option.markexpr != "slow":
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """`core_gpt2_only`: the core suite runs it for gpt2 alone, the wide one for the others."""
    for item in items:
        marker = item.get_closest_marker("core_gpt2_only")
        if marker and item.callspec.params["family"] is not GPT2:
            item.add_marker(*marker.args or ["wide"])


@pytest.fixture(scope="session")
def make_case(tmp_path_factory):
    """(family, name of a config) -> its Case; the same one every time."""
    cases = {}

    def make(family, name="plain"):
        if (family.name, name) not in cases:
            folder = tmp_path_factory.mktemp(family.name)
            write_random(family, family.config(name), folder)
            cases[family.name, name] = Case(family, folder)
        return cases[family.name, name]

    return make


@pytest.fixture(scope="session", params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture(scope="session")
def plain(make_case, family):
    """The Case of a family's plain config."""
    return make_case(family)


@pytest.fixture(scope="session")
def model(plain):
    return plain.model


@pytest.fixture(scope="session", params=EVERY_CONFIG)
def case(request, make_case):
    return make_case(*request.param)


@pytest.fixture(autouse=True)
def no_mesh():
    """The programs set a mesh for the rest of their process, which here runs other tests, too."""
    yield
    jax.set_mesh(None)


@pytest.fixture(autouse=True, scope="module")
def no_programs_of_other_files():
    """Linux gives a process some 65,000 regions of memory; a test file compiles into thousands."""
    yield
    jax.clear_caches()


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs sample.py in this process, for speed; its one line on standard error."""

    def call(*options):
        command = ["sample.py", "--compile-cache", "off", *map(str, options)]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()  # what the fixtures printed
        with pytest.raises(SystemExit) as stop:
            sample.main()
        out, err = capsys.readouterr()
        assert (stop.value.code, out) == (2, "")
        assert err.startswith("sample.py: ") and err.count("\n") == 1
        return err

    yield call
    jax.config.update("jax_default_device", None)
