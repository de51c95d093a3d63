"""What is the same to the letter in several model files, and the command that keeps it so.

    python tests/copies.py                  # says what differs
    python tests/copies.py --write gpt2.py  # spreads the copies of gpt2.py to the other files

The model files share no code, so that each can be read and copied alone. That has a price: a change
to what they have in common is made in one of them, and spread by this command.
"""

import ast
import sys
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALL = ["gpt2", "opt", "llama", "gemma", "mistral"]
WITH_BIN = ["opt", "llama"]  # families whose repositories have pytorch_model.bin
ROTARY = ["llama", "gemma", "mistral"]
COPIES = {
    **dict.fromkeys(
        [
            "InputError",
            "product",
            "Linear",
            "attend_chunked",
            "write",
            "sample",
            "generate_naive",
            "prefill",
            "STEPS",
            "decode",
            "round_up",
            "batch_prompts",
            "generate",
            "fetch",
            "safetensors_in",
            "stored_tensors",
            "named_parameters",
            "load",
            "save",
            "sharding",
            "Model.__call__",
        ],
        ALL,
    ),
    "attend": ROTARY,
    "masked_scores": ["gpt2", "opt", "llama"],
    "Cache": ["gpt2", "opt", "llama"],
    "torch_tensors_in": WITH_BIN,
    "norm": ["llama", "mistral"],
    "remember": ["gemma", "mistral"],
    "tokenizer": ["llama", "mistral"],
    "rotate": ROTARY,
}


@lru_cache
def definitions(source: str) -> dict[str, tuple[int, int]]:
    """Where each top-level name and each method of a model file stands: (first line, last line)."""
    tree = ast.parse(source)
    found = {}

    def add(node, prefix=""):
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        targets = getattr(node, "targets", [])
        for label in [getattr(node, "name", None), *(getattr(t, "id", None) for t in targets)]:
            if label:
                found[prefix + label] = first, node.end_lineno
        if isinstance(node, ast.ClassDef):
            for child in node.body:
                add(child, f"{node.name}.")

    for node in tree.body:
        add(node)
    return found


def text_of(name: str, what: str) -> str | None:
    """The lines of a definition, or None where the file has none of that name."""
    source = (ROOT / f"{name}.py").read_text()
    if what not in (places := definitions(source)):
        return None
    first, last = places[what]
    return "\n".join(source.splitlines()[first - 1 : last])


def differing() -> list[tuple[str, str, str]]:
    """(what, file, other file) for each copy that is not the same as in the first file it is in."""
    here = {name for name in ALL if (ROOT / f"{name}.py").exists()}
    pairs = []
    for what, names in COPIES.items():
        first, *others = [name for name in names if name in here] or [None]
        pairs += [
            (what, first, other) for other in others if text_of(first, what) != text_of(other, what)
        ]
    return pairs


def spread(source: str) -> None:
    """Writes what is a copy in `source` to the other files."""
    for what, names in COPIES.items():
        for name in names:
            path = ROOT / f"{name}.py"
            if source not in names or name == source or not path.exists():
                continue
            if text_of(name, what) not in (None, text_of(source, what)):
                first, last = definitions(path.read_text())[what]
                lines = path.read_text().splitlines()
                lines[first - 1 : last] = text_of(source, what).splitlines()
                path.write_text("\n".join(lines) + "\n")
                print(f"{name}.py: {what}")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--write" and Path(sys.argv[2]).stem in ALL:
        spread(Path(sys.argv[2]).stem)
    elif len(sys.argv) != 1:
        sys.exit(f"copies.py: python tests/copies.py [--write {{{','.join(ALL)}}}.py]")
    for what, first, other in differing():
        print(f"{what} differs between {first}.py and {other}.py")
    sys.exit(bool(differing()))
