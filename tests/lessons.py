"""Runs the lessons in notebooks/, and keeps their stored outputs those of the present code.

    python tests/lessons.py                                # runs all, and says what differs
    python tests/lessons.py notebooks/03_attention.ipynb   # runs one
    python tests/lessons.py --write notebooks/03_attention.ipynb   # stores what it prints and draws
    python tests/lessons.py --repository https://github.com/me/copy  # what Colab clones, in all

A lesson is run in a new kernel, in the folder notebooks/, as Jupyter does it. A cell with the tag
`measured` prints times: there, numbers may differ.
"""

import argparse
import re
import sys
import time
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
NUMBER = re.compile(r"[-+]?\d[\d,_]*\.?\d*(?:[eE][-+]?\d+)?")
SECONDS = 300  # for a cell; a lesson takes less than 60 s
KEPT = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def lessons() -> list[Path]:
    return sorted(FOLDER.glob("*.ipynb"))


def read(path: Path):
    return nbformat.read(path, as_version=4)


def answers(notebook) -> list[str]:
    """The Python of the hidden answers to the exercises."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for hidden in re.findall(r"<details>(.*?)</details>", cell.source, re.DOTALL):
                found += re.findall(r"^```python\n(.*?)^```", hidden, re.DOTALL | re.MULTILINE)
    return found


def run(path: Path, with_answers: bool = False):
    """The notebook with new outputs. An error in a cell is raised.

    with_answers: the answers to the exercises are run after it, as cells at its end.
    """
    from nbclient import NotebookClient

    notebook = read(path)
    if with_answers:
        for source in answers(notebook):
            notebook.cells.append(nbformat.v4.new_code_cell(source))
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    return tidy(notebook)


def tidy(notebook):
    """Without what changes from run to run: counts of executions, times, the version of Python.

    What a cell prints in several pieces becomes one.
    """
    notebook.metadata = nbformat.from_dict(KEPT)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        outputs = []
        for output in cell.outputs:
            output.pop("execution_count", None)
            if output.output_type == "execute_result":
                output.execution_count = None
            last = outputs[-1] if outputs else None
            both_print = last and output.output_type == last.output_type == "stream"
            if both_print and output.name == last.name:
                last.text += output.text
            else:
                outputs.append(output)
        cell.outputs = outputs
    return notebook


def texts(cell) -> list[str]:
    """What a cell printed or showed, as text; for a picture, that it is one."""
    found = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "image/png" in data:
            found.append("(a picture)")
        else:
            found.append(output.get("text") or data.get("text/plain", output.output_type))
    return found


def is_close(one: str, other: str, measured: bool) -> bool:
    """Whether two texts are equal, but for rounding in their numbers.

    Numbers may differ by 2%, as machines round differently; those below 1e-4 are such
    differences themselves.
    """
    if NUMBER.sub("#", one).split() != NUMBER.sub("#", other).split():
        return False
    if measured:
        return True
    pairs = zip(NUMBER.findall(one), NUMBER.findall(other), strict=True)
    for a, b in pairs:
        a = float(a.replace(",", "").replace("_", ""))
        b = float(b.replace(",", "").replace("_", ""))
        small = max(abs(a), abs(b)) < 1e-4
        if not small and abs(a - b) > 0.02 * max(abs(a), abs(b)):
            return False
    return True


def differences(stored, fresh) -> list[str]:
    """Where the outputs of two runs of a notebook differ: a line for each cell."""
    found = []
    for i, (old, new) in enumerate(zip(stored.cells, fresh.cells, strict=False)):
        measured = "measured" in old.metadata.get("tags", [])
        before = texts(old)
        now = texts(new)
        same = len(before) == len(now)
        if same:
            pairs = zip(before, now, strict=True)
            same = all(is_close(a, b, measured) for a, b in pairs)
        if not same:
            found.append(f"cell {i}: stored {before}\n         now    {now}")
    return found


def set_repository(address: str):
    """Writes the address of the repository into the first cell of all lessons."""
    for path in lessons():
        notebook = read(path)
        cell = notebook.cells[1]
        cell.source = re.sub('REPOSITORY = ".*"', f'REPOSITORY = "{address}"', cell.source)
        nbformat.write(notebook, path)


def main() -> int:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument("lesson", nargs="*", type=Path, help="default: all")
    parser.add_argument("--write", action="store_true", help="store the new outputs")
    parser.add_argument("--repository", metavar="URL", help="set what Colab clones, and stop")
    args = parser.parse_args()
    if args.repository:
        set_repository(args.repository)
        return 0

    code = 0
    for path in args.lesson or lessons():
        start = time.perf_counter()
        fresh = run(path.resolve())
        seconds = time.perf_counter() - start
        changed = differences(read(path), fresh)
        if args.write:
            nbformat.write(fresh, path)
            changed = []
        kilobytes = path.stat().st_size / 1000
        print(f"{path.name}: {seconds:.0f} s, {kilobytes:.0f} kB", *changed, sep="\n")
        if changed:
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
