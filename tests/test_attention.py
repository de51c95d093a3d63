"""sample.py --attention: what each token attends to, as numbers, as a picture and as a page."""

import base64
import errno
import importlib
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.families import FAMILIES, LLAMA
from helpers.reference import ROOT, Float64, read_hf
from helpers.small import byte_tokenizer
from matplotlib.image import imread
from test_sample import run

import gpt2
import sample
from sample import MODELS

TEXT = "ROMEO: I love thee, my sweet; the night is come."
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def reference_attention(hf, tokens) -> np.ndarray:
    """[layers, heads, T, T] of one row, by transformers' output_attentions."""
    with torch.no_grad():
        layers = hf(torch.tensor(tokens)[None], output_attentions=True).attentions
    return torch.cat(layers).double().numpy()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_numbers_are_those_of_transformers(family, tmp_path):
    """Within 1e-5: weights below 1 in float32, after four layers."""
    file = tmp_path / "out.npz"
    flags = ["--model", family.name, "--weights", "tiny", "--prompt", TEXT, "--attention", file]
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    found = np.load(file)
    hf = read_hf(family, ROOT / "tiny" / family.name)
    expected = reference_attention(hf, found["ids"])
    assert found["weights"].shape == expected.shape
    np.testing.assert_allclose(found["weights"], expected, atol=1e-5)
    assert "".join(found["tokens"]).replace("·", " ").endswith(TEXT)


def test_windows_soft_caps_and_grouped_heads_are_in_the_weights(case):
    """Every configuration; at most four times as far from float64 as PyTorch's float32 is, or four
    roundings of the largest weight."""
    tokens = case.tokens[0]
    with Float64():
        exact = reference_attention(case.hf64, tokens)
    theirs = np.abs(reference_attention(case.hf32, tokens) - exact).max()
    ours = sample.attention_weights(case.family.module, case.model, tokens.tolist())
    assert np.abs(ours - exact).max() <= 4 * max(theirs, np.finfo(np.float32).eps / 2)


def test_long_texts_in_chunks_have_the_same_weights(monkeypatch):
    """One chunk of scores at a time, and rows that end within a chunk."""
    model = LLAMA.module.load(ROOT / "tiny/llama")
    ids = np.random.default_rng(0).integers(0, 256, 45).tolist()
    whole = sample.attention_weights(LLAMA.module, model, ids)
    monkeypatch.setattr(LLAMA.module, "LONG", 8)
    in_chunks = sample.attention_weights(LLAMA.module, model, ids)
    np.testing.assert_allclose(in_chunks, whole, atol=1e-6)  # another order of the sums
    np.testing.assert_allclose(whole.sum(axis=-1), 1, atol=1e-6)


def test_watching_changes_nothing_and_ends_even_after_an_error():
    llama = LLAMA.module
    model = llama.load(ROOT / "tiny/llama")
    attend = llama.attend
    tokens = np.arange(12)[None]
    before = model(tokens)
    with pytest.raises(ZeroDivisionError), sample.watched_attention(llama) as seen:
        np.testing.assert_array_equal(model(tokens), before)
        assert len(seen) == model.config.num_hidden_layers
        raise ZeroDivisionError
    assert llama.attend is attend


def test_a_token_is_labelled_by_its_text_or_by_its_name():
    """The last token of a character by that character; what cannot be seen by a sign for it."""
    backend = byte_tokenizer()
    backend.add_special_tokens(["<s>"])
    codec = SimpleNamespace(backend=backend, decode=backend.decode)
    ids = backend.encode("<s>a b\né\t\r😀c").ids
    signs = ["↵", "\ufffd", "é", "⇥", "␍", "\ufffd", "\ufffd", "\ufffd", "😀", "c"]
    assert sample.token_labels(codec, ids) == ["<s>", "a", "·", "b", *signs]


@pytest.mark.parametrize("name", MODELS)
def test_the_labels_of_a_text_are_the_text(name):
    codec = importlib.import_module(name).tokenizer(ROOT / "tiny" / name)
    text = "naïve 中文 שלום e\u0301 <b>"
    labels = "".join(sample.token_labels(codec, codec.encode(text)))
    assert labels.replace("\ufffd", "") == text.replace(" ", "·")


def test_the_picture_has_a_map_for_each_head(tmp_path):
    """Layer 1, head 2 attends to the token before; all others to the token itself."""
    weights = np.broadcast_to(np.eye(5), (2, 3, 5, 5)).copy()
    weights[1, 2] = np.eye(5, k=-1)
    figure = sample.attention_picture(weights, ["a", "$b$", "$", "_", "e"])
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()][6] == "$b$"
    names = [text.get_text() for text in axes.texts]
    assert names == ["head 0", "head 1", "head 2", "layer 0", "layer 1"]

    # Dark is where a weight is 1; a map and the gap after it have six pixels.
    dark = axes.images[0].get_array()[..., 0] < 128
    np.testing.assert_array_equal(dark[6:11, 12:17], weights[1, 2] == 1)
    assert dark.sum() == 5 * 5 + 4
    sample.save_picture(figure, tmp_path / "out.png")
    assert imread(tmp_path / "out.png").shape[2] == 4


def test_a_picture_of_many_heads_or_tokens_stays_within_6000_pixels():
    for layers, heads, T in [(32, 32, 40), (2, 2, 512)]:
        weights = np.full((layers, heads, 1, 1), 1 / T)
        weights = np.broadcast_to(weights, (layers, heads, T, T))
        figure = sample.attention_picture(weights, ["a"] * T)
        assert max(figure.get_size_inches()) * figure.dpi <= 6000


