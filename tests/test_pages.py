"""The links of all pages and lessons lead somewhere; the code of README.md and docs/ runs."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from helpers.flax_classes import flax_parameters, msgpack_of
from helpers.hub import Hub
from helpers.pages import (
    LESSONS,
    PAGES,
    RUN,
    anchors_of,
    links_of,
    markdown_of,
    name_of,
    prose_of,
    python_of,
    scripts_of,
)
from helpers.reference import ROOT
from helpers.small import edit_config
from test_docs import ROWS
from transformers import AutoModelForCausalLM

import bench
import sample
import train

PROGRAMS = {"sample.py": sample, "train.py": train, "bench.py": bench}
# Pages whose lines are wrapped; the changes and the cards of bundled models have wider ones.
NARROW = [page for page in PAGES if page.name != "CHANGELOG.md" and "tiny" not in page.parts]
GATED = "meta-llama/Llama-3.2-1B"

# ------------------------------------------------------------------------------------------- links


def lost_links(page) -> list[str]:
    """The links of a page or a notebook that lead nowhere, or out of the repository.

    They lead to a file, and to a heading in it. Addresses on the web are not looked up.
    """
    lost = []
    for target in links_of(markdown_of(page)):
        if re.match(r"https?://|\.\./\.\./actions/", target):  # the latter is GitHub's own
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        leads = file.exists() and file.is_relative_to(ROOT)
        if leads and anchor:
            leads = anchor in headings_of(file)
        if not leads:
            lost.append(target)
    return lost


def headings_of(file) -> set[str]:
    """What a link may name after the #. In a notebook, Jupyter has a form of its own, too."""
    text = markdown_of(file)
    anchors = anchors_of(text)
    if file.suffix == ".ipynb":
        headings = re.findall(r"^#+ +(.+?) *$", prose_of(text), flags=re.MULTILINE)
        anchors |= {heading.replace(" ", "-") for heading in headings}
    return anchors


@pytest.mark.parametrize("page", [*PAGES, *LESSONS], ids=name_of)
def test_every_link_leads_somewhere(page):
    assert lost_links(page) == []


def test_a_lost_link_is_found_in_pages_and_in_notebooks(tmp_path, monkeypatch):
    monkeypatch.setattr("test_pages.ROOT", tmp_path)
    links = "[a](b.md) [b](c.md) [c](c.ipynb#one-two) [d](#none) [e](../../x.md) [f](https://x.org)"
    cells = [
        {"cell_type": "markdown", "source": ["# One two\n", links]},
        {"cell_type": "code", "source": ["# [not](a-link.md)"]},
    ]
    (tmp_path / "c.ipynb").write_text(json.dumps({"cells": cells}))
    (tmp_path / "c.md").write_text(f"# None\n\n{links}")
    assert lost_links(tmp_path / "c.ipynb") == ["b.md", "#none", "../../x.md"]
    assert lost_links(tmp_path / "c.md") == ["b.md", "../../x.md"]


def test_anchors_are_those_of_github():
    page = "# A `b_c`: [d.py](d.py)\n\n## Is it?\n\n## Is it?\n\n```\n# no heading\n```\n"
    assert anchors_of(page) == {"a-b_c-dpy", "is-it", "is-it-1"}


def test_the_list_of_pages_is_whole():
    listed = set(links_of((ROOT / "docs" / "README.md").read_text()))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= listed | {"README.md"}


@pytest.mark.parametrize("page", NARROW, ids=name_of)
def test_prose_has_lines_of_100_columns_at_most(page):
    """Tables, pictures and code may be wider."""
    wide = [line for line in prose_of(page.read_text()).splitlines() if len(line) > 100]
    assert [line for line in wide if not line.startswith(("|", "<"))] == []


