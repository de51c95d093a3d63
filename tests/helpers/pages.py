"""What is in a page of Markdown: its headings and links, its Python, and its commands."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from helpers.reference import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name / "README.md" for name in ("tests", "benchmarks", "notebooks")),
    *sorted((ROOT / "tiny").glob("*/README.md")),
]
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RUN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # whose code is run

FENCE = re.compile(r"```(\w*)")
SET = r"([A-Z_]+=\S+ )*"  # variables of the environment before a command
PROGRAM = re.compile(rf"{SET}(python|pip|bash|git|sed|patch|cp|mkdocs|hf|model\(\))(?= |$)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@dataclass
class Block:
    """A block of code: fenced, with what its fence says, or indented."""

    language: str
    line: int  # of the page, where the code begins; from 1
    section: str  # the last heading above it
    lines: list[str] = field(default_factory=list)

    @property
    def code(self) -> str:
        return "\n".join(self.lines).rstrip("\n") + "\n"


@dataclass
class Script:
    """Commands that stand together, and what the page shows below as their output, if anything."""

    section: str
    line: int
    commands: list[str]  # continued lines are joined, comments left out
    output: str


def blocks_of(text: str) -> list[Block]:
    """All blocks of code of a page."""
    blocks, section, fenced, indented = [], "", None, None
    before = ""  # the last line that is not blank
    for number, line in enumerate(text.splitlines(), 1):
        fence = FENCE.match(line)
        if fenced is not None and fence:
            fenced = None
        elif fenced is not None:
            fenced.lines.append(line)
        elif fence:
            fenced = Block(fence[1], number + 1, section)
            blocks.append(fenced)
        elif indented is not None and (line.startswith("    ") or not line):
            indented.lines.append(line[4:])
        elif line.startswith("    ") and not re.match(r"[*\d ]", before):  # not within a list
            indented = Block("", number, section, [line[4:]])
            blocks.append(indented)
        elif line:
            indented = None
        if not fenced and line.startswith("#"):
            section = line.lstrip("# ")
        before = line or before
    return blocks


def python_of(text: str) -> list[Block]:
    return [block for block in blocks_of(text) if block.language == "python"]


def scripts_of(text: str) -> list[Script]:
    """The commands of a page: indented or bash, beginning with the name of a program.

    What follows after a blank line in the same block is their output.
    """
    scripts = []
    for block in blocks_of(text):
        if block.language not in ("", "bash"):
            continue
        line = block.line
        last = None
        for part in block.code.rstrip("\n").split("\n\n"):
            if PROGRAM.match(part):
                last = Script(block.section, line, list(commands_in(part)), "")
                scripts.append(last)
            elif last:
                last.output += part + "\n"
            line += part.count("\n") + 2
    return scripts


def commands_in(script: str) -> Iterator[str]:
    """The commands of a script, each in one line."""
    for command in script.replace("\\\n", " ").splitlines():
        command = re.sub(r"(^|\s)#\s.*", "", command)
        command = " ".join(command.split())
        if command:
            yield command


def prose_of(text: str) -> str:
    """A page without its blocks of code; as many lines."""
    lines = text.splitlines()
    for block in blocks_of(text):
        for i in range(len(block.lines)):
            lines[block.line - 1 + i] = ""
    return "\n".join(lines)


def markdown_of(file: Path) -> str:
    """The text of a page, or of the Markdown cells of a notebook."""
    text = file.read_text()
    if file.suffix != ".ipynb":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def links_of(text: str) -> list[str]:
    """The targets of all links and pictures."""
    prose = re.sub(r"`[^`]*`", "", prose_of(text))
    pictures = re.findall(r'(?:src|srcset)="([^"]+)"', prose)
    return pictures + re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors_of(text: str) -> set[str]:
    """What a link to a heading may name, after the #: as GitHub forms it."""
    anchors, seen = set(), {}
    for heading in re.findall(r"^#+ +(.+?) *#*$", prose_of(text), flags=re.M):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # a link shows its text
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        times = seen[slug] = seen.get(slug, -1) + 1
        anchors.add(f"{slug}-{times}" if times else slug)
    return anchors
