"""train.py: a run that is cut off goes on as if it had not been; one that goes wrong says so."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from helpers.small import complaint

import train

ROOT = Path(__file__).resolve().parents[1]
TEXT = "Größe, naïve: 日本 🙂\n" + "".join(
    f"The {n} of {n * n} said: 'I'll go', and went {n % 7} miles.\n" for n in range(400)
)
SMALL = "--layers 1 --heads 2 --width 32 --block 16 --batch 4 --tokens char --device cpu"
STEPS = 200
# All that a step changes matters: dropout draws from the step, the mean of the weights lags behind.
RUN = "--dropout 0.2 --ema 0.99 --save-every 10 --eval-every 10"


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """No run reads or writes the user's own cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(train, "CACHE", folder / train.CACHE.name)
        yield
    jax.config.update("jax_default_device", None)  # which runs in this process have chosen


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def whole(text_file, tmp_path_factory):
    """The undisturbed run, in a folder that no test changes."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    finish("--data", text_file, "--steps", STEPS, "--out", out)
    return out


def command(*flags):
    return [sys.executable, str(ROOT / "train.py"), *SMALL.split(), *RUN.split(), *map(str, flags)]


def run(*flags, timeout=600):
    """Runs train.py with the flags (a later one wins) and returns the finished process."""
    return subprocess.run(command(*flags), capture_output=True, text=True, timeout=timeout)


def finish(*flags, **options):
    """A run that must come to its end -> what it printed."""
    done = run(*flags, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(*flags):
    """Begins a run whose lines, those of both outputs, can be read as they come."""
    return subprocess.Popen(
        command(*flags), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def read_until(process, text):
    """Reads lines up to the first that begins with the text -> these lines."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(text):
            return lines
    pytest.fail(f"the run ended before it said {text!r}:\n{''.join(lines)}")


def steps_in(out):
    """The steps of the checkpoints that are whole."""
    return sorted(int(path.name) for path in out.glob("checkpoints/*") if path.name.isdigit())


def rows_in(out):
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def contents(folder):
    """{path: bytes} of all files."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_run(out, whole):
    """Bit for bit the same weights and the same curve, without a gap or a step told twice."""
    assert rows_in(out) == rows_in(whole)
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (out / file).read_bytes() == (whole / file).read_bytes(), file


# ---------------------------------------------------------------------------------------- cut off


def kill(process, lines, seconds):
    """Kills a run so many lines after it has begun, and a moment later."""
    try:
        read_until(process, "validation loss before")
        for _ in range(lines):
            read_until(process, "step ")
        with pytest.raises(subprocess.TimeoutExpired):  # or it had come to its end
            process.wait(seconds)
    finally:
        process.kill()
    process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL


def kill_and_resume(flags, out, kills, seed, timeout=600):
    """Kills a run again and again at random moments, and at last lets it come to its end."""
    rng = np.random.default_rng(seed)
    for _ in range(kills):
        resume = ["--resume"] if steps_in(out) else []  # killed too early: it begins again
        kill(start(*flags, "--out", out, *resume), rng.integers(4), rng.uniform(0, 0.5))
    finish(*flags, "--out", out, "--resume", timeout=timeout)


def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_if_undisturbed(
    text_file, whole, tmp_path
):
    """The first of these three too early, before there is a checkpoint."""
    kill_and_resume(["--data", text_file, "--steps", STEPS], tmp_path, kills=3, seed=14)
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_bit_for_bit_as_if_undisturbed(text_file, tmp_path):
    flags = ["--data", text_file, "--steps", 1000]
    finish(*flags, "--out", tmp_path / "whole", timeout=600)
    kill_and_resume(flags, tmp_path / "parts", kills=20, seed=1, timeout=600)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_to_stop_saves_first_and_says_how_to_go_on(number, text_file, whole, tmp_path):
    flags = ["--data", text_file, "--steps", STEPS, "--out", tmp_path]
    process = start(*flags)
    read_until(process, "step ")
    process.send_signal(number)
    lines = process.communicate(timeout=600)[0].splitlines()
    assert process.returncode == 130
    stopped = int(
        re.match(r"stopped after step (\d+): the same command with --resume", lines[-1])[1]
    )
    assert 10 <= stopped < STEPS and steps_in(tmp_path)[-1] == stopped
    assert rows_in(tmp_path)[-1]["step"] == stopped
    assert not (tmp_path / "model.safetensors").exists()
    finish(*flags, "--resume")
    assert_same_run(tmp_path, whole)


@pytest.fixture
def handlers():
    """The handlers of this process, put back after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_training_ends_the_program_at_once(number, handlers):
    stop = train.Stop()
    stop.restore()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


