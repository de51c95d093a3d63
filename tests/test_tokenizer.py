"""tokenizer(): the ids of transformers and of tiktoken, and every text back unchanged."""

import shutil

import pytest
import tiktoken
import transformers
from reference import MATERIAL

import gpt2

pytestmark = pytest.mark.skipif(not (MATERIAL / "gpt2-tokenizer").exists(),
                                reason="the vocabulary of GPT-2 is not at hand")

TEXTS = [
    "", " ", "\n", "  leading, trailing  and   inner    spaces   ",
    "\t tabs\tand\r\nline ends\n\n\n",
    "It's what they'd've said: we'll, I'M, you're, O'CLOCK, can't.",
    "1 12 123 1234 12345, 3.14159 and 1,000,000 or 0x7f", "def f(x):\n    return x ** 2  # squared",
    "Ünïcödé, naïve café, Straße, ελληνικά, русский, עברית, العربية, हिन्दी, 中文字, 日本語, 한국어",
    "👍🏽 👨‍👩‍👧‍👦 🇯🇵 e\u0301 \u200b\u00a0\u2003 zero widths",
    "\u0000\u0007\x7f control bytes", "\ufffd\ud7ff",
    "a" * 300 + "!?" * 50, "<|endoftext|>", "One text.<|endoftext|>Another<|endoftext|>\n",
    "not quite: <|endoftext| >, <|ENDOFTEXT|>, |endoftext|",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The published vocabulary, under the names that it has on the Hub."""
    folder = tmp_path_factory.mktemp("gpt2")
    shutil.copy(MATERIAL / "gpt2-tokenizer" / "encoder.json", folder / "vocab.json")
    shutil.copy(MATERIAL / "gpt2-tokenizer" / "vocab.bpe", folder / "merges.txt")
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    return transformers.GPT2Tokenizer.from_pretrained(folder)


@pytest.fixture(params=["vocab.json and merges.txt", "tokenizer.json"])
def codec(request, folder, reference, tmp_path):
    if request.param == "tokenizer.json":
        reference.save_pretrained(tmp_path)
        (tmp_path / "vocab.json").unlink(missing_ok=True)
        (tmp_path / "merges.txt").unlink(missing_ok=True)
        return gpt2.tokenizer(tmp_path)
    return gpt2.tokenizer(folder)


def long_texts():
    return [(MATERIAL / "texts" / name).read_text()[:200_000]
            for name in ("tinyshakespeare.txt", "wikitext-2-valid.txt")]


def test_ids_are_those_of_transformers(codec, reference):
    for text in TEXTS + long_texts():
        assert codec.encode(text) == reference.encode(text), text[:60]


def test_ids_are_those_of_tiktoken(codec, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(MATERIAL / "gpt2-tokenizer" / "tiktoken-cache"))
    published = tiktoken.get_encoding("gpt2")
    for text in TEXTS + long_texts():
        expected = published.encode(text, allowed_special={"<|endoftext|>"})
        assert codec.encode(text) == expected, text[:60]


def test_decoding_gives_every_text_back(codec):
    for text in [text for text in TEXTS if "<|endoftext|>" not in text] + long_texts():
        assert codec.decode(codec.encode(text)) == text


def test_nothing_is_put_before_a_text_and_the_end_of_text_is_one_token(codec):
    assert codec.encode("The dog") == [464, 3290]
    assert codec.encode("<|endoftext|>") == [50256]


def test_the_end_of_text_is_not_shown(codec):
    """As in transformers with skip_special_tokens: a reader wants the text alone."""
    assert codec.decode(codec.encode("One.<|endoftext|>Two.")) == "One.Two."


def test_a_folder_without_a_tokenizer_is_refused_with_what_it_lacks(tmp_path, folder):
    shutil.copy(folder / "vocab.json", tmp_path)
    with pytest.raises(gpt2.InputError, match=r"no tokenizer\.json, nor vocab\.json and merges"):
        gpt2.tokenizer(tmp_path)
