"""train.py --data and --dataset: from files to the rows of tokens that a step sees."""

import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx
from helpers.small import complaint, edit_config, write_checkpoint

import gpt2
import llama
import train

ROOT = Path(__file__).resolve().parents[1]
TIKTOKEN = ROOT.parent / "shared/material/gpt2-tokenizer/tiktoken-cache"
LLAMA2 = ROOT.parent / "shared/material/llama2-tokenizer/tokenizer.model"
SIZES = {"layers": 1, "heads": 2, "width": 16, "context": 64}
FIRST, SECOND = "a first text, longer than a block, ", "and a second one, which is the last"
SMALL = "--layers 1 --heads 2 --width 32 --block 4 --batch 4 --steps 2 --warmup 0 --device cpu"
TEXT = "".join(f"The {n} of {n * n} said: 'I'll go', and went {n % 7} miles.\n" for n in range(400))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache folder of a test, in which it also stands: paths are short."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(train, "CACHE", tmp_path / "cache" / train.CACHE.name)
    monkeypatch.chdir(tmp_path)
    yield train.CACHE
    jax.config.update("jax_default_device", None)  # which runs in this process have chosen


@pytest.fixture
def prepare(monkeypatch):
    """(flags) -> what `train.prepare_data` gives: tokens to train on, to validate on, the folder
    of their tokenizer."""

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *SMALL.split(), *map(str, flags)])
        args = train.parse_command_line()
        data = train.prepare_data(args, gpt2, Path(args.weights) if args.weights else None)
        return data.train.tokens, data.val.tokens, data.tokenizer_folder

    return call


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs train.py in this process, for speed -> its one line on standard error."""

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *SMALL.split(), *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            train.main()
        error = capsys.readouterr().err
        assert stop.value.code == 2
        error = complaint(error)
        assert not Path("runs").exists()  # the default --out
        return error

    return call


def codec_of(folder):
    return tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")


def text_of(train_tokens, val_tokens, folder):
    """The tokens as a text again, with those that end a text shown."""
    tokens = np.concatenate([train_tokens, val_tokens])
    return codec_of(folder).decode(tokens.tolist(), skip_special_tokens=False)


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def write_jsonl(name, *lines):
    Path(name).write_text("".join(line + "\n" for line in lines))


# ------------------------------------------------------------------------------------ several texts


@pytest.mark.parametrize("kind", ["bpe", "char", "bytes"])
def test_several_files_become_one_row_of_tokens_with_a_token_after_each_text(prepare, kind):
    write_jsonl(
        "more.jsonl", '{"text": "one line\\nand \\ud83d\\ude42", "id": 7}', "", '{"text": "two"}'
    )
    for name in ("b", "a", "z"):
        Path(f"{name}.txt").write_bytes(f"This is {name},\r\nnaïve 日本.\n\n".encode())
    Path("folder/deep").mkdir(parents=True)
    Path("folder/deep/c.txt").write_text("deep")
    files = ["z.txt", "more.jsonl", "[ab].txt", "folder/**/*.txt"]
    found = prepare("--data", *files, "--tokens", kind)
    texts = [
        "This is z,\r\nnaïve 日本.\n\n",
        "one line\nand 🙂",
        "two",
        *[f"This is {name},\r\nnaïve 日本.\n\n" for name in "ab"],
        "deep",
    ]
    assert text_of(*found) == "".join(text + "<|endoftext|>" for text in texts)
    end = codec_of(found[2]).token_to_id("<|endoftext|>")
    assert np.concatenate(found[:2]).tolist().count(end) == len(texts)


def test_a_single_text_has_no_token_that_ends_it(prepare):
    Path("a.txt").write_text(TEXT)
    found = prepare("--data", "a.txt", "--tokens", "bytes")
    assert text_of(*found) == TEXT
    assert codec_of(found[2]).token_to_id("<|endoftext|>") is None
    assert codec_of(found[2]).get_vocab_size() == 256


def test_the_token_of_a_checkpoint_ends_a_text_as_its_config_says(prepare):
    folder = write_checkpoint("model", eos_token_id=0)
    Path("a.txt").write_text("first text, " * 9)
    Path("b.txt").write_text("second text" * 9)
    *tokens, tokenizer_folder = prepare("--data", "a.txt", "b.txt", "--weights", "model")
    encode = gpt2.tokenizer(folder).encode
    assert tokenizer_folder.samefile(folder)
    assert np.concatenate(tokens).tolist() == [
        *encode("first text, " * 9),
        0,
        *encode("second text" * 9),
        0,
    ]


@pytest.mark.parametrize(
    "lines, number",
    [
        (['{"text": "fine"}', '{"text": "never closed}'], 2),
        (['{"text": "fine"}', "", "plain text"], 3),
        (["plain text"], 1),
        (['{"text": "fine"}'] * 3 + ['{"content": "of another name"}'], 4),
        (['{"text": 7}'], 1),
        (['{"text": null}'], 1),
        (['{"text": ["a", "list"]}'], 1),
        (['["text"]'], 1),
        (['"text"'], 1),
        (['{"text": "fine"}', '{"text": "half of a pair: \\ud83d"}'], 2),
    ],
)
def test_a_line_of_jsonl_without_a_text_is_named(refused, lines, number):
    write_jsonl("bad.jsonl", *lines)
    error = refused("--data", "bad.jsonl")
    assert "--data bad.jsonl" in error and f"line {number}" in error
    assert 'like {"text": "..."}' in error


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--data missing.txt", "--data missing.txt: no such file"),
        ("--data no/*.txt", "--data no/*.txt: no such file"),
        ("--data empty.txt", "--block 4 is longer than the text"),
        ("--data latin.txt", "--data latin.txt is not UTF-8 text"),
        ("--data empty.bin", "--block 4 is longer than the text"),
        ("--data odd.bin", "odd.bin"),
        ("--data a.txt x.bin", "a .bin stands alone"),
        ("--data x.bin x.bin x.bin", "a .bin stands alone"),
    ],
)
def test_data_that_is_none_is_one_line(refused, flags, message):
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes("Größe".encode("latin-1"))
    Path("empty.bin").write_bytes(b"")
    Path("odd.bin").write_bytes(bytes(101))  # each token takes two
    Path("a.txt").write_text(TEXT)
    Path("x.bin").write_bytes(bytes(100))
    write_checkpoint("model")
    weights = ["--weights", "model"] if ".bin" in flags else []
    assert message in refused(*flags.split(), *weights)


# ------------------------------------------------------------------------------- nanoGPT's format


def write_bin(name, tokens):
    np.array(tokens, np.uint16).tofile(name)


def test_nanogpts_bin_is_read_as_it_is(prepare, cache):
    write_checkpoint("model")
    tokens = np.random.default_rng(0).integers(256, size=1000)
    write_bin("x.bin", tokens)
    train_tokens, val_tokens, folder = prepare("--data", "x.bin", "--weights", "model")
    assert (len(train_tokens), len(val_tokens)) == (900, 100)  # the last tenth is not trained on
    assert [*train_tokens, *val_tokens] == tokens.tolist()
    assert folder.samefile("model") and not files_in(cache)


@pytest.mark.skipif(not TIKTOKEN.exists(), reason="needs GPT-2's vocabulary")
def test_a_bin_for_a_model_from_scratch_has_gpt2s_tokens(prepare, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(TIKTOKEN))
    write_bin("x.bin", [15496, 995, 50256] * 100)
    *tokens, folder = prepare("--data", "x.bin")
    assert np.concatenate(tokens).tolist() == [15496, 995, 50256] * 100
    assert codec_of(folder).get_vocab_size() == 50257
    assert text_of(*tokens, folder).startswith("Hello world<|endoftext|>Hello world")


def test_a_token_beyond_the_vocabulary_is_refused(refused):
    write_checkpoint("model")  # of 256 tokens
    write_bin("bad.bin", [*range(100), 256, *range(100)])
    error = refused("--data", "bad.bin", "--weights", "model")
    assert "token 256" in error and "the model has 256" in error


def test_a_token_beyond_the_vocabulary_is_found_wherever_it_stands(refused):
    write_checkpoint("model")
    write_bin("good.bin", range(100))
    for tokens in (np.zeros(10_000_000, np.uint16), np.zeros(100, np.uint16)):
        tokens[:10] = range(10)
        tokens[-1] = 300
        tokens.tofile("bad.bin")
        for files in (["bad.bin"], ["bad.bin", "good.bin"], ["good.bin", "bad.bin"]):
            assert "token 300" in refused("--data", *files, "--weights", "model")


@pytest.mark.parametrize("kind", [np.uint16, np.uint32, np.int32, np.int64])
def test_ids_of_two_four_and_eight_bytes_are_told_apart(prepare, kind):
    """np.array(ids).tofile writes eight, and some scripts four; nanoGPT's own two."""
    write_checkpoint("model")
    tokens = np.random.default_rng(0).integers(256, size=1000)
    tokens.astype(kind).tofile("x.bin")
    train_tokens, val_tokens, _ = prepare("--data", "x.bin", "--weights", "model")
    assert [*train_tokens, *val_tokens] == tokens.tolist()


