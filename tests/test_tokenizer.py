"""tokenizer(): the ids of transformers and of tiktoken, and every text back unchanged."""

import importlib
import json
import shutil

import pytest
import tiktoken
import transformers
from helpers.reference import MATERIAL, ROOT
from tokenizers import Tokenizer

import gpt2
import opt

# Model file -> vocabulary and merges as published, and the rest of its tokenizer_config.json.
PUBLISHED = {
    gpt2: ("gpt2-tokenizer/encoder.json", "gpt2-tokenizer/vocab.bpe", {}),
    opt: (
        "opt-tokenizer/gpt2-vocab.json",
        "opt-tokenizer/gpt2-merges.txt",
        {
            "add_bos_token": True,
            "pad_token": "<pad>",
            **dict.fromkeys(["bos_token", "eos_token", "unk_token"], "</s>"),
        },
    ),
}
TEXTS = [
    "",
    " ",
    "\n",
    "  leading, trailing  and   inner    spaces   ",
    "\t tabs\tand\r\nline ends\n\n\n",
    "It's what they'd've said: we'll, I'M, you're, O'CLOCK, can't.",
    "1 12 123 1234 12345, 3.14159 and 1,000,000 or 0x7f",
    "def f(x):\n    return x ** 2  # squared",
    "Ünïcödé, naïve café, Straße, ελληνικά, русский, עברית, العربية, हिन्दी, 中文字, 日本語, 한국어",
    "👍🏽 👨‍👩‍👧‍👦 🇯🇵 e\u0301 \u200b\u00a0\u2003 zero widths",
    "\u0000\u0007\x7f control bytes",
    "\ufffd\ud7ff",
    "a" * 300 + "!?" * 50,
    "not quite: <|endoftext| >, <|ENDOFTEXT|>, |endoftext|, </ s>, < /s>, <s>, <unk>, <mask>",
]
SPECIAL = [  # texts with tokens that are not made of bytes: of GPT-2, then of OPT
    "<|endoftext|>",
    "One text.<|endoftext|>Another<|endoftext|>\n",
    "</s>",
    "One text.</s>Another </s> \n",
    "a<pad> b <pad>",
]


@pytest.fixture(scope="module", params=PUBLISHED, ids=lambda module: module.__name__)
def module(request):
    return request.param


def published(module, folder):
    """The published vocabulary, in a folder and under the names that it has on the Hub."""
    for source, name in zip(PUBLISHED[module], ["vocab.json", "merges.txt"], strict=False):
        if not (MATERIAL / source).exists():
            pytest.skip(f"the vocabulary of {module.__name__} is not at hand")
        shutil.copy(MATERIAL / source, folder / name)
    return folder


@pytest.fixture(scope="module")
def folder(module, tmp_path_factory):
    return published(module, tmp_path_factory.mktemp(module.__name__))


@pytest.fixture(scope="module")
def reference(module, folder):
    return transformers.GPT2Tokenizer.from_pretrained(folder, **PUBLISHED[module][2])


@pytest.fixture(scope="module", params=["vocab.json and merges.txt", "tokenizer.json"])
def codec(request, module, folder, reference, tmp_path_factory):
    if request.param == "tokenizer.json":
        folder = tmp_path_factory.mktemp("json")
        reference.save_pretrained(folder)
        assert not (folder / "vocab.json").exists()
    return module.tokenizer(folder)


def long_texts():
    return [
        (MATERIAL / "texts" / name).read_text()[:200_000]
        for name in ("tinyshakespeare.txt", "wikitext-2-valid.txt")
    ]


def test_ids_are_those_of_transformers(codec, reference):
    for text in TEXTS + SPECIAL + long_texts():
        assert codec.encode(text) == reference.encode(text), text[:60]


