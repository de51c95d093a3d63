"""Trains a model file on text: from scratch or from a checkpoint, all weights or LoRA only.

    python train.py                                          # a small GPT-2 on Python's own source
    python train.py --data shakespeare --tokens char --out runs/char         # nanoGPT's example
    python train.py --model llama --weights HuggingFaceTB/SmolLM2-135M --lora 8 --data 'my/*.txt'
    python sample.py --weights runs/gpt2                     # what has it learned?

The end of the text, a tenth at most, is not trained on. The loss on it, the validation loss, tells
how well the model predicts what it has not seen. Ctrl-C stops a run, and the same command with
--resume goes on from there, on a CPU bit for bit. The finished folder is a checkpoint in Hugging
Face's format, or a LoRA adapter in PEFT's.

How to read this file: `main` is its table of contents, `train` is the training loop, `train_step`
is one update of the weights. Each later section can be read alone.

On one device you may delete, with the flags --multihost and --parallel:
* `JOIN`, `join_hosts`, `meet`, `wait_for_hosts`, `report_to_first`, `any_host_stops`, each
  `process_allgather` and each test of `process_index` (several hosts);
* `compile_steps_pmap`, and each branch on "pmap" or `config.axis`;
* `gather` in `make_build_model`, and in `compile_steps` the branch on "fsdp" with the `regather` of
  `StepConfig`;
* `wait_on_emulated_devices`, and `choose_parallel`: put "data" in place of its call.
The mesh must stay, a mesh of one device: `place`, `groups_of`, `init_sharded` and `first_state` use
it.
"""

import argparse
import contextlib
import errno
import glob
import hashlib
import importlib
import itertools
import json
import logging
import math
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
import threading
import time
import timeit
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
import optax
import orbax.checkpoint as ocp
import pooch
import tiktoken
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.multihost_utils import process_allgather
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns where nothing is wrong

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jax-one-file-models"


def main() -> int:
    """Trains as the command line says; returns the exit code."""
    args = parse_command_line()
    model_file = importlib.import_module(args.model)
    if args.multihost:
        join_hosts(args.multihost)
    devices = pick_devices(args.device, args.parallel)
    if args.dtype == "auto":
        args.dtype = "float32" if devices[0].platform == "cpu" else "bfloat16"

    with explained((OSError, model_file.InputError), "{}"):
        folder = find_weights(args, model_file)
        tokens_from = model_file.tokenizer_folder(folder) if folder else None
        data = prepare_data(args, model_file, tokens_from)
        if args.show_data:
            show_data(model_file, data)
            return 0
        model, adapters, mesh = make_model(args, model_file, folder, data, devices)

    run = set_up(args, model_file, data, model, adapters, mesh)
    del model  # step 1 donates its arrays
    stop = Stop()
    train(run, stop)
    stop.restore()
    return finish(run)


# ---------------------------------------- The training run ----------------------------------------


@dataclass
class Run:
    """A training run: what its steps need, and what they change."""

    args: argparse.Namespace
    model_file: Any  # the imported gpt2.py, llama.py, ...
    data: "Data"
    mesh: jax.sharding.Mesh
    graphdef: nnx.GraphDef  # the model without its arrays
    frozen: nnx.State  # the arrays that are not trained: with LoRA, the weights of the checkpoint
    adapters: dict  # with LoRA, what `add_adapters` returned; else empty
    prompt: list[int]  # the tokens of --prompt
    train_step: Callable  # compiled
    eval_step: Callable  # compiled
    prune_step: Callable  # compiled: see `prune_when_due`
    learning_rate: Callable  # step -> learning rate
    flops_per_token: int  # what training takes
    peak_flops: float  # FLOP/s that the devices reach together
    settings: dict  # what --resume compares
    checkpoints: ocp.CheckpointManager
    state: dict  # all that a step changes: see `first_state`
    step: int = 0  # steps done
    began: float = field(default_factory=time.monotonic)
    resumed_at: int = 0  # steps that were done before, where the run was resumed
    changes: list[str] = field(default_factory=list)  # of settings, since then
    metrics: "Metrics" = None
    waiting: list = field(default_factory=list)  # metrics of steps still in flight
    clock: "Clock" = None
    shown: float = 0.0  # when the progress line was printed last
    val_loss: float = math.nan  # the last estimate
    sparsity: float = math.nan  # with --prune: the share of the weights that are 0
    trouble: str = ""  # why the run must stop
    stopped: bool = False  # by a signal
    out_of_patience: bool = False  # see --patience

    @property
    def learned(self):
        """The weights to evaluate and to write: their moving average, with --ema."""
        return self.state.get("ema", self.state["params"])

    @property
    def model(self):
        """The model with these weights."""
        model = nnx.merge(self.graphdef, self.learned, self.frozen)
        if self.args.prune:
            merge_adapters(model, self.adapters, keep_zeros=True)
        return model


def train(run: Run, stop: "Stop") -> None:
    """The training loop: until --steps, a signal, --patience, or a loss that diverges."""
    if is_over(run):
        return
    key = random_key(run.args.seed)
    say("compiling the evaluation")
    run.val_loss, accuracy = evaluate(run, run.learned, some_batches(run))
    print(f"validation loss before step {run.step + 1}: {run.val_loss:.4f}", flush=True)
    if run.args.eval_first and run.step == 0:
        run.metrics.add([{"step": 0, "val_loss": run.val_loss, "val_accuracy": accuracy}])
    say("compiling the training step")

    while run.step < run.args.steps and not run.stopped and not run.out_of_patience:
        start_trace(run)  # with --profile
        batch = next_batch(run)
        learning_rate = run.learning_rate(run.step)
        run.state, metrics = run.train_step(run.state, run.frozen, batch, key)
        run.step += 1
        # Learning rate, loss, accuracy and gradient norm: nothing waits for them yet.
        run.waiting.append({"lr": learning_rate, **metrics})
        wait_on_emulated_devices(run, metrics)
        prune_when_due(run)  # with --prune
        end_trace_after_five(run, metrics)  # with --profile

        due = what_is_due(run, stop)
        run.stopped = due.stop
        if not due.log:
            if is_overdue(run):
                log_steps(run)
            continue

        # From here on the host waits for the device.
        log_steps(run)
        run.trouble = run.metrics.divergence(after=pruned_by(run))
        if run.trouble:
            break
        if due.evaluate or due.save:
            log_validation(run)
            heed_patience(run, due)  # with --patience
        if due.evaluate or sys.stderr.isatty():
            print_progress(run, end="\n" if due.evaluate else "\r")
        if due.evaluate and run.prompt:
            print_sample(run, key)
        if due.save or due.stop:
            # At a stop the estimate may be stale; before all is pruned, it is of another model.
            final = due.save and run.step >= pruned_by(run)
            save_checkpoint(run, val_loss=run.val_loss if final else None)
        run.clock.go_on()


def finish(run: Run) -> int:
    """Ends the run -> the exit code: writes the finished model, or says how to go on."""
    end_trace(run)
    run.metrics.close()
    with exit_on_write_error(run.args.out):
        if run.checkpoints.is_saving_in_progress():
            say("writing the last checkpoint")
        run.checkpoints.wait_until_finished()

    if run.trouble:
        newest = run.checkpoints.latest_step()
        again = "begin again"
        if newest is not None:
            again = (
                f"newest checkpoint: step {newest}: go on from it by --resume, or from another by "
                "--resume STEP,"
            )
        gently = "with a lower --lr, a longer --warmup or a smaller --clip"
        note(f"train.py: {run.trouble}; {again} {gently}")
        return 1
    if run.step < run.args.steps and not run.out_of_patience:
        note(f"stopped after step {run.step}: the same command with --resume goes on from there")
        return 130

    write_best(run)
    return 0


def write_best(run: Run) -> None:
    """Writes the finished model: the weights with the lowest validation loss, or the last."""
    if run.out_of_patience:
        print(
            f"stopped after step {run.step}: {counted(run.args.patience, 'estimate')} without a "
            "lower validation loss"
        )

    # The best weights, as they are written: in --save-dtype.
    best = run.checkpoints.best_step()
    if best not in (None, run.step):
        run.state = restore_state(run, best)
        print(f"the validation loss was lowest at step {best}: its weights are written")
    dtype = run.args.save_dtype
    params = jax.tree.map(lambda p: p.astype(dtype).astype(p.dtype), run.learned)
    say("evaluating on the whole validation text")
    loss, accuracy = evaluate(run, params, run.data.val_batches)

    say("writing the model")
    frozen = run.frozen
    if run.args.multihost:  # each host gets all of them
        params, frozen = process_allgather((params, frozen), tiled=True)
    if jax.process_index() == 0:
        write_model(run, nnx.merge(run.graphdef, params, frozen))
    lines = [
        f"finished: {run.args.out}, in {dtype}",
        f"validation loss over the whole text: {loss:.4f} nats per token; "
        f"perplexity {np.exp(loss):.2f}, accuracy {accuracy:.1%}",
    ]
    if run.args.prune:
        lines.append(f"sparsity: {describe_zeros(params, frozen)}")
    print_wrapped(
        *lines,
        f"it took {duration(time.monotonic() - run.began)}; {run.args.out} holds the model, "
        "metrics.jsonl and curves.png",
    )
    # A command to be copied is not wrapped.
    if run.data.template is None:
        print(f"to see what it writes: python sample.py --weights {run.args.out}")
    else:
        print(f"to talk to it: python sample.py --chat --weights {run.args.out}")


def print_wrapped(*lines: str):
    """Prints lines; on a terminal, those that are too long go on below, between two words."""
    if sys.stdout.isatty():
        fill = partial(textwrap.fill, width=shutil.get_terminal_size().columns)
        fill = partial(fill, subsequent_indent=" " * 7, break_on_hyphens=False)
        lines = [fill(line, break_long_words=False) for line in lines]
    print(*lines, sep="\n", flush=True)


def note(line: str) -> None:
    """A line on standard error; of several hosts, the first writes it."""
    if jax.process_index() != 0:
        return
    if sys.stderr.isatty():
        line = line.ljust(shutil.get_terminal_size().columns - 1)  # over a progress line
    print(line, file=sys.stderr, flush=True)


def say(doing: str) -> None:
    """Says what takes its time."""
    note(f"{doing} ...")


def counted(number: int, noun: str) -> str:
    """Such as "1 step" and "2,000 steps"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:03 or 0:07."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours > 0:
        return f"{hours}:{minutes:02}:{seconds:02}"
    return f"{minutes}:{seconds:02}"


class Stop:
    """Whether Ctrl-C (SIGINT) or SIGTERM has asked the run to stop.

    The question is asked after each step. So the current step is finished, or the next one if the
    run is evaluating (with several hosts, up to ten more); a checkpoint is saved, and the program
    ends. After the last step it goes on to write the model. A further Ctrl-C ends it at once: the
    checkpoint being written is lost, and earlier ones are kept. A further SIGTERM is ignored.
    Before and after the training, Ctrl-C ends the program at once, and so does SIGTERM if no stop
    was asked for.
    """

    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGINT, self.ask)
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self):
        """After the training. A repeated SIGTERM stays ignored: schedulers may send several."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not self.asked:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C


def is_over(run: Run) -> bool:
    """Whether a resumed run has nothing left to train; its model is then written again."""
    patience = run.args.patience
    if run.step == run.args.steps:
        note(f"step {run.step} was the last: the model is written again; a larger --steps goes on")
        return True
    if patience and estimates_since_lowest(run) >= patience:
        note(
            f"--patience {patience} had stopped the run after step {run.step}: the model is "
            "written again; a larger --patience goes on"
        )
        run.out_of_patience = True
    return run.out_of_patience


def heed_patience(run: Run, due: "Due") -> None:
    """--patience: saves after the lowest validation loss so far, or stops after enough others.

    Several hosts agree, because each has the same estimates.
    """
    if not run.args.patience or run.step < pruned_by(run):
        return
    since = estimates_since_lowest(run)
    if since == 0:
        due.save = True
    if since >= run.args.patience:
        run.out_of_patience = True
        due.evaluate = due.save = True


def estimates_since_lowest(run: Run) -> int:
    """How many validation losses came after the lowest one.

    That of step 0 does not count, nor do those of a model that is not yet as sparse as it will be.
    """
    steps, losses = column(run.metrics.rows, "val_loss")
    losses = losses[steps >= max(1, pruned_by(run))]
    if len(losses) == 0:
        return 0
    lowest = np.argmin(np.where(np.isnan(losses), np.inf, losses))
    return len(losses) - 1 - lowest


@dataclass
class Due:
    """What is to be done after a step."""

    log: bool  # read the metrics of the last steps, which waits for the device
    evaluate: bool
    save: bool
    stop: bool


def what_is_due(run: Run, stop: Stop) -> Due:
    """What --eval-every, --save-every and the signals ask for after this step."""
    args, step = run.args, run.step
    last = step == args.steps
    evaluate = step % args.eval_every == 0 or last
    save = args.save_every > 0 and (step % args.save_every == 0 or last)
    stopping = stop.asked
    if args.multihost:
        stopping = any_host_stops(step, stopping)
    log = evaluate or save or stopping or step % 10 == 0 or step == run.resumed_at + 1
    return Due(log, evaluate, save, stopping)


def any_host_stops(step: int, stopping: bool) -> bool:
    """Whether one of the hosts was asked to stop; they agree on it every 10 steps."""
    if step % 10 != 0:
        return False
    return bool(process_allgather(np.array(stopping)).any())


def next_batch(run: Run) -> "Batch":
    """The rows of the next step on their devices: [microbatches, groups, rows, T].

    microbatches: of gradient accumulation; groups: of devices, where each has its own rows.
    """
    args = run.args
    numbers = np.arange(args.batch).reshape(args.accumulate, groups_of(run.mesh), -1)
    numbers = numbers + run.step * args.batch  # rows are numbered from the start of the run

    def read(index):  # JAX passes one slice per dimension; the last is the whole row
        return run.data.train.rows(numbers[index[:3]], args.seed)

    return place(run.mesh, (*numbers.shape, args.block), read, accumulated=True)


def wait_on_emulated_devices(run: Run, metrics) -> None:
    """Waits for the step on emulated devices, which share a CPU's cores and lock up with several
    steps in flight."""
    if run.mesh.size > 1 and own_device(run.mesh).platform == "cpu":
        jax.block_until_ready(metrics)


class Clock:
    """The time that steps take, without their compilation, evaluations and checkpoints."""

    def __init__(self):
        self.seconds = 0.0
        self.started = None

    def stop(self):
        """After the metrics of a step were read. The first step is mostly compilation."""
        if self.started is not None:
            self.seconds += timeit.default_timer() - self.started

    def go_on(self):
        """Before the next step, or the next that is read."""
        self.started = timeit.default_timer()


def log_steps(run: Run) -> None:
    """Adds the metrics of the steps since the last call to metrics.jsonl; waits for the device.

    On a terminal, the progress line shows them as they come.
    """
    for step, metrics in enumerate(run.waiting, run.step + 1 - len(run.waiting)):
        run.metrics.add([{"step": step, **jax.tree.map(float, metrics)}])
        run.clock.stop()
        run.clock.go_on()
        if is_overdue(run):
            print_progress(run, end="\r")
    run.waiting = []


def is_overdue(run: Run) -> bool:
    """Whether a terminal has shown the same progress line for 2 seconds.

    Of several hosts, only the first has one: they may do nothing together because of this.
    """
    if jax.process_index() != 0 or not sys.stderr.isatty():
        return False
    return time.monotonic() - run.shown > 2


def log_validation(run: Run) -> None:
    """Estimates the validation loss, adds it to metrics.jsonl, and draws curves.png."""
    run.val_loss, accuracy = evaluate(run, run.learned, some_batches(run))
    memory = own_device(run.mesh).memory_stats() or {}  # a CPU counts none
    row = {"step": run.step, "val_loss": run.val_loss, "val_accuracy": accuracy, **memory}
    if run.args.prune:
        row["sparsity"] = run.sparsity
    run.metrics.add([row])
    run.metrics.draw()


def print_progress(run: Run, end: str) -> None:
    """The progress line on standard error; of several hosts, the first prints it.

    train: the mean loss since the last estimate. val: the last estimate. Both in nats per token. A
    narrow terminal gets the first parts of the line, as many as fit.
    """
    if jax.process_index() != 0:
        return
    run.shown = time.monotonic()

    # The mean training loss since the last estimate. Of later steps, nothing is known yet.
    args = run.args
    rows = [row for row in run.metrics.rows[-2 * args.eval_every :] if "loss" in row]
    step = rows[-1]["step"]
    since = 1 + (step - 1) % args.eval_every  # steps
    losses = [row["loss"] for row in rows[-since:]]

    # The first step does not count: it is mostly compilation.
    speed = 0.0
    if run.clock.seconds > 0:
        speed = (step - run.resumed_at - 1) / run.clock.seconds  # steps/s
    tokens_per_second = speed * args.batch * args.block
    mfu = run.flops_per_token * tokens_per_second / run.peak_flops
    parts = [
        f"step {step:>6}/{args.steps}",
        f"train (mean) {np.mean(losses):.4f}",
        f"val (last) {run.val_loss:.4f}",
    ]
    if run.args.prune:
        parts.append(f"sparsity {run.sparsity:.1%}")
    if speed > 0:
        parts.append(f"{duration((args.steps - step) / speed):>7} left")
        parts.append(f"{tokens_per_second:>9,.0f} tokens/s")
    parts.append(f"lr {rows[-1]['lr']:.2e}")
    if speed > 0:
        parts.append(f"MFU {mfu:5.1%}")
    parts += usage(own_device(run.mesh))

    # On a terminal the line is written over itself: it must neither wrap nor leave a rest.
    line = "  ".join(parts)
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        while len(line) > width and len(parts) > 1:
            parts.pop()
            line = "  ".join(parts)
        line = "\r" + line[:width].ljust(width)  # also over the ^C of a Ctrl-C
    print(line, end=end, file=sys.stderr, flush=True)