def test_mkdocs_builds_the_pages_without_a_warning(tmp_path):
    """tests/mkdocs.yml says which links it may not find: those to files outside of docs/."""
    pytest.importorskip("mkdocs", reason="pip install -r requirements-dev.txt")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ROOT / "tests/mkdocs.yml"]
    done = subprocess.run(
        [*command, "-d", tmp_path / "site"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "performance" / "index.html").exists()
    lost = re.findall(r"contains a link '([^']+)', but the target", done.stderr)
    assert [target for target in lost if not target.startswith("../")] == []


# ------------------------------------------------------------------------------------ Python blocks

HERE = {name: reader for row in ROWS for name in row.ids for reader in row.readers[:1]}


def with_bundled(text: str) -> str:
    """Text with ids of the Hub replaced: by the bundled model of the file that reads it.

    Those tuned for a chat become my/chat, which has a chat template.
    """

    def local(match):
        if match[0].endswith(("Instruct", "-it")):
            return "my/chat"
        return f"tiny/{HERE[match[0]]}" if match[0] in HERE else match[0]

    return re.sub(r"[\w-]+/[\w.-]+", local, text)


@pytest.fixture(scope="session")
def flax_model(tmp_path_factory):
    """tiny/gpt2 as a Flax class of transformers would have written it."""
    folder = tmp_path_factory.mktemp("flax") / "model"
    folder.mkdir()
    for file in ("config.json", "tokenizer.json"):
        (folder / file).write_bytes((ROOT / "tiny/gpt2" / file).read_bytes())
    hf = AutoModelForCausalLM.from_pretrained(ROOT / "tiny/gpt2", dtype=torch.float32)
    (folder / "flax_model.msgpack").write_bytes(msgpack_of(flax_parameters(hf)))
    return folder


@pytest.fixture
def folder(tmp_path, flax_model):
    """A copy of the top folder, in which commands may write, and files of the reader's own."""
    programs = [file.name for file in ROOT.glob("*.py")]
    for name in [*programs, "README.md", "docs", "tiny", "tests", "pyproject.toml"]:
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "benchmarks").mkdir()
    for file in ("cpu.txt", "gpt2-60m"):
        (tmp_path / "benchmarks" / file).symlink_to(ROOT / "benchmarks" / file)

    my = tmp_path / "my"
    my.mkdir()
    (my / "flax-model").symlink_to(flax_model)
    (my / "folder").symlink_to(ROOT / "tiny" / "llama")
    (tmp_path / "ID").symlink_to(ROOT / "tiny" / "gpt2")
    for name in ("chat", "quantized"):
        (my / name).mkdir()
        for file in (ROOT / "tiny" / "llama").iterdir():
            (my / name / file.name).write_bytes(file.read_bytes())
    (my / "chat" / "chat_template.jinja").write_text(train.PLAIN_TEMPLATE)
    edit_config(my / "quantized", quantization_config={"quant_method": "gptq", "bits": 4})

    text = (ROOT / "README.md").read_text()
    for name in ("my.txt", "my/some.txt"):
        (tmp_path / name).write_text(text)
    for name in ("my.jsonl", "more.jsonl"):
        (tmp_path / name).write_text('{"text": "To be, or not to be."}\n' * 400)
    return tmp_path


