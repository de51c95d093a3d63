"""train.py: what a step computes, and what a whole run leaves behind."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiktoken
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
MATERIAL = ROOT.parent / "shared/material"
SHAKESPEARE = MATERIAL / "texts/tinyshakespeare.txt"
TIKTOKEN = MATERIAL / "gpt2-tokenizer/tiktoken-cache"
sys.path.insert(0, str(ROOT))

import gpt2  # noqa: E402
import train  # noqa: E402

TEXT = "Größe, naïve: 日本 🙂\r\n\ttwo  spaces, 1234\n\n\n" + "".join(
    f"The {n} of {n * n} said: 'I'll go', and went {n % 7} miles.\n" for n in range(400))
SMALL = "--layers 1 --heads 2 --width 32 --block 16 --batch 4 --steps 8 --eval-every 4 --device cpu"

@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory):
    """Programs that one process compiled, the others take from here: half of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("programs")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield

@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT.encode())
    return file

def command(*flags):
    return [sys.executable, str(ROOT / "train.py"), *SMALL.split(), *map(str, flags)]

def run(*flags, env=None, **options):
    """Runs train.py with the flags (a later one wins) and returns the finished process."""
    env = os.environ | {"TIKTOKEN_CACHE_DIR": str(TIKTOKEN)} | (env or {})
    return subprocess.run(command(*flags), capture_output=True, text=True, timeout=120, env=env,
                          **options)

def curve(stderr):
    """(step, train loss, validation loss) of the lines on standard error."""
    found = re.findall(r"step +(\d+)/\d+ +train ([\d.]+) +val ([\d.]+)", stderr)
    return [(int(step), float(loss), float(val)) for step, loss, val in found]

def small_model(**options):
    config = gpt2.Config(vocab_size=50, padded_vocab_size=64, n_positions=16, n_embd=32, n_layer=2,
                         n_head=2, bos_token_id=None, eos_token_id=None,
                         **{"embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0} | options)
    return gpt2.Model(config, rngs=nnx.Rngs(0))

def some_tokens():
    return np.random.default_rng(1).integers(50, size=(3, 17)).astype(np.int32)

def some_settings(**options):
    return Namespace(**{"lr": 1e-2, "min_lr": 1e-3, "warmup": 0, "steps": 100, "beta2": 0.99,
                        "weight_decay": 0.1, "clip": 1.0} | options)

# -------------------------------------------------------------------------------------------- steps

def test_the_loss_is_the_mean_negative_log_probability_of_the_next_token():
    model, tokens = small_model(), some_tokens()
    log_probs = jax.nn.log_softmax(model(tokens[:, :-1]))
    expected = -np.take_along_axis(np.array(log_probs), tokens[:, 1:, None], axis=2)[..., 0]
    # Both in float32, 50 terms in a sum: a few units of the seventh digit.
    np.testing.assert_allclose(train.token_losses(model, tokens)[0], expected, rtol=1e-5)

def test_padding_counts_for_nothing():
    model, tokens = small_model(), some_tokens()
    padded = np.concatenate([tokens[:, :10], np.full((3, 7), -1, np.int32)], axis=1)
    losses, _ = train.token_losses(model, padded)
    expected, _ = train.token_losses(model, tokens)
    np.testing.assert_allclose(losses[:, :9], expected[:, :9], rtol=1e-5)
    assert not losses[:, 9:].any()

def test_loss_and_gradients_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import GPT2LMHeadModel

    model, tokens = small_model(), some_tokens()
    gpt2.save(model, tmp_path)
    graphdef, params = nnx.split(model)
    loss, gradients = jax.value_and_grad(
        lambda params: train.token_losses(nnx.merge(graphdef, params), tokens)[0].mean())(params)

    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    logits = theirs(torch.tensor(tokens[:, :-1])).logits
    their_loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(tokens[:, 1:]).long().flatten())
    their_loss.backward()
    np.testing.assert_allclose(loss, their_loss.item(), rtol=1e-6)
    their_gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    gpt2.save(nnx.merge(graphdef, gradients), tmp_path)  # and so they get the names of a checkpoint
    ours = load_file(tmp_path / "model.safetensors")
    assert ours.keys() == their_gradients.keys()
    for name, gradient in ours.items():
        # Sums of 48 tokens in float32, in another order: 1e-5 of the largest entry is ample.
        np.testing.assert_allclose(gradient, their_gradients[name], err_msg=name,
                                   atol=1e-5 * np.abs(gradient).max())

def test_weight_decay_shrinks_matrices_and_nothing_else():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2)}
    optimizer, rate = train.make_optimizer(some_settings())
    still = jax.tree.map(jnp.zeros_like, params)  # no gradient: only decay can move anything
    updates, _ = optimizer.update(still, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * rate(0), rtol=1e-6)
    assert not updates["bias"].any() and not updates["scale"].any()

