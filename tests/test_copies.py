"""Files that share no code: what is the same in several is held together by copies.py."""

import shutil
import subprocess
import sys

import copies
import pytest
from helpers.reference import ROOT

HERE = [name for name in [*copies.ALL, *copies.PROGRAMS] if (ROOT / f"{name}.py").exists()]


@pytest.fixture
def tree(tmp_path):
    """A copy of the files and of the command, to be changed at will."""
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


# -------------------------------------------------------------------------- the project's own files


def test_no_copy_differs():
    assert copies.differing() == []


@pytest.mark.parametrize(("what", "names"), copies.copies())
def test_what_is_listed_as_a_copy_is_there(what, names):
    for name in names:
        assert copies.text_of(name, what), f"{name}.py has no {what}"


def test_a_changed_copy_is_reported_and_restored(tree):
    """A function, a method, a constant and a function with a decorator; and in a program."""
    for file, old, new in [
        ("opt.py", "factor = jnp.where(logits > 0,", "factor = jnp.where(logits >= 0,"),
        ("opt.py", "x, new_cache = self.hidden(", "x, rest = self.hidden("),
        ("opt.py", "STEPS = 32", "STEPS = 33"),
        ("opt.py", 'donate_argnames="cache")\ndef decode', "donate_argnames=())\ndef decode"),
        ("train.py", "def fail(message)", "def fail(words)"),
    ]:
        replace(tree / file, old, new)
    done = run(tree)
    assert done.returncode == 1
    assert "Model.__call__ differs between gpt2.py and opt.py\n" in done.stdout
    assert "fail differs between sample.py and train.py\n" in done.stdout
    run(tree, "--write", "gpt2.py")
    assert run(tree, "--write", "sample.py").returncode == 0
    for name in HERE:
        assert (tree / f"{name}.py").read_text() == (ROOT / f"{name}.py").read_text()


def test_a_change_is_spread_to_all_files_that_have_the_copy(tree):
    replace(tree / "opt.py", "STEPS = 32", "STEPS = 64")
    run(tree, "--write", "opt.py")
    for name in {*HERE} & {*copies.ALL}:
        changed = (ROOT / f"{name}.py").read_text().replace("STEPS = 32", "STEPS = 64")
        assert (tree / f"{name}.py").read_text() == changed


def test_a_call_that_makes_no_sense_changes_nothing(tree):
    replace(tree / "opt.py", "STEPS = 32", "STEPS = 64")
    for arguments in (["--write"], ["--write", "README.md"], ["gpt2.py"]):
        done = run(tree, *arguments)
        assert done.returncode == 1 and "--write" in done.stderr
    assert "STEPS = 64" in (tree / "opt.py").read_text()


# ------------------------------------------------------------------------------------ made-up files

MODEL = """
# --------------------- Config ---------------------
WIDTH = {width}
# ------ Generation: the same in every model file -----


def draw():
    return {drawn}


# --------------------------------------------------

if __name__ == "__main__":
    print({width})
"""
PROGRAM = """
LIMIT: int = {limit}


def fail():
    print({words!r})
"""


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Three model files and two programs, of which one does not have all copies yet."""
    monkeypatch.setattr(copies, "ROOT", tmp_path)
    monkeypatch.setattr(copies, "COPIES", [(copies.PROGRAMS, ["LIMIT", "fail"])])
    for width, name in enumerate(["gpt2", "opt", "llama"]):
        (tmp_path / f"{name}.py").write_text(MODEL.format(width=width, drawn=1))
    (tmp_path / "sample.py").write_text(PROGRAM.format(limit=1, words="a"))
    (tmp_path / "bench.py").write_text("LIMIT: int = 1\n")
    return tmp_path


HEADING = "Generation: the same in every model file"


def test_a_section_that_says_so_is_held_whole(made_up):
    assert copies.differing() == []
    (made_up / "opt.py").write_text(MODEL.format(width=1, drawn=2))
    assert copies.differing() == [(HEADING, "gpt2", "opt")]
    copies.spread("opt")
    assert copies.differing() == []
    for width, name in enumerate(["gpt2", "opt", "llama"]):
        assert (made_up / f"{name}.py").read_text() == MODEL.format(width=width, drawn=2)


@pytest.mark.parametrize(
    "old, new",
    [
        ("return 1\n", "return 1  # one\n"),
        ("\n\n\ndef draw", "\n\ndef draw"),  # blank lines count, too
        ("every model file -----\n", "every model file ------\n"),
        ("return 1\n", "return 1\n\n\ndef more():\n    return 2\n"),  # the section is longer
    ],
)
def test_any_difference_within_a_section_is_seen_and_mended(made_up, old, new):
    replace(made_up / "llama.py", old, new)
    assert copies.differing() == [(HEADING, "gpt2", "llama")]
    copies.spread("gpt2")
    assert (made_up / "llama.py").read_text() == MODEL.format(width=2, drawn=1)


def test_a_section_that_a_model_file_lacks_is_reported(made_up):
    (made_up / "llama.py").write_text("WIDTH = 2\n")
    copies.spread("gpt2")  # does not know where it should stand
    assert copies.differing() == [(HEADING, "gpt2", "llama")]


def test_a_section_may_be_the_last_one(made_up):
    last = MODEL.partition("# ----------------------------------------------")[0].rstrip() + "\n"
    (made_up / "opt.py").write_text(last.format(width=1, drawn=2))
    copies.spread("gpt2")
    assert (made_up / "opt.py").read_text() == last.format(width=1, drawn=1)


def test_the_copies_of_programs_are_held_by_name(made_up):
    """A constant with a type and a function, which one of the programs does not have yet."""
    assert copies.differing() == []
    (made_up / "bench.py").write_text(PROGRAM.format(limit=2, words="b"))
    assert copies.differing() == [("LIMIT", "sample", "bench"), ("fail", "sample", "bench")]
    copies.spread("sample")
    assert (made_up / "bench.py").read_text() == PROGRAM.format(limit=1, words="a")