@pytest.fixture
def bash(folder, tmp_path_factory):
    """Runs a script in that folder, without the Hub's settings and with a Hub that is gated."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}

    def run(script):
        with Hub(GATED, {"config.json": b"{}"}, gated=True) as hub:
            cache = str(tmp_path_factory.mktemp("cache"))
            done = subprocess.run(
                ["bash", "-o", "pipefail", "-c", script],
                cwd=folder,
                env=outside | {"HF_HOME": cache, "HF_ENDPOINT": hub.endpoint},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=1200,  # only against what hangs
            )
        done.stdout = done.stdout.replace(hub.endpoint, "https://huggingface.co")
        return done

    return run


ELSEWHERE = "adding-a-model.md"  # test_adding_a_model.py runs what is on that page


@pytest.mark.parametrize(
    "page",
    [page for page in RUN if python_of(page.read_text()) and page.name != ELSEWHERE],
    ids=name_of,
)
def test_every_python_block_runs(page, folder, bash):
    """All blocks of a page in one process, for speed, each with names of its own."""
    script = []
    for block in python_of(page.read_text()):
        code = "\n" * (block.line - 1) + with_bundled(block.code)  # so that lines are the page's
        script.append(f"exec(compile({code!r}, {name_of(page)!r}, 'exec'), {{}})")
    (folder / "blocks.py").write_text("\n".join(script))
    done = bash("python blocks.py")
    assert done.returncode == 0, done.stdout
    if page.name == "README.md":
        losses = [float(x) for x in re.findall(r"^\d+ ([\d.]+)$", done.stdout, re.MULTILINE)]
        assert len(losses) == 20  # of the training loop
        assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.3


# ----------------------------------------------------------------------------------------- commands

# What is not run, and why.
NOT_RUN = {
    r"python sample\.py .*--ui": "serves until Ctrl-C; test_server.py runs it",
    r"pip install": "needs the network; .ci/run installs what the project needs",
    r"python -m pytest( -m network)? --collect": "is all that pytest finds, this test included",
}


def is_run(command: str) -> bool:
    return not any(re.match(pattern, command) for pattern in NOT_RUN)


def cheap(command: str) -> str:
    """The command with little work and no network: the same flags, and some more at its end.

    Of two flags of the same name the last one counts. Installations are left out. Ids on the Hub
    become bundled models, and where a model file alone is named, its bundled model is taken.
    train.py takes two steps on README.md (15 where a profile needs them), bench.py one run of few
    tokens. --parallel gets as many emulated devices as it names. A chat has one message. pytest
    only selects.
    """
    command = re.sub(r"^pip install \S+ \S+ && ", "", command)
    has = command.split
    if "bench.py" in command and "plan" in command:
        return command  # calculates from a config
    command = with_bundled(command)

    if "pytest" in command:
        command += " --collect-only -q -n 0 -p no:cacheprovider"
    if "train.py" in command and not re.search("--data (?!shakespeare)|--dataset", command):
        command += " --data README.md"
    if "train.py" in command:
        steps = 15 if "--profile" in command else 2
        command += f" --steps {steps} --warmup 0"
    names_weights = {"--weights", "--preset"} & set(has())
    if re.search(r"(sample|bench)\.py .*--model", command) and not names_weights:
        command += " --weights tiny"
    if "sample.py" in command and not {"--list", "--attention", "--score", "--choices"} & set(
        has()
    ):
        command += " --max-new-tokens 5"
    if "--chat" in has() and "--prompt" not in has():
        command += " --prompt Hello"
    if "bench.py" in command:
        command += " --runs 1 --batch 4 --length 16 --new-tokens 4"
    if "ctranslate2" in command:
        command += " --vs transformers"
    if "--parallel" in has() and "JAX_NUM_CPU_DEVICES" not in command:
        devices = 1
        for number in re.findall(r":(\d)", command) or [4]:
            devices *= int(number)
        command = f"NPROC=16 JAX_NUM_CPU_DEVICES={devices} {command}"
    return command


def commands_of(page) -> list[str]:
    """The commands of a page, those within a line of prose, too."""
    text = page.read_text()
    commands = [command for script in scripts_of(text) for command in script.commands]
    return commands + inline_commands(text)


def inline_commands(text: str) -> list[str]:
    """The commands within a line of prose."""
    inline = re.findall(r"`((?:[A-Z_]+=\S+\s)*python [^`]+)`", prose_of(text))
    return [" ".join(command.split()) for command in inline]


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_the_flags_of_every_command_are_read(page, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for command in commands_of(page):
        call = re.search(r"python (\w+\.py)(.*)", cheap(command).replace("$'", "'"))
        if not call or call[1] not in PROGRAMS or "olmo2" in command:
            continue
        monkeypatch.setattr(sys, "argv", [call[1], *shlex.split(call[2])])
        try:
            PROGRAMS[call[1]].parse_command_line()
        except SystemExit:
            error = capsys.readouterr().err
            shown = "".join(script.output for script in scripts_of(page.read_text()))
            assert error.strip() in shown, f"{command}: {error}"


def matches(shown: str, printed: str) -> bool:
    """Whether a line of a page is one that was printed; numbers may differ, and ... be anything."""
    pattern = re.escape(" ".join(shown.split()))
    pattern = pattern.replace(re.escape("..."), ".*")
    pattern = re.sub(r"(?<![\w.])[\d,]+(\\\.\d+)?(?!\w)", r"[\\d,.]+", pattern)
    return any(re.fullmatch(pattern, " ".join(line.split())) for line in printed.splitlines())


def test_a_shown_line_may_differ_in_numbers_and_where_dots_stand():
    assert matches("loss 2.51 of ... tokens", "x\nloss 3.1  of all tokens")
    assert not matches("loss 2.51", "loss was 2.51")
    assert not matches("gpt2.py: no", "gpt3.py: no")


def sections() -> list:
    """(page, section) of all commands but those that are run elsewhere.

    A section is one test: its commands build on each other. The core suite runs those that take
    seconds.
    """
    found = []
    for page in RUN:
        if page.name == ELSEWHERE:
            continue
        for section in dict.fromkeys(script.section for script in scripts_of(page.read_text())):
            mark = [] if section in QUICK else [pytest.mark.slow]
            label = f"{name_of(page)}: {section}"
            found.append(pytest.param(page, section, id=label, marks=mark))
    return found


QUICK = ["Install and run", "A gated model", "No network", "A checkpoint is refused", "GPU"]


@pytest.mark.parametrize(("page", "section"), sections())
def test_every_command_runs_and_prints_what_the_page_shows(page, section, bash):
    for script in scripts_of(page.read_text()):
        if script.section != section:
            continue
        is_error = re.match(r"\w+\.py: ", script.output)
        commands = script.commands if is_error else [cheap(x) for x in script.commands]
        commands = [command for command in commands if is_run(command)]
        done = bash("\n".join(["set -e", *commands]))
        expected = 0
        if is_error:
            expected = 2
        if commands and commands[-1].startswith("diff"):
            expected = 1  # what it compares differs
        assert done.returncode == expected, f"{commands}\n{done.stdout}"
        for line in script.output.splitlines():
            assert matches(line, done.stdout) or not line, f"{line!r} is not in:\n{done.stdout}"


INLINE = [
    command
    for page in RUN
    if page.name != ELSEWHERE
    for command in inline_commands(page.read_text())
    if "--suite" not in command  # test_bench.py reads its lines
]


@pytest.mark.wide
@pytest.mark.parametrize("command", dict.fromkeys(INLINE))
def test_a_command_within_a_line_runs(command, folder, bash):
    for name in ("char", "lora"):  # what the commands above it in README.md would have written
        (folder / "runs").mkdir(exist_ok=True)
        (folder / "runs" / name).symlink_to(ROOT / "tiny" / "gpt2")
    done = bash(cheap(command))
    assert done.returncode == 0, done.stdout
