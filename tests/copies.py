"""What is the same to the letter in several files, and the command that keeps it so.

    python tests/copies.py                    # says what differs
    python tests/copies.py --write gpt2.py    # spreads the copies of gpt2.py to the model files
    python tests/copies.py --write sample.py  # spreads the copies of sample.py to the programs

The model files share no code, so that each can be read and copied alone; nor do the programs. That
has a price: a change to what they have in common is made in one of them, and spread by this
command. A copy is a function, a class, a method or a constant that a table below names, or a whole
section of a model file: from a heading that says so to the next rule line.
"""

import ast
import re
import sys
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALL = ["gpt2", "opt", "llama", "gemma", "mistral", "qwen"]
PROGRAMS = ["sample", "train", "bench"]
# Which files have the same definitions, beside the sections that are the same in every model file.
COPIES = [
    (ALL, ["Model.__call__", "write_slots", "sharding"]),
    (["gpt2", "opt"], ["Cache", "update_layer"]),
    (["gpt2", "opt", "llama"], ["attention_scores", "causal_mask", "has_unbounded_context"]),
    (["llama", "gemma", "mistral", "qwen"], ["attend", "rotate"]),
    (["llama", "mistral", "qwen"], ["yarn_frequencies", "check_rope", "ROPE_POSITIVE"]),
    (["mistral", "qwen"], ["attention_scale"]),
    (["llama", "mistral"], ["rms_norm"]),
    (["sample", "train"], ["random_key"]),
    (["train", "bench"], ["keys_of"]),
    (
        ["gemma", "mistral", "qwen"],
        [
            "FULL",
            "SLIDING",
            "causal_mask",
            "update_layer",
            "ring_contents",
            "has_unbounded_context",
        ],
    ),
    (["mistral", "qwen"], ["attention_scores", "on_each_device", "run_chosen", "run_sorted"]),
    (
        ["mistral", "qwen"],
        [
            *("IN_PLACE", "EXPERT_TILE", "is_sparse", "is_quantized", "run_one_by_one"),
            *("run_in_blocks", "add_expert", "run_ragged", "expert_at"),
            *("dot_in_place", "rows_of", "rows_of_tangent"),
        ],
    ),
    (
        PROGRAMS,
        [
            *("KINDS", "MODELS", "AXIS", "PARALLEL", "fail", "explained", "not_empty"),
            *("run_program", "hear_again", "model_of", "check_family"),
            *("pick_devices", "memory_of", "make_mesh"),
        ],
    ),
]
RULE = re.compile(r"# -{5,}( (?P<heading>.+?)( -{5,})?)?")
SECTION = "the same in every model file"  # how the heading of a section ends that is a copy


@lru_cache
def places(source: str) -> dict[str, tuple[int, int]]:
    """Where each name and each section that is a copy stands in a file: (first, last line).

    The names are those of the top level, and the methods as Class.method; a section goes by its
    heading.
    """
    found = sections(source)

    def add(node, prefix=""):
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        for label in [getattr(node, "name", None), *(getattr(t, "id", None) for t in targets)]:
            if label:
                found[prefix + label] = first, node.end_lineno
        if isinstance(node, ast.ClassDef):
            for child in node.body:
                add(child, f"{node.name}.")

    for node in ast.parse(source).body:
        add(node)
    return found


def sections(source: str) -> dict[str, tuple[int, int]]:
    """Where each section that is a copy stands: heading -> (first line, last line with text)."""
    lines = source.splitlines()
    rules = [i for i, line in enumerate(lines) if RULE.fullmatch(line)]
    found = {}
    for begin, end in pairwise([*rules, len(lines)]):
        heading = RULE.fullmatch(lines[begin])["heading"]
        if heading and heading.endswith(SECTION):
            while not lines[end - 1].strip():
                end -= 1
            found[heading] = begin + 1, end
    return found


def source_of(name: str) -> str | None:
    """The text of a file, or None where it does not exist."""
    path = ROOT / f"{name}.py"
    return path.read_text() if path.exists() else None


def text_of(name: str, what: str) -> str | None:
    """The lines of a copy in a file, or None where the file has none of that name."""
    source = source_of(name)
    if source is None or what not in places(source):
        return None
    first, last = places(source)[what]
    return "\n".join(source.splitlines()[first - 1 : last])


def copies() -> list[tuple[str, list[str]]]:
    """All that is a copy: its name or heading, and the existing files that should have it."""
    here = [name for name in ALL if source_of(name)]
    headings = [heading for name in here for heading in sections(source_of(name))]
    pairs = [(heading, here) for heading in dict.fromkeys(headings)]
    for names, definitions in COPIES:
        existing = [name for name in names if source_of(name)]
        pairs += [(what, existing) for what in definitions]
    return pairs


def differing() -> list[tuple[str, str, str]]:
    """(what, file, other file) for each copy that is not the same as in the first file it is in.

    A name that a file does not have is no difference; a section that it does not have is one.
    """
    pairs = []
    for what, names in copies():
        having = [name for name in names if text_of(name, what)]
        for other in names if what.endswith(SECTION) else having:
            if text_of(having[0], what) != text_of(other, what):
                pairs.append((what, having[0], other))
    return pairs


def spread(source: str) -> None:
    """Writes what is a copy in `source` to the other files that have it."""
    for what, names in copies():
        if source not in names or not text_of(source, what):
            continue
        for name in names:
            if text_of(name, what) in (None, text_of(source, what)):
                continue
            first, last = places(source_of(name))[what]
            lines = source_of(name).splitlines()
            lines[first - 1 : last] = text_of(source, what).splitlines()
            (ROOT / f"{name}.py").write_text("\n".join(lines) + "\n")
            print(f"{name}.py: {what}")


def main() -> int:
    match sys.argv[1:]:
        case []:
            pass
        case ["--write", file] if Path(file).stem in ALL + PROGRAMS:
            spread(Path(file).stem)
        case _:
            files = ",".join(f"{name}.py" for name in ALL + PROGRAMS)
            sys.exit(f"copies.py: python tests/copies.py [--write {{{files}}}]")

    found = differing()
    for what, first, other in found:
        print(f"{what} differs between {first}.py and {other}.py")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