@pytest.mark.parametrize("kind", ["u4", "u8"])
def test_ids_of_a_large_vocabulary_have_four_bytes_or_eight(tmp_path, kind):
    tokens = np.random.default_rng(0).integers(128_000, size=1000)
    tokens.astype(kind).tofile("x.bin")
    assert train.read_tokens(Path("x.bin"), 128_256).tolist() == tokens.tolist()


def test_an_npy_file_under_the_name_of_a_bin_is_refused(refused):
    np.save("x.npy", np.arange(100))
    Path("x.npy").rename("x.bin")
    write_checkpoint("model")
    assert "is an .npy file" in refused("--data", "x.bin", "--weights", "model")


def write_meta(content):
    Path("meta.pkl").write_bytes(pickle.dumps(content))


def test_the_characters_of_nanogpts_meta_pkl_are_the_tokens_of_its_bin(prepare):
    """As its data/shakespeare_char/prepare.py writes them."""
    letters = sorted(set(TEXT))
    ids = {letter: i for i, letter in enumerate(letters)}
    write_bin("train.bin", [ids[letter] for letter in TEXT])
    write_meta({"vocab_size": len(letters), "itos": dict(enumerate(letters)), "stoi": ids})
    found = prepare("--data", "train.bin")
    assert text_of(*found) == TEXT
    assert codec_of(found[2]).get_vocab_size() == len(letters)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"vocab_size": 65}, "names no characters"),
        (np.array([1]), "it asks for numpy"),
        ("text", "names no characters"),
    ],
)
def test_a_meta_pkl_of_another_kind_is_refused_and_not_run(refused, content, said):
    write_bin("train.bin", range(100))
    write_meta(content)
    assert said in refused("--data", "train.bin")