def usage(device) -> list[str]:
    """The most memory that a device has used and how busy it is, as far as it tells."""
    parts = []
    stats = device.memory_stats()
    if stats:
        parts.append(f"{stats['peak_bytes_in_use'] / 1e9:.2f} GB")
    if device.platform == "gpu" and find_spec("pynvml"):
        pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.local_hardware_id)
        parts.append(f"{pynvml.nvmlDeviceGetUtilizationRates(handle).gpu}% busy")
    return parts


def print_sample(run: Run, key) -> None:
    """Prints how the model continues --prompt, or answers it."""
    say("continuing --prompt")
    model = run.model
    length = min(100, model.config.max_position_embeddings - len(run.prompt))
    stop_ids = [] if run.data.template is None else end_of_turn(run)
    [new] = run.model_file.generate(model, [run.prompt], length, key=key, stop_ids=stop_ids)
    text = run.model_file.tokenizer(run.data.tokenizer_folder).decode(run.prompt + new)
    print(f"--- step {run.step}: {text}", flush=True)
    with open(run.args.out / "samples.txt", "a", encoding="utf-8") as file:
        print(f"--- step {run.step}: {text}", file=file)


def end_of_turn(run: Run) -> list[int]:
    """The tokens that end an answer; where the checkpoint has none, the end of a line does."""
    folder = run.data.tokenizer_folder
    stop_ids = run.model_file.read_stop_ids(folder, run.model.config)
    if not stop_ids:
        codec = run.model_file.tokenizer(folder).backend
        stop_ids = encode(codec, "\n")[-1:]
    return stop_ids


def make_trace_folder(args) -> None:
    """Makes the folder of --profile, before anything else is written."""
    if args.profile:
        with explained(OSError, f"--profile {args.profile}: {{}}"):
            args.profile.mkdir(parents=True, exist_ok=True)


def start_trace(run: Run) -> None:
    """With --profile, begins to trace before the eleventh step, when all is compiled."""
    if run.args.profile and run.step == run.resumed_at + 10:
        jax.profiler.start_trace(run.args.profile)


def end_trace_after_five(run: Run, metrics) -> None:
    """Ends the trace after five steps."""
    if run.args.profile and run.step == run.resumed_at + 15:
        jax.block_until_ready(metrics)
        jax.profiler.stop_trace()
        note(f"five steps are traced: run `xprof {run.args.profile}`")


def end_trace(run: Run) -> None:
    """Ends a trace that Ctrl-C interrupted."""
    if run.args.profile:
        with contextlib.suppress(RuntimeError):  # raised where no trace is running
            jax.profiler.stop_trace()


# ------------------------------------------- Setting up -------------------------------------------


def set_up(args, model_file, data: "Data", model, adapters: dict, mesh) -> Run:
    """Makes the optimizer, compiles the steps, and opens the checkpoints, or resumes from one."""
    check_batch(args, mesh)
    make_trace_folder(args)  # with --profile
    prompt = encode_prompt(args, model_file, data) if args.prompt else []
    graphdef, params, frozen = nnx.split(model, nnx.LoRAParam if adapters else nnx.Param, ...)
    flops_per_token, peak_flops = describe(args, model_file, model, params, data, mesh)

    optimizer, learning_rate = make_optimizer(args)
    state = first_state(args, optimizer, params, mesh)
    build_model = make_build_model(mesh, graphdef, args.dtype, state["params"], frozen)
    if args.prune:
        build_model = with_merged_adapters(build_model, adapters)
    balance = balance_of(model_file, model.config)
    config = StepConfig(build_model, optimizer, balance, args.ema)
    train_step, eval_step = compile_steps(config, mesh, state)
    data.val_batches = validation_batches(args, data.val.in_order(), mesh)

    run = Run(
        args=args,
        model_file=model_file,
        data=data,
        mesh=mesh,
        graphdef=graphdef,
        frozen=frozen,
        adapters=adapters,
        prompt=prompt,
        train_step=train_step,
        eval_step=eval_step,
        prune_step=compile_pruning(args.prune, state),
        learning_rate=learning_rate,
        flops_per_token=flops_per_token,
        peak_flops=peak_flops,
        settings=settings_of(args, data),
        checkpoints=open_checkpoints(args.out, args.keep),
        state=state,
        clock=Clock(),
    )
    if args.resume is not None:
        resume(run)
    if args.profile and args.steps - run.step < 15:
        fail(
            f"--profile traces five steps after ten, and from step {run.step} on there are fewer: "
            "raise --steps"
        )
    if args.prune:
        run.sparsity = describe_pruning(run)
    run.metrics = Metrics(args.out, run.step, title_of(args, params))
    if args.log == "wandb" and jax.process_index() == 0:
        run.metrics.wandb = open_wandb(run)
    return run


def encode_prompt(args, model_file, data: "Data") -> list[int]:
    """The tokens of --prompt: the beginning of a text, or the first message of a conversation."""
    tokenizer = model_file.tokenizer(data.tokenizer_folder)
    if data.template is None:
        return tokenizer.encode(args.prompt)[: args.block // 2]
    message = {"role": "user", "content": args.prompt}
    ids = encode(tokenizer.backend, data.template.write([message], "--prompt", prompt=True))
    if len(ids) > args.block:
        fail(f"--prompt has {len(ids)} tokens, and --block {args.block} is less: shorten it")
    return ids


def check_batch(args, mesh):
    """Stops where --batch does not split over devices and --accumulate."""
    groups = groups_of(mesh)
    divisor = groups * args.accumulate
    if args.batch % divisor != 0:
        fail(
            f"--batch {args.batch} does not split over {groups} devices (or groups of them) in "
            f"--accumulate {args.accumulate} microbatches: choose a multiple of {divisor}"
        )


def settings_of(args, data: "Data") -> dict:
    """What must be the same when a run is resumed: see SETTINGS."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["data"] = f"with checksum {data.checksum}"  # as `compare_settings` prints it
    return settings


def describe(args, model_file, model, params, data: "Data", mesh) -> tuple:
    """Prints what is trained on what -> (FLOPs per token, peak FLOP/s of the devices).

    Training takes 6 FLOPs for each weight of a matrix and token, LoRA 4: it needs no gradients of
    the frozen weights, unless --prune merges the adapters. Attention adds 12 A for each token and
    key: A is the width of all heads, and a token has T keys in each layer, or as many as its
    sliding window.
    """
    config = model.config
    devices = [*mesh.devices.flat]
    peak = measure_peak(devices, args.dtype)
    per_weight = 4 if args.lora and not args.prune else 6

    # The weights that a token meets in matrix products. Of experts, that is those it chooses.
    E = getattr(config, "num_experts", getattr(config, "num_local_experts", 1))
    chosen = getattr(config, "num_experts_per_tok", 1) / E
    matrices = "kernel" if hasattr(model, "lm_head") else "kernel|wte|embed_tokens"
    N = 0
    for path, param in jax.tree.leaves_with_path(nnx.state(model, nnx.Param)):
        if re.search(matrices, str(path)):
            N += param.size * (chosen if "experts" in str(path) else 1)
    N = round(N)

    layers = jax.eval_shape(lambda: model_file.init_cache(config, 1, 1, jnp.float32)).layers
    L = len(layers)
    A = layers[0][0].shape[-1] * config.num_attention_heads  # attention width
    keys = sum(keys_of(config, L, args.block))
    trained = sum(param.size for param in jax.tree.leaves(params))
    print_wrapped(
        f"model  {args.model}.py, {trained:,} parameters trained, in {args.dtype} "
        f"on {len(devices)} x {devices[0].device_kind}",
        f"text   {data.train.describe()} to train on, {data.val.describe()} to validate on; "
        f"vocabulary size {config.vocab_size:,}",
        f"MFU    ({per_weight} N + 12 A K) x tokens/s / peak: {N:,} weights N, "
        f"attention width A {A}, {keys:,} keys K in {L} layers, {peak / 1e9:,.0f} GFLOP/s",
    )
    return per_weight * N + 12 * A * keys, peak


def keys_of(config, layers: int, T: int) -> list[int]:
    """How many keys a token of T attends to in each layer; the causal mask is not counted."""
    window = getattr(config, "sliding_window", None) or T
    kinds = getattr(config, "layer_types", ["sliding_attention"] * layers)
    return [min(T, window) if kind == "sliding_attention" else T for kind in kinds]


def measure_peak(devices: list, dtype) -> float:
    """FLOP/s that the devices reach in the product of two large square matrices."""
    say("measuring the FLOP/s of the devices")
    n = 2048 if devices[0].platform == "cpu" else 8192
    a = jnp.ones((n, n), dtype)
    seconds = timeit.repeat(lambda: (a @ a).block_until_ready(), number=1, repeat=4)
    return len(devices) * 2 * n**3 / np.median(seconds[1:])  # the first one is compiled, too


def balance_of(model_file, config) -> Callable | None:
    """What a model with experts adds to the loss: its load-balancing loss, given the cache.

    Training needs no keys and values, but the cache also carries the router's statistics.
    """
    if getattr(config, "model_type", "") not in ("mixtral", "qwen3_moe"):
        return None
    return lambda cache: config.router_aux_loss_coef * model_file.balance_loss(cache)


# ---------------------------------------- A training step -----------------------------------------

# More logits than this, 1 GiB in float32, are computed in chunks, and again in the backward pass.
# They are counted over all devices; under pmap, on each device alone.
MAX_LOGITS = 2**28


class Batch(NamedTuple):
    """Rows of tokens, and what is to be predicted from them; each [..., T]."""

    tokens: Any
    targets: Any  # the token after each; -1 where none is learned: in prompts and in padding
    positions: Any = None  # in rows of examples: of each token in its own; -1 for padding


def next_tokens(tokens) -> Batch:
    """What there is to predict in a text: tokens [..., T + 1], padded with -1, as a batch."""
    return Batch(tokens=tokens[..., :-1].clip(0), targets=tokens[..., 1:])


def token_losses(model, batch: Batch, rngs=None):
    """The cross-entropy of each next token: a batch of [B, T] -> (losses, correct, the cache).

    losses float32 [B, T]; correct [B, T]: whether the target was the likeliest token, for the
    accuracy. Both are 0 where the target is -1. Above MAX_LOGITS, the logits are computed one chunk
    of time steps at a time (chunked cross-entropy).
    """

    def token_loss(x, target):  # [D], a token id
        logits = model.head(x)  # [V]
        label = logits[jnp.maximum(target, 0)]
        loss = jnp.where(target < 0, 0, jax.nn.logsumexp(logits) - label)
        correct = (target >= 0) & (label >= logits.max())
        return loss, correct

    x, cache = model.hidden(batch.tokens, batch.positions, rngs=rngs)  # [B, T, D]
    targets = batch.targets
    B, T = targets.shape
    chunk = MAX_LOGITS // (B * model.config.vocab_size)  # time steps whose logits are few enough
    step_loss = jax.vmap(token_loss)  # [B, D], [B]: all rows at one time step
    if chunk >= T:
        losses, correct = jax.vmap(step_loss)(x, targets)  # here the outer vmap is over rows
        return losses, correct, cache

    @jax.checkpoint
    def recomputed(time_step):
        return step_loss(*time_step)

    time_steps = (x.swapaxes(0, 1), targets.T)  # [T, B, D], [T, B]
    losses, correct = jax.lax.map(recomputed, time_steps, batch_size=max(1, chunk))
    return losses.T, correct.T, cache


@dataclass(frozen=True)
class StepConfig:
    """What a training step is made of, besides its inputs."""

    build_model: Callable  # (params, frozen) -> model
    optimizer: optax.GradientTransformation
    balance: Callable | None  # what `balance_of` returned
    ema: float  # decay of the exponential moving average (EMA) of the weights; 0: off
    regather: Callable | None = None  # FSDP: makes the loss gather its weights twice
    axis: str | None = None  # the name of pmap's axis of devices


def train_step(config: StepConfig, state: dict, frozen, batch: Batch, key):
    """One update of the weights: a batch of [microbatches, ..., T] -> (state, metrics).

    microbatches: of gradient accumulation, one after another. metrics: the mean loss, the accuracy
    and the norm of the gradient. In float16, a step whose gradient overflows is skipped; only the
    loss scale and the number of steps change: Micikevicius et al. 2018.
    """
    # [microbatches, groups of devices, rows, T] -> [microbatches, B, T]
    batch = jax.tree.map(lambda x: x.reshape(len(x), -1, x.shape[-1]), batch)
    loss_and_accuracy, gradients = mean_gradients(config, state, frozen, batch, key)
    if "scale" in state:
        gradients = jax.tree.map(lambda g: g / state["scale"], gradients)
    norm = optax.tree.norm(gradients)

    params = state["params"]
    updates, optimizer_state = config.optimizer.update(gradients, state["optimizer"], params)
    new = state | {"params": optax.apply_updates(params, updates), "optimizer": optimizer_state}
    if "ema" in state:
        new["ema"] = optax.incremental_update(new["params"], state["ema"], 1 - config.ema)
    if "scale" in state:
        new, norm = update_loss_scale(state, new, norm)
    new["step"] = state["step"] + 1
    return new, loss_and_accuracy | {"norm": norm}


def mean_gradients(config: StepConfig, state: dict, frozen, batch: Batch, key):
    """({mean loss, accuracy}, gradients) of the whole batch, on all devices.

    The gradients include the balance loss of experts and float16's loss scale.
    """
    params = state["params"]

    # Dropout differs between steps, between devices and between microbatches.
    key = jax.random.fold_in(key, state["step"])
    if config.axis is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(config.axis))
    keys = jax.random.split(key, len(batch.tokens))

    # The summed loss is divided by the number of targets on all devices, so gradients need only be
    # summed over devices. Under pmap the sum is this explicit psum; under jit the code sees the
    # global batch, and XLA inserts the all-reduce.
    def all_reduce(x):
        if config.axis is None:
            return x
        return jax.lax.psum(x, config.axis)

    num_targets = all_reduce(jnp.sum(batch.targets >= 0))
    num_microbatches = all_reduce(len(keys))  # on all devices: each adds its balance loss

    def mean_loss(params, rows, key):
        model = config.build_model(params, frozen)
        losses, correct, cache = token_losses(model, rows, nnx.Rngs(dropout=key))
        loss = losses.sum() / num_targets
        balance = 0
        if config.balance is not None:
            # It is a product of means over all tokens, so the router's statistics in the cache are
            # summed over devices first. Every microbatch adds its share.
            if config.axis is not None:
                cache = sum_router_stats(cache, config.axis)
            balance = config.balance(cache) / num_microbatches
        metrics = {"loss": loss, "accuracy": correct.sum() / num_targets}
        return state.get("scale", 1) * (loss + balance), metrics

    # FSDP: gather the weights again in the backward pass.
    if config.regather is not None:
        mean_loss = config.regather(mean_loss)
    gradient = jax.value_and_grad(mean_loss, has_aux=True)

    def add_microbatch(total, microbatch):
        return jax.tree.map(jnp.add, total, gradient(params, *microbatch)), None

    # Gradient accumulation: the gradients of the microbatches are summed.
    microbatches = (batch, keys)
    total = gradient(params, *jax.tree.map(lambda x: x[0], microbatches))
    if len(keys) > 1:
        others = jax.tree.map(lambda x: x[1:], microbatches)
        total, _ = jax.lax.scan(add_microbatch, total, others)
    (_, metrics), gradients = all_reduce(total)
    return metrics, gradients


def sum_router_stats(cache, axis: str):
    """A cache with the statistics of routers, if any, summed over pmap's axis of devices."""
    layers = [(k, v, jax.lax.psum(stats, axis)) for k, v, stats in cache.layers]
    return cache._replace(layers=layers)


def update_loss_scale(state: dict, new: dict, norm):
    """float16's loss scale: (the new state, or the old one if the gradient overflowed; the norm).

    The scale keeps small gradients from becoming 0. It is halved after an overflow, and doubled
    every 1,000 steps.
    """
    scale = state["scale"]
    # Below scale 1 the loss scale is not to blame: let the NaN through so that the run stops as
    # diverged.
    usable = jnp.isfinite(norm) | (scale < 1)
    new = jax.tree.map(partial(jnp.where, usable), new, state)
    norm = jnp.where(usable, norm, 0.0)
    growth = jnp.where(state["step"] % 1000 == 999, 2.0, 1.0)
    new["scale"] = scale * jnp.where(usable, growth, 0.5)
    return new, norm


def eval_step(config: StepConfig, params, frozen, batch: Batch):
    """A batch of [..., T] -> the sum of all losses, and the number of correct predictions."""
    model = config.build_model(params, frozen)
    batch = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch)  # [B, T]
    losses, correct, _ = token_losses(model, batch)
    sums = losses.sum(), correct.sum()
    if config.axis is not None:
        sums = jax.lax.psum(sums, config.axis)
    return sums


def compile_steps(config: StepConfig, mesh, state: dict):
    """(train_step, eval_step) as compiled programs, for a batch that `place` has placed.

    The first overwrites the state that it is given.
    """
    if "pmap" in mesh.shape:
        return compile_steps_pmap(config, mesh)

    # One program for all devices. XLA splits it as the state and the rows are split.
    if "fsdp" in mesh.shape:
        # What FSDP gathers for the forward pass is dropped, and gathered again for the backward.
        policy = jax.checkpoint_policies.save_anything_except_these_names("gathered")
        config = replace(config, regather=partial(jax.checkpoint, policy=policy))
    shardings = jax.tree.map(lambda x: x.sharding, state)
    train = jax.jit(partial(train_step, config), donate_argnums=0, out_shardings=(shardings, None))
    return train, jax.jit(partial(eval_step, config))