def test_ids_of_gpt2_are_those_of_tiktoken(tmp_path, monkeypatch):
    codec = gpt2.tokenizer(published(gpt2, tmp_path))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(MATERIAL / "gpt2-tokenizer" / "tiktoken-cache"))
    encoding = tiktoken.get_encoding("gpt2")
    for text in TEXTS + SPECIAL + long_texts():
        expected = encoding.encode(text, allowed_special={"<|endoftext|>"})
        assert codec.encode(text) == expected, text[:60]


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "gemma", "mistral"])
def test_a_tokenizer_json_that_asks_to_cut_or_pad_texts_is_not_obeyed(name, tmp_path):
    """Both are for batches of training; transformers switches them off, too."""
    module = importlib.import_module(name)
    stored = ROOT / "tiny" / name / "tokenizer.json"
    fast = Tokenizer.from_file(str(stored))
    fast.enable_truncation(4)
    fast.enable_padding(length=64)
    fast.save(str(tmp_path / "tokenizer.json"))
    expected = module.tokenizer(stored.parent).encode("Two households, both alike in dignity")
    assert len(expected) > 4
    found = module.tokenizer(tmp_path).encode("Two households, both alike in dignity")
    assert found == expected


def test_decoding_gives_every_text_back(codec):
    for text in TEXTS + long_texts():
        assert codec.decode(codec.encode(text)) == text


def test_a_text_begins_as_the_family_was_trained(module, codec):
    """GPT-2 with the text itself, OPT with </s>, once."""
    text, ids = {gpt2: ("The dog", [464, 3290]), opt: ("Hello world", [2, 31414, 232])}[module]
    assert codec.encode(text) == ids


def test_the_end_of_text_is_one_token_and_is_not_shown(module, codec):
    """As in transformers with skip_special_tokens: a reader wants the text alone."""
    end, ids = {gpt2: ("<|endoftext|>", [50256]), opt: ("</s>", [2, 2])}[module]
    assert codec.encode(end) == ids
    assert codec.decode(codec.encode(f"One.{end}Two.")) == "One.Two."


@pytest.mark.parametrize("adds", [True, False], ids=["adds </s>", "adds nothing"])
def test_opt_begins_as_its_tokenizer_json_says(adds, tmp_path):
    """Galactica has a word </s>, and no text begins with it."""
    settings = PUBLISHED[opt][2] | {"add_bos_token": adds}
    saved = transformers.GPT2Tokenizer.from_pretrained(published(opt, tmp_path), **settings)
    saved.save_pretrained(tmp_path)
    post_processor = json.loads((tmp_path / "tokenizer.json").read_text())["post_processor"]
    assert ("</s>" in json.dumps(post_processor)) == adds
    begin = [2] if adds else []
    assert opt.tokenizer(tmp_path).encode("Hello world") == [*begin, 31414, 232]


def described(content, **options):
    """A token as tokenizer_config.json describes it."""
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"content": content, "special": False, **plain, **options}