def test_the_learning_rate_rises_and_falls_to_its_minimum():
    _, rate = train.make_optimizer(some_settings(warmup=10))
    assert 0 < rate(0) < rate(5) < rate(10) and float(rate(10)) == pytest.approx(1e-2)
    assert rate(10) > rate(50) > rate(99) and float(rate(100)) == pytest.approx(1e-3)

def test_steps_lower_the_loss():
    graphdef, params = nnx.split(small_model())
    optimizer, _ = train.make_optimizer(some_settings())
    step, _ = train.compile_steps(graphdef, optimizer, None, None, jax.devices()[:1])
    opt_state, losses = optimizer.init(params), []
    for i in range(30):  # the same batch again and again, which a model learns by heart
        params, opt_state, loss = step(params, opt_state, some_tokens(), jax.random.key(0), i)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(np.log(50), rel=0.05)  # at first every token is as likely
    assert losses[-1] < 0.7 * losses[0]

def test_dropout_is_drawn_anew_in_each_step_and_is_off_in_evaluation():
    graphdef, params = nnx.split(small_model(embd_pdrop=0.5))
    optimizer, _ = train.make_optimizer(some_settings())
    opt_state, key = optimizer.init(params), jax.random.key(0)

    def loss_at(step):
        return float(train.train_step(graphdef, optimizer, None, None, params, opt_state,
                                      some_tokens(), key, step)[2])

    assert loss_at(0) == loss_at(0) != loss_at(1)
    plain = train.token_losses(small_model(), some_tokens())[0].sum()
    assert float(train.eval_step(graphdef, None, params, some_tokens())) == pytest.approx(plain)

def test_remat_changes_no_gradient():
    def gradients(remat):
        graphdef, params = nnx.split(small_model(resid_pdrop=0.5))
        model = nnx.merge(graphdef, params)
        model.remat = remat
        graphdef, params = nnx.split(model)
        return jax.grad(lambda p: train.token_losses(
            nnx.merge(graphdef, p), some_tokens(), nnx.Rngs(dropout=3))[0].mean())(params)

    # The same operations; compiled apart, so that the last bits may differ.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
                 gradients(True), gradients(False))

# --------------------------------------------------------------------------------------------- text

@pytest.mark.parametrize("kind", ["char", "bytes", "bpe", "gpt2"])
def test_tokens_give_the_text_back_as_it_was(kind, monkeypatch):
    if kind == "gpt2" and not TIKTOKEN.exists():
        pytest.skip("needs GPT-2's vocabulary")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(TIKTOKEN))
    codec = train.make_tokenizer(kind, TEXT[:5000], TEXT, 300)
    ids = train.encode(codec, TEXT)
    assert ids.tolist() == codec.encode(TEXT).ids  # cut into pieces or in one: the same
    assert codec.decode(ids.tolist()) == TEXT
    if kind == "bytes":
        assert ids.tolist() == list(TEXT.encode())
    if kind == "gpt2":
        odd = "".join(map(chr, [*range(256), 0x3000, 0x4E2D, 0x1F642])) * 2 + " \n \n's 'LL\n"
        for text in (TEXT, odd, train.__doc__):
            assert codec.encode(text).ids == tiktoken.get_encoding("gpt2").encode_ordinary(text)

def test_windows_hold_every_token_but_the_first_as_a_target_once():
    tokens = np.arange(100)
    batches = train.windows(tokens, batch=4, block=8)
    targets, inputs = batches[..., 1:], batches[..., :-1]
    assert targets[targets >= 0].tolist() == list(range(1, 100))
    assert (inputs[targets >= 0] == targets[targets >= 0] - 1).all()

def test_a_batch_follows_from_seed_and_step():
    tokens = np.arange(100, dtype=np.uint16)
    batch = train.random_batch(tokens, 4, 8, seed=1, step=2)
    assert (batch == train.random_batch(tokens, 4, 8, seed=1, step=2)).all()
    assert (batch != train.random_batch(tokens, 4, 8, seed=1, step=3)).any()
    assert batch.shape == (4, 9) and (np.diff(batch) == 1).all()

def test_without_data_there_is_the_standard_library():
    text = train.read_text(None)
    assert len(text) > 1e6 and "class ArgumentParser" in text

# ----------------------------------------------------------------------------------------- the runs