# ------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.Json"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_lines_of_json_are_texts_whatever_the_file_is_called(prepare, name, bom):
    write_jsonl(name, bom + json.dumps({"text": FIRST}), json.dumps({"text": SECOND}))
    found = prepare("--data", name, "--tokens", "bytes")
    assert text_of(*found) == f"{FIRST}<|endoftext|>{SECOND}<|endoftext|>"


def test_a_line_of_json_ends_with_a_newline_and_nowhere_else(prepare):
    texts = [f"{FIRST}\u2028\x85\x0c", SECOND]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    Path("a.jsonl").write_bytes("\r\n \n".join(lines).encode())
    found = prepare("--data", "a.jsonl", "--tokens", "bytes")
    assert text_of(*found) == "<|endoftext|>".join([*texts, ""])


@pytest.mark.parametrize("with_keys", [False, True])
def test_an_array_in_a_json_is_a_list_of_texts(prepare, with_keys):
    texts = [FIRST, SECOND]
    rows = [{"text": text} for text in texts] if with_keys else texts
    Path("a.json").write_text("\n \n" + json.dumps(rows, indent=1))
    found = prepare("--data", "a.json", "--tokens", "bytes")
    assert text_of(*found) == f"{FIRST}<|endoftext|>{SECOND}<|endoftext|>"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"text": "one"}, {"title": "two"}]', "a.json, text 2: it must be like"),
        ('[{"text": "one"}', "a.json is not a JSON array of texts"),
        ('{"text": 1}', "a.json, line 1: it must be like"),
        ("no json", "a.json, line 1: it must be like"),
    ],
)
def test_json_that_holds_no_texts_is_refused(refused, content, said):
    Path("a.json").write_text(content)
    assert said in refused("--data", "a.json")


def test_a_byte_order_mark_is_no_part_of_a_text(prepare):
    Path("a.txt").write_text(TEXT, encoding="utf-8-sig")
    assert text_of(*prepare("--data", "a.txt", "--tokens", "bytes")) == TEXT


# --------------------------------------------------------------------------------- long texts


@pytest.mark.skipif(not LLAMA2.exists(), reason="needs Llama's vocabulary")
def test_a_long_text_has_the_ids_that_it_has_in_one_piece(tmp_path):
    """Llama's tokenizer puts a blank before what it encodes; pieces must not show it."""
    folder = Path("llama")
    llama.save(llama.Model(llama.Config.small(**SIZES, vocab_size=32000), rngs=nnx.Rngs(0)), folder)
    shutil.copy(LLAMA2, folder / "tokenizer.model")
    text = "".join(f"Line {n} of a long text.\n" * 3 for n in range(2000))
    write_jsonl("a.jsonl", json.dumps({"text": text}), '{"text": "short"}')
    train.write_tokens(tmp_path, llama, folder, train.Texts([Path("a.jsonl")]))
    found = np.fromfile("tokens.bin", np.uint16).tolist()
    codec = llama.tokenizer(folder)
    assert found == [*codec.encode(text), 2, *codec.encode("short"), 2]