def compile_steps_pmap(config: StepConfig, mesh):
    """The same with pmap: each device runs the program on its own rows, on a copy of the state.

    Devices communicate only by `psum`, in `mean_gradients`, `sum_router_stats` and `eval_step`.
    """
    config = replace(config, axis="pmap")
    options = {"axis_name": "pmap", "out_axes": None, "devices": [*mesh.devices.flat]}
    train_in_axes = (None, None, 1, None)  # state, frozen, batch, key
    eval_in_axes = (None, None, 0)  # params, frozen, batch
    train = jax.pmap(
        partial(train_step, config), in_axes=train_in_axes, donate_argnums=0, **options
    )
    return train, jax.pmap(partial(eval_step, config), in_axes=eval_in_axes, **options)


def make_build_model(mesh, graphdef, dtype, params, frozen) -> Callable:
    """The function (params, frozen) -> model for use inside of a program.

    Each weight that is sharded along the axis fsdp is constrained to be whole, in `dtype`: XLA puts
    its all-gather where a block needs it. The name "gathered" lets `compile_steps` drop it again.
    """
    shardings = jax.tree.map(lambda p: p.sharding, (params, frozen))

    def gather(p, sharding):
        if "fsdp" not in sharding.spec:
            return p
        whole = [None if axis == "fsdp" else axis for axis in sharding.spec]
        whole = jax.NamedSharding(mesh, jax.P(*whole))
        p = jax.lax.with_sharding_constraint(p.astype(dtype), whole)
        return checkpoint_name(p, "gathered")

    def build_model(params, frozen):
        params, frozen = jax.tree.map(gather, (params, frozen), shardings)
        return nnx.merge(graphdef, params, frozen)

    return build_model


def evaluate(run: Run, params, batches) -> tuple:
    """(mean loss, accuracy) over all targets of some validation batches [N, groups, rows, T]."""
    sums = []
    hidden = None if jax.process_index() == 0 else True  # None: where there is no terminal
    numbers = range(len(batches.tokens))
    for i in tqdm(numbers, desc="evaluating", delay=1, leave=False, disable=hidden):

        def read(index, i=i):
            return jax.tree.map(lambda x: x[i][index], batches)

        batch = place(run.mesh, batches.tokens.shape[1:], read, accumulated=False)
        sums.append(jax.device_get(run.eval_step(params, run.frozen, batch)))
    targets = np.count_nonzero(batches.targets >= 0)
    loss, accuracy = np.sum(sums, axis=0) / targets
    return loss, accuracy


# ----------------------------------------- The optimizer ------------------------------------------


def make_optimizer(args) -> tuple:
    """(the optimizer of --optimizer, preceded by gradient clipping; step -> learning rate).

    Weight decay is for matrices only. To add an optimizer, add a row to the table, a function of
    the learning rate such as `partial(optax.sgd, momentum=args.beta1)`, and its name to OPTIMIZERS.
    SGD has no weight decay of its own: for --weight-decay, chain `optax.add_decayed_weights`
    before it.
    """
    rate = learning_rate(args)
    decay = args.weight_decay
    decayed = {"weight_decay": decay, "mask": decay_mask}
    make = {
        "adamw": partial(optax.adamw, b1=args.beta1, b2=args.beta2, **decayed),
        "lion": partial(optax.lion, b1=args.beta1, b2=args.beta2, **decayed),
        "adafactor": partial(
            optax.adafactor,
            weight_decay_rate=lambda step: decay * rate(step),
            weight_decay_mask=decay_mask,
        ),
        "muon": partial(
            optax.contrib.muon,
            beta=args.beta1,
            adam_b2=args.beta2,
            weight_decay=decay,
            weight_decay_mask=decay_mask,
            adam_weight_decay=decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=muon_dimensions,
        ),
    }[args.optimizer]
    optimizer = optax.chain(optax.clip_by_global_norm(args.clip), make(rate))
    if args.prune:
        optimizer = keeping_zeros(optimizer)
    return optimizer, jax.jit(rate)


OPTIMIZERS = ("adamw", "lion", "adafactor", "muon")


