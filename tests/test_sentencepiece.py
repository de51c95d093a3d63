"""tokenizer() of a checkpoint that has a SentencePiece model and no tokenizer.json."""

import json
import shutil

import pytest
import transformers
from helpers.reference import MATERIAL
from test_tokenizer import TEXTS, long_texts

import gemma
import llama
import mistral

PUBLISHED = {
    "Llama 2": (llama, "llama2-tokenizer/tokenizer.model"),
    "Mistral 7B v0.1": (mistral, "mistral-tokenizer/tokenizer.model.v1"),
    "Mistral 7B v0.3": (mistral, "mistral-tokenizer/mistral_instruct_tokenizer_240323.model.v3"),
}
SETTINGS = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "legacy": True,
}


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request, tmp_path_factory):
    """(model file, the folder of a published tokenizer.model and nothing beside it)"""
    module, source = PUBLISHED[request.param]
    folder = tmp_path_factory.mktemp("sentencepiece")
    if not (MATERIAL / source).exists():
        pytest.skip(f"the tokenizer of {request.param} is not at hand")
    shutil.copy(MATERIAL / source, folder / "tokenizer.model")
    return module, folder


def test_the_published_ids_of_llama_2(tmp_path):
    """Of transformers' own test of meta-llama/Llama-2-7b-hf."""
    source = MATERIAL / PUBLISHED["Llama 2"][1]
    if not source.exists():
        pytest.skip("the tokenizer of Llama 2 is not at hand")
    shutil.copy(source, tmp_path / "tokenizer.model")
    ids = llama.tokenizer(tmp_path).encode("I believe the meaning of life is")
    assert ids == [1, 306, 4658, 278, 6593, 310, 2834, 338]


def test_every_text_begins_with_bos_and_decodes_to_itself(published):
    module, folder = published
    codec = module.tokenizer(folder)
    for text in TEXTS + long_texts():
        ids = codec.encode(text)
        assert ids[0] == 1
        assert codec.decode(ids) == text


def test_ids_are_those_of_transformers(published, tmp_path):
    """Which makes a tokenizer of its own from the file, and cuts runs of blanks and the names of
    special tokens in another way than SentencePiece and so than the training of these models did:
    lines without them are compared."""
    module, folder = published
    shutil.copy(folder / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    codec, lines = module.tokenizer(folder), 0
    for line in [line for text in TEXTS + long_texts() for line in text.splitlines()]:
        if line.strip() == line and "  " not in line and ">" not in line:
            lines += 1
            assert codec.encode(line) == reference.encode(line), line
    assert lines > 7000


def test_a_tokenizer_json_is_read_as_transformers_reads_it(published, tmp_path):
    module, folder = published
    shutil.copy(folder / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    reference.save_pretrained(tmp_path)
    for reader in (module, gemma):
        codec = reader.tokenizer(tmp_path)
        for text in TEXTS + long_texts():
            assert codec.encode(text) == reference.encode(text), text[:60]