def awkward_texts():
    """name -> a text of several pieces, or of none."""
    rng = np.random.default_rng(0)
    words = ["the", "naïve", "日本", "don't", "1234", "🙂", "e\u0301", "x" * 99, "wait...", "no;"]
    words = [words[i] for i in rng.integers(len(words), size=9_000)]
    lines = [" ".join(words[i : i + 8]) for i in range(0, len(words), 8)]
    return {
        "one line": " ".join(words),
        "lines": "\n".join(lines),
        "lines that end with punctuation": ".\n".join(lines),
        "lines of Windows": "\r\n".join(lines),
        "lines that end with a blank": " \n".join(lines),
        "blank lines and indentation": "\n\n\t  ".join(lines),
        "line separators": "\u2028\x85 ".join(lines),
        "two bytes each, from an odd place": "x" + "é ü" * 50_000,
        "four bytes each, from an odd place": "x" + "🙂 é " * 40_000,
        "no end of a line": "\n".join(lines)[:-1] + "a",
        "short": "short",
        "empty": "",
    }


def bpe(pattern, texts):
    """A byte-level BPE whose words are those of a pattern, as Llama 3's are."""
    codec = train.byte_level(train.byte_vocabulary(), [], use_regex=False)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    codec.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, codec.pre_tokenizer])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000,
        show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    codec.train_from_iterator(texts, trainer)
    return codec


GPT2_WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("pattern", [GPT2_WORDS, LLAMA3_WORDS], ids=["gpt2", "llama3"])
def test_streamed_texts_have_the_ids_that_they_have_as_a_whole(pattern, tmp_path):
    """Llama 3 has tokens of punctuation and the newline after it, which no cut may part."""
    texts = awkward_texts()
    folder = write_checkpoint("model", vocab_size=1000)
    codec = bpe(pattern, [text[:9000] for text in texts.values()])
    codec.save(f"{folder}/tokenizer.json")
    for i, text in enumerate(texts.values()):
        Path(f"{i:02}.txt").write_bytes(text.encode())
    train.write_tokens(tmp_path, gpt2, folder, train.Texts(train.find_files(["*.txt"])))
    found = np.fromfile("tokens.bin", np.uint16)

    for name, text in texts.items():
        whole = codec.encode(text).ids
        assert found[: len(whole)].tolist() == whole, name
        found = found[len(whole) :]
    assert not len(found)
    long = [text for text in texts.values() if len(text) > 2**16]
    assert all(len([*train.cut([text])]) > 1 for text in long) and len(long) > 8


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
@pytest.mark.parametrize("letters", ["abcdefgh", "。!", "\n", "a\n "])
def test_a_text_without_a_place_to_cut_is_cut_somewhere_and_loses_nothing(
    prepare, monkeypatch, kind, letters
):
    monkeypatch.setattr(train, "CUTS", [(pattern, 2**15) for pattern, _ in train.CUTS])
    text = " " * 100_000 + "".join(np.random.default_rng(0).choice([*letters], size=100_000))
    Path("a.txt").write_bytes(text.encode())
    assert max(len(piece) for piece, _ in train.cut([text])) <= 2**15
    assert text_of(*prepare("--data", "a.txt", "--tokens", kind, "--vocab-size", 260)) == text


def test_where_the_blocks_of_a_text_end_does_not_matter():
    rng = np.random.default_rng(0)
    for text in awkward_texts().values():
        ends = np.sort(rng.integers(len(text) + 1, size=50))
        blocks = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
        assert [*train.cut(blocks)] == [*train.cut([text])]


def test_a_text_is_never_in_memory_as_a_whole():
    Path("a.txt").write_text(TEXT * 400)
    [text] = train.Texts([Path("a.txt")])
    blocks = [*text]
    assert "".join(blocks) == TEXT * 400 and len(blocks) > 5
    batches = [*train.batches(train.pieces([blocks]))]
    sizes = [sum(len(piece) for piece, *_ in batch) for batch in batches]
    assert sum(sizes) == len(TEXT * 400) and max(sizes) <= 2**20 + 2**16