def learning_rate(args) -> Callable:
    """The schedule of --schedule: it rises for --warmup steps, then falls from --lr to --min-lr."""
    steps = args.steps - args.warmup
    if args.schedule == "cosine":
        fall = optax.cosine_decay_schedule(args.lr, steps, args.min_lr / args.lr)
    elif args.schedule == "linear":
        fall = optax.linear_schedule(args.lr, args.min_lr, steps)
    else:
        # wsd: falls only in the last fifth. In two steps at least, as the first has still --lr.
        last = min(steps, max(2, args.steps // 5))
        fall = optax.linear_schedule(args.lr, args.min_lr, last, steps - last)
    rise = optax.linear_schedule(args.lr / (args.warmup + 1), args.lr, args.warmup)
    return optax.join_schedules([rise, fall], [args.warmup])


def decay_mask(params):
    """Which parameters decay: those of two dimensions and more."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def muon_dimensions(params):
    """Which parameters Muon updates: matrices between hidden layers. AdamW updates the others.

    The token and position tables and the head are no such matrices (Jordan et al. 2024). Of a stack
    of experts, [E, in, out], each matrix is orthogonalized by itself.
    """

    def of_param(path, p):
        outer = re.search("embedding|lm_head", str(path))
        if p.ndim >= 2 and not outer:
            return optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
        return None

    return jax.tree.map_with_path(of_param, params)


def first_state(args, optimizer, params, mesh) -> dict:
    """All that a step changes, before the first step."""
    state = {"step": jnp.zeros((), int), "params": params, "optimizer": optimizer.init(params)}
    if args.ema:
        state["ema"] = jax.tree.map(jnp.copy, params)  # exponential moving average
    if args.dtype == "float16":
        state["scale"] = jnp.array(2.0**15)  # the loss scale

    # Whatever has no sharding from a parameter (counters, loss scale) is replicated.
    replicated = jax.NamedSharding(mesh, jax.P())

    def replicate(x):
        if isinstance(x.sharding, jax.NamedSharding):
            return x
        return jax.device_put(x, replicated)

    return jax.tree.map(replicate, state)


# -------------------------------------------- Pruning ---------------------------------------------

# A pruned weight is 0, and the weights themselves are the mask: what is 0 stays 0. So checkpoints,
# --resume and all modes of --parallel need no code for the masks.


def read_pruning(prune: str | None) -> tuple[float, tuple[int, int] | None]:
    """What --prune asks for: (share of the weights that become 0, n and m of n:m).

    The share of None and of "keep" is 0. ValueError: it is none of these.
    """
    if prune in (None, "keep"):
        return 0.0, None
    if re.fullmatch(r"\d+:\d+", prune):
        n, m = map(int, prune.split(":"))
        if not 0 < n < m:
            raise ValueError(prune)
        return 1 - n / m, (n, m)
    share = float(prune)
    if not 0 < share < 1:
        raise ValueError(prune)
    return share, None


def is_matrix_of_block(path) -> bool:
    """Whether a parameter is pruned: a kernel in a block, but not the router of experts."""
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    in_block = re.match(r"(h|layers)\.\d+\.", name) is not None
    return in_block and ".kernel" in name and ".gate." not in name


def change_matrices(change: Callable, params, *others):
    """The parameters with `change` applied to each matrix that --prune applies to.

    others: more trees of the same structure, whose leaves `change` gets, too.
    """

    def of_param(path, p, *rest):
        if is_matrix_of_block(path):
            return change(p, *rest)
        return p

    return jax.tree.map_with_path(of_param, params, *others)


def zeros_as_in(params, tree):
    """The tree with 0 wherever a matrix of `params` is pruned."""
    return change_matrices(lambda x, p: jnp.where(p == 0, 0, x), tree, params)


def keeping_zeros(optimizer) -> optax.GradientTransformation:
    """An optimizer under which a pruned weight stays 0.

    Its gradient is 0, too, so that it counts neither for clipping nor for Muon. The optimizer's
    update would not be: momentum from before the pruning, and Muon's orthogonalization, would move
    the weight. So it is set to 0.
    """

    def update(gradients, state, params):
        updates, state = optimizer.update(zeros_as_in(params, gradients), state, params)
        return zeros_as_in(params, updates), state

    return optax.GradientTransformation(optimizer.init, update)


def begin_pruning(args, model) -> None:
    """Checks --prune against the model; prunes it at once where LoRA leaves the weights frozen."""
    share, group = read_pruning(args.prune)
    params = nnx.state(model, nnx.Param)
    zeros, size = count_zeros(params)
    if args.prune == "keep" and zeros == 0:
        fail(f"--prune keep: none of the {size:,} weights is 0: name a share, such as --prune 0.5")
    if group:
        check_groups(args, group, params)
    if args.lora and share > 0:
        prune_step = compile_pruning(args.prune, {"params": params})
        pruned = prune_step({"params": params}, counts_of(share, params))
        nnx.update(model, pruned["params"])


def check_groups(args, group: tuple[int, int], params) -> None:
    """Stops where the inputs of a matrix do not split into groups of m."""
    _, m = group
    for path, p in jax.tree.leaves_with_path(params):
        if not is_matrix_of_block(path):
            continue
        inputs = p.shape[-2]
        if inputs % m != 0:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            name = name.removesuffix(".kernel.value")
            fail(
                f"--prune {args.prune}: the {inputs} inputs of {name} do not split into "
                f"groups of {m}: choose a pattern whose second number divides them, or a share"
            )


def describe_pruning(run: Run) -> float:
    """Prints what is pruned -> the share of the weights that are 0 now."""
    share, _ = read_pruning(run.args.prune)
    last = pruned_by(run)
    zeros = describe_zeros(run.state["params"], run.frozen)
    if last > run.step:
        print_wrapped(f"prune  {zeros}; after step {last:,} {share:.1%} will be")
    else:
        print_wrapped(f"prune  {zeros}, and stay 0")
    return sparsity(run.state["params"], run.frozen)


def pruned_by(run: Run) -> int:
    """The step after which no more weights are pruned: three quarters of the run.

    0 where that is done before the first step: without --prune, with "keep", and with LoRA.
    """
    args = run.args
    if args.prune in (None, "keep") or args.lora:
        return 0
    return max(1, args.steps * 3 // 4)


def prune_when_due(run: Run) -> None:
    """Prunes more weights at each fortieth of the run, up to three quarters of it.

    By the cubic schedule of Zhu and Gupta 2017: fast at first, when many weights are of little use,
    then ever slower. In the last quarter, the weights that are left recover.
    """
    last = pruned_by(run)
    if last == 0:
        return

    every = max(1, run.args.steps // 40)
    due = run.step == last or (run.step < last and run.step % every == 0)
    if run.resumed_at >= last:  # perhaps with fewer --steps than before: it may have missed some
        due = run.step == run.resumed_at + 1
    if not due:
        return

    share, _ = read_pruning(run.args.prune)
    share *= 1 - (1 - min(1, run.step / last)) ** 3
    run.state = run.prune_step(run.state, counts_of(share, run.state["params"]))
    run.sparsity = sparsity(run.state["params"])


def counts_of(share: float, params):
    """How many weights of each matrix this share is; of a stack of experts, of each expert's."""
    return jax.tree.map(lambda p: round(share * math.prod(p.shape[-2:])), params)


def compile_pruning(target: str | None, state: dict) -> Callable:
    """The program (state, counts) -> state with so many weights of each matrix pruned.

    It overwrites the state that it is given. target: the value of --prune.
    """
    _, group = read_pruning(target)

    def prune_step(state, counts):
        params = change_matrices(partial(prune, group), state["params"], counts)
        new = state | {"params": params}
        if "ema" in state:
            new["ema"] = zeros_as_in(params, state["ema"])
        return new

    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(prune_step, donate_argnums=0, out_shardings=shardings)


def prune(group: tuple[int, int] | None, kernel, count):
    """A matrix [in, out] with the `count` smallest weights 0: magnitude pruning.

    Of a stack of experts, [E, in, out], each matrix by itself. group: (n, m), where n of each m
    consecutive inputs of an output must stay in the end. Then only the m - n smallest of these may
    be pruned.
    """
    if kernel.ndim == 3:
        return jax.lax.map(lambda matrix: prune(group, matrix, count), kernel)

    magnitude = jnp.abs(kernel)
    if group:
        n, m = group
        groups = magnitude.reshape(-1, m, kernel.shape[1])
        order = jnp.argsort(groups, axis=1)  # [in / m, m, out]
        rank = jnp.argsort(order, axis=1)  # of a weight in its group; 0: the smallest
        groups = jnp.where(rank < m - n, groups, jnp.inf)
        magnitude = groups.reshape(kernel.shape)
    return jnp.where(smallest(magnitude, count), 0, kernel)


def smallest(values, count):
    """Whether each of these float32 values is one of the `count` smallest; none is negative.

    Of equal ones, the first are taken. A binary search for the limit only counts values, which is
    faster than to sort them, and its steps send only counts between shards. The bits of floats that
    are not negative are in the order of the floats.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)

    def next_bit(i, limit):
        higher = limit | (1 << (30 - i))
        return jnp.where(jnp.sum(bits < higher) <= count, higher, limit)

    limit = jax.lax.fori_loop(0, 31, next_bit, 0)  # the highest with at most `count` values below
    below = bits < limit
    equal = bits == limit
    number = jnp.cumsum(equal.ravel()).reshape(equal.shape)  # from 1
    return below | (equal & (number <= count - below.sum()))


def count_zeros(*trees) -> tuple[int, int]:
    """(how many weights are 0, how many there are) in the matrices that --prune applies to."""
    zeros, size = 0, 0
    for path, p in itertools.chain.from_iterable(map(jax.tree.leaves_with_path, trees)):
        if is_matrix_of_block(path):
            zeros += int(jnp.sum(p == 0))
            size += p.size
    return zeros, size


def sparsity(*trees) -> float:
    """The share of these weights that are 0."""
    zeros, size = count_zeros(*trees)
    return zeros / size


def describe_zeros(*trees) -> str:
    """That share in words, such as: 50.0% of the 786,432 weights in the blocks' matrices are 0"""
    zeros, size = count_zeros(*trees)
    return f"{zeros / size:.1%} of the {size:,} weights in the blocks' matrices are 0"


# -------------------------------------------- The text --------------------------------------------

SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_HASH = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
END = "<|endoftext|>"


@dataclass
class Data:
    """What a run learns from, and the folder of its tokenizer."""

    train: "Text | Examples"
    val: "Text | Examples"
    tokenizer_folder: Path
    checksum: int  # of all tokens, for --resume
    template: "ChatTemplate | None" = None  # of conversations
    val_batches: "Batch" = None  # of `validation_batches`


def prepare_data(args, model_file, folder: Path | None) -> Data:
    """The tokens of --data or --dataset, split into those to train on and those to validate on.

    Text is encoded once: tokens and tokenizer are kept in the cache folder. folder: of --weights,
    whose tokenizer is used.
    """
    files = []
    if args.data or not args.dataset:
        files = find_files(args.data)
    encoded = [file for file in files if file.suffix.lower() == ".bin"]
    if encoded and (encoded != files or len(files) > 2 or args.dataset):
        fail("--data: a .bin stands alone, or before the one to validate on")

    source = open_source([] if encoded else files, args.dataset)
    context = model_file.read_config(folder).max_position_embeddings if folder else math.inf
    check_source(args, source, context)
    letters = read_meta(encoded[0]) if args.tokens == META else None
    cached = encode_once(args, model_file, folder, source, letters, has_tokens=bool(encoded))
    encoded = encoded or [cached / "tokens.bin"]
    tokenizer_folder = folder or cached
    V, eos = vocabulary(model_file, tokenizer_folder)
    if isinstance(source, Texts):
        if source.number > 1 and eos is None:
            note("no end-of-text token: the model does not learn where a text ends")
        train, val = read_text(encoded, V, args.block)
    else:
        train, val = read_examples(cached, V, args)
    largest, checksum = scan_tokens(encoded, V)
    if largest >= V:
        fail(f"the text has token {largest}, the model has {V}: encode it for this model")
    if isinstance(source, Texts):
        return Data(train, val, tokenizer_folder, checksum)

    checksum = zlib.crc32(train.learned, checksum)
    template = ChatTemplate(tokenizer_folder)
    if template.is_plain and source.without_roles:
        if not template.templates.eos_token:
            note(
                "no end-of-text token: the model does not learn to stop after a completion; end "
                "each one alike, such as by a newline, and generate with --stop"
            )
        template = None  # the conversations are texts in two parts
    return Data(train, val, tokenizer_folder, checksum, template)


def open_source(files: list[Path], dataset: str | None) -> "Texts | Conversations":
    """The texts or the conversations of --data and --dataset: the first row says which."""
    if sum(file.stat().st_size for file in files) > 2**26:  # some seconds
        say(f"reading {counted(len(files), 'file')}")
    rows = load_rows(dataset) if dataset else None
    first = next(iter(rows), None) if dataset else None
    if files and files[0].suffix.lower() in JSON:
        _, first = next(read_rows(files[0]), (None, None))
    if is_conversation(first):
        return Conversations(files, dataset, rows)
    return Texts(files, dataset, rows)


def read_text(files: list[Path], V: int, block: int) -> tuple:
    """(the text to train on, the one to validate on): of two files of tokens, or parts of one."""
    splits = [read_tokens(file, V) for file in files]
    if len(splits) == 1:
        splits = split_validation(splits[0])
    train, val = splits
    if min(len(train), len(val)) <= block:
        fail(
            f"--block {block} is longer than the text: {len(train)} tokens to train on, "
            f"{len(val)} to validate on; shorten it, or give more"
        )
    return Text(train, block), Text(val, block)


def find_files(names: list[str]) -> list[Path]:
    """The files that --data names, in that order; without any, Python's own but for its tests."""
    if not names:
        return python_source()

    files = []
    for name in names:
        found = [Path(file) for file in sorted(glob.glob(name, recursive=True)) or [name]]
        found = [file for file in found if file.is_file()]
        if not found and name == "shakespeare":
            cannot = (
                f"it cannot be downloaded to {CACHE}: try again online, or name a file of yours"
            )
            other = explained(ValueError, f"--data {name}: {{}}; name a file of yours")  # its hash
            with explained(OSError, f"--data {name}: {cannot}"), other:
                file = pooch.retrieve(SHAKESPEARE, SHAKESPEARE_HASH, "tinyshakespeare.txt", CACHE)
                found = [Path(file)]
        if not found:
            fail(f"--data {name}: no such file: name text, .jsonl, .bin or shakespeare")
        files += found
    return files


def python_source() -> list[Path]:
    """The files of Python's standard library."""
    say("reading Python's source")
    library = Path(os.__file__).parent
    others = re.compile("(site|dist)-packages|/(idle_)?tests?/")
    files = sorted(library.rglob("*.py"))
    return [file for file in files if not others.search(str(file.relative_to(library.parent)))]


class Texts:
    """The texts of --data and --dataset. They may be larger than memory: each pass reads them anew.

    Iterating yields one text after another, each as an iterable of blocks: strings, a million
    characters long or a whole row, that make up the text. There are up to three passes: to count
    and to check them, to learn a tokenizer, and to encode them.
    """

    def __init__(self, files: list[Path], dataset: str | None = None, rows=None):
        """rows: of the dataset."""
        self.files = files
        self.dataset = dataset
        self.rows = rows

        # The first pass: what later ones must know before they begin.
        self.number = 0  # of texts
        self.characters = 0
        checksums = hashlib.sha256()
        for text in self:
            checksum = hashlib.sha256()
            for block in text:
                checksum.update(block.encode())
                self.characters += len(block)
            checksums.update(checksum.digest())  # of each text: "ab", "c" are not "a", "bc"
            self.number += 1
        self.checksum = checksums.hexdigest()

    def __iter__(self):
        for file in self.files:
            yield from read_texts(file)
        if self.dataset:
            yield from read_dataset(self.dataset, self.rows)


def read_texts(file: Path):
    """Yields the texts of a file, each as its blocks: all of it is one, or it is JSON with several.

    A .jsonl or .ndjson has {"text": ...} in each line, a .json an array of them, or such lines.
    """
    if file.suffix.lower() not in JSON:
        yield read_blocks(file)
        return

    for place, row in read_rows(file):
        with explained(NO_TEXT, f"--data {file}, {place}: {LIKE_THIS}"):
            text = text_of(row)
        yield [text]


def read_blocks(file: Path):
    """Yields the characters of a text file, a million at a time."""
    with open_text(file) as stream:
        while block := stream.read(2**20):
            yield block


@contextlib.contextmanager
def open_text(file: Path):
    """Opens a file of UTF-8 text; one that cannot be read, or is none, is named.

    Some files begin with a byte order mark, which is no part of the text. A line ends with \\n, and
    the \\r of an \\r\\n is left in its place.
    """
    unreadable = explained(OSError, f"--data {file}: {{}}: name files that can be read")
    no_text = explained(
        UnicodeDecodeError, f"--data {file} is not UTF-8 text: {{}}: convert it first"
    )
    with unreadable, no_text, open(file, encoding="utf-8-sig", newline="\n") as stream:
        yield stream


JSON = (".json", ".jsonl", ".ndjson")
# What rows without a text raise, and those that are nested too deeply.
NO_TEXT = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
LIKE_THIS = (
    'it must be like {"text": "..."}, or in a file of conversations like '
    '{"messages": [{"role": "user", "content": "..."}, ...]}'
)


def read_rows(file: Path):
    """Yields the rows of a JSON file: (a place such as "line 3", the parsed row).

    Each line holds one and is read alone. A .json may also be an array of rows or of strings, and
    is then read whole.
    """
    with open_text(file) as stream:
        start = stream.read(2**10).lstrip()
        stream.seek(0)
        if file.suffix.lower() == ".json" and start.startswith("["):
            text = stream.read()
            with explained(NO_TEXT, f"--data {file} is not a JSON array of texts: {{}}"):
                rows = json.loads(text)
            for i, row in enumerate(rows, 1):
                yield f"text {i}", {"text": row} if isinstance(row, str) else row
            return

        for i, line in enumerate(stream, 1):
            if line.strip():
                with explained(NO_TEXT, f"--data {file}, line {i}: {LIKE_THIS}"):
                    row = json.loads(line)
                yield f"line {i}", row


def text_of(row) -> str:
    """The text of a row; an error of NO_TEXT: it has none."""
    return row["text"].encode().decode()  # rejects lone surrogates


def load_rows(name: str):
    """The train split of a dataset on the Hub, NAME[:SUBSET]: its rows, which stay on disk."""
    from datasets import load_dataset

    errors = (ValueError, OSError, KeyError, RuntimeError)
    with explained(errors, f"--dataset {name}: {{}}"):
        rows = load_dataset(*name.split(":"), split="train")
        if "text" in rows.column_names and not is_conversation(dict.fromkeys(rows.column_names)):
            rows = rows.select_columns("text")
        return rows


def read_dataset(name: str, rows):
    """Yields the texts of a dataset, each as its blocks."""
    for i, row in enumerate(rows, 1):
        with explained(NO_TEXT, f"--dataset {name}, row {i}: {LIKE_THIS}"):
            text = text_of(row)
        yield [text]


def encode_once(args, model_file, folder: Path | None, source, letters, has_tokens: bool) -> Path:
    """The cache folder of the tokenizer and the tokens of a source; written if it is new.

    Its name is a checksum of all that the tokens depend on, the code included.
    """
    files = [Path(__file__), Path(model_file.__file__), *(folder.iterdir() if folder else ())]
    files = [file for file in files if re.search("(py|json|txt|model|jinja)$", file.name)]
    files = [file for file in files if file.is_file()]
    inputs = [args.tokens, args.vocab_size, args.loss, folder, letters, source.checksum]
    inputs += [file.read_bytes() for file in files]
    digest = hashlib.sha256()
    for each in inputs:
        data = str(each).encode()
        digest.update(f"{len(data)}:".encode())  # where one ends: "ab", "c" are not "a", "bc"
        digest.update(data)

    cached = CACHE / "tokens" / digest.hexdigest()[:16]
    with exit_on_write_error(cached):
        cached.parent.mkdir(parents=True, exist_ok=True)
        if cached.exists():
            return cached
        if source.characters > 2**20:  # some seconds
            say("tokenising the text")

        # Under another name until it is complete: all of it is there, or nothing.
        with tempfile.TemporaryDirectory(dir=cached.parent, ignore_cleanup_errors=True) as part:
            if folder is None:
                write_tokenizer(Path(part), args.tokens, args.vocab_size, source, letters)
            if isinstance(source, Conversations):
                write_examples(Path(part), model_file, folder or Path(part), source, args.loss)
            elif not has_tokens:
                write_tokens(Path(part), model_file, folder or Path(part), source)
            if not cached.exists():  # another run may have been faster
                Path(part).rename(cached)
    return cached


def pieces(texts):
    """Yields (piece of a text, whether the text starts with it, whether it ends with it).

    Long texts are cut, so that several cores can encode them and none need be in memory as a whole.
    """
    for text in texts:
        starts = True
        for piece, ends in cut(text):
            yield piece, starts, ends
            starts = False


def cut(blocks):
    """Yields (piece, whether it is the last) of a text; where the blocks end does not matter."""
    rest = ""
    for block in blocks:
        rest += block
        start = 0
        while end := find_cut(rest, start):
            yield rest[start:end], False
            start = end
        rest = rest[start:]
    yield rest, True


# Where a piece may end, and how many characters are searched for such a place. No token crosses it:
# vocabularies join a newline to punctuation before it or to white space, and a blank to the word
# after it, but neither to a letter or digit on its other side. The last place is for text without
# newlines and blanks, such as minified code. What has none of them is cut after 2^20 characters.
CUTS = [
    (re.compile(r"[^\W_](?=\r?\n)|\S\n(?=[^\W_])"), 2**16),  # a line
    (re.compile(r"[^\W_](?= )"), 2**18),  # a word
    (re.compile(r"[^\W_](?=[^\w\s'’])"), 2**20),  # a word before punctuation, apostrophes excepted
]


def find_cut(text: str, start: int) -> int | None:
    """Where the piece that begins at `start` ends; None: more of the text must be seen first."""
    for place, longest in CUTS:
        end = start + longest
        found = place.search(text, start + 2**14, end)
        if found:
            return found.end()
        if len(text) <= end:
            return None
    return end


def write_tokenizer(folder: Path, kind: str, vocab_size: int, texts, letters=None):
    """Writes the tokenizer of --tokens, learned from texts or conversations. All kinds give a text
    back as it was.

    Where there are several texts, it has a token that ends one. letters: of a meta.pkl.
    """
    if kind == "gpt2":
        codec = gpt2_tokenizer()
    elif kind == META:
        codec = char_tokenizer(letters)
    elif kind == "char":
        found = set()
        for block in itertools.chain.from_iterable(texts):
            found.update(block)
        codec = char_tokenizer(sorted(found))
    elif kind == "bytes":
        codec = byte_tokenizer()
    else:
        codec = bpe_tokenizer(texts, vocab_size)

    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if kind == "gpt2" or texts.number > 1:
        codec.add_special_tokens([END])
        about |= {"bos_token": END, "eos_token": END}
    (folder / "tokenizer.json").write_text(codec.to_str(pretty=True), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    if isinstance(texts, Conversations) and not texts.without_roles:
        (folder / "chat_template.jinja").write_text(PLAIN_TEMPLATE)


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's byte-level BPE, from tiktoken's copy of its vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode, generate_merges

    offline = (
        "GPT-2's vocabulary cannot be downloaded: run once online, with a folder in "
        "TIKTOKEN_CACHE_DIR, or choose other --tokens"
    )
    with explained(OSError, offline):
        ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks  # bytes -> token id
    letters = bytes_to_unicode()
    words = ["".join(map(letters.get, word)) for word in sorted(ranks, key=ranks.get)]
    vocabulary = {word: i for i, word in enumerate(words)}
    return byte_level(vocabulary, generate_merges(vocabulary, None), use_regex=True)


def char_tokenizer(letters: list[str]) -> Tokenizer:
    """A token for each of these characters, in their order. Unknown characters are dropped."""
    codec = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    codec.decoder = decoders.Fuse()
    return codec


def byte_tokenizer() -> Tokenizer:
    """A token for each of the 256 bytes."""
    return byte_level(byte_vocabulary(), [], use_regex=False)


def bpe_tokenizer(texts: Texts, vocab_size: int) -> Tokenizer:
    """Byte-level BPE, learned from the first nine tenths of the texts, not the validation text.

    The tenths are counted in characters.
    """
    codec = byte_level(byte_vocabulary(), [], use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=list(byte_vocabulary())
    )
    seen = int(0.9 * texts.characters)
    blocks = first_characters(itertools.chain.from_iterable(texts), seen)
    bar = tqdm(desc="learning bpe", unit_scale=True, disable=None, total=seen)
    stop = threading.Event()

    def learned_from():
        for piece, _ in cut(blocks):
            if stop.is_set():
                return
            yield piece
            bar.update(len(piece))

    # In a thread: this one waits and hears Ctrl-C, which the package would hear at the end.
    with bar, ThreadPoolExecutor(1) as pool:
        learning = pool.submit(codec.train_from_iterator, learned_from(), trainer)
        try:
            learning.result()
        finally:
            stop.set()
    return codec


def first_characters(blocks, number: int):
    """Yields this many characters, in blocks."""
    for block in blocks:
        yield block[:number]
        number -= len(block)
        if number <= 0:
            return


def byte_vocabulary() -> dict[str, int]:
    """The 256 bytes, as the letters that byte-level tokenizers write for them."""
    return {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def byte_level(vocabulary: dict[str, int], merges: list, use_regex: bool) -> Tokenizer:
    """A byte-level tokenizer; use_regex: no token crosses the end of a word."""
    codec = Tokenizer(models.BPE(vocabulary, merges))
    codec.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=use_regex)
    codec.decoder = decoders.ByteLevel()
    return codec


def vocabulary(model_file, folder: Path) -> tuple[int, int | None]:
    """(vocabulary size, EOS id) of a checkpoint, or of a tokenizer of ours."""
    if not (model_file.base_of(folder, weights=False) / "config.json").exists():
        codec = Tokenizer.from_file(f"{folder}/tokenizer.json")
        return codec.get_vocab_size(), codec.token_to_id(END)

    config = model_file.read_config(folder)
    eos = np.ravel(config.eos_token_id)  # the first, if there are several
    return config.vocab_size, next(iter(eos), None)


def write_tokens(part: Path, model_file, folder: Path, texts: Texts):
    """Writes tokens.bin: the tokens of all texts, each between BOS and EOS where there are such."""
    V, eos = vocabulary(model_file, folder)
    codec = model_file.tokenizer(folder).backend
    bos = begin_ids(codec)
    bar = tqdm(desc="tokens", unit_scale=True, disable=None, total=texts.characters)
    with bar, open(part / "tokens.bin", "wb") as out:
        for batch, rows in encode_batches(codec, batches(pieces(texts))):
            ids = []
            for (piece, starts, ends), row in zip(batch, rows, strict=True):
                if starts:
                    ids += bos
                ids += row
                if ends and eos is not None:
                    ids.append(eos)
                bar.update(len(piece))
            out.write(np.array(ids, token_type(V)))


def batches(pieces):
    """Yields lists of pieces: enough to keep all cores busy, and few enough for memory.

    An encoding takes up to 150 bytes for each character, and more than that for an empty text.
    """
    batch, size = [], 0
    for piece, starts, ends in pieces:
        batch.append((piece, starts, ends))
        size += len(piece) + 10
        if size >= 2**19:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_batches(codec, batches):
    """Yields (batch of pieces, an iterator of their ids).

    All cores encode the next batch while the caller writes the last.
    """
    anchors = {text: len(encode(codec, text)) for text in ANCHORS}

    def encode_batch(batch):
        marks = [anchor_of(piece, starts) for piece, starts, _ in batch]
        marked = [mark + piece for mark, (piece, *_) in zip(marks, batch, strict=True)]
        rows = codec.encode_batch_fast(marked, add_special_tokens=False)
        return batch, (row.ids[anchors[mark] :] for mark, row in zip(marks, rows, strict=True))

    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for batch in batches:
            encoded, ahead = ahead, pool.submit(encode_batch, batch)
            if encoded:
                yield encoded.result()
        if ahead:
            yield ahead.result()


# One of these stands before a piece that continues a text: some tokenizers put a blank before what
# they encode. Nothing joins a blank to the letter before it, or a letter to the newline before it.
ANCHORS = ("", "a", "a\n")


def anchor_of(piece: str, starts: bool) -> str:
    """The anchor of a piece; `starts`: whether a text starts with it."""
    if starts:
        return ""
    return "a" if piece[0].isspace() else "a\n"


def encode(codec, text: str) -> list[int]:
    """The ids of a text alone, without BOS and EOS."""
    return codec.encode(text, add_special_tokens=False).ids


def begin_ids(codec) -> list[int]:
    """The ids that a tokenizer puts before every text, such as BOS. Some add EOS at the end."""
    letter = encode(codec, "a")
    whole = codec.encode("a").ids
    for start in range(len(whole)):
        if whole[start : start + len(letter)] == letter:
            return whole[:start]
    return []


def token_type(V: int) -> str:
    """How a token id is stored: in two bytes if they suffice, as nanoGPT does, else in four."""
    return "u2" if V <= 2**16 else "u4"


def stored_type(file: Path, V: int) -> str:
    """How the token ids of a .bin file are stored. Zeros tell more than two bytes from two."""
    with open(file, "rb") as stream:
        start = stream.read(2**20)
    if start.startswith(b"\x93NUMPY"):
        fail(f"--data {file} is an .npy file: write the ids alone, by tofile")

    # In units of two bytes: an id of 4 bytes has one more, of 8 bytes three, which are 0 here.
    units = np.frombuffer(start[: len(start) // 8 * 8], "u2").reshape(-1, 4)
    if len(units) < 4 or not units.any():
        return token_type(V)
    if not units[:, 2:].any():
        return "u8"
    if token_type(V) == "u2" and not units[:, [1, 3]].any():
        return "u4"
    return token_type(V)


def read_tokens(file: Path, V: int) -> np.ndarray:
    """The tokens of a .bin file. They stay on disk until they are used."""
    size = file.stat().st_size
    kind = stored_type(file, V)
    if size % np.dtype(kind).itemsize != 0:
        fail(f"--data {file} ends in the middle of a token")
    if size == 0:
        return np.zeros(0, int)
    return np.memmap(file, kind, "r")


def scan_tokens(files: list[Path], V: int) -> tuple[int, int]:
    """(the largest token, the checksum) of .bin files, which are read in blocks: a map would keep
    all that was touched in memory."""
    if sum(file.stat().st_size for file in files) > 2**30:  # some seconds
        say("reading the tokens")
    largest, checksum = 0, 0
    for file in files:
        kind = stored_type(file, V)
        with open(file, "rb") as stream:
            while block := stream.read(2**24):
                largest = max(largest, np.frombuffer(block, kind).max())
                checksum = zlib.crc32(block, checksum)
    return largest, checksum


META = "meta.pkl"  # nanoGPT writes it beside a .bin of characters


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts, lists and dicts. A pickle that looks up anything else may do harm."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_meta(file: Path) -> list[str]:
    """The characters of the token ids 0, 1, ... in a .bin, by the meta.pkl beside it."""
    meta = file.parent / META
    errors = (OSError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError)
    with explained(errors, f"{meta} names no characters ({{}}): name the --weights to go on from"):
        with open(meta, "rb") as stream:
            characters = PlainUnpickler(stream).load()["itos"]
        return [characters[i] for i in range(len(characters))]


# ----------------------------------------- Conversations ------------------------------------------

# The chat template of a checkpoint or tokenizer that has none.
PLAIN_TEMPLATE = """\
{%- for message in messages %}
    {{- message["role"] | capitalize + ": " + message["content"] }}
    {%- if message["role"] == "assistant" and eos_token %}
        {{- eos_token }}
    {%- endif %}
    {{- "\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "Assistant:" }}
{%- endif %}
"""
COMPILED_TEMPLATE = jinja2.Template(PLAIN_TEMPLATE)


class Conversation(NamedTuple):
    """An example to learn from: messages, of which the model learns to write the answers."""

    messages: list  # each a dict with role and content
    first: int  # answers are learned from this message on
    place: str  # where it stands, for errors
    texts: tuple | None = None  # a prompt and its completion, where both are texts


def is_conversation(row) -> bool:
    """Whether a row is a conversation and not a text.

    Some rows have a text, too: beside messages it is another form of them; beside a prompt alone it
    is what somebody wrote for that prompt.
    """
    if not isinstance(row, dict):
        return False
    if "messages" in row:
        return True
    return "prompt" in row and ("completion" in row or "text" not in row)


def read_conversation(row, place: str) -> Conversation:
    """A row with messages, or with a prompt and its completion: texts or lists of messages."""
    if not is_conversation(row):
        fail(f'{place}: it must be like {{"messages": [...]}}, as the first row is')
    texts = None
    if "messages" in row:
        messages = row["messages"]
        first = 0
    else:
        prompt = row["prompt"]
        completion = row.get("completion")
        if isinstance(prompt, str) and isinstance(completion, str):
            texts = (prompt, completion)
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        if not (isinstance(prompt, list) and isinstance(completion, list)):
            fail(f"{place}: prompt and completion must both be texts, or both lists of messages")
        messages = prompt + completion
        first = len(prompt)

    if not isinstance(messages, list) or not messages:
        fail(f"{place}: messages must be a list of one message or more")
    messages = [read_message(message, i, place) for i, message in enumerate(messages, 1)]
    if row.get("tools"):
        fail(f"{place}: tools are not supported; leave such rows out")
    return Conversation(messages, first, place, texts)


def read_message(message, number: int, place: str) -> dict:
    """A message of a row. Its content may be a list of texts, which are joined."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        fail(f'{place}: message {number} must be like {{"role": "user", "content": "..."}}')
    content = message.get("content")
    if isinstance(content, list):
        if not all(is_text_part(part) for part in content):
            fail(f"{place}: message {number} has parts that are no texts; leave such rows out")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        fail(f"{place}: the content of message {number} must be a text")
    with explained(UnicodeError, f"{place}: message {number} is no Unicode text: {{}}"):
        (message["role"] + content).encode()  # rejects lone surrogates
    return message | {"content": content}


def is_text_part(part) -> bool:
    """Whether a part of a content is like {"type": "text", "text": "..."}, and no picture."""
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


class Conversations:
    """The conversations of --data and --dataset; like Texts, each pass reads them anew.

    Iterating yields them as plain texts, from which a tokenizer may be learned.
    """

    def __init__(self, files: list[Path], dataset: str | None, rows):
        self.files = files
        self.dataset = dataset
        self.rows = rows

        # The first pass: what later ones must know before they begin.
        self.number = 0
        self.characters = 0
        self.without_roles = True  # prompt and completion are texts in all of them
        checksum = hashlib.sha256()
        for example in self.examples():
            checksum.update(json.dumps([*example[:2], example.texts]).encode())
            self.characters += len(plain_text(example))
            self.number += 1
            if example.texts is None:
                self.without_roles = False
        self.checksum = checksum.hexdigest()

    def examples(self):
        """Yields each as a `Conversation`."""
        for file in self.files:
            if file.suffix.lower() not in JSON:
                fail(f"--data {file} is a text, and {self.files[0]} holds conversations")
            for place, row in read_rows(file):
                yield read_conversation(row, f"--data {file}, {place}")
        if self.dataset:
            for i, row in enumerate(self.rows, 1):
                yield read_conversation(row, f"--dataset {self.dataset}, row {i}")

    def __iter__(self):
        for example in self.examples():
            yield [plain_text(example)]


def plain_text(example: Conversation) -> str:
    """A conversation as a text, without special tokens."""
    if example.texts:
        return "".join(example.texts)
    return COMPILED_TEMPLATE.render(messages=example.messages)


class ChatTemplate:
    """The chat template of a tokenizer: the program that writes messages as one text."""

    def __init__(self, folder: Path):
        if "transformers" not in sys.modules:  # some seconds, which texts need not wait
            say("importing transformers")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # PyTorch is not missing
        from transformers import AutoTokenizer

        self.folder = folder
        unreadable = (ValueError, OSError, TypeError, AttributeError, KeyError)
        with explained(unreadable, f"the chat template of {folder} cannot be read: {{}}"):
            # Code that came with the folder is not run, nor does transformers ask whether to.
            self.templates = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        named = self.templates.chat_template
        if isinstance(named, dict) and "default" not in named:
            fail(f"{folder} has the chat templates {', '.join(named)}, but none called default")

        self.ending_checked = False

        # Only the checkpoint's own template writes what must stand before every text.
        self.is_plain = not named
        if self.is_plain:
            self.templates.chat_template = PLAIN_TEMPLATE

    def example(self, example: Conversation, loss: str = "assistant") -> tuple[str, list]:
        """(an example as a text, where its answers stand there, as (begin, end) in characters).

        loss: what --loss says; if all is learned, nobody asks for the answers.
        """
        if self.is_plain and example.texts:  # no roles have to be told apart
            prompt, completion = example.texts
            text = prompt + completion + (self.templates.eos_token or "")
            return text, [(len(prompt), len(text))]
        text = self.write(example.messages, example.place)
        return text, [] if loss == "all" else self.answers(example, text)

    def write(self, messages: list[dict], place: str, *, prompt: bool = False) -> str:
        """The messages as a text; prompt: up to where the next answer begins."""
        from jinja2.exceptions import TemplateError

        # A template is a small program: it may refuse a conversation, or fail.
        failed = (TemplateError, TypeError, ValueError, AttributeError, LookupError)
        failed += (ArithmeticError, RuntimeError)
        with explained(
            failed, f"{place}: the chat template of {self.folder} does not take it: {{}}"
        ):
            return self.templates.apply_chat_template(
                messages, add_generation_prompt=prompt, tokenize=False
            )

    def answers(self, example: Conversation, text: str) -> list[tuple[int, int]]:
        """Where the learned answers stand in the text, as (begin, end) in characters.

        An answer begins where the prompt for it ends, and its end of turn belongs to it. A template
        may mark the answers itself, by {% generation %}.
        """
        template = self.templates.get_chat_template()
        is_answer = [message["role"] == "assistant" for message in example.messages]
        numbers = [i for i in range(example.first, len(is_answer)) if is_answer[i]]
        if re.search(r"{%-?\s*generation", template):
            from transformers.utils.chat_template_utils import render_jinja_template

            _, [marked] = render_jinja_template(
                [example.messages],
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self.templates.special_tokens_map,
            )
            return marked[sum(is_answer[: example.first]) :]
        return [self.find_answer(example, text, i) for i in numbers]

    def find_answer(self, example: Conversation, text: str, i: int) -> tuple[int, int]:
        """Where message i, an answer, stands in the text of all messages."""
        messages, place = example.messages, example.place

        # A mark in its place tells what the template writes before it and after it.
        mark = unused_character(text + "".join(message["content"] for message in messages))
        marked = [*messages[:i], messages[i] | {"content": mark}, *messages[i + 1 :]]
        before, _, after = self.write(marked, place).partition(mark)
        until, _, closing = self.write(marked[: i + 1], place).partition(mark)
        prompt = self.write(messages[:i], place, prompt=True) if i > 0 else until
        if until.startswith(prompt):
            self.check_ending(marked[: i + 1], prompt, closing, place)

        # The model itself writes what stands between the prompt and its answer: a blank, or a
        # thought that the template takes out of the answer and writes in its own way.
        begin = len(before)
        if until.startswith(prompt) and before.endswith(until[len(prompt) :]):
            begin -= len(until) - len(prompt)
        if not text.startswith(before[:begin]) or not text.endswith(after):
            fail(
                f"{place}: the chat template of {self.folder} writes the other messages otherwise "
                f"because of message {i + 1}, so it is not clear what to learn: leave such rows "
                "out, mark the answers by {% generation %} in the template, or add --loss all"
            )

        # It also ends its turn, by what follows the answer where no other message does.
        end = len(text) - len(after) + shared_prefix(after, closing)
        return begin, end

    def check_ending(self, messages: list[dict], prompt: str, closing: str, place: str):
        """Stops where a template begins an answer at the end of every text, asked to or not: the
        model would learn to begin it after its own answers.

        messages: up to an answer. prompt: what the template writes for it. closing: what it writes
        after it.
        """
        *earlier, answer = messages
        if self.ending_checked or not earlier or earlier[-1]["role"] != "user":
            return
        self.ending_checked = True
        if self.write(earlier, place) != prompt:
            return  # it begins an answer only where it is asked to

        # Where nothing is begun, what ends the text also stands before the next message.
        continued = self.write([*messages, earlier[-1]], place)
        if not continued.partition(answer["content"])[2].startswith(closing):
            fail(
                f"the chat template of {self.folder} begins an answer at the end of every text: "
                "let it do so only `if add_generation_prompt`"
            )


def shared_prefix(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))


def unused_character(text: str) -> str:
    """A character for private use that a text does not have."""
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)


def learned_tokens(offsets, answers) -> np.ndarray:
    """Which tokens belong to an answer, because they end in it: bool [tokens].

    offsets: where each token begins and ends in the text; white space may have no width there.
    """
    token_ends = np.array(offsets, int).reshape(-1, 2)[:, 1]
    learned = np.zeros(len(token_ends), bool)
    for begin, end in answers:
        learned |= (token_ends > begin) & (token_ends <= end)
    return learned


def write_examples(part: Path, model_file, folder: Path, source: Conversations, loss: str):
    """Writes the files that `read_examples` reads. loss: what --loss says."""
    V, _ = vocabulary(model_file, folder)
    template = ChatTemplate(folder)
    codec = model_file.tokenizer(folder).backend
    bos = begin_ids(codec) if template.is_plain else []  # other templates write it
    table = []  # for each example: its number of tokens, and which of them is the first learned

    examples = source.examples()
    bar = tqdm(desc="conversations", unit_scale=True, disable=None, total=source.number)
    with (
        bar,
        open(part / "tokens.bin", "wb") as tokens_file,
        open(part / "learned.bin", "wb") as learned_file,
    ):
        while batch := list(itertools.islice(examples, 1000)):
            if not source.without_roles:
                # Among conversations, a prompt and its completion are written as one, too.
                batch = [example._replace(texts=None) for example in batch]
            written = [template.example(example, loss) for example in batch]
            rows = codec.encode_batch([text for text, _ in written], add_special_tokens=False)
            for (_, answers), row in zip(written, rows, strict=True):
                ids = np.array(bos + row.ids, token_type(V))
                learned = np.zeros(len(ids), bool)
                learned[len(bos) :] = learned_tokens(row.offsets, answers)
                if loss == "all":
                    learned[:] = True
                learned[:1] = False  # nothing stands before it to predict it from

                ids.tofile(tokens_file)
                learned.tofile(learned_file)
                first = np.argmax(learned) if learned.any() else len(ids)
                table.append((len(ids), first))
            bar.update(len(batch))
    np.save(part / "examples.npy", np.array(table, int).reshape(-1, 2))


def read_examples(folder: Path, V: int, args) -> tuple:
    """(examples to train on, examples to validate on) of the files that `write_examples` wrote."""
    tokens = read_tokens(folder / "tokens.bin", V)
    learned = np.memmap(folder / "learned.bin", bool, "r")
    lengths, first = np.load(folder / "examples.npy").T
    starts = np.cumsum(lengths) - lengths
    if (first == lengths).all():
        fail("no message has the role assistant, so no answer is there to learn: add --loss all")

    # What is longer than a row and its last target is cut.
    used = np.minimum(lengths, args.block + 1)
    kept = np.flatnonzero(first < used)
    if len(kept) < len(used) or (used < lengths).any():
        print(
            f"of {counted(len(used), 'conversation')}: {np.sum(used < lengths):,} longer than "
            f"--block {args.block}, and cut; {len(used) - len(kept):,} without anything to learn "
            "before the cut, and left out"
        )
    if len(kept) < 2:
        left = counted(len(kept), "conversation")
        fail(f"--block {args.block} leaves {left}, and two are needed: raise it, or give more")

    # The last tenth is for validation, and 2^20 tokens at most.
    starts, used = starts[kept], used[kept]
    from_here_on = np.cumsum(used[::-1])[::-1]
    cut = max(int(0.9 * len(kept)), np.argmax(from_here_on <= 2**20))
    packed = args.pack == "yes"
    if len(kept) > 2**17:  # some seconds
        say("packing the conversations into rows")
    return (
        Examples(tokens, learned, starts[:cut], used[:cut], args.block, packed),
        Examples(tokens, learned, starts[cut:], used[cut:], args.block, packed),
    )


def show_data(model_file, data: Data):
    """Prints the first example or row, and which of its tokens are learned."""
    ids, learned = data.train.first()
    print(f"first in the data: {len(ids)} tokens, {learned.sum()} of them learned")
    codec = model_file.tokenizer(data.tokenizer_folder).backend
    for is_learned, run in itertools.groupby(zip(learned, ids, strict=True), lambda pair: pair[0]):
        text = codec.decode([int(token) for _, token in run], skip_special_tokens=False)
        print(f"{'learned' if is_learned else 'not learned':12} {text!r}")


# ----------------------------------------- Rows of tokens -----------------------------------------


def split_validation(tokens: np.ndarray) -> list[np.ndarray]:
    """[tokens to train on, tokens to validate on]: the last tenth, and 2^20 tokens at most."""
    cut = max(int(0.9 * len(tokens)), len(tokens) - 2**20)
    return np.split(tokens, [cut])


class Text:
    """Tokens, cut into rows of T."""

    def __init__(self, tokens: np.ndarray, block: int):
        self.tokens = tokens
        self.block = block

    def describe(self) -> str:
        """How much it is."""
        return counted(len(self.tokens), "token")

    def first(self) -> tuple:
        """The first T tokens, and which of them are learned."""
        ids = self.tokens[: self.block]
        return ids, np.arange(len(ids)) > 0

    def rows(self, numbers, seed: int) -> Batch:
        """The rows [..., T] with these numbers [...], counted from the start of a run.

        A row begins every T tokens, and each token's target is the next one. Rows are cut from all
        texts end to end: a token attends to the texts before its own, too. Each epoch begins at
        another place and shuffles the rows. The order depends only on seed and epoch, so resuming
        needs just the step number.
        """
        length, block = len(self.tokens), self.block
        rows_per_epoch = len(epoch_starts(length, block, seed, 0))
        rows = []
        for number in numbers.flat:
            epoch, i = divmod(number, rows_per_epoch)
            start = epoch_starts(length, block, seed, epoch)[i]
            rows.append(self.tokens[start : start + block + 1])
        return next_tokens(np.stack(rows).astype(np.int32).reshape(*numbers.shape, -1))

    def in_order(self) -> Batch:
        """All rows in their order [N, T]: every token but the first is a target exactly once."""
        block = self.block
        count = math.ceil((len(self.tokens) - 1) / block)
        missing = count * block + 1 - len(self.tokens)
        padded = np.pad(self.tokens.astype(np.int32), (0, missing), constant_values=-1)
        starts = np.arange(0, count * block, block)[:, None]
        return next_tokens(padded[starts + np.arange(block + 1)])


@lru_cache(maxsize=2)
def epoch_starts(length: int, block: int, seed: int, epoch: int):
    """Where the rows of an epoch begin, in the order of training."""
    rng = np.random.default_rng((seed, epoch))
    rows = max(1, (length - 1) // block - 1)  # one fewer than would fit: room for a random offset
    offset = rng.integers(length - rows * block)
    starts = rng.permutation(rows)
    starts *= block  # in place: a large text has many rows
    starts += offset
    return starts


class Examples:
    """Examples in rows of T tokens: each is learned from as if it were alone."""

    def __init__(self, tokens, learned, starts, lengths, block: int, packed: bool):
        """tokens, learned: of all examples, one after another; starts, lengths [N]: where each
        begins and how long it is. packed: a row takes as many as fit, and else one."""
        self.tokens = tokens
        self.learned = learned
        self.starts = starts
        self.lengths = lengths
        self.block = block
        places = lengths - 1  # in a row; the last token is a target alone
        self.packing = pack(places, block) if packed else [[i] for i in range(len(places))]

    def describe(self) -> str:
        """How much it is."""
        conversations = counted(len(self.lengths), "conversation")
        rows = counted(len(self.packing), "row")
        full = np.sum(self.lengths - 1) / (len(self.packing) * self.block)
        return f"{conversations} ({rows}, {full:.0%} full)"

    def first(self) -> tuple:
        """The tokens of the first example, and which of them are learned."""
        span = slice(self.starts[0], self.starts[0] + self.lengths[0])
        return self.tokens[span], self.learned[span]

    def rows(self, numbers, seed: int) -> Batch:
        """The rows [..., T] with these numbers [...], counted from the start of a run.

        Each epoch shuffles them. The order depends only on seed and epoch.
        """
        rows = []
        for number in numbers.flat:
            epoch, i = divmod(number, len(self.packing))
            rows.append(self.row(epoch_order(len(self.packing), seed, epoch)[i]))
        return jax.tree.map(lambda *each: np.stack(each).reshape(*numbers.shape, -1), *rows)

    def in_order(self) -> Batch:
        """All rows [N, T]."""
        rows = [self.row(i) for i in range(len(self.packing))]
        return jax.tree.map(lambda *each: np.stack(each), *rows)

    def row(self, i: int) -> Batch:
        """Row i [T]: its examples one after another, then padding. Each has positions of its own,
        by which the model tells them apart."""
        tokens = np.zeros(self.block, np.int32)
        targets = np.full(self.block, -1, np.int32)
        positions = np.full(self.block, -1, np.int32)
        end = 0
        for example in self.packing[i]:
            start = self.starts[example]
            length = self.lengths[example]
            ids = self.tokens[start : start + length].astype(np.int32)
            learned = self.learned[start : start + length]

            begin, end = end, end + length - 1
            tokens[begin:end] = ids[:-1]
            targets[begin:end] = np.where(learned[1:], ids[1:], -1)
            positions[begin:end] = np.arange(length - 1)
        return Batch(tokens, targets, positions)


@lru_cache(maxsize=2)
def epoch_order(rows: int, seed: int, epoch: int):
    """The order of the rows in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(rows)


def pack(lengths, block: int) -> list[list[int]]:
    """Which examples share a row of `block` tokens: the longest first, each where it fits best."""
    rows = []
    waiting = [[] for _ in range(block + 1)]  # by room: rows in which so many tokens still fit
    has_waiting = np.zeros(block + 1, bool)
    for example in np.argsort(-lengths, kind="stable"):
        length = lengths[example]
        room = length + int(np.argmax(has_waiting[length:]))  # the least that is enough
        if has_waiting[room]:
            row = waiting[room].pop()
            has_waiting[room] = len(waiting[room]) > 0
        else:
            row = []
            rows.append(row)
            room = block

        row.append(int(example))
        waiting[room - length].append(row)
        has_waiting[room - length] = True
    return rows


def validation_batches(args, rows: Batch, mesh) -> Batch:
    """All validation rows as batches [N, groups, rows, T], as large as a microbatch.

    Rows without targets fill up the last one.
    """
    batch = args.batch // args.accumulate
    missing = -len(rows.tokens) % batch

    def in_batches(x, fill: int):
        x = np.pad(x, [(0, missing), (0, 0)], constant_values=fill)
        return x.reshape(-1, groups_of(mesh), batch // groups_of(mesh), args.block)

    positions = rows.positions
    if positions is not None:
        positions = in_batches(positions, fill=-1)
    return Batch(in_batches(rows.tokens, fill=0), in_batches(rows.targets, fill=-1), positions)


def some_batches(run: Run) -> Batch:
    """About 20 batches, evenly spread over the validation rows: enough for an estimate."""
    batches = run.data.val_batches
    every = math.ceil(len(batches.tokens) / (20 * run.args.accumulate))
    return jax.tree.map(lambda x: x[::every], batches)


# ------------------------------------------- The model --------------------------------------------


def find_weights(args, model_file) -> Path | None:
    """The folder of --weights; None: from scratch. InputError: this file does not read it."""
    if not args.weights:
        return None
    folder = model_file.fetch(args.weights)
    check_family(model_file, folder)
    if model_file.is_gguf(folder):
        fail(
            f"--weights {args.weights} is a GGUF file, and training starts from a folder: "
            "write one with `load` and `save` (docs/checkpoints.md)"
        )
    model_file.read_config(folder)
    held = model_file.read_quantization(folder)
    if held:
        fail(
            f"--weights {args.weights} holds its weights in {held}, which cannot be trained: name "
            "the checkpoint that they were made from"
        )
    if args.lora and not args.merge and model_file.is_adapter(folder):
        fail(
            f"--weights {args.weights} is an adapter, and the base of another one must be a whole "
            "checkpoint: add --merge, which writes one"
        )
    return folder


def make_model(args, model_file, folder: Path | None, data: Data, devices: list) -> tuple:
    """The model of --weights, or one from scratch -> (model, adapters of LoRA, mesh)."""
    if folder:
        config = model_file.read_config(folder)
    else:
        config = new_config(args, model_file, *vocabulary(model_file, data.tokenizer_folder))
    context = config.max_position_embeddings
    if args.block > context:
        fail(f"--block {args.block}: the context of this model is {context}")
    if args.pack == "yes":
        check_packed_rope(config, args.block)

    options = {"dtype": args.dtype, "remat": args.remat}

    def init_model():
        return model_file.Model(config, rngs=nnx.Rngs(random_key(args.seed)), **options)

    heads = config.num_attention_heads
    parallel = args.parallel
    if parallel in ("no", "auto"):
        parallel = choose_parallel(
            devices, heads, init_model, bytes_per_weight=4 if args.lora else 16
        )
    mesh = make_mesh(parallel, devices, heads)
    jax.set_mesh(None if "pmap" in mesh.shape else mesh)  # the routing of experts reads it

    if folder:
        say(f"reading {short_name(args.weights)}")
        # Frozen weights need no more digits than they are computed with.
        stored = args.dtype if args.lora and not args.merge else "float32"
        model = model_file.load(folder, param_dtype=stored, mesh=mesh, **options)
        if args.unused_sizes:
            note(f"not used: {', '.join(args.unused_sizes)}; the model of --weights has its own")
    else:
        say("initialising the model")
        model = init_sharded(model_file, config, init_model, mesh)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Dropout):
            module.rate = args.dropout
    if args.prune:
        begin_pruning(args, model)
    adapters = add_adapters(model_file, model, args) if args.lora else {}
    return model, adapters, mesh


def check_packed_rope(config, block: int):
    """Stops where a packed row would not be what its conversations are alone."""
    scaling = dict(getattr(config, "rope_scaling", ()))
    if scaling.get("rope_type") == "dynamic" and block > scaling["trained"]:
        fail(
            f"--block {block}: beyond {scaling['trained']} tokens, RoPE scaling depends on the "
            "length of each conversation: add --pack no"
        )


def new_config(args, model_file, V: int, eos: int | None):
    """The config of a model from scratch, for V token ids; EOS serves as BOS, too."""
    sizes = {"layers": args.layers, "heads": args.heads, "width": args.width, "context": args.block}
    if args.experts:
        sizes["experts"] = args.experts
    # What a config refuses came from these flags: a head of odd width, where RoPE rotates pairs.
    with explained(model_file.InputError, f"--width {args.width} with --heads {args.heads}: {{}}"):
        return model_file.Config.small(
            **sizes,
            vocab_size=V,
            padded_vocab_size=model_file.round_up(V, 128),  # such sizes are faster
            bos_token_id=eos,
            eos_token_id=eos,
        )


def choose_parallel(devices: list, heads: int, init_model, bytes_per_weight: int) -> str:
    """What --parallel auto means: data, or tensor where one device has no room for the state.

    bytes_per_weight: a weight, its gradient and two moments take 16; a frozen weight takes 4.
    """
    if len(devices) == 1:
        return "data"
    weights = sum(p.size for p in jax.tree.leaves(nnx.eval_shape(init_model)))
    own = next(device for device in devices if device.process_index == jax.process_index())
    parallel, than = "data", "less"
    if weights * bytes_per_weight > memory_of(own):
        most = max(n for n in range(1, len(devices) + 1) if heads % n == 0)
        parallel, than = f"tensor:{most}", "more"
    print(f"--parallel {parallel}: the state takes {than} than the memory of one device")
    return parallel


def init_sharded(model_file, config, init_model, mesh):
    """A model from scratch. Each device initialises its part of the weights, and no other."""
    graphdef, shardings = nnx.split(nnx.eval_shape(init_model))
    for path, param, *_ in model_file.named_parameters(shardings):
        param.set_value(model_file.sharding(mesh, config, path, param.shape))

    def init_state():
        return nnx.state(init_model())

    return nnx.merge(graphdef, jax.jit(init_state, out_shardings=shardings)())


# ---------------------------------------------- LoRA ----------------------------------------------


def add_adapters(model_file, model, args) -> dict:
    """Adds A B of rank --lora to each matrix that --lora-targets names.

    A is random and B zero, so that the model begins as it was: Hu et al. 2021. The model file is
    not changed: the layers of the model are. Returns {path: the matrix's name in a checkpoint}.
    """
    layers = linear_layers(model)
    adapters = find_targets(model_file, model, layers, args.lora_targets)
    rngs = nnx.Rngs(random_key(args.seed))
    for path in adapters:
        holder, name, layer = layers[path]
        adapter = nnx.LoRA(
            layer.in_features,
            args.lora,
            layer.out_features,
            base_module=layer,
            dtype=layer.dtype,
            rngs=rngs,
        )
        setattr(holder, name, adapter)
    return adapters


def find_targets(model_file, model, layers: dict, targets: str) -> dict:
    """The matrices that --lora-targets names -> {path: the matrix's name in a checkpoint}.

    targets: names, separated by commas, each of them the last parts of a name in the checkpoint, as
    in PEFT's target_modules; or a regular expression that matches the whole path of a matrix.
    """
    stored = {path: name for path, _, name, _ in model_file.named_parameters(nnx.state(model))}
    names = {}
    for path in layers:
        # Their kernels are read directly, bypassing an adapter.
        if path[-1] != "lm_head" and "experts" not in path:
            kernel = ".".join(map(str, [*path, "kernel"]))
            names[path] = stored[kernel].removesuffix(".weight")

    found = set()
    parts = targets.split(",") if re.fullmatch(r"[\w.]+(,[\w.]+)*", targets) else [targets]
    for part in parts:
        with explained(re.error, "--lora-targets is not a regular expression: {}"):
            pattern = re.compile(part)
        matched = set()
        for path, name in names.items():
            by_path = pattern.fullmatch(".".join(map(str, path)))
            if by_path or f".{name}".endswith(f".{part}"):
                matched.add(path)
        if not matched:
            known = ", ".join(sorted({path[-1] for path in names}))
            fail(
                f"--lora-targets {part} matches no matrix of {model_file.__name__}.py; "
                f"there are {known}"
            )
        found |= matched
    return {path: name for path, name in names.items() if path in found}


def linear_layers(model) -> dict:
    """{path: (the module that holds it, its name there, the layer)} of all linear layers."""
    layers = {}
    for path, holder in nnx.iter_modules(model):
        for name, layer in vars(holder).items():
            if isinstance(layer, nnx.Linear | nnx.LoRA):
                layers[(*path, name)] = (holder, name, layer)
    return layers


def merge_adapters(model, paths, keep_zeros: bool):
    """Adds each A B to its matrix: the model is an ordinary one of its file again.

    keep_zeros: with --prune, what is 0 in a matrix stays 0.
    """
    layers = linear_layers(model)
    for path in paths:
        holder, name, lora = layers[path]
        kernel = lora.base_module.kernel
        merged = kernel[...] + lora.lora_a[...] @ lora.lora_b[...]  # all are float32
        if keep_zeros:
            merged = jnp.where(kernel[...] == 0, 0, merged)
        kernel.set_value(merged)
        setattr(holder, name, lora.base_module)


def with_merged_adapters(build_model: Callable, adapters: dict) -> Callable:
    """build_model for --prune: the adapters are merged, so that the zeros stay.

    What is trained is what will be written.
    """

    def build_merged(params, frozen):
        model = build_model(params, frozen)
        merge_adapters(model, adapters, keep_zeros=True)
        return model

    return build_merged


def write_adapters(folder: Path, args, model, adapters: dict):
    """Writes adapter_model.safetensors and adapter_config.json, as PEFT does."""
    layers = linear_layers(model)
    tensors = {}
    for path, name in adapters.items():
        _, _, lora = layers[path]
        for letter, factor in [("A", lora.lora_a), ("B", lora.lora_b)]:
            tensor = np.asarray(factor[...], args.save_dtype).T
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = np.ascontiguousarray(tensor)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": args.weights,
        "r": args.lora,
        "lora_alpha": args.lora,  # alpha = r: scale 1
        "target_modules": sorted(adapters.values()),
        "fan_in_fan_out": args.model == "gpt2",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


# ------------------------------- Checkpoints and the finished model -------------------------------

# What must be the same when a run is resumed, but for what is in CHANGEABLE.
SETTINGS = (
    *("dataset", "tokens", "vocab_size", "loss", "pack"),
    *("model", "weights", "layers", "heads", "width", "block", "dropout", "experts"),
    *("lora", "lora_targets", "steps", "batch", "optimizer", "lr", "schedule", "min_lr", "warmup"),
    *("weight_decay", "beta1", "beta2", "clip", "ema", "seed", "dtype", "prune"),
)
# What may be changed then: a step depends on it, and neither the state nor the order of the rows.
CHANGEABLE = ("steps", "lr", "schedule", "min_lr", "warmup", "weight_decay", "clip")

NEWEST = -1  # --resume without a step


def open_checkpoints(out: Path, keep: int) -> ocp.CheckpointManager:
    """The last states of a run and the best one, in out/checkpoints; each whole or not at all."""

    def val_loss(metrics):
        return metrics["val_loss"]

    policies = ocp.checkpoint_managers
    best = policies.BestN(
        get_metric_fn=val_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
        best_fn=val_loss,
        best_mode="min",
    )
    with exit_on_write_error(out):
        return ocp.CheckpointManager((out / "checkpoints").absolute(), options=options)


def save_checkpoint(run: Run, val_loss: float | None):
    """Begins to store the state; it is written while the training goes on."""
    checkpoints, state = run.checkpoints, run.state
    with exit_on_write_error(run.args.out):
        checkpoints.wait_until_finished()  # of the one before
        size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
        free = shutil.disk_usage(checkpoints.directory).free / 1e6
        if 1.2 * size > free:
            raise OSError(f"a checkpoint takes {size:.0f} MB, and {free:.0f} are free")

        # On a CPU, Orbax would read what the next step overwrites.
        if jax.default_backend() == "cpu":
            state = jax.tree.map(jnp.copy, state)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), settings=ocp.args.JsonSave(run.settings)
        )
        metrics = None if val_loss is None else {"val_loss": val_loss}
        checkpoints.save(int(state["step"]), metrics=metrics, args=items)


def step_to_resume(run: Run) -> int:
    """The step of --resume STEP, or of the newest checkpoint."""
    steps = sorted(run.checkpoints.all_steps())
    if run.args.resume == NEWEST:
        return steps[-1]
    if run.args.resume not in steps:
        known = ", ".join(map(str, steps))
        fail(f"--resume {run.args.resume}: the checkpoints in {run.args.out} are of steps {known}")
    return run.args.resume


def resume(run: Run):
    """Goes on from the checkpoint of --resume."""
    step = step_to_resume(run)
    stored = restore(run, step, settings=ocp.args.JsonRestore()).settings
    run.changes = compare_settings(run, stored)
    if step > run.args.steps:
        fail(f"--steps {run.args.steps}: the checkpoint is of step {step}; ask for more")
    run.state = restore_state(run, step)
    run.step = run.resumed_at = step

    if run.changes:
        note(
            f"{', '.join(run.changes)}: from step {step + 1} on; there the new schedule gives a "
            f"learning rate of {run.learning_rate(step):.2e}"
        )
    drop_later_checkpoints(run)


def restore_state(run: Run, step: int) -> dict:
    """The state after a step, in the shapes and on the devices of run.state."""
    say(f"reading the checkpoint of step {step}")
    return restore(run, step, state=ocp.args.StandardRestore(run.state)).state


def restore(run: Run, step: int, **items):
    """The items `state` or `settings` of a checkpoint."""
    folder = run.checkpoints.directory
    before = max((s for s in run.checkpoints.all_steps() if s < step), default=None)
    instead = "begin again in another --out"
    if before is not None:
        instead = f"--resume {before} goes on from the one before"
    damaged = f"{folder / str(step)} is damaged ({{}}): {instead}"
    with explained((KeyError, ValueError, OSError, TypeError), damaged):
        return run.checkpoints.restore(step, args=ocp.args.Composite(**items))


def drop_later_checkpoints(run: Run):
    """After --resume STEP: what came later would be in the way of what comes now."""
    for step in run.checkpoints.all_steps():
        if step > run.step:
            note(f"the checkpoint of step {step} is dropped")
            run.checkpoints.delete(step)


def compare_settings(run: Run, stored: dict) -> list[str]:
    """What the command line changes, such as "--lr 0.003 -> 0.001". Exits if it may not.

    A value of CHANGEABLE may be named anew. The defaults that follow from it change with it; any
    other default does not, as it was only left out.
    """
    named = set(run.args.named)
    if "steps" in named:
        named.add("warmup")  # a twentieth of it
    if "lr" in named:
        named.add("min_lr")  # a tenth of it

    changes, refused = [], []
    for name, value in run.settings.items():
        was = stored.get(name)
        if was == value:
            continue
        flag = f"--{name.replace('_', '-')} {shown(was)}"
        if name in named:
            changes.append(f"{flag} -> {shown(value)}")
        else:
            refused.append(flag)
    if refused:
        fail(
            f"the run in {run.args.out} has {', '.join(refused)}: resume with that, or begin in "
            "another --out"
        )
    return changes


def shown(value) -> str:
    """A setting as one would type it: a tenth of 0.003 is 0.0003, and no 0.00030000000000000003."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def write_model(run: Run, model):
    """Writes the finished folder, which the model file and transformers read; or an adapter."""
    args = run.args
    tokenizer = re.compile(r".*token.*json|.*jinja|vocab.json|merges.txt|.*\.model|gen.*json")
    with exit_on_write_error(args.out), tempfile.TemporaryDirectory(dir=args.out) as part:
        # An adapter with a tokenizer of its own may still have the stop ids of its base.
        folder = run.data.tokenizer_folder
        stop_ids = run.model_file.base_of(folder, weights=False) / "generation_config.json"
        for file in [stop_ids, *folder.iterdir()]:
            if tokenizer.fullmatch(file.name) and file.is_file():
                shutil.copyfile(file, Path(part, file.name))
        if run.data.template is not None and run.data.template.is_plain:
            write_plain_template(Path(part), run)

        if run.adapters and not args.merge:
            write_adapters(Path(part), args, model, run.adapters)
        else:
            merge_adapters(model, run.adapters, keep_zeros=args.prune is not None)
            graphdef, params = nnx.split(model)
            params = jax.tree.map(lambda p: p.astype(args.save_dtype), params)
            run.model_file.save(nnx.merge(graphdef, params), part)

        # All is written, or no file is replaced.
        for file in Path(part).iterdir():
            file.chmod(0o644)  # safetensors writes for the owner alone
            file.replace(args.out / file.name)


def write_plain_template(folder: Path, run: Run):
    """Writes the chat template that the checkpoint lacked, for `sample.py --chat`."""
    (folder / "chat_template.jinja").write_text(PLAIN_TEMPLATE)
    if not run.model_file.read_stop_ids(run.data.tokenizer_folder, run.model.config):
        stop_ids = json.dumps({"eos_token_id": end_of_turn(run)})
        (folder / "generation_config.json").write_text(stop_ids + "\n")


def exit_on_write_error(path: Path):
    """For what writes to a path, where there may be no room."""
    message = f"{path}: {{}}: make room or choose another --out"
    if any(name.name.isdigit() for name in path.glob("checkpoints/*")):
        message += "; earlier checkpoints remain"
    return explained((OSError, SafetensorError), message)


# -------------------------------------------- Metrics ---------------------------------------------


class Metrics:
    """The rows of out/metrics.jsonl. TensorBoard, where installed, and W&B get them, too.

    A run that is resumed from `step` drops the rows of later steps. Of several hosts, the first
    writes.
    """

    def __init__(self, out: Path, step: int, title: str = ""):
        self.file = out / "metrics.jsonl"
        self.title = title  # of the picture
        self.writes = jax.process_index() == 0
        self.rows = []
        self.dropped = False
        self.board = None
        self.wandb = None  # what `open_wandb` returned
        if self.file.exists():
            self.read(step)

        part = out / "metrics.part"
        with exit_on_write_error(part):
            if self.writes:
                part.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
                part.replace(self.file)  # at no moment are the rows gone
        if self.writes and find_spec("tensorboard"):
            tensorboard = importlib.import_module("tensorboard.summary")
            self.board = tensorboard.Writer(f"{out}/tensorboard")

    def read(self, last: int):
        """Reads the rows of the steps up to `last`."""
        for line in self.file.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last line may be cut off
                row = json.loads(line)
                if row["step"] <= last:
                    self.rows.append(row)
                else:
                    self.dropped = True

    def add(self, rows: list[dict]):
        """Appends rows, each of which has a step."""
        self.rows += rows
        if self.writes:
            with exit_on_write_error(self.file), open(self.file, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        if self.board:
            for row in rows:
                for name in row.keys() - {"step"}:
                    self.board.add_scalar(name, row[name], row["step"])
        if self.wandb:
            for row in rows:
                values = {name: value for name, value in row.items() if name != "step"}
                self.wandb.log(values, step=row["step"])

    def close(self):
        """Writes what TensorBoard and W&B still hold."""
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()

    def draw(self):
        """Draws out/curves.png."""
        if not self.writes:
            return
        figure = draw_curves(self.rows, self.title)
        with exit_on_write_error(self.file):
            figure.savefig(self.file.with_name("curves.png"), dpi=150)

    def divergence(self, after: int = 0) -> str:
        """What is wrong with the last ten steps, or "": a loss that is not finite, or that jumped.

        It jumped if its median over ten steps exceeds 1.5 x the earlier median + 0.5. Only steps
        after a given one count for that: while weights are pruned, a loss may rise.
        """
        steps = [row for row in self.rows[-120:] if "loss" in row]
        last = steps[-10:]
        for row in last:
            if not np.isfinite(row["loss"] + row["norm"]):
                return (
                    f"at step {row['step']} the loss is {row['loss']}, "
                    f"the norm of its gradient {row['norm']}"
                )

        steps = [row for row in steps if row["step"] > after]
        last, before = steps[-10:], steps[:-10]
        if len(steps) >= 20:
            new = np.median([row["loss"] for row in last])
            old = np.median([row["loss"] for row in before])
            if new > 1.5 * old + 0.5:
                step = last[-1]["step"]
                return f"the loss of ten steps to {step} is {new:.2f}, after {old:.2f}"
        return ""


def open_wandb(run: Run):
    """Begins a run of Weights & Biases (W&B) for --log wandb, or goes on with that of this folder.

    W&B takes no step twice. So where steps are told anew and differently, a new run of it begins.
    """
    os.environ["WANDB_SILENT"] = "true"  # neither lines among ours nor a prompt to log in
    wandb = importlib.import_module("wandb")
    out = run.args.out.absolute()

    # W&B's folders are named offline-run-DATE-ID, and run-DATE-ID where they were sent.
    folders = sorted(out.glob("wandb/*run-*"), key=lambda folder: folder.name.split("run-")[1])
    known = None
    if folders and not (run.metrics.dropped and run.changes):
        known = folders[-1].name.rsplit("-", 1)[1]

    config = {name: str(value) for name, value in vars(run.args).items() if name != "named"}
    config |= run.settings
    away = "--log wandb: {} (WANDB_MODE=offline keeps the run in this folder)"
    with explained(wandb.Error, away):
        logged = wandb.init(
            dir=out,
            id=known,
            resume="allow",
            name=out.name,
            config=config,
            settings=wandb.Settings(console="off"),
        )
    kept = f"in {Path(logged.dir).parent}: `wandb sync` sends it"
    note(f"W&B    {logged.url or kept}")
    return logged


# Two colours that colour-blind readers tell apart: Okabe and Ito 2008.
TRAINING, VALIDATION = "#0072B2", "#D55E00"


def draw_curves(rows: list[dict], title: str) -> Figure:
    """The curves of a run: the loss; below it accuracy, norm of the gradient and learning rate.

    rows: of metrics.jsonl.
    """
    figure = Figure((9, 7), layout="constrained")
    figure.suptitle(title, fontsize=12, wrap=True)
    panels = figure.subplot_mosaic([["loss"] * 3, ["accuracy", "norm", "lr"]], height_ratios=[2, 1])
    last = max((row["step"] for row in rows), default=1)
    for name, label in [
        ("loss", "loss (nats per token)"),
        ("accuracy", "accuracy (% of tokens)"),
        ("norm", "gradient norm"),
        ("lr", "learning rate"),
    ]:
        most = 8 if name == "loss" else 3
        panels[name].xaxis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10], integer=True))
        panels[name].xaxis.set_major_formatter("{x:,.0f}")
        panels[name].set_xlim(0, 1.02 * last)
        panels[name].set_xlabel("step")
        panels[name].set_ylabel(label)
        panels[name].grid(alpha=0.3)

    loss, val_loss = column(rows, "loss"), column(rows, "val_loss")
    plot_training(panels["loss"], *loss)
    plot_validation(panels["loss"], *val_loss)
    mark_lowest(panels["loss"], *val_loss)
    panels["loss"].set_ylim(robust_range(loss, val_loss))
    panels["loss"].legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)

    steps, accuracy = column(rows, "accuracy")
    plot_training(panels["accuracy"], steps, 100 * accuracy)
    steps, accuracy = column(rows, "val_accuracy")
    plot_validation(panels["accuracy"], steps, 100 * accuracy)

    steps, norms = column(rows, "norm")
    plot_training(panels["norm"], steps, norms)
    if (norms > 0).any():
        panels["norm"].set_yscale("log")
        spread = norms[norms > 0].max() / norms[norms > 0].min()
        labels = (1, 2, 5) if spread < 100 else (1,)  # of each power of ten
        panels["norm"].yaxis.set_major_locator(LogLocator(subs=labels))
        panels["norm"].yaxis.set_major_formatter("{x:g}")
        panels["norm"].yaxis.set_minor_formatter("")
    panels["lr"].plot(*thinned(*column(rows, "lr")), color=TRAINING)
    panels["lr"].set_ylim(bottom=0)
    panels["lr"].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    return figure


def title_of(args, params) -> str:
    """What is trained on what, for the picture."""
    trained = sum(param.size for param in jax.tree.leaves(params))
    data = args.data or ([] if args.dataset else ["Python's source"])
    names = [Path(name).name for name in data]
    if args.dataset:
        names.append(args.dataset)
    if len(names) > 3:
        names = [*names[:2], f"{len(names) - 2} more"]
    model = f"{args.model}.py"
    if args.weights:
        model += f", from {short_name(args.weights)}"
    return f"{model}: {trained:,} parameters trained on {', '.join(names)}"


def short_name(weights: str) -> str:
    """What --weights names, without the folders above it."""
    return "/".join(Path(weights).parts[-2:])


def column(rows: list[dict], name: str) -> tuple:
    """(steps, values) of the rows that have this column."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    steps, values = np.reshape(points, (-1, 2)).T
    return steps, values


def plot_training(axes, steps, values):
    """The values of the steps, faint, and their running mean over a fiftieth of the steps."""
    window = max(1, len(values) // 50)
    axes.plot(*thinned(steps, values), color=TRAINING, alpha=0.25, linewidth=0.8)
    label = "training" if window == 1 else f"training, mean of {window:,} steps"
    axes.plot(*thinned(steps, running_mean(values, window)), color=TRAINING, label=label)


def plot_validation(axes, steps, values):
    """Points on a line."""
    axes.plot(
        *thinned(steps, values),
        "o-",
        color=VALIDATION,
        markersize=4,
        linewidth=1,
        label="validation",
    )


def mark_lowest(axes, steps, values):
    """A ring around the lowest validation loss, and its value in the legend."""
    if not np.isfinite(values).any():
        return
    best = np.nanargmin(values)
    label = f"lowest: {values[best]:.4f} at step {steps[best]:,.0f}"
    ring = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.5}
    axes.plot(steps[best], values[best], "o", color=VALIDATION, label=label, **ring)


def running_mean(values, window: int):
    """For each value the mean of the `window` nearest ones, as far as they are finite; or NaN."""
    finite = np.isfinite(values)
    sums = np.append(0, np.cumsum(np.where(finite, values, 0)))
    counts = np.append(0, np.cumsum(finite))

    places = np.arange(len(values))
    first = np.maximum(places - window // 2, 0)
    end = np.minimum(places + (window + 1) // 2, len(values))
    count = counts[end] - counts[first]
    return np.where(count > 0, (sums[end] - sums[first]) / np.maximum(count, 1), np.nan)


def thinned(steps, values) -> tuple:
    """About 2,000 points at most, the last one included: a picture shows no more."""
    every = 1 + len(steps) // 2000
    first = (len(steps) - 1) % every
    return steps[first::every], values[first::every]


def robust_range(*curves) -> tuple[float, float] | None:
    """(bottom, top) of the loss, or None. curves: (steps, values).

    From scratch, a loss first falls from where every token is as likely. So the first twentieth of
    1,000 steps or more gets no room where it would leave less than a third of the height to the
    others. A point at step 0 always has room: --eval-first asked for it.
    """
    last = max((steps.max() for steps, _ in curves if len(steps) > 0), default=0)
    shown = usual_values(curves, after=0)
    later = usual_values(curves, after=last / 20)
    if last >= 1000 and len(later) > 0 and np.ptp(later) < np.ptp(shown) / 3:
        shown = later
    at_0 = [values[(steps == 0) & np.isfinite(values)] for steps, values in curves]
    shown = np.concatenate([shown, *at_0])
    if len(shown) == 0 or np.ptp(shown) == 0:
        return None
    margin = 0.05 * np.ptp(shown)
    return shown.min() - margin, shown.max() + margin


def usual_values(curves, after: float) -> np.ndarray:
    """The values after a step, without those that would count as diverged: `Metrics.divergence`.

    They are compared with the median of their curve or with its first value, as a loss that falls
    to almost 0 has not diverged where it began.
    """
    found = [np.zeros(0)]
    highest = 0.0
    for steps, values in curves:
        values = values[(steps > after) & np.isfinite(values)]
        if len(values) > 0:
            found.append(values)
            highest = max(highest, np.median(values), values[0])
    found = np.concatenate(found)
    return found[found <= 1.5 * highest + 0.5]


# --------------------------------------- Devices and hosts ----------------------------------------


def groups_of(mesh) -> int:
    """How many groups of devices have rows of their own. The axis tensor makes groups of devices
    that share their rows."""
    return mesh.size // mesh.shape.get("tensor", 1)


def own_device(mesh):
    """The first device of the mesh that belongs to this host."""
    index = jax.process_index()
    return next(device for device in mesh.devices.flat if device.process_index == index)


def place(mesh, shape, read, accumulated: bool) -> Batch:
    """A batch of rows [groups, rows, T] on the devices, each group of devices with its own.

    accumulated: a dimension of microbatches comes first. read(slices) -> that part of the batch;
    each host reads those of its own devices.
    """
    groups = tuple(axis for axis in mesh.shape if axis != "tensor")
    spec = jax.P(None, groups) if accumulated else jax.P(groups)
    sharding = jax.NamedSharding(mesh, spec)

    slices = sharding.addressable_devices_indices_map(shape)
    parts = [jax.device_put(read(index), device) for device, index in slices.items()]
    join = partial(jax.make_array_from_single_device_arrays, shape, sharding)
    return jax.tree.map(lambda *arrays: join(list(arrays)), *parts)


JOIN = 300  # seconds to wait for all hosts


def join_hosts(where: str):
    """Joins the other hosts of --multihost. From here on, only the first prints."""
    known = []
    if where != "auto":
        address, hosts, host = where.split(",")
        known = [address, int(hosts), int(host)]
        meet(*known)
    with explained(ValueError, f"--multihost {where}: {{}}"):
        jax.distributed.initialize(*known)
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def meet(address: str, hosts: int, host: int):
    """Waits until all hosts are there, or says which ones are not.

    JAX would end the process without a word about it. The protocol: each host sends its number to
    the first one; when all have come, or after JOIN seconds, the first sends each the list of the
    numbers that are missing.
    """
    if host >= hosts:
        fail(f"--multihost: there is no host {host} of {hosts}, counted from 0")
    name, port = address.rsplit(":", 1)
    if host == 0:
        missing = wait_for_hosts(int(port), hosts)
    else:
        missing = report_to_first(name, int(port), host)
    if missing:
        fail(f"--multihost {address}: {missing} of {hosts} did not connect in {JOIN} s")


def wait_for_hosts(port: int, hosts: int) -> list[int]:
    """The first host's part of `meet` -> the hosts that are missing."""
    end = time.monotonic() + JOIN
    came = {}  # number of a host -> its connection
    with socket.create_server(("", port)) as server, contextlib.suppress(TimeoutError):
        while len(came) < hosts - 1:
            server.settimeout(max(0.01, end - time.monotonic()))
            link, _ = server.accept()
            came[int(link.recv(99))] = link

    missing = [number for number in range(1, hosts) if number not in came]
    for link in came.values():
        link.sendall(json.dumps(missing).encode())
    return missing


def report_to_first(name: str, port: int, host: int) -> list[int]:
    """The other hosts' part of `meet` -> the hosts that are missing: [0] if the first is."""
    end = time.monotonic() + JOIN
    while time.monotonic() < end:
        # The first host may not listen yet.
        with contextlib.suppress(OSError, ValueError):
            link = socket.create_connection((name, port), 1)
            link.settimeout(JOIN)
            link.sendall(str(host).encode())
            return json.loads(link.recv(9999))
        time.sleep(0.2)
    return [0]


# ---------------- Errors and devices: the same in sample.py, train.py and bench.py ----------------

# model_type in a config.json -> the model file that reads it
KINDS = {
    "gpt2": "gpt2",
    "opt": "opt",
    "llama": "llama",
    "smollm3": "llama",
    "granite": "llama",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3": "gemma",
    "gemma3_text": "gemma",
    "mistral": "mistral",
    "mixtral": "mistral",
    "ministral": "mistral",
    "ministral3": "mistral",
    "mistral3": "mistral",
    "qwen2": "qwen",
    "qwen3": "qwen",
    "qwen3_moe": "qwen",
}
MODELS = [name for name in dict.fromkeys(KINDS.values()) if (HERE / f"{name}.py").exists()]

AXIS = r"(data|fsdp|tensor)(:[1-9]\d*)?"
PARALLEL = rf"no|auto|pmap|{AXIS}(,{AXIS})*"  # what --parallel takes


def fail(message) -> NoReturn:
    """Exits with code 2 after one line that says what is wrong and what to do."""
    one_line = " ".join(str(message).split())
    print(f"{Path(__file__).name}: {one_line}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def explained(errors, message: str):
    """Turns these exceptions into `fail(message)`; {} in the message is the exception's text."""
    try:
        yield
    except errors as error:
        fail(message.replace("{}", str(error)))


def run_program(main) -> NoReturn:
    """Runs `main` and exits with the code that it returns. What is no bug has no traceback."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    if sys.stderr is None:  # it is closed, and `print` would take standard output instead
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    sys.unraisablehook = hear_again
    try:
        try:
            code = main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
        sys.exit(code)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr, flush=True)
        code = 130
    except BrokenPipeError:  # nobody reads on, as under `| head`
        code = 141
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"{Path(__file__).name}: {error}: make room", file=sys.stderr, flush=True)
        code = 2
    os._exit(code)  # at once: the usual clean-up can crash under a computation that still runs


def hear_again(lost):
    """Sends Ctrl-C again, a moment later, where its exception is lost; shows other lost exceptions.

    Python drops what a callback of the garbage collector raises, such as the one that JAX has.
    """
    if isinstance(lost.exc_value, KeyboardInterrupt):
        threading.Timer(0.01, os.kill, [os.getpid(), signal.SIGINT]).start()
    else:
        sys.__unraisablehook__(lost)


def not_empty(text: str) -> str:
    """A type of argparse: a shell variable that is not set would mean the default."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: name a folder or a Hub id, or leave it out")
    return text


def model_of(weights: str, revision: str | None = None) -> str:
    """The model file that reads a checkpoint, by its model_type."""
    any_file = importlib.import_module(MODELS[0])
    with explained(any_file.InputError, "{}"):
        folder = any_file.base_of(any_file.fetch(weights, revision, weights=False), weights=False)
        kind = any_file.read_kind(folder)
    if not isinstance(kind, str):
        fail(f"{folder} has no model_type: name --model, one of {', '.join(MODELS)}")
    if kind not in KINDS:
        fail(f"{weights} is of model_type {kind!r}; {', '.join(KINDS)} are supported")
    return KINDS[kind]


def check_family(model_file, folder: Path):
    """Exits where another model file than --model reads a checkpoint."""
    base = model_file.base_of(folder, weights=False)
    kind = str(model_file.read_kind(base))
    reader = KINDS.get(kind, model_file.__name__)
    if reader != model_file.__name__:
        fail(f"{folder} is a {kind!r}, which {reader}.py reads: --model {reader}")


def pick_devices(name: str | None, parallel: str) -> list:
    """The devices of --device: all of that kind, or one if it is numbered or --parallel is no.

    The first of them on this host becomes JAX's default.
    """
    if not re.fullmatch(r"((cpu|gpu|tpu)(:\d+)?)?", name or ""):
        fail(f"--device {name}: it must be cpu, gpu or tpu, or a numbered one such as gpu:1")
    kind, _, index = (name or "").partition(":")

    # Without this, JAX would start a GPU too and take its memory.
    if kind == "cpu":
        jax.config.update("jax_platforms", "cpu")

    missing = f"--device {name}: JAX finds no such device; leave it out"
    with explained(RuntimeError, missing if name else "JAX finds no device: {}"):
        devices = jax.devices(kind or None)
    number = int(index or 0)
    if number >= len(devices):
        fail(f"--device {name}: there are {len(devices)}, counted from 0")
    if index or parallel == "no":
        devices = [devices[number]]

    own = next(device for device in devices if device.process_index == jax.process_index())
    jax.config.update("jax_default_device", own)
    return devices


def random_key(seed: int):
    """A random key for a seed; jax.random.key itself uses only the low 32 bits."""
    key = jax.random.key(seed % 2**32)
    if seed >= 2**32:
        key = jax.random.fold_in(key, seed // 2**32)
    return key


def memory_of(device) -> float:
    """The bytes that a device has; infinite where it does not say, as a CPU does not."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", math.inf)


def make_mesh(parallel: str, devices: list, heads: int) -> jax.sharding.Mesh:
    """Arranges the devices along the axes of --parallel, such as data:2,tensor:4.

    An axis without a number takes the devices that the others leave.
    """
    axes = {}
    for part in parallel.split(","):
        axis, _, number = part.partition(":")
        axes[axis] = int(number or 0)
    if list(axes.values()).count(0) > 1:
        fail(f"--parallel {parallel}: say how many along all axes but one, as in data:2,tensor")
    taken = math.prod(number for number in axes.values() if number > 0)
    for axis, number in axes.items():
        axes[axis] = number or len(devices) // taken

    count = math.prod(axes.values())
    if not 0 < count <= len(devices):
        needed = max(count, taken)
        fail(f"--parallel {parallel} needs {needed} devices, and there are {len(devices)}")
    if count < len(devices) and jax.process_count() > 1:
        fail(f"--parallel {parallel} leaves devices out: of several hosts all must take part")
    tensor = axes.get("tensor", 1)
    if heads % tensor != 0:
        fits = [n for n in range(1, heads + 1) if heads % n == 0]
        fail(f"--parallel: {heads} heads split over tensor: {fits}, not over {tensor}")

    return jax.sharding.Mesh(np.reshape(devices[:count], [*axes.values()]), [*axes])


# ---------------------------------------- The command line ----------------------------------------


def parse_command_line() -> argparse.Namespace:
    """The command line, checked as far as that needs neither the text nor a device."""
    parser = argparse.ArgumentParser(
        prog="train.py", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.error = fail
    add_text_flags(parser)
    add_model_flags(parser)
    training = parser.add_argument_group("training")
    add_training_flags(training)
    add_learning_rate_flags(training)
    add_output_flags(parser)
    add_machine_flags(parser)

    args = parser.parse_args()

    # Which of CHANGEABLE the command line names: these have a value without their defaults.
    without = parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(CHANGEABLE)))
    args.named = [name for name in CHANGEABLE if getattr(without, name) is not None]
    fill_defaults(args)
    check_numbers(args)
    check_model_flags(args)
    check_training_flags(args)
    check_machine_flags(args)
    check_output_flags(args)
    return args


def add_text_flags(parser):
    text = parser.add_argument_group("text")
    text.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text, texts or conversations in .jsonl, nanoGPT's .bin, or shakespeare "
        "(default: Python's source)",
    )
    text.add_argument(
        "--dataset",
        metavar="NAME[:SUBSET]",
        help="a dataset on the Hub, its train split; needs the package datasets",
    )
    text.add_argument(
        "--tokens",
        metavar="KIND",
        help="tokenizer: bpe (learned from the text; the default), char, bytes or gpt2",
    )
    add_size(text, "--vocab-size", "vocabulary size of bpe, the 256 bytes included")
    text.add_argument(
        "--loss",
        choices=["assistant", "all"],
        help="tokens of conversations to learn: of the assistant alone (the default), or all",
    )
    text.add_argument(
        "--pack",
        choices=["yes", "no"],
        help="whether conversations share rows, without seeing each other (default: yes)",
    )
    text.add_argument(
        "--show-data",
        action="store_true",
        help="show the first example and which of its tokens are learned; do not train",
    )


def add_model_flags(parser):
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="NAME",
        help=f"model file: {', '.join(MODELS)} (default: as --weights says, or else gpt2)",
    )
    model.add_argument(
        "--weights",
        type=not_empty,
        help="folder or Hub id to go on from (default: from scratch, sized by the flags below)",
    )
    add_size(model, "--layers", "number of blocks")
    add_size(model, "--heads", "attention heads of a block")
    add_size(model, "--width", "model width: the length of the vectors in the residual stream")
    model.add_argument(
        "--block",
        type=int,
        metavar="N",
        help="sequence length; from scratch, the model's context length (default: 64; for "
        "conversations 1024, or the context length of --weights if that is less)",
    )
    add_number(model, "--dropout", 0.0, "dropout rate (gpt2, opt)")
    add_size(model, "--experts", "experts of a block, two for each token (mistral, qwen); 0: none")
    add_number(model, "--lora", 0, "rank of LoRA, which trains adapters and no weights; 0: off")
    model.add_argument(
        "--lora-targets",
        default=r".*\.(c_attn|c_proj|c_fc|\w+_proj|fc[12])",
        metavar="NAMES",
        help="matrices with adapters: q_proj,v_proj or a regular expression of their paths "
        "(default: %(default)s)",
    )
    model.add_argument(
        "--merge",
        action="store_true",
        help="write LoRA's result as a whole checkpoint, not as an adapter",
    )


def add_training_flags(training):
    add_number(training, "--steps", 2000, "updates of the weights")
    add_number(training, "--batch", 12, "batch size: sequences in a step")
    add_number(
        training, "--accumulate", 1, "gradient accumulation: microbatches in a step, to save memory"
    )
    training.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamw",
        help="lion wants a tenth of --lr (default: %(default)s)",
    )
    add_number(training, "--weight-decay", 0.1, "weight decay, of matrices only")
    add_number(training, "--beta1", 0.9, "decay of the mean of gradients")
    add_number(
        training, "--beta2", 0.99, "decay of the mean of squared gradients (lion: of gradients)"
    )
    add_number(training, "--clip", 1.0, "clip the global norm of the gradient to this")
    add_number(
        training,
        "--ema",
        0.0,
        "evaluate and write an exponential moving average of the weights; its decay",
    )
    add_number(
        training,
        "--patience",
        0,
        "stop after this many estimates of the validation loss without a lower one; the lowest so "
        "far is always saved, and is written in the end; 0: off",
    )
    training.add_argument(
        "--prune",
        metavar="SHARE",
        help="make this share of the weights of each matrix in the blocks 0, little by little: "
        "0.5, or 2:4, where 2 of each 4 inputs stay; keep: what is 0 in --weights stays 0 "
        "(without it, training fills zeros)",
    )
    add_number(training, "--seed", 0, "random seed: initialisation, data order, dropout")


def add_learning_rate_flags(training):
    training.add_argument(
        "--lr",
        type=float,
        metavar="X",
        help="highest learning rate (default: 3e-3; with --weights 3e-5, with LoRA 3e-4)",
    )
    training.add_argument(
        "--schedule",
        choices=["cosine", "linear", "wsd"],
        default="cosine",
        help="how the learning rate falls; wsd: in the last fifth alone (default: %(default)s)",
    )
    training.add_argument(
        "--min-lr", type=float, metavar="X", help="what it falls to (default: a tenth of --lr)"
    )
    training.add_argument(
        "--warmup",
        type=int,
        metavar="N",
        help="steps in which it rises first (default: a twentieth of all)",
    )


def add_output_flags(parser):
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="for the model and its checkpoints (default: runs/MODEL)",
    )
    output.add_argument(
        "--resume",
        nargs="?",
        const=NEWEST,
        type=int,
        metavar="STEP",
        help="go on from the newest checkpoint in --out, or from that of a step; --steps, --lr, "
        "--schedule, --min-lr, --warmup, --weight-decay and --clip may be other ones",
    )
    add_number(output, "--eval-every", 250, "steps between estimates of the validation loss")
    output.add_argument(
        "--eval-first",
        action="store_true",
        help="record the validation loss before the first step, too, as that of step 0",
    )
    add_number(output, "--save-every", 500, "steps between checkpoints; 0: only the final model")
    add_number(output, "--keep", 2, "how many of the last checkpoints stay, besides the best")
    output.add_argument(
        "--save-dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of the finished model's weights (default: %(default)s)",
    )
    output.add_argument(
        "--prompt", metavar="TEXT", help="show at each estimate how the model continues this"
    )
    output.add_argument(
        "--log",
        choices=["wandb"],
        help="send the metrics to Weights & Biases, too; needs the package wandb "
        "(TensorBoard gets them where it is installed)",
    )
    output.add_argument(
        "--profile",
        type=Path,
        metavar="FOLDER",
        help="trace five steps into this folder, for Perfetto or xprof",
    )


def add_machine_flags(parser):
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device", help="cpu, gpu or tpu; gpu:1 is the second GPU (default: the best there is)"
    )
    machine.add_argument(
        "--parallel",
        default="auto",
        metavar="MODE",
        help="over devices: pmap, data, fsdp, tensor, data:2,tensor:4 or no (default: %(default)s)",
    )
    machine.add_argument(
        "--multihost",
        metavar="ADDRESS:PORT,HOSTS,HOST",
        help="of the first host, how many there are, which one this is; or auto",
    )
    machine.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="to compute in; auto: by the device (default: %(default)s)",
    )
    machine.add_argument(
        "--remat",
        action="store_true",
        help="gradient checkpointing: save memory, compute each block again in the backward pass",
    )


def add_number(group, flag: str, default: int | float, about: str):
    """A flag with a number; its help ends with the default."""
    group.add_argument(
        flag,
        type=type(default),
        default=default,
        metavar="N" if isinstance(default, int) else "X",
        help=f"{about} (default: %(default)s)",
    )


# Of a model from scratch.
SIZES = {"layers": 4, "heads": 4, "width": 128, "experts": 0, "vocab_size": 1024}


def add_size(group, flag: str, about: str):
    """A flag with a size in SIZES; None where it is not given."""
    default = SIZES[flag.removeprefix("--").replace("-", "_")]
    group.add_argument(flag, type=int, metavar="N", help=f"{about} (default: {default})")


def fill_defaults(args):
    """The defaults that depend on other flags."""
    if args.model is None:
        args.model = "gpt2"
        if args.weights not in (None, "tiny"):
            args.model = model_of(args.weights)
    if args.model not in MODELS:
        fail(f"no model file for {args.model!r}; there are: {', '.join(MODELS)}")
    if args.out is None:
        args.out = Path("runs", args.model)
    if args.weights == "tiny":
        args.weights = str(HERE / "tiny" / args.model)
    if args.weights and os.path.isdir(args.weights):
        args.weights = str(Path(args.weights).resolve())

    if args.lr is None:
        args.lr = 3e-3
        if args.weights:
            args.lr = 3e-5
        if args.lora:
            args.lr = 3e-4
    if args.min_lr is None:
        args.min_lr = args.lr / 10
    if args.warmup is None:
        args.warmup = args.steps // 20
    fill_sizes(args)
    choose_tokenizer(args)


def fill_sizes(args):
    """The sizes of a model from scratch; those given beside --weights are noted as not used."""
    given = [f"--{name.replace('_', '-')}" for name in SIZES if getattr(args, name) is not None]
    args.unused_sizes = given if args.weights else []
    for name, default in SIZES.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def choose_tokenizer(args):
    """The tokenizer of --tokens, or the first that fits --weights and --data."""
    kinds = ["bpe", "char", "bytes", "gpt2"]
    files = [file for name in args.data for file in (glob.glob(name) or [name])]
    encoded = [Path(file) for file in files if file.lower().endswith(".bin")]
    if encoded:
        kinds = [META] if (encoded[0].parent / META).exists() else ["gpt2"]
    if args.weights:
        kinds = ["its own"]
    if args.tokens is None:
        args.tokens = kinds[0]
    if args.weights and args.tokens not in kinds:
        fail(f"--tokens {args.tokens}: --weights bring their own tokenizer; leave --tokens out")
    if args.tokens not in kinds:
        fail(f"--tokens {args.tokens}: it must be {' or '.join(kinds)} here")


def check_source(args, source, context: float):
    """The flags whose defaults depend on the data. context: the context length of --weights."""
    is_text = isinstance(source, Texts)
    if args.block is None:
        args.block = min(64 if is_text else 1024, context)
    if not is_text:
        args.loss = args.loss or "assistant"
        args.pack = args.pack or "yes"
        return
    for flag in ("loss", "pack"):
        if getattr(args, flag) is not None:
            fail(f"--{flag} is for conversations, and this is text: leave it out")


def check_numbers(args):
    least = {
        "layers heads width block steps batch accumulate eval_every keep": 1,
        "vocab_size": 256,
        "seed save_every lora weight_decay min_lr warmup patience": 0,
    }
    for names, number in least.items():
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not value >= number:
                fail(f"--{name.replace('_', '-')} must be {number} or more")
    if args.seed >= 2**63:
        fail("--seed must be below 2^63")
    for name in ("dropout", "beta1", "beta2", "ema"):
        if not 0 <= getattr(args, name) < 1:
            fail(f"--{name}: 0 to below 1")


def check_model_flags(args):
    if args.width % args.heads != 0:
        fail("--width must be a multiple of --heads")
    if args.dropout and args.model not in ("gpt2", "opt"):
        fail(f"{args.model}.py has no --dropout")
    if args.experts and args.model not in ("mistral", "qwen"):
        fail("--experts are of --model mistral and --model qwen")
    if args.experts < 0 or args.experts == 1:
        fail("--experts must be 0, or 2 or more")
    if args.lora and not args.weights:
        fail("--lora adds to trained weights: name them with --weights")
    if args.merge and not args.lora:
        fail("--merge is for --lora")


def check_training_flags(args):
    if args.dataset and not find_spec("datasets"):
        fail("--dataset needs: pip install datasets")
    if args.warmup >= args.steps:
        fail("--warmup must be below --steps")
    if args.prune is not None:
        check_prune(args)
    if args.profile and args.steps < 15:
        fail("--profile traces five steps after ten: --steps 15")
    if not (args.clip > 0 and args.lr > 0 and args.lr >= args.min_lr):
        fail("--lr, --clip: above 0; --min-lr: at most --lr")
    if args.dtype == "float16" and args.model == "gemma":
        fail("gemma.py overflows in float16")


def check_prune(args):
    with explained(
        ValueError,
        f"--prune {args.prune}: it must be a share above 0 and below 1, a pattern such as 2:4 "
        "(2 of each 4 inputs stay), or keep",
    ):
        read_pruning(args.prune)
    if args.prune == "keep" and not args.weights:
        fail("--prune keep is for --weights with zeros: name them, or a share to prune")
    if args.lora and not args.merge:
        fail("--prune with --lora needs --merge: an adapter would fill the zeros")


def check_machine_flags(args):
    axes = re.findall("[a-z]+", args.parallel)
    if not re.fullmatch(PARALLEL, args.parallel) or len(set(axes)) < len(axes):
        fail("--parallel: pmap, or like fsdp or data:2,tensor:4")
    if not args.multihost:
        return

    if not re.fullmatch(r"auto|[^,]+:\d+,\d+,\d+", args.multihost):
        fail("--multihost must be auto, or like 10.0.0.1:1234,2,0")
    if args.parallel == "no" or ":" in (args.device or ""):
        fail("--multihost takes all devices: leave --parallel no and the number of --device out")
    if args.parallel == "pmap" or args.prompt:
        fail("--parallel pmap and --prompt are for one host")


def check_output_flags(args):
    out = args.out
    with explained(OSError, "--out cannot be used: {}"):  # such as a name that is too long
        if out.exists() and not out.is_dir():
            fail(f"--out {out} is a file: name a folder")
    if args.log == "wandb" and not find_spec("wandb"):
        fail("--log wandb needs: pip install wandb")
    stored = any(path.name.isdigit() for path in out.glob("checkpoints/*"))
    if args.resume is not None and not stored:
        fail(f"{out} has no checkpoints: leave --resume out to begin")
    if args.resume is None and (stored or any(out.glob("*.safetensors"))):
        fail(f"{out} holds a run already: add --resume to go on, or choose another --out")


if __name__ == "__main__":
    run_program(main)