@pytest.mark.parametrize("kind, dtype", [
    ("char", "float32"), *[
        pytest.param(*case, marks=pytest.mark.wide)
        for case in [("bytes", "bfloat16"), ("bpe", "bfloat16"), ("gpt2", "float32")]]])
def test_a_finished_folder_is_read_by_the_model_file_and_by_transformers(
        kind, dtype, text_file, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if kind == "gpt2" and not TIKTOKEN.exists():
        pytest.skip("needs GPT-2's vocabulary")
    out = tmp_path / "out"
    done = run("--data", text_file, "--out", out, "--tokens", kind, "--vocab-size", 300,
               "--save-dtype", dtype, "--save-every", 0)
    assert done.returncode == 0, done.stderr
    [(_, _, first), (step, _, last)] = curve(done.stderr)
    assert step == 8 and last < first
    of_run, of_stored = map(float, re.findall(r"validation loss.*: ([\d.]+) a token", done.stdout))
    # bfloat16 keeps 8 bits of each weight; over all tokens that hardly shows in the loss.
    assert of_stored == pytest.approx(of_run, abs=1e-4 if dtype == "float32" else 1e-2)
    assert sorted(file.name for file in out.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]

    ours, theirs = gpt2.tokenizer(out), AutoTokenizer.from_pretrained(out)
    ids = ours.encode(TEXT)
    assert ids == theirs(TEXT)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids) == TEXT
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"] == theirs.eos_token_id == (50256 if kind == "gpt2" else None)
    logits = gpt2.load(out, dtype=jnp.float32)(np.array([ids[:16]]))
    with torch.no_grad():
        their_model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        expected = their_model(torch.tensor([ids[:16]])).logits
    assert logits.shape[-1] == config["vocab_size"] == len(theirs)
    # float32 in another order of addition, on logits below 1.
    np.testing.assert_allclose(logits, expected, atol=1e-5)

@pytest.mark.parametrize("flags", ["--model opt", *[
    pytest.param(flags, marks=pytest.mark.wide) for flags in [
        "--model llama", "--model gemma", "--model mistral", "--model mistral --experts 4"]]])
