"""docs/checkpoints.md: what it says of a checkpoint is what Config.from_hf does with its keys."""

import importlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
import transformers

from sample import KINDS, MODELS

PAGE = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
HEADER = ["checkpoint", "what decides", "result", "why"]
NOT_READ = "Not read by any of the files"
MODULES = {name: importlib.import_module(name) for name in MODELS}


class Row(NamedTuple):
    """A row of a table."""

    readers: list[str]  # the model file of its section; all of them for NOT_READ
    ids: list[str]  # checkpoints on the Hub
    decides: str  # JSON
    result: str
    why: str

    @property
    def values(self) -> dict:
        """What the row quotes of config.json."""
        return json.loads(self.decides)

    @property
    def quotes(self) -> list[str]:
        """What is in backticks in the note."""
        return quoted(self.why)


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def rows_of(page: str) -> list[Row]:
    """All rows of the tables, but their headers."""
    rows = []
    for section in page.split("\n## ")[1:]:
        heading, _, body = section.partition("\n")
        readers = re.findall(r"\(\.\./(\w+)\.py\)", heading)
        if heading == NOT_READ:
            readers = MODELS
        for line in re.findall(r"^\|(.+)\|$", body, re.MULTILINE):
            cells = [cell.strip() for cell in line.split("|")]
            if cells == HEADER or set(line) <= set(" -|"):
                continue
            checkpoint, decides, result, why = cells
            rows.append(Row(readers, quoted(checkpoint), decides.strip("`"), result, why))
    return rows


ROWS = rows_of(PAGE)
IDS = [hub_id for row in ROWS for hub_id in row.ids]
LOADED = [row for row in ROWS if row.result == "loads"]
REFUSED = [row for row in ROWS if row.result == "refused"]


def name_of(row: Row) -> str:
    return row.ids[0]


def whole(values: dict) -> dict:
    """A config.json with these values and, where transformers knows the kind, all other keys."""
    kind = values["model_type"]
    if kind not in transformers.CONFIG_MAPPING:
        return values
    return transformers.CONFIG_MAPPING[kind]().to_dict() | values


def test_the_tables_are_read_whole():
    lines = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(ROWS) == len(lines)
    assert len(LOADED) + len(REFUSED) == len(ROWS)
    assert {row.readers[0] for row in LOADED} == set(MODELS)
    assert any(row.readers == MODELS for row in REFUSED)


def test_each_row_names_checkpoints_and_a_model_type():
    for row in ROWS:
        assert row.ids, row
        assert "model_type" in row.values, row
    assert [name for name in IDS if not re.fullmatch(r"[\w.-]+/[\w.-]+", name)] == []


def test_no_checkpoint_has_two_answers():
    assert [name for name in IDS if IDS.count(name) > 1] == []


@pytest.mark.parametrize("name", MODELS)
def test_every_preset_is_in_the_section_of_its_file(name):
    listed = {hub_id for row in LOADED if row.readers == [name] for hub_id in row.ids}
    assert MODULES[name].PRESETS.keys() <= listed


@pytest.mark.parametrize("row", LOADED, ids=name_of)
def test_what_loads_is_read_by_the_file_of_its_section(row):
    [reader] = row.readers
    assert KINDS[row.values["model_type"]] == reader
    MODULES[reader].Config.from_hf(row.values)
    MODULES[reader].Config.from_hf(whole(row.values))


@pytest.mark.parametrize("row", REFUSED, ids=name_of)
def test_a_refusal_says_what_the_note_quotes(row):
    assert row.quotes
    for reader in row.readers:
        module = MODULES[reader]
        for values in (row.values, whole(row.values)):
            with pytest.raises(module.InputError) as error:
                module.Config.from_hf(values)
            for quote in row.quotes:
                assert quote in str(error.value)


def test_what_is_refused_is_in_the_section_of_the_file_that_reads_its_kind():
    for row in REFUSED:
        kind = row.values["model_type"]
        assert kind not in KINDS or row.readers == [KINDS[kind]], row


@pytest.mark.parametrize("name", MODELS)
def test_the_keys_of_a_preset_are_those_of_its_config(name):
    """Where the keys of a row change a field of Config, the preset has the same value."""
    module = MODULES[name]
    for row in LOADED:
        for hub_id in module.PRESETS.keys() & row.ids:
            default = asdict(module.Config.from_hf({"model_type": row.values["model_type"]}))
            config = asdict(module.Config.from_hf(row.values))
            changed = dict(config.items() - default.items())
            preset = asdict(module.PRESETS[hub_id].config)
            assert {field: preset[field] for field in changed} == changed, hub_id


def test_the_list_of_the_tests_is_whole():
    """tests/README.md has a line for each file of tests."""
    folder = Path(__file__).parent
    listed = re.findall(
        r"^\| `(test_\w+\.py)` \|", (folder / "README.md").read_text(), re.MULTILINE
    )
    assert sorted(listed) == sorted(path.name for path in folder.glob("test_*.py"))