START, END, THINK = "<|im_start|>", "<|im_end|>", "<think>"
BESIDE = {  # what the files beside a tokenizer.json may say about tokens that it lacks
    "described": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                "513": described(THINK),
                "512": described(START, special=True, lstrip=True, rstrip=True),
            }
        },
        "added_tokens.json": {THINK: 513, START: 512},
        "special_tokens_map.json": {"pad_token": "<never read>"},
    },
    "described, and named as special": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {"512": described(START), "513": described(END)},
            "eos_token": END,
            "additional_special_tokens": [START],
        }
    },
    "named by a role": {
        "tokenizer_config.json": {
            "eos_token": END,
            "pad_token": {"__type": "AddedToken", **described("<pad>")},
            "bos_token": START,
            "unk_token": None,
            "add_bos_token": True,
            "image_token": THINK,
        }
    },
    "in a list": {"tokenizer_config.json": {"additional_special_tokens": [START, END]}},
    "in a list of descriptions": {
        "tokenizer_config.json": {
            "additional_special_tokens": [{"__type": "AddedToken", **described(START)}, END]
        }
    },
    "in a newer list": {"tokenizer_config.json": {"extra_special_tokens": [START, END]}},
    "in a dict": {"tokenizer_config.json": {"extra_special_tokens": {"image_token": START}}},
    "words of the vocabulary": {"tokenizer_config.json": {"pad_token": "lo", "eos_token": "!"}},
    "in special_tokens_map.json": {
        "tokenizer_config.json": {"eos_token": "<never used>"},
        "special_tokens_map.json": {
            "additional_special_tokens": [START],
            "pad_token": "<pad>",
            "eos_token": described(END),
        },
    },
    "in added_tokens.json": {
        "tokenizer_config.json": {"additional_special_tokens": [START]},
        "added_tokens.json": {THINK: 513, START: 512},
    },
    "a blank in front": {"tokenizer_config.json": {"add_prefix_space": True}},
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "gemma", "mistral"])
def test_tokens_that_a_tokenizer_json_lacks_are_taken_from_the_files_beside_it(
    name, beside, tmp_path
):
    """As fine-tunes leave it that added tokens, and kept the old tokenizer.json."""
    for file in ("tokenizer.json", "config.json"):
        shutil.copy(ROOT / "tiny" / name / file, tmp_path)
    for file, values in BESIDE[beside].items():
        if file == "tokenizer_config.json":
            values = {"tokenizer_class": "PreTrainedTokenizerFast", **values}
        (tmp_path / file).write_text(json.dumps(values))

    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    codec = importlib.import_module(name).tokenizer(tmp_path)
    for text in [
        f"{START}Hello {THINK} world{END} <pad><never read><never used>",
        f"hello {START} all{END}!",
        f"Two{THINK}three",
    ]:
        ids = reference.encode(text)
        assert codec.encode(text) == ids, text
        assert codec.decode(ids) == reference.decode(ids, skip_special_tokens=True), text


def test_an_added_token_is_one_id_and_decode_leaves_it_out(tmp_path):
    """The same, without transformers: the ids follow on the 512 of the vocabulary."""
    shutil.copy(ROOT / "tiny" / "gpt2" / "tokenizer.json", tmp_path)
    settings = {"additional_special_tokens": [START], "eos_token": END}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    codec = gpt2.tokenizer(tmp_path)
    assert codec.encode(f"{START}A{END}") == [513, *codec.encode("A"), 512]
    assert codec.decode([513, *codec.encode("A"), 512]) == "A"


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"512": 3}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"512": {}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"512": {"content": 3}}}),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"512": {"content": "a", "special": 1}}},
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"last": described("a")}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [described("a")]}),
        ("tokenizer_config.json", {"extra_special_tokens": 3}),
        ("tokenizer_config.json", {"extra_special_tokens": [3]}),
        ("tokenizer_config.json", {"eos_token": {"text": "</s>"}}),
        ("added_tokens.json", {"<think>": None}),
        ("special_tokens_map.json", {"eos_token": {"content": None}}),
    ],
)
def test_a_wrongly_described_token_is_refused_in_words(file, values, tmp_path):
    shutil.copy(ROOT / "tiny" / "gpt2" / "tokenizer.json", tmp_path)
    (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises(gpt2.InputError, match="describes an added token wrongly"):
        gpt2.tokenizer(tmp_path)


def test_a_tokenizer_json_that_begins_with_a_byte_order_mark_is_read(tmp_path):
    stored = (ROOT / "tiny" / "gpt2" / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(stored, encoding="utf-8-sig")
    expected = gpt2.tokenizer(ROOT / "tiny" / "gpt2").encode("Two households")
    assert gpt2.tokenizer(tmp_path).encode("Two households") == expected


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is damaged or cut short"),
        ('{"version": "1.0", "model": {', "is damaged or cut short"),
        ("[1, 2]", "is damaged or cut short"),
        ("version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
        ("<!DOCTYPE html><html>404", "is a web page"),
    ],
)
def test_a_damaged_tokenizer_json_is_refused_in_words(content, says, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(gpt2.InputError, match=rf"tokenizer\.json {says}"):
        gpt2.tokenizer(tmp_path)


def test_a_dangling_link_and_a_folder_are_no_tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "gone")
    with pytest.raises(gpt2.InputError, match="a link to a file that is gone"):
        gpt2.tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(gpt2.InputError, match="is a folder, not a file"):
        gpt2.tokenizer(tmp_path)