def test_every_model_file_learns_and_writes_a_folder_that_transformers_reads(
        text_file, tmp_path, flags):
    done = run("--data", text_file, "--tokens", "bytes", "--steps", 30, "--out", tmp_path, "--lr",
               "1e-2", *flags.split())
    assert done.returncode == 0, done.stderr
    losses = [val for _, _, val in curve(done.stderr)]
    assert losses[-1] < 0.8 * np.log(256)  # bytes of this text are not all as likely
    module = importlib.import_module(flags.split()[1])
    model, codec = module.load(tmp_path), module.tokenizer(tmp_path)
    ids = torch.tensor([codec.encode("The 3 of 9 said")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
    np.testing.assert_allclose(model(jnp.array(ids)), theirs.detach(), rtol=0, atol=1e-4)

@pytest.mark.wide
def test_experts_are_kept_balanced(text_file, tmp_path, monkeypatch):
    """The loss for balance is a part of what is learned: its gradient reaches the router."""
    module = importlib.import_module("mistral")
    config = module.Config("mixtral", 50, 16, 32, 64, 1, 2, 2, 16, num_local_experts=4)
    graphdef, params = nnx.split(module.Model(config, rngs=nnx.Rngs(0)))
    optimizer, _ = train.make_optimizer(some_settings(clip=1e9))

    def gate_after_a_step(balance):
        new, _, loss = train.train_step(graphdef, optimizer, balance, None, params,
                                        optimizer.init(params), some_tokens(), jax.random.key(0), 0)
        return np.asarray(new["layers"][0]["block_sparse_moe"]["gate"]["kernel"][...]), float(loss)

    plain, plain_loss = gate_after_a_step(None)
    balanced, loss = gate_after_a_step(lambda cache: 100 * module.balance_loss(cache))
    assert loss == plain_loss  # what is reported is that of the tokens
    assert np.abs(balanced - plain).max() > 1e-4

def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
        text_file, tmp_path, monkeypatch, capsys):
    flags = ["--data", text_file, "--tokens", "bpe", "--vocab-size", 300, "--dropout", 0.2,
             "--steps", 60, "--save-every", 20]
    whole = run(*flags, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr

    process = subprocess.Popen(command(*flags, "--out", tmp_path / "parts"), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first_line = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in stderr.splitlines()[-1]
    stopped = int(re.search(r"stopped after step (\d+)", stderr)[1])
    assert 4 <= stopped < 60 and not (tmp_path / "parts/model.safetensors").exists()

    rest = run(*flags, "--out", tmp_path / "parts", "--resume")
    assert rest.returncode == 0, rest.stderr
    # The validation losses, and for all full stretches between two looks the training losses.
    expected = curve(whole.stderr)
    before, after = curve(first_line + stderr), curve(rest.stderr)
    assert [val for *_, val in before + after] == [val for *_, val in expected]
    assert after[1:] == expected[len(before) + 1 :]
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    assert {path.name for path in (tmp_path / "parts/checkpoints").iterdir()} == {"40", "60"}

    # Now that there is a run: it is not overwritten, nor resumed as another one.
    for more, message in [([], "holds a run already: add --resume"),
                          (["--resume", "--width", 64], "has --width 32: resume with that")]:
        monkeypatch.setattr(sys, "argv", command(*flags, "--out", tmp_path / "parts", *more)[1:])
        with pytest.raises(SystemExit, match="2"):
            train.main(train.arguments())
        stderr = capsys.readouterr().err
        assert message in stderr and len(stderr.splitlines()) == 1

def test_pmap_learns_what_one_device_learns(text_file, tmp_path):
    flags = ["--data", text_file, "--tokens", "char", "--save-every", 0, "--steps", 20]
    # On few cores the devices' threads would wait for one another for ever without NPROC.
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "NPROC": "16"}
    many = run(*flags, "--parallel", "pmap", "--out", tmp_path / "many", env=env)
    one = run(*flags, "--out", tmp_path / "one")
    assert many.returncode == one.returncode == 0, many.stderr + one.stderr
    assert "4 x cpu" in many.stdout and "1 x cpu" in one.stdout
    # Means of means add up in another order, and Adam turns that into a little more; printed are
    # four decimals.
    np.testing.assert_allclose(curve(many.stderr), curve(one.stderr), atol=3e-4)

def test_pmap_wants_rows_for_each_device(text_file, monkeypatch, capsys):
    monkeypatch.setattr(train, "pick_devices", lambda *_: jax.devices()[:1] * 4)
    monkeypatch.setattr(sys, "argv", command("--data", text_file, "--batch", 6)[1:])
    with pytest.raises(SystemExit, match="2"):
        train.main(train.arguments())
    assert "--batch 6 does not split over 4 devices" in capsys.readouterr().err

def test_a_full_disk_is_one_line_and_leaves_the_model_that_was_there(text_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("the old one")
    flags = ["--data", text_file, "--tokens", "char", "--out", tmp_path / "out", "--save-every", 0]
    small_files = ["sh", "-c", 'ulimit -f 40; exec "$@"', "sh"]  # 20 kB: the model is larger
    done = subprocess.run([*small_files, *command(*flags)], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("train.py: ")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "out" / "model.safetensors").read_text() == "the old one"

def test_a_checkpoint_for_which_there_is_no_room_is_not_begun(tmp_path, monkeypatch, capsys):
    checkpoints = train.open_checkpoints(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Namespace(free=1000))
    with pytest.raises(SystemExit, match="2"):
        train.save_checkpoint(checkpoints, 1, {"kernel": np.zeros(1000)}, {})
    assert "a checkpoint takes" in capsys.readouterr().err
    assert not list((tmp_path / "checkpoints").iterdir())

# ------------------------------------------------------------------------------------------ profile

def test_five_steps_are_traced_and_never_the_first():
    assert train.traced_steps(0, 2000) == range(10, 15)
    assert train.traced_steps(37, 2000) == range(47, 52)  # a run that was resumed
    assert train.traced_steps(0, 15) == range(10, 15)
    assert train.traced_steps(0, 14) == range(1, 6)
    assert train.traced_steps(0, 3) == range(1, 3)
    assert not train.traced_steps(0, 1)

COUNTS = """
import jax, sys, train
stats = {"bytes_in_use": 2, "peak_bytes_in_use": 3, "num_allocs": 4}
type(jax.devices("cpu")[0]).memory_stats = lambda device: stats
sys.exit(train.main(train.arguments()))
"""

def test_a_profile_shows_five_steps_and_their_memory_and_changes_no_bit(text_file, tmp_path):
    folder = tmp_path / "profile"
    flags = ["--data", text_file, "--tokens", "bytes", "--save-every", 0]
    plain = run(*flags, "--out", tmp_path / "plain")
    assert plain.returncode == 0, plain.stderr
    with_counts = [sys.executable, "-c", COUNTS, *command(*flags)[2:]]
    traced = subprocess.run([*with_counts, "--out", tmp_path / "traced", "--profile", folder],
                            cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert traced.returncode == 0, traced.stderr
    assert f"a trace of steps 2 to 6 is in {folder}: open its newest" in traced.stderr
    assert curve(traced.stderr) == curve(plain.stderr)
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("traced", "plain"))
    assert ours.read_bytes() == theirs.read_bytes()

    [trace] = folder.glob("plugins/profile/*/*.xplane.pb")
    for name in (b"jvp(h.0)/attn/attend", b"transpose(jvp(h.0))/mlp"):  # forward and backward
        assert name in trace.read_bytes()
    runs = {dict(event.stats)["run_id"]
            for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
            for line in plane.lines for event in line.events
            if dict(event.stats).get("hlo_module") == "jit_train_step"}
    assert len(runs) == 5
    lines = [json.loads(line) for line in (folder / "memory.jsonl").read_text().splitlines()]
    seconds = [line.pop("seconds") for line in lines]
    assert lines == [{"bytes_in_use": 2, "peak_bytes_in_use": 3}] * 5
    assert seconds[0] > 0 and seconds == sorted(seconds)

# ---------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("flags, message", [
    ("--model bert", "no model file for 'bert'"),
    ("--data missing.txt", "missing.txt: No such file or directory"),
    ("--data empty.txt", "has next to no text"),
    ("--data short.txt", "--block 16 is longer than the text"),
    ("--data latin.txt", "latin.txt is not UTF-8 text (byte 2)"),
    ("--width 30 --heads 4", "--width 30 does not split into --heads 4"),
    ("--steps -5", "--steps must be 1 or more"),
    ("--block 0", "--block must be 1 or more"),
    ("--steps many", "invalid int value: 'many'"),
    ("--vocab-size 100", "--vocab-size must be 256 or more"),
    ("--warmup 8", "--warmup must be from 0 to below --steps"),
    ("--dropout 1", "--dropout must be from 0 to below 1"),
    ("--block 100000", "--block 100000 is longer than the text"),
    ("--device tpu", "JAX finds no tpu here"),
    ("--device cpu:99", "there are 1 of this kind"),
    ("--device abacus", "it must be cpu, gpu or tpu"),
    ("--out short.txt", "--out short.txt is a file"),
    ("--profile short.txt", "--profile short.txt cannot be written"),
    ("--profile short.txt/in", "--profile short.txt/in cannot be written"),
    ("--resume", "no checkpoints: leave --resume out"),
    ("--tokens gpt2", "tiktoken cannot download"),
])
def test_bad_input_is_one_line_that_says_what_to_do(
        flags, message, text_file, monkeypatch, capsys):
    folder = text_file.parent
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})  # forget what is loaded
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("too short to learn from")
    (folder / "latin.txt").write_bytes("Größe".encode("latin-1"))
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(sys, "argv", [*command("--data", text_file)[1:], *flags.split()])
    with pytest.raises(SystemExit) as stop:
        train.main(train.arguments())
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and message in stderr
    assert stderr.startswith("train.py: ") and len(stderr.splitlines()) == 1
    assert sorted(folder.rglob("*")) == before