def test_a_second_ctrl_c_ends_the_program_at_once_and_a_second_sigterm_does_not(handlers):
    stop = train.Stop()
    signal.raise_signal(signal.SIGTERM)
    stop.restore()
    signal.raise_signal(signal.SIGTERM)
    assert stop.asked
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_while_the_last_checkpoint_is_written_keeps_the_earlier_ones(
    number, text_file, whole, tmp_path
):
    """The signal comes in `finish`, whose wait for the checkpoint is replaced by it."""
    flags = ["--data", text_file, "--steps", STEPS, "--out", tmp_path]
    program = f"""
import contextlib, os, signal, sys, train
finish = train.finish
def interrupted(run):
    run.checkpoints.wait_until_finished = lambda: signal.raise_signal({int(number)})
    return finish(run)
train.finish = interrupted
with contextlib.suppress(KeyboardInterrupt):
    sys.exit(train.main())
os._exit(130)
"""
    done = subprocess.run([sys.executable, "-c", program, *command(*flags)[2:]], cwd=ROOT)
    assert done.returncode == 130
    assert steps_in(tmp_path) and not (tmp_path / "model.safetensors").exists()
    finish(*flags, "--resume")
    assert_same_run(tmp_path, whole)


def test_the_run_goes_on_from_the_newest_checkpoint_and_rows_after_it_are_told_anew(
    text_file, whole, tmp_path
):
    """As after a kill that also cut off the last line of metrics.jsonl."""
    out = shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(out / f"checkpoints/{STEPS}")
    (out / "model.safetensors").unlink()
    metrics = out / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    with pytest.raises(json.JSONDecodeError):
        rows_in(out)
    printed = finish("--data", text_file, "--steps", STEPS, "--out", out, "--resume")
    assert f"validation loss before step {STEPS - 9}" in printed
    assert_same_run(out, whole)


