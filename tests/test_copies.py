"""The model files share no code; what is the same in several is held together by copies.py."""

import shutil
import subprocess
import sys

import copies
import pytest
from helpers.reference import ROOT

HERE = [name for name in copies.ALL if (ROOT / f"{name}.py").exists()]


@pytest.fixture
def tree(tmp_path):
    """A copy of the model files and of the command, to be changed at will."""
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "copies.py", tmp_path / "tests")
    for name in HERE:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    return tmp_path


def run(tree, *arguments):
    return subprocess.run(
        [sys.executable, "tests/copies.py", *arguments], cwd=tree, capture_output=True, text=True
    )


def replace(path, old, new):
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))


def test_no_copy_differs():
    assert copies.differing() == []


@pytest.mark.parametrize("what", copies.COPIES)
def test_what_is_listed_as_a_copy_is_there(what):
    for name in copies.COPIES[what]:
        if name in HERE:
            assert copies.text_of(name, what), f"{name}.py has no {what}"


def test_a_changed_copy_is_reported_and_restored(tree):
    """A function, a method, a constant and a function with a decorator."""
    for old, new in [
        ("factor = jnp.where(logits > 0,", "factor = jnp.where(logits >= 0,"),
        ("x, new_cache = self.hidden(", "x, rest = self.hidden("),
        ("STEPS = 32", "STEPS = 33"),
        ('donate_argnames="cache")\ndef decode', "donate_argnames=())\ndef decode"),
    ]:
        replace(tree / "opt.py", old, new)
    done = run(tree)
    assert done.returncode == 1
    for what in ("sample", "Model.__call__", "STEPS", "decode"):
        assert f"{what} differs between gpt2.py and opt.py\n" in done.stdout
    assert run(tree, "--write", "gpt2.py").returncode == 0
    for name in HERE:
        assert (tree / f"{name}.py").read_text() == (ROOT / f"{name}.py").read_text()


def test_a_change_is_spread_to_all_files_that_have_the_copy(tree):
    replace(tree / "opt.py", "STEPS = 32", "STEPS = 64")
    assert run(tree, "--write", "opt.py").returncode == 0
    for name in HERE:
        changed = (ROOT / f"{name}.py").read_text().replace("STEPS = 32", "STEPS = 64")
        assert (tree / f"{name}.py").read_text() == changed


def test_a_call_that_makes_no_sense_changes_nothing(tree):
    replace(tree / "opt.py", "STEPS = 32", "STEPS = 64")
    for arguments in (["--write"], ["--write", "sample.py"], ["gpt2.py"]):
        done = run(tree, *arguments)
        assert done.returncode == 1 and "--write" in done.stderr
    assert "STEPS = 64" in (tree / "opt.py").read_text()