# --------------------------------------------------------------------------------------------- slow

@pytest.mark.slow
@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="needs Tiny Shakespeare")
@pytest.mark.parametrize("seed", [0, 1])
def test_the_defaults_reach_nanogpts_loss_on_shakespeare(seed, tmp_path):
    """nanoGPT's CPU example, with its sizes and number of steps: a validation loss of 1.88."""
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--data", SHAKESPEARE, "--tokens", "char", "--seed",
         str(seed), "--out", tmp_path / "out"], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"validation loss: ([\d.]+)", done.stdout)[1]) <= 1.88

@pytest.mark.slow
@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="needs Tiny Shakespeare")
@pytest.mark.parametrize("model", train.MODELS)
def test_the_tiny_checkpoint_has_the_loss_of_its_model_card(model):
    folder, module = ROOT / "tiny" / model, importlib.import_module(model)
    text = train.read_text([SHAKESPEARE])
    ids = module.tokenizer(folder).encode(text[int(0.9 * len(text)) :])
    graphdef, params = nnx.split(module.load(folder, dtype=jnp.float32))
    _, evaluate = train.compile_steps(graphdef, None, None, None, jax.devices()[:1])
    loss = train.mean_eval_loss(evaluate, params, train.windows(ids, batch=8, block=256))
    stated = re.search(r"([\d.]+) nats a token", (folder / "README.md").read_text())[1]
    assert loss == pytest.approx(float(stated), abs=1e-3)