@pytest.mark.parametrize(
    ("kind", "learned_from"),
    [("bytes", []), ("char", ["a.txt", "b.jsonl"]), ("bpe", ["a.txt"])],
)
def test_a_file_is_read_once_for_each_pass(prepare, monkeypatch, kind, learned_from):
    """To check it, to learn a tokenizer, to encode it; once it is encoded, only to check it.

    The last tenth, of which b.jsonl is a part, is not learned from.
    """
    opened = []

    def open_text(file, original=train.open_text):
        opened.append(file.name)
        return original(file)

    monkeypatch.setattr(train, "open_text", open_text)
    Path("a.txt").write_text(TEXT)
    write_jsonl("b.jsonl", '{"text": "one"}', '{"text": "two"}')
    prepare("--data", "a.txt", "b.jsonl", "--tokens", kind)
    assert opened == ["a.txt", "b.jsonl", *learned_from, "a.txt", "b.jsonl"]
    opened.clear()
    prepare("--data", "a.txt", "b.jsonl", "--tokens", kind)
    assert opened == ["a.txt", "b.jsonl"]


def peak_memory(*flags) -> int:
    """The bytes that train.py has in memory at most, for two steps."""
    command = [sys.executable, ROOT / "train.py", *SMALL.split(), *flags]
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_maxrss * 1024


@pytest.mark.slow
def test_a_large_text_takes_little_more_memory_than_a_small_one():
    size = 400_000_000
    Path("small.txt").write_text(TEXT * 10)
    with open("large.txt", "w") as file:
        for _ in range(size // len(TEXT)):
            file.write(TEXT)
    flags = ["--tokens", "bytes", "--save-every", 0, "--block", 64, "--data"]
    small = peak_memory(*flags, "small.txt", "--out", "small")
    large = peak_memory(*flags, "large.txt", "--out", "large")
    assert large < small + size / 2


def test_a_tokenizer_that_ends_texts_itself_does_not_begin_the_next_with_it(tmp_path):
    folder = write_checkpoint("model", eos_token_id=5)
    codec = codec_of(folder)
    codec.add_special_tokens(["<s>", "</s>"])
    ids = [(token, codec.token_to_id(token)) for token in ("<s>", "</s>")]
    codec.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ids
    )
    assert train.begin_ids(codec) == [ids[0][1]]


def test_texts_that_join_to_the_same_bytes_are_other_texts(prepare):
    write_jsonl(
        "a.jsonl",
        '{"text": "one\\u0000two, and more of it than a block has, in training and in validation"}',
    )
    write_jsonl(
        "b.jsonl",
        '{"text": "one"}',
        '{"text": "two, and more of it than a block has, in training and in validation"}',
    )
    first = prepare("--data", "a.jsonl", "--tokens", "bytes")
    second = prepare("--data", "b.jsonl", "--tokens", "bytes")
    assert first[2] != second[2]


# -------------------------------------------------------------------------------------- the cache


def test_a_text_is_tokenised_once(prepare, cache):
    Path("a.txt").write_text(TEXT)
    flags = ["--data", "a.txt", "--vocab-size", 300]
    first = prepare(*flags)
    [entry] = (cache / "tokens").iterdir()
    times = {path: path.stat().st_mtime_ns for path in [entry, *entry.iterdir()]}
    assert {path.name for path in entry.iterdir()} == {
        "tokens.bin",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    again = prepare(*flags)
    assert [entry] == [*(cache / "tokens").iterdir()] and again[2] == first[2]
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert text_of(*again) == TEXT


def test_another_text_or_tokenizer_is_tokenised_anew(prepare, cache):
    def entries(*flags):
        prepare("--data", "a.txt", *flags)
        return len([*(cache / "tokens").iterdir()])

    Path("a.txt").write_text(TEXT)
    assert entries() == 1
    assert entries("--vocab-size", 300) == 2
    assert entries("--tokens", "char") == 3
    Path("a.txt").write_text(TEXT.replace("miles", "yards"))  # as long as before
    os.utime("a.txt", (0, 0))
    assert entries("--tokens", "char") == 4
    assert text_of(*prepare("--data", "a.txt")) == TEXT.replace("miles", "yards")


def test_a_checkpoint_whose_tokenizer_changes_is_tokenised_anew(prepare):
    """Also one with vocab.json and merges.txt, as GPT-2's first ones have them."""
    folder = write_checkpoint("model")
    codec = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    Path("a.txt").write_text("eeeehhhh" * 10)
    found = []
    for merge in ("e e", "h h"):
        pair = merge.replace(" ", "")
        (folder / "vocab.json").write_text(json.dumps(codec["vocab"] | {pair: 256}))
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merge}\n")
        edit_config(folder, vocab_size=258)
        found.append(np.concatenate(prepare("--data", "a.txt", "--weights", "model")[:2]).tolist())
        assert found[-1] == gpt2.tokenizer(folder).encode("eeeehhhh" * 10)
    assert found[0] != found[1]


