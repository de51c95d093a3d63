"""tokenizer() of folders from before tokenizer.json: the ids of transformers, settings included."""

import importlib
import json
import shutil

import pytest
import transformers
from helpers.reference import MATERIAL
from test_tokenizer import TEXTS

VOCABULARIES = {  # model_type -> its published files, under the names that they have on the Hub
    "gpt2": {
        "vocab.json": "gpt2-tokenizer/encoder.json",
        "merges.txt": "gpt2-tokenizer/vocab.bpe",
    },
    "opt": {
        "vocab.json": "opt-tokenizer/gpt2-vocab.json",
        "merges.txt": "opt-tokenizer/gpt2-merges.txt",
    },
    "llama": {"tokenizer.model": "llama2-tokenizer/tokenizer.model"},
    "gemma": {"tokenizer.model": "llama2-tokenizer/tokenizer.model"},  # as Gemma's is not at hand
    "mistral": {"tokenizer.model": "mistral-tokenizer/tokenizer.model.v1"},
}
END = {"gpt2": "<|endoftext|>", "opt": "</s>"}  # else </s>
CLASSES = {"llama": "LlamaTokenizer", "gemma": "GemmaTokenizer", "mistral": "LlamaTokenizer"}
SETTINGS = {  # what a tokenizer_config.json may say
    "nothing": {},
    "begins with BOS": {"add_bos_token": True},
    "begins with nothing": {"add_bos_token": False},
    "ends with EOS": {"add_bos_token": True, "add_eos_token": True},
    "a blank in front": {"add_prefix_space": True},
    "no blank in front": {"add_prefix_space": False},
    "added tokens": {
        "added_tokens_decoder": {
            "60000": {
                "content": "<|im_start|>",
                "special": True,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "single_word": False,
            }
        }
    },
}
CHAT = [
    "<|im_start|>user\nHello<|im_end|>\n",
    "Hello world",
    " Hello world",
    "One text.</s>Another<|endoftext|>.",
]


def write_folder(folder, kind, settings=None, added=None):
    """A checkpoint's folder without weights: model_type `kind`, and an older tokenizer."""
    for name, source in VOCABULARIES[kind].items():
        if not (MATERIAL / source).exists():
            pytest.skip(f"the vocabulary of {kind} is not at hand")
        shutil.copy(MATERIAL / source, folder / name)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if added is not None:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


def assert_same_ids(kind, folder):
    """The model file and transformers read the same ids from a folder, and the same text back."""
    codec = importlib.import_module(kind).tokenizer(folder)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    for text in CHAT + TEXTS:
        ids = reference(text).input_ids
        assert codec.encode(text) == ids, text
        assert codec.decode(ids) == reference.decode(ids, skip_special_tokens=True), text
    return codec


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", VOCABULARIES)
def test_the_settings_of_tokenizer_config_json_are_followed(kind, name, tmp_path):
    settings = {"tokenizer_class": CLASSES.get(kind, "GPT2Tokenizer"), **SETTINGS[name]}
    if kind in END:
        settings |= dict.fromkeys(["bos_token", "eos_token", "unk_token"], END[kind])
    assert_same_ids(kind, write_folder(tmp_path, kind, settings))


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_the_tokens_of_added_tokens_json_are_not_cut(kind, tmp_path):
    settings = {"tokenizer_class": CLASSES.get(kind, "GPT2Tokenizer")}
    added = {"<|im_start|>": 60000, "<|im_end|>": 60001}
    codec = assert_same_ids(kind, write_folder(tmp_path, kind, settings, added))
    new = [
        token for token in codec.encode("<|im_start|>a<|im_end|>") if codec.decode([token]) != ""
    ]
    assert len(codec.encode("<|im_start|>a<|im_end|>")) <= 5, new


@pytest.mark.parametrize(
    ("kind", "ids"),
    [
        ("gpt2", [15496, 995]),
        ("opt", [2, 31414, 232]),
        ("llama", [1, 15043, 3186]),
        ("gemma", [1, 15043, 3186]),
        ("mistral", [1, 22557, 1526]),
    ],
)
def test_without_settings_a_text_begins_as_the_family_was_trained(kind, ids, tmp_path):
    """GPT-2 with the text itself, OPT with </s>, the others with <s>; transformers adds none."""
    folder = write_folder(tmp_path, kind)
    assert importlib.import_module(kind).tokenizer(folder).encode("Hello world") == ids


def test_a_tokenizer_of_another_kind_than_the_familys_is_read(tmp_path):
    """Some fine-tunes of a Llama have a vocabulary of byte pairs, as GPT-2 has."""
    folder = write_folder(tmp_path, "gpt2", {"tokenizer_class": "GPT2Tokenizer"})
    for kind in ("llama", "gemma"):
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        assert_same_ids(kind, folder)

    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    mistral = importlib.import_module("mistral")  # of which transformers expects a tokenizer.model
    with pytest.raises(mistral.InputError, match="has a tokenizer that cannot be read"):
        mistral.tokenizer(folder)


def test_code_that_came_with_the_folder_is_not_run(tmp_path, monkeypatch):
    """Nor is anybody asked whether to."""
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    folder = write_folder(tmp_path, "gpt2", settings)
    (folder / "config.json").write_text("{}")  # of no model_type that has a tokenizer of its own
    (folder / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nOwn = 1\n")
    monkeypatch.setattr("builtins.input", lambda question: "y")
    gpt2 = importlib.import_module("gpt2")
    with pytest.raises(gpt2.InputError, match="contains custom code"):
        gpt2.tokenizer(folder)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("merges.txt", None, "has no merges.txt"),
        ("merges.txt", "", "merges.txt is damaged or cut short"),
        ("vocab.json", "{", "cannot be read"),
        ("vocab.json", "version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        ("tokenizer_config.json", '{"add_bos', "tokenizer_config.json is damaged"),
        ("tokenizer_config.json", "[]", "holds list, not a JSON object"),
    ],
)
def test_a_damaged_file_is_named(name, content, says, tmp_path):
    gpt2 = importlib.import_module("gpt2")
    folder = write_folder(tmp_path, "gpt2", {})
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(gpt2.InputError, match=says):
        gpt2.tokenizer(folder)


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    gpt2 = importlib.import_module("gpt2")
    with pytest.raises(gpt2.InputError, match=r"has no tokenizer: none of tokenizer\.json, vocab"):
        gpt2.tokenizer(tmp_path)