def test_no_moment_of_a_resume_is_without_the_rows_before_it(whole, tmp_path):
    """They go to a new file, which then takes the place of the old one: a link shows the latter."""
    shutil.copy(whole / "metrics.jsonl", tmp_path)
    os.link(tmp_path / "metrics.jsonl", tmp_path / "old")
    train.Metrics(tmp_path, 100)
    assert rows_in(tmp_path) == [row for row in rows_in(whole) if row["step"] <= 100]
    assert (tmp_path / "old").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def cut_short(path):
    """Half of each file is gone."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (remove, "settings"),
        (cut_short, "state/d"),
        *[
            pytest.param(damage, part, marks=pytest.mark.wide)
            for damage in (remove, cut_short)
            for part in ("state", "state/_METADATA", "state/manifest.ocdbt")
        ],
    ],
)
def test_a_damaged_checkpoint_is_one_line_that_names_the_one_before(
    damage, part, text_file, whole, tmp_path, refused
):
    out = shutil.copytree(whole, tmp_path / "out")
    last, before = steps_in(out)[-1], steps_in(out)[-2]
    damage(out / f"checkpoints/{last}" / part)
    error = refused("--data", text_file, "--steps", STEPS, "--out", out, "--resume")
    assert f"checkpoints/{last} is damaged" in error
    assert f"--resume {before} goes on from the one before" in error


def test_a_run_goes_on_from_an_earlier_checkpoint_if_asked(text_file, whole, tmp_path, refused):
    out = shutil.copytree(whole, tmp_path / "out")
    flags = ["--data", text_file, "--steps", STEPS, "--out", out]
    steps = steps_in(out)
    assert f"are of steps {steps[0]}" in refused(*flags, "--resume", 3)

    remove(out / f"checkpoints/{steps[-1]}/state")
    finish(*flags, "--resume", steps[-2])
    assert_same_run(out, whole)
    assert steps_in(out) == steps


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_begins_again_in_its_folder(
    text_file, whole, tmp_path
):
    (tmp_path / "checkpoints/10.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "lo')
    finish("--data", text_file, "--steps", STEPS, "--out", tmp_path)
    assert_same_run(tmp_path, whole)


# -------------------------------------------------------------------------------- best and worst


def test_the_best_checkpoint_stays_beside_the_last_ones_and_is_what_is_written(tmp_path):
    """The validation text runs backwards: what is learned makes the loss on it rise."""
    text = tmp_path / "letters.txt"
    text.write_text("abcdefgh" * 90 + "hgfedcba" * 10)
    printed = finish(
        "--data",
        text,
        "--steps",
        50,
        "--lr",
        1e-2,
        "--ema",
        0,
        "--eval-every",
        50,
        "--keep",
        2,
        "--out",
        tmp_path / "out",
    )
    losses = {
        row["step"]: row["val_loss"] for row in rows_in(tmp_path / "out") if "val_loss" in row
    }
    best = min(losses, key=losses.get)
    assert list(losses) == [10, 20, 30, 40, 50] and best < 40
    assert steps_in(tmp_path / "out") == [best, 40, 50]
    assert f"the validation loss was lowest at step {best}: its weights are written" in printed
    assert losses[best] < losses[50] - 0.1
    assert f"validation loss over the whole text: {losses[best]:.4f} nats per token" in printed


@pytest.mark.parametrize(
    "flags, checkpoint",
    [
        pytest.param("--lr 1e30 --clip 1e30", None, marks=pytest.mark.wide),  # with the first step
        ("--lr 1e-3 --min-lr 1e-3 --warmup 0 --weight-decay 3e4", 5),  # tenfold each step
    ],
)
def test_a_loss_that_is_no_number_stops_the_run_and_says_what_to_do(
    flags, checkpoint, text_file, tmp_path
):
    done = run(
        "--data",
        text_file,
        "--steps",
        60,
        "--save-every",
        5,
        "--out",
        tmp_path,
        "--ema",
        0,
        *flags.split(),
    )
    assert done.returncode == 1
    *before, line = done.stderr.splitlines()
    said = r"step +\d+/60  train|.* \.\.\.$"  # and no traceback
    assert all(re.match(said, text) for text in before)
    bad = next(
        row
        for row in rows_in(tmp_path)
        if "loss" in row and not np.isfinite(row["loss"] + row["norm"])
    )
    assert line.startswith(f"train.py: at step {bad['step']} the loss is {bad['loss']}")
    assert "--lr" in line and "--warmup" in line and "--clip" in line
    stored = steps_in(tmp_path)  # whole ones, and none with what came of the bad step
    assert all(step < bad["step"] for step in stored) and bool(stored) == bool(checkpoint)
    if stored:
        assert re.search(rf"newest checkpoint.* step {stored[-1]}\b", line)
    else:
        assert "None" not in line
    assert not (tmp_path / "model.safetensors").exists()


@pytest.fixture(scope="module")
def impatient(tmp_path_factory):
    """(flags, folder, what it printed) of a run on a validation text that runs backwards."""
    folder = tmp_path_factory.mktemp("impatient")
    text, out = folder / "letters.txt", folder / "out"
    text.write_text("abcdefgh" * 90 + "hgfedcba" * 10)
    flags = ["--data", text, "--lr", 1e-2, "--ema", 0, "--eval-every", 5, "--save-every", 0]
    flags += ["--steps", STEPS, "--out", out, "--patience", 3, "--eval-first"]
    return flags, out, finish(*flags)


def test_a_run_whose_validation_loss_does_not_fall_stops_and_writes_the_best(impatient):
    _, out, printed = impatient
    losses = {row["step"]: row["val_loss"] for row in rows_in(out) if "val_loss" in row}
    first, *later = losses
    best = min(later, key=losses.get)
    last = later[-1]
    assert first == 0 and last == best + 3 * 5 < STEPS
    assert f"stopped after step {last}: 3 estimates without a lower validation loss" in printed
    assert f"the validation loss was lowest at step {best}: its weights are written" in printed
    assert f"validation loss over the whole text: {losses[best]:.4f} nats per token" in printed
    assert {best, last} <= set(steps_in(out))


def test_the_validation_loss_before_the_first_step_is_recorded_if_asked(impatient):
    _, out, printed = impatient
    row, *_ = rows_in(out)
    assert row["step"] == 0 and set(row) == {"step", "val_loss", "val_accuracy"}
    assert f"validation loss before step 1: {row['val_loss']:.4f}" in printed


def test_a_run_that_lost_patience_goes_on_with_more_of_it_only(impatient, tmp_path):
    flags, whole, _ = impatient
    out = shutil.copytree(whole, tmp_path / "out")
    last = rows_in(whole)[-1]["step"]
    flags = [*flags, "--out", out, "--resume"]
    again = run(*flags)
    assert again.returncode == 0
    assert f"--patience 3 had stopped the run after step {last}" in again.stderr
    assert_same_run(out, whole)
    printed = finish(*flags, "--patience", 5)
    assert f"stopped after step {last + 10}: 5 estimates without" in printed


@pytest.mark.parametrize(
    "losses, since",
    [
        ([], 0),
        ([3.0], 0),
        ([3.0, 2.0], 0),
        ([2.0, 2.0], 1),  # as low is not lower
        ([2.0, math.nan, 3.0], 2),
        ([math.nan, 2.0], 0),
        ([0.0, 1.0], 1),
    ],
)
def test_estimates_are_counted_from_the_lowest_and_not_from_step_0(losses, since):
    rows = [{"step": 0, "val_loss": -1.0}, {"step": 5, "loss": 1.0}]
    rows += [{"step": 10 * n, "val_loss": loss} for n, loss in enumerate(losses, 1)]
    run = Namespace(metrics=Namespace(rows=rows), args=Namespace(prune=None))
    assert train.estimates_since_lowest(run) == since


def test_a_validation_loss_of_exactly_0_is_recorded_and_kept_as_the_best(tmp_path):
    """A text of one letter: there is no other token."""
    text = tmp_path / "letters.txt"
    text.write_text("a" * 1000)
    printed = finish("--data", text, "--steps", 20, "--patience", 3, "--out", tmp_path / "out")
    losses = [row["val_loss"] for row in rows_in(tmp_path / "out") if "val_loss" in row]
    assert losses == [0, 0]
    checkpoints = train.open_checkpoints(tmp_path / "out", 2)
    assert checkpoints.best_step() in (10, 20)
    assert checkpoints.metrics(checkpoints.best_step()) == {"val_loss": 0.0}
    checkpoints.close()
    assert "validation loss over the whole text: 0.0000 nats per token; perplexity 1.00" in printed


# -------------------------------------------------------------------------------- another run


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs train.py in this process, for speed -> its one line on standard error."""

    def call(*flags):
        monkeypatch.setattr(sys, "argv", command(*flags)[1:])
        with pytest.raises(SystemExit) as stop:
            train.main()
        error = capsys.readouterr().err
        assert stop.value.code == 2
        return complaint(error)

    return call


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--width 64", "--width 32"),
        ("--beta2 0.9", "--beta2 0.99"),
        ("--batch 8", "--batch 4"),
        ("--optimizer lion", "--optimizer adamw"),
        ("--dropout 0.1", "--dropout 0.2"),
        ("--ema 0", "--ema 0.99"),
        ("--seed 1", "--seed 0"),
        ("--tokens bytes", "--tokens char"),
        ("--model opt", "--model gpt2"),
        ("--dtype bfloat16", "--dtype float32"),
        ("--data other.txt", "--data"),
    ],
)
def test_a_run_is_not_resumed_as_another_one(
    flags, message, text_file, whole, monkeypatch, refused
):
    monkeypatch.chdir(text_file.parent)
    Path("other.txt").write_text(TEXT.replace("miles", "yards"))
    before = contents(whole)
    error = refused(
        "--data", text_file, "--steps", STEPS, "--out", whole, "--resume", *flags.split()
    )
    assert f"the run in {whole} has" in error and message in error
    assert contents(whole) == before