def test_a_tokenizer_that_cuts_texts_off_encodes_them_whole(prepare):
    """Many checkpoints that were tuned ask their tokenizer for it."""
    folder = write_checkpoint("model")
    codec = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    whole = codec.encode("many words " * 50).ids
    codec.enable_truncation(20)
    codec.save(str(folder / "tokenizer.json"))
    Path("a.txt").write_text("many words " * 50)
    found = np.concatenate(prepare("--data", "a.txt", "--weights", "model")[:2]).tolist()
    assert found[: len(whole)] == whole and len(found) <= len(whole) + 1


@pytest.mark.parametrize("end", [b"\xff", "é".encode()[:1]], ids=["no character", "half of one"])
def test_an_error_leaves_nothing_in_the_cache(refused, cache, end):
    write_jsonl("bad.jsonl", json.dumps({"text": TEXT}), "{")
    refused("--data", "bad.jsonl")
    Path("bad.txt").write_bytes(TEXT.encode() * 100 + end)
    assert "--data bad.txt is not UTF-8 text" in refused("--data", "bad.txt")
    Path("bad.jsonl").write_bytes(json.dumps({"text": TEXT}).encode() + b"\n" + end)
    assert "--data bad.jsonl is not UTF-8 text" in refused("--data", "bad.jsonl")
    assert not files_in(cache)


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing_in_the_cache(refused, cache):
    Path("a.txt").write_text(TEXT * 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # of each file
    try:
        error = refused("--data", "a.txt", "--tokens", "bytes")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large: make room" in error.replace("'", "")
    assert not [*(cache / "tokens").iterdir()]


def test_ctrl_c_leaves_nothing_in_the_cache(prepare, cache, monkeypatch):
    def interrupted(pieces, original=train.batches):
        yield next(original(pieces))
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "batches", interrupted)
    Path("a.txt").write_text(TEXT * 100)
    with pytest.raises(KeyboardInterrupt):
        prepare("--data", "a.txt", "--tokens", "bytes")
    assert not [*(cache / "tokens").iterdir()]


def test_ctrl_c_is_heard_while_a_tokenizer_is_learned(prepare, cache, monkeypatch):
    pieces = iter(range(60_000))

    def slow_cut(blocks):
        for number in pieces:
            if number == 1000:
                os.kill(os.getpid(), signal.SIGINT)
            if number > 1000:
                time.sleep(0.001)  # a minute for the whole: enough to be heard on a busy machine
            yield "a piece of a text ", False

    monkeypatch.setattr(train, "cut", slow_cut)
    Path("a.txt").write_text(TEXT)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    with pytest.raises(KeyboardInterrupt):
        prepare("--data", "a.txt", "--tokens", "bpe")
    signal.signal(signal.SIGINT, before)
    assert 1000 < next(pieces) < 59_999  # not all were read
    assert not [*(cache / "tokens").iterdir()]


