"""What the tests know about each model file: the rest of the suite is the same for all of them.

A family names its file, the reference class in transformers, small configs that differ in what can
go wrong, the parts that are compared alone, and faults that the parity tests have to notice.
"""

import pytest

from helpers.families.gemma import GEMMA
from helpers.families.gpt2 import GPT2
from helpers.families.llama import LLAMA
from helpers.families.mistral import MISTRAL
from helpers.families.opt import OPT
from helpers.families.qwen import QWEN

FAMILIES = [GPT2, OPT, LLAMA, GEMMA, MISTRAL, QWEN]
EVERY_CONFIG = [
    pytest.param(
        (family, name),
        marks=[] if name == family.core else pytest.mark.wide,
        id=f"{family.name}: {name}",
    )
    for family in FAMILIES
    for name in family.configs
]

# A test of what is the same to the letter in all files, as test_copies.py holds it: once is enough.

once = pytest.mark.parametrize("family", [GPT2], ids=["gpt2"], indirect=True)