def test_characters_that_the_font_lacks_are_said(tmp_path, capsys):
    figure = sample.attention_picture(np.ones((1, 1, 1, 1)), ["\U00012000"])
    sample.save_picture(figure, tmp_path / "out.png")
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of a tiny model, with text that HTML could take for its own."""
    file = tmp_path_factory.mktemp("page") / "out.html"
    done = run("--weights", "tiny", "--prompt", "A </script><b>king</b>", "--attention", file)
    assert done.returncode == 0, done.stderr
    return file


def data_of(page) -> dict:
    """What the page holds."""
    text = re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1]
    return json.loads(text)


def weights_in(data: dict) -> np.ndarray:
    """The numbers of a page: [layers, heads, T, T]. It holds them up to the diagonal."""
    layers, heads, T = data["layers"], data["heads"], len(data["tokens"])
    numbers = np.frombuffer(base64.b64decode(data["weights"]), "<u2")
    weights = np.zeros((layers, heads, T, T))
    rows, columns = np.tril_indices(T)
    weights[:, :, rows, columns] = numbers.reshape(layers, heads, -1) / 65535
    return weights


@pytest.mark.parametrize("token", ["</script><img src=x onerror=alert(1)>", "<!--<script>"])
def test_no_token_ends_the_script_of_a_page(token):
    page = sample.attention_page(np.ones((1, 1, 1, 1)), [token])
    data = page.split('id="data">')[1].split("</script>")[0]
    assert "<" not in data
    assert json.loads(data)["tokens"] == [token]


def test_the_page_holds_the_weights_and_needs_no_network(page):
    data = data_of(page)
    ids = gpt2.tokenizer(ROOT / "tiny/gpt2").encode("A </script><b>king</b>")
    assert "".join(data["tokens"]) == "A·</script><b>king</b>"
    weights = sample.attention_weights(gpt2, gpt2.load(ROOT / "tiny/gpt2"), ids)
    shape = (data["layers"], data["heads"], len(ids), len(ids))
    assert weights.shape == shape
    np.testing.assert_allclose(weights_in(data), weights, atol=2 / 65535)
    assert not re.search(r"https?://|src=|@import|url\(", page.read_text())


HOVER = """
<script>
const box = large.getBoundingClientRect();
large.onmousemove({clientX: box.left + margin + 0.5 * square,
                   clientY: box.top + margin + 2.5 * square});
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="apt install chromium")
def test_pointing_at_a_square_of_the_page_shows_its_weight(page, tmp_path):
    file = tmp_path / "hover.html"
    file.write_text(page.read_text().replace("</body>", HOVER + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout
    data = data_of(page)
    weight = weights_in(data)[0, 0, 2, 0]
    said = re.search(r'id="weight">(.*?)<', dom)[1]
    first, third = data["tokens"][0], data["tokens"][2]
    third = third.replace("<", "&lt;").replace(">", "&gt;")
    assert said == f"{third} (2) attends to {first} (0): {weight:.4f}"
    assert dom.count("<button") == data["layers"] * data["heads"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["out.gif"], "its name must end in .png, .html or .npz"),
        (["nowhere/out.png"], "it must be a file in a folder that can be written to"),
        (["a" * 300 + ".png"], "cannot be written: [Errno 36] File name too long"),
        (["out.png", "--prompt", "b"], "draws one text, not 2"),
        (["out.png", "--json"], "leave --num-samples"),
        (["out.png", "--max-new-tokens", "3"], "does not continue it"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(flags, message, tmp_path):
    flags = ["--attention", *flags]
    done = run("--weights", "tiny", "--prompt", "a", *flags)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["png", "html", "npz"])
def test_what_was_there_stays_if_the_new_file_cannot_be_written(
    kind, tmp_path, monkeypatch, capsys
):
    """A full disk, after the first bytes: the file is as it was, and nothing lies beside it."""
    file = tmp_path / f"out.{kind}"
    file.write_text("the old one")
    writer = {"png": "save_picture", "html": "attention_page", "npz": "np.savez_compressed"}[kind]

    def full(*given, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"sample.{writer}", full)
    codec = gpt2.tokenizer(ROOT / "tiny/gpt2")
    args = SimpleNamespace(attention=file)
    with pytest.raises(SystemExit):
        sample.draw_attention(gpt2, gpt2.load(ROOT / "tiny/gpt2"), codec, ["a"], args)
    assert f"--attention {file} cannot be written" in capsys.readouterr().err
    assert file.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [file]


def test_an_ending_in_capitals_is_kept(tmp_path):
    done = run("--prompt", "a", "--attention", tmp_path / "OUT.NPZ")
    assert done.returncode == 0, done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["OUT.NPZ"]
    assert np.load(tmp_path / "OUT.NPZ")["tokens"].tolist() == ["a"]


def test_a_text_longer_than_the_context_is_one_line(tmp_path):
    done = run("--prompt", "a b c " * 100, "--attention", tmp_path / "out.npz")
    assert done.returncode == 2
    assert (
        "context length of 256" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.wide
def test_a_sharded_model_has_the_same_attention(tmp_path):
    """On four devices, in each of --parallel's modes; sums are taken in another order."""
    flags = ["--model", "llama", "--weights", "tiny", "--prompt", TEXT, "--attention"]
    env = {"JAX_NUM_CPU_DEVICES": "4", "NPROC": "16"}
    found = []
    for mode in ["no", "tensor", "fsdp", "pmap"]:
        file = tmp_path / f"{mode}.npz"
        done = run(*flags, file, "--parallel", mode, **env)
        assert done.returncode == 0, done.stderr
        found.append(np.load(file)["weights"])
    for weights in found[1:]:
        np.testing.assert_allclose(weights, found[0], atol=1e-5)
