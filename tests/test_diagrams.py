"""The diagrams in docs/diagrams: they are those of the present code, and show what it does."""

import importlib
import sys
from functools import cache
from xml.etree import ElementTree

import pytest
from helpers.reference import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import diagrams


def test_the_stored_diagrams_are_those_of_the_present_code():
    """After a change to a model file: python docs/diagrams.py."""
    drawn = diagrams.draw_all()
    assert {path.stem for path in diagrams.FOLDER.glob("*.svg")} == set(drawn)
    for name, svg in drawn.items():
        assert (diagrams.FOLDER / f"{name}.svg").read_text() == svg
        ElementTree.fromstring(svg)


def family(name):
    """What the diagram of a family is drawn from."""
    file, checkpoint, _ = diagrams.DIAGRAMS[name]
    return diagrams.describe(importlib.import_module(file), checkpoint)


described = cache(family)  # of the present code; tracing a large model takes seconds


def names_of(row):
    return [[box.name if box else None for box in column] for column in row]


def test_the_parts_of_a_block_stand_where_it_calls_them():
    attention, mlp = described("gpt2").rows
    assert names_of(attention) == [["ln_1"], ["c_attn"], ["attend"], ["c_proj"]]
    assert names_of(mlp) == [["ln_2"], ["c_fc"], [""], ["c_proj"]]
    attention, mlp = described("gemma").rows
    assert names_of(attention)[1:4] == [
        ["q_proj", "k_proj", "v_proj"],
        ["q_norm", "k_norm", None],
        ["rotate", "rotate", None],
    ]
    assert names_of(mlp)[-1] == ["post_feedforward_layernorm"]


@pytest.mark.parametrize(
    ("name", "before", "new"),
    [
        ("opt", "gpt2", {"3 projections", "ReLU", "shifted positions"}),
        ("llama", "opt", {"RoPE", "grouped-query", "gated", "SiLU", "no bias"}),
        ("gemma", "llama", {"1 + weight", "scaled embedding", "window", "GELU"}),
        ("mistral", "llama", {"window", "own head"}),
        ("qwen", "llama", {"RMSNorm of queries and keys", "heads wider than D / H"}),
        pytest.param(
            *("mixtral", "mistral", {"router", "experts", "weighted sum"}),
            marks=pytest.mark.slow,  # a minute of tracing
        ),
    ],
)
def test_what_a_family_changes_is_new_in_its_diagram(name, before, new):
    assert new <= described(name).kinds() - described(before).kinds()


def test_a_part_that_is_added_elsewhere_is_drawn_elsewhere(monkeypatch):
    """Drawn from the calls: without its second addition, a block is a single row."""
    llama = importlib.import_module("llama")

    def call(self, x, positions, k_positions, layer_cache, start, first=0):
        y = self.input_layernorm(x)
        y, cache = self.self_attn(y, positions, k_positions, layer_cache, start, first)
        return x + self.mlp(y), cache

    monkeypatch.setattr(llama.Block, "__call__", call)
    [row] = family("llama").rows
    assert names_of(row)[-1] == ["down_proj"]