# ------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("lines", [200, 200_000])
def test_bpe_does_not_learn_from_the_last_tenth(prepare, lines):
    """A piece of the text to validate on would make the loss on it look lower."""
    seen, unseen = "ab cd\n" * (9 * lines // 10), "xy zw\n" * (lines // 10)
    Path("a.txt").write_text(seen + unseen)
    *_, folder = found = prepare("--data", "a.txt", "--vocab-size", 300)
    learned = {piece for piece in codec_of(folder).get_vocab() if len(piece) > 1}
    assert any("ab" in piece for piece in learned)
    assert not [piece for piece in learned if {*"xyzw"} & {*piece}]
    assert text_of(*found) == seen + unseen


def test_a_long_text_in_pieces_has_the_tokens_that_it_has_as_a_whole(prepare):
    """Pieces are cut where no token crosses, whatever stands there."""
    rng = np.random.default_rng(0)
    lines = [
        "The end.",
        "",
        "  indented",
        "naïve 日本 🙂",
        "\ttwo\t",
        "don't   stop  ",
        "\r",
        "1234",
        "e\u0301 combined",
        "\u3000wide space\u3000",
        "\x85",
        "\u2028",
        "x" * 99,
        "!?",
    ]
    text = "\n".join(lines[i] for i in rng.integers(len(lines), size=200_000))
    Path("long.txt").write_bytes(text.encode())
    *tokens, folder = prepare("--data", "long.txt", "--vocab-size", 400)
    assert len(text.encode()) > 2e6
    assert np.concatenate(tokens).tolist() == codec_of(folder).encode(text).ids


def test_the_tokenizer_of_a_checkpoint_goes_into_the_finished_folder(monkeypatch, capsys):
    folder, out = write_checkpoint("model"), Path("out")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        (folder / name).write_text(json.dumps({"unk_token": name}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("of another model")
    Path("a.txt").write_text(TEXT)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train.py",
            *SMALL.split(),
            "--data",
            "a.txt",
            "--weights",
            "model",
            "--out",
            "out",
            "--save-every",
            "0",
        ],
    )
    assert train.main() == 0
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors", "README.md"):
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    assert not (out / "README.md").exists()
    assert gpt2.tokenizer(out).encode(TEXT) == gpt2.tokenizer(folder).encode(TEXT)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(name, marks=pytest.mark.wide if name == "gpt2" else pytest.mark.slow)
        for name in train.MODELS
    ],
)
def test_sample_goes_on_with_what_was_trained(model):
    Path("a.txt").write_text(TEXT)
    for program in [
        [
            "train.py",
            *SMALL.split(),
            "--data",
            "a.txt",
            "--weights",
            "tiny",
            "--out",
            "out",
            "--save-every",
            "0",
            "--model",
            model,
        ],
        [
            "sample.py",
            "--model",
            model,
            "--weights",
            "out",
            "--device",
            "cpu",
            "--prompt",
            "The 3 of 9",
            "--max-new-tokens",
            "5",
        ],
    ]:
        done = subprocess.run(
            [sys.executable, str(ROOT / program[0]), *program[1:]],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
    assert "The 3 of 9" in done.stdout


# ----------------------------------------------------------------------------- rows of a step


def rows_of(tokens, batch, block, seed, step):
    """The rows of one step, each with its last target."""
    rows = train.Text(tokens, block).rows(step * batch + np.arange(batch), seed)
    assert (rows.tokens[:, 1:] == rows.targets[:, :-1]).all()
    return np.concatenate([rows.tokens, rows.targets[:, -1:]], axis=1)


def epoch(tokens, block, seed, number, batch=4):
    """The rows of all steps of one epoch, in order."""
    rows = len(train.epoch_starts(len(tokens), block, seed, number))
    assert rows % batch == 0  # so that a step has rows of one epoch alone
    steps = range(number * rows // batch, (number + 1) * rows // batch)
    return np.concatenate([rows_of(tokens, batch, block, seed, step) for step in steps])


def test_an_epoch_has_each_token_once_but_for_a_rest_at_the_ends():
    tokens, block = np.arange(1003, dtype=np.uint16), 8
    for number in range(5):
        rows = epoch(tokens, block, 0, number)
        assert rows.dtype == np.int32 and (np.diff(rows) == 1).all()
        targets = np.sort(rows[:, 1:].reshape(-1))
        assert (np.diff(targets) == 1).all()  # each once, and none left out between
        assert len(tokens) - len(targets) <= 2 * block


def test_the_next_epoch_cuts_at_another_place_and_has_another_order():
    tokens, block = np.arange(1003, dtype=np.uint16), 8
    first, second = (epoch(tokens, block, 0, number) for number in range(2))
    assert first.min() % block != second.min() % block
    assert (np.argsort(first[:, 0]) != np.argsort(second[:, 0])).mean() > 0.9


def test_rows_follow_from_seed_and_step_alone():
    tokens = np.arange(203, dtype=np.uint16)
    steps = [rows_of(tokens, 3, 8, 1, step) for step in range(60)]  # some epochs
    train.epoch_starts.cache_clear()
    for step in np.random.default_rng(0).permutation(60):
        assert (rows_of(tokens, 3, 8, 1, step) == steps[step]).all()
    assert all((rows_of(tokens, 3, 8, 2, step) != steps[step]).any() for step in range(60))


@pytest.mark.parametrize("length", [9, 10, 16, 17, 18])
def test_a_text_of_few_rows_is_enough(length):
    for step in range(20):
        rows = rows_of(np.arange(length), 4, 8, 0, step)
        assert rows.shape == (4, 9) and (np.diff(rows) == 1).all()


# ---------------------------------------------------------------------------- what is downloaded


@pytest.fixture
def offer_shakespeare(monkeypatch):
    """(text, its hash) -> offers it on the loopback address, as if it was Shakespeare."""
    Path("served").mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory="served"))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def offer(text, sha256=None):
        Path("served/input.txt").write_bytes(text)
        address = f"http://127.0.0.1:{server.server_port}/input.txt"
        monkeypatch.setattr(train, "SHAKESPEARE", address)
        digest = sha256 or hashlib.sha256(text).hexdigest()
        monkeypatch.setattr(train, "SHAKESPEARE_HASH", digest)

    yield offer
    server.shutdown()
    server.server_close()


