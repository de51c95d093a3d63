"""tokenizer() of a checkpoint that has a SentencePiece model and no tokenizer.json."""

import json
import re
import shutil

import pytest
import transformers
from helpers.reference import MATERIAL
from sentencepiece import SentencePieceProcessor
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


def texts_without_special_tokens():
    """SentencePiece cuts the names of special tokens like any text."""
    return [text for text in TEXTS + long_texts() if not re.search("<s>|</s>|<unk>", text)]


def test_without_settings_the_ids_are_those_of_sentencepiece(published):
    module, folder = published
    codec = module.tokenizer(folder)
    reference = SentencePieceProcessor(str(folder / "tokenizer.model"))
    texts = texts_without_special_tokens()
    assert len(texts) > 13
    for text in texts:
        ids = codec.encode(text)
        assert ids == reference.encode(text, add_bos=True), text[:60]
        assert codec.decode(ids) == text


def test_with_settings_the_ids_are_those_of_transformers(published, tmp_path):
    module, folder = published
    shutil.copy(folder / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    codec = module.tokenizer(tmp_path)
    for text in TEXTS + long_texts():
        assert codec.encode(text) == reference.encode(text), text[:60]


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