def test_a_folder_with_a_run_is_not_begun_in_again(text_file, whole, refused):
    before = contents(whole)
    assert "holds a run already: add --resume" in refused("--data", text_file, "--out", whole)
    assert contents(whole) == before


def test_there_is_nothing_to_resume_in_an_empty_folder(text_file, tmp_path, refused):
    error = refused("--data", text_file, "--out", tmp_path, "--resume")
    assert "has no checkpoints: leave --resume out" in error
    assert not contents(tmp_path)


def test_resuming_a_finished_run_changes_no_weight_and_no_row(text_file, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    finish("--data", text_file, "--steps", STEPS, "--out", out, "--resume")
    assert_same_run(out, whole)


# -------------------------------------------------------------------------------- changed settings

CONSTANT = ["--lr", "1e-3", "--min-lr", "1e-3", "--warmup", "0"]


@pytest.mark.wide
def test_a_finished_run_with_more_steps_is_the_longer_run_bit_for_bit(text_file, tmp_path):
    """The rate is constant, so that both follow the same schedule."""
    flags = ["--data", text_file, *CONSTANT]
    finish(*flags, "--steps", 40, "--out", tmp_path / "whole")
    finish(*flags, "--steps", 20, "--out", tmp_path / "parts")
    done = run(*flags, "--steps", 40, "--out", tmp_path / "parts", "--resume")
    assert "--steps 20 -> 40: from step 21 on; there the new schedule gives" in done.stderr
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.fixture(scope="module")
def changed(text_file, whole, tmp_path_factory):
    """(the flags of `whole`, changed, its folder, what the changed run wrote on standard error)."""
    out = shutil.copytree(whole, tmp_path_factory.mktemp("runs") / "changed")
    flags = ["--data", text_file, "--steps", STEPS + 20, "--lr", 1e-3, "--weight-decay", 0.2]
    flags += ["--clip", 0.5, "--schedule", "linear", "--out", out, "--resume"]
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    return flags, out, done.stderr


def test_from_where_it_goes_on_the_learning_rate_is_that_of_the_new_schedule(changed, whole):
    _, out, _ = changed
    before, after = rows_in(whole), rows_in(out)
    assert after[: len(before)] == before
    # --warmup and --min-lr follow from the new --steps and --lr.
    warmup = (STEPS + 20) // 20
    fall = optax.linear_schedule(1e-3, 1e-4, STEPS + 20 - warmup)
    rates = {row["step"]: row["lr"] for row in after[len(before) :] if "lr" in row}
    assert list(rates) == list(range(STEPS + 1, STEPS + 21))
    for step, rate in rates.items():
        assert rate == pytest.approx(float(fall(step - 1 - warmup)), rel=1e-6)


def test_what_changed_is_said_and_stored_in_later_checkpoints(changed, refused):
    flags, _, stderr = changed
    for change in [
        "--steps 200 -> 220",
        "--lr 0.003 -> 0.001",
        "--schedule cosine -> linear",
        "--min-lr 0.0003 -> 0.0001",
        "--warmup 10 -> 11",
        "--weight-decay 0.1 -> 0.2",
        "--clip 1 -> 0.5",
    ]:
        assert change in stderr
    again = run(*flags)
    assert again.returncode == 0 and "->" not in again.stderr
    assert "step 220 was the last: the model is written again; a larger --steps" in again.stderr
    error = refused(*flags, "--steps", 100)
    assert f"--steps 100: the checkpoint is of step {STEPS + 20}" in error


def test_a_setting_that_was_only_left_out_is_not_taken_for_a_change(text_file, changed, refused):
    _, out, _ = changed
    error = refused("--data", text_file, "--steps", 300, "--out", out, "--resume")
    for kept in ("--lr 0.001", "--schedule linear", "--weight-decay 0.2", "--clip 0.5"):
        assert kept in error
    assert "--steps" not in error and "--warmup" not in error


@pytest.mark.wide
def test_a_diverged_run_goes_on_from_its_newest_checkpoint_with_a_lower_rate(text_file, tmp_path):
    flags = ["--data", text_file, "--ema", 0, "--out", tmp_path]
    finish(*flags, *CONSTANT, "--steps", 20)
    wild = run(*flags, "--steps", 60, "--lr", 1e30, "--clip", 1e30, "--resume")
    assert wild.returncode == 1
    assert "newest checkpoint: step 20: go on from it by --resume" in wild.stderr
    printed = finish(*flags, *CONSTANT, "--steps", 40, "--resume")
    assert "finished" in printed
    losses = {row["step"]: row["loss"] for row in rows_in(tmp_path) if "loss" in row}
    assert list(losses) == list(range(1, 41)) and max(losses.values()) < 4