def test_shakespeare_is_downloaded_once(prepare, cache, offer_shakespeare):
    offer_shakespeare(TEXT.encode())
    assert text_of(*prepare("--data", "shakespeare", "--tokens", "char")) == TEXT
    Path("served/input.txt").unlink()
    assert text_of(*prepare("--data", "shakespeare", "--tokens", "bytes")) == TEXT
    [file] = (path for path in cache.iterdir() if path.is_file())
    assert file.read_text() == TEXT


def test_another_text_in_the_place_of_shakespeare_is_not_kept(refused, cache, offer_shakespeare):
    offer_shakespeare(TEXT.encode(), sha256="0" * 64)
    error = refused("--data", "shakespeare")
    assert "--data shakespeare" in error and "hash" in error and "name a file of yours" in error
    assert not files_in(cache)


def test_without_an_answer_shakespeare_is_one_line(refused, cache, monkeypatch):
    monkeypatch.setattr(train, "SHAKESPEARE", "http://127.0.0.1:9/input.txt")
    error = refused("--data", "shakespeare")
    assert "--data shakespeare" in error and "name a file of yours" in error
    assert not files_in(cache)


# ------------------------------------------------------------------------ .bin pairs and datasets


@pytest.mark.skipif(not TIKTOKEN.exists(), reason="needs GPT-2's vocabulary")
def test_a_second_bin_is_what_is_validated_on(prepare, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(TIKTOKEN))
    for name, ids in [("train.bin", range(100)), ("val.bin", range(100, 130))]:
        np.array(ids, np.uint16).tofile(name)
    train_tokens, val_tokens, _ = prepare("--data", "train.bin", "val.bin")
    assert train_tokens.tolist() == [*range(100)] and val_tokens.tolist() == [*range(100, 130)]


class Columns(dict):
    """A stand-in for a dataset: a dict of columns, whose rows one may iterate."""

    column_names = property(list)

    def select_columns(self, name):
        return Columns({name: self[name]})

    def __iter__(self):
        names = list(self.keys())
        return (dict(zip(names, row, strict=True)) for row in zip(*self.values(), strict=True))


@pytest.fixture
def offer_dataset(monkeypatch):
    """(rows, or an error) -> the list of what is asked of datasets, which gives or raises them."""

    def call(found):
        asked = []

        def load_dataset(*names, split):
            asked.append((*names, split))
            if isinstance(found, Exception):
                raise found
            return Columns(found)

        monkeypatch.setattr(train, "find_spec", lambda name: True)
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        return asked

    return call


def test_the_texts_of_a_dataset_are_parted_by_the_token_that_ends_one(prepare, offer_dataset):
    asked = offer_dataset({"text": ["one and more words", "two\n", ""]})
    expected = "one and more words<|endoftext|>two\n<|endoftext|><|endoftext|>"
    flags = ["--block", 1, "--tokens", "char"]
    assert text_of(*prepare("--dataset", "some/name", *flags)) == expected
    assert text_of(*prepare("--dataset", "some/name:part", *flags)) == expected
    assert asked == [("some/name", "train"), ("some/name", "part", "train")]
    Path("mine.txt").write_text("mine")  # and both together
    found = prepare("--data", "mine.txt", "--dataset", "some/name", *flags)
    assert text_of(*found) == "mine<|endoftext|>" + expected


@pytest.mark.parametrize(
    "found",
    [
        ValueError("Config name is missing.\nPlease pick one of ['a', 'b']"),
        ConnectionError("Couldn't reach the Hub"),
        {"content": ["of another name"]},
        {"text": [TEXT, None]},
        {"text": [1, 2]},
    ],
    ids=["no such part", "no network", "no text", "a row without a text", "numbers"],
)
def test_a_dataset_that_cannot_be_read_is_one_line(refused, offer_dataset, found):
    offer_dataset(found)
    assert "--dataset some/name" in refused("--dataset", "some/name")


def test_without_the_package_a_dataset_says_what_to_install(refused, monkeypatch):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    assert "pip install datasets" in refused("--dataset", "some/name")
