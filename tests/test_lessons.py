"""The lessons in notebooks/: they run, and the outputs that they show are those of this code."""

import importlib.util
import re

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install -r notebooks/requirements.txt")
import lessons  # noqa: E402

LESSONS = lessons.lessons()


@pytest.mark.slow
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs_and_shows_what_this_code_gives(path):
    pytest.importorskip("nbclient", reason="pip install -r notebooks/requirements.txt")
    if "import keras" in path.read_text() and importlib.util.find_spec("keras") is None:
        pytest.skip("pip install -r notebooks/requirements.txt")
    fresh = lessons.run(path, with_answers=True)
    assert lessons.differences(lessons.read(path), fresh) == []


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_is_stored_with_its_outputs_and_nothing_that_changes(path):
    notebook = lessons.read(path)
    assert path.stat().st_size < 400_000
    assert notebook.metadata == lessons.KEPT
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", "a lesson shows no warnings"
    assert any("image/png" in str(cell.get("outputs")) for cell in notebook.cells)


def test_all_lessons_begin_with_the_same_cell():
    first = {lessons.read(path).cells[1].source for path in LESSONS}
    assert len(first) <= 1


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_has_exercises_with_hidden_answers_and_what_to_read_next(path):
    text = "\n".join(c.source for c in lessons.read(path).cells if c.cell_type == "markdown")
    assert 2 <= len(re.findall("<details>", text)) <= 4
    assert text.count("<details>") == text.count("</details>")
    assert "## What to read next" in text


def test_every_lesson_is_in_the_list():
    listed = re.findall(r"\]\((\w+\.ipynb)\)", (lessons.FOLDER / "README.md").read_text())
    assert sorted(listed) == [path.name for path in LESSONS]


def test_numbers_may_differ_by_rounding_and_measured_ones_by_more():
    assert lessons.is_close("loss 2.000, off by 3e-07", "loss 2.001, off by 9e-07", False)
    assert not lessons.is_close("loss 2.0", "loss 2.1", False)
    assert lessons.is_close("took 2.0 ms", "took 9 ms", True)
    assert not lessons.is_close("took 2.0 ms", "took 9 s", True)
