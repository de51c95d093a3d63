"""Measures any of the model files: speed and memory, beside the machine's limits and beside others.

    python bench.py                                      # the bundled tiny GPT-2; no network
    python bench.py --model gpt2 --task prefill,decode,load,start --vs transformers,ctranslate2
    python bench.py --model llama --preset meta-llama/Llama-2-7b-hf  # random weights of that size
    python bench.py --model opt --weights FOLDER --task validate     # the same as transformers?

Each task runs in a process of its own. A figure is the median of --runs runs, with the lowest and
the highest. The runs of all that is compared take turns, and so do the machine's limits: large
matrix multiplications, and reads of a large array. --out keeps every figure.

How to read this file: `main` starts the tasks, `run_task` is one of them, `tasks` lists them all.
"""

import argparse
import contextlib
import errno
import importlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from huggingface_hub.errors import StrictDataclassError
from jax.experimental.compilation_cache import compilation_cache
from safetensors import SafetensorError

HERE = Path(__file__).resolve().parent
INTERRUPTED = 130  # the exit code after Ctrl-C


def main() -> int:
    """Runs each task in a process of its own, and prints the figures; returns the exit code.

    1: a task failed or was given up, or `validate` found another model than transformers'.
    """
    args = parse_command_line()
    if sys.stdout is None:
        fail("standard output is closed")
    if args.scratch:
        run_task(args)
        return 0

    records = []
    code = 0
    parts = list_parts(args)
    for number, options in enumerate(parts, 1):
        print(f"bench.py: {number} of {len(parts)}: {shlex.join(options)}", file=sys.stderr)
        found, ended = run_part(args, options)
        records += found
        code = max(code, ended)
        if ended == INTERRUPTED:
            break

    if records:
        print_tables(records)
        warn_if_busy(records)
    if any(found["metric"] == "verdict" and found["value"] == 0 for found in records):
        code = max(code, 1)
    if args.out and records:
        write_results(args.out, records)
    return code


def tasks() -> dict[str, Callable]:
    """What --task takes: each is called with the arguments and the dtype, and records figures."""
    return {
        "prefill": partial(measure_speed, task="prefill"),
        "decode": partial(measure_speed, task="decode"),
        "train": partial(measure_speed, task="train"),
        "compile": measure_compilation,
        "load": measure_loading,
        "start": measure_start,
        "validate": validate,
        "eval": measure_loss,
        "compare": compare_texts,
        "plan": plan,
    }


def run_task(args) -> None:
    """A single task, in its own process."""
    args.devices = pick_devices(args.device, args.parallel)
    dtype = args.dtype[0]
    if dtype == "auto":
        dtype = "float32" if args.devices[0].platform == "cpu" else "bfloat16"

    # OSError: of the Hub, or of a file. InputError: of a checkpoint, or of a text that is too long.
    errors = (OSError, UnicodeDecodeError, importlib.import_module(args.model).InputError)
    with explained(errors, "{}"):
        check_length(args)
        if args.once:
            load_once(args, dtype)
        else:
            tasks()[args.task[0]](args, dtype)


def list_parts(args) -> list[list[str]]:
    """The options of each process: a task and a dtype, a line of --suite, or a model to plan."""
    dtypes = [["--dtype", dtype] for dtype in args.dtype]
    if args.dtype == ["auto"]:
        dtypes = [[]]
    if args.suite:
        lines = (HERE / f"benchmarks/{args.suite}.txt").read_text().splitlines()
        weights = args.chosen_weights or "random"
        return [
            ["--weights", weights, *dtype, *shlex.split(line)] for line in lines for dtype in dtypes
        ]

    if args.every_model:
        parts = []
        for name in MODELS:
            presets = importlib.import_module(name).PRESETS
            largest = max(presets, key=lambda preset: presets[preset].parameters)
            parts.append(["--model", name, "--preset", largest])
        return parts

    return [["--task", task, *dtype] for task in args.task for dtype in dtypes]


def run_part(args, options: list[str]) -> tuple[list[dict], int]:
    """Runs bench.py with these options added -> (the records it wrote, its exit code)."""
    limit = args.limit
    if "--limit" in options:
        limit = int(options[options.index("--limit") + 1])
    environment = {
        **os.environ,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # others need memory of a GPU, too
    }

    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, *sys.argv[1:], *options, "--scratch", scratch]
        try:
            done = subprocess.run(command, timeout=limit, env=environment)
            code = abs(done.returncode)
        except subprocess.TimeoutExpired:
            print(f"bench.py: given up after {limit} s", file=sys.stderr)
            code = 1
        except KeyboardInterrupt:
            code = INTERRUPTED
        return read_records(scratch), code


def check_length(args) -> None:
    """Fails where a task needs more tokens than the model's context length."""
    [task] = args.task
    needed = max(args.length)
    if task == "prefill":
        needed += 1
    elif task == "compile":
        needed += 2
    elif task == "decode":
        needed += args.new_tokens + 1

    context = find_config(args).max_position_embeddings
    if needed > context:
        fail(f"{needed} tokens do not fit the context of {context}: choose another --length")


# ------------------------------------------- Measuring --------------------------------------------


def in_turn(calls: dict, runs: int, warm=1) -> dict:
    """Seconds that each call takes, `runs` times, after `warm` calls that do not count.

    The calls take turns: where a machine becomes slower, it does so for all of them. A call must
    wait for its result.
    """
    seconds = {name: [] for name in calls}
    for run in range(warm + runs):
        for name, call in calls.items():
            took = timeit.timeit(call, number=1)
            if run >= warm:
                seconds[name].append(took)
    return seconds


class Limits:
    """What the device reaches: FLOP/s in matrix multiplications, B/s in reading its memory."""

    def __init__(self, dtype):
        n = 2048
        nbytes = 2**30  # fits no cache
        if jax.default_backend() != "cpu":
            n *= 4
            nbytes *= 4
        self.matrix = jnp.ones((n, n), dtype)
        self.numbers = jnp.ones(nbytes // 4, jnp.float32)
        self.nbytes = self.matrix.nbytes + nbytes
        self.work = {"FLOP/s": 2 * n**3, "B/s": nbytes}  # of one call
        self.calls = {"FLOP/s": self.multiply, "B/s": self.read}

    def multiply(self):
        jnp.matmul(self.matrix, self.matrix).block_until_ready()

    def read(self):
        jnp.sum(self.numbers).block_until_ready()


def resident_memory() -> int:
    """The most bytes of the machine's memory that this process has held."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def peak_memory() -> int:
    """The most bytes that the device has held; for a CPU, the process."""
    stats = jax.config.jax_default_device.memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    return resident_memory()


def weights_name(args) -> str:
    """tiny, a preset of random weights, a Hub id or a folder."""
    return args.preset if args.weights == "random" else args.weights


def record(args, metric: str, who: str, values: list, unit: str, **more) -> None:
    """Hands a figure to the process that started this one: a line of JSON in its folder."""
    figure = {
        "task": args.task[0],
        "metric": metric,
        "who": who,
        "value": np.median(values),
        "low": min(values),
        "high": max(values),
        "runs": len(values),
        "unit": unit,
        "model": args.model,
        "weights": weights_name(args),
        "device": jax.config.jax_default_device.device_kind,
        **more,
    }
    with open(Path(args.scratch, "records"), "a") as file:
        print(json.dumps(figure), file=file)


def read_records(scratch) -> list[dict]:
    """The figures that a process recorded."""
    file = Path(scratch, "records")
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


# --------------------------------------------- Theory ---------------------------------------------


@dataclass
class Costs:
    """What B sequences of T tokens need at least: FLOPs, and bytes that are read."""

    size: int  # parameters
    depth: int  # blocks
    weights: float  # bytes of the weights that one token of each sequence uses
    cache: int  # bytes of the KV cache
    prefill: float
    prefill_bytes: float
    decode: float  # of one token for each sequence
    decode_bytes: float
    train: float
    train_bytes: float


# Bytes of a weight of the blocks, and of the head; in int4, 32 weights share a scale of 16 bits.
BYTES_OF_WEIGHT = {"int8": (1, 1), "int4": (4.5 / 8, 1)}


@lru_cache(1)  # a plan asks for several numbers of chips
def costs(module, config, B: int, T: int, dtype, quantize=None) -> Costs:
    """The costs of B sequences of T tokens, from the shapes of the parameters alone.

    Each weight of a matrix takes part in 2 FLOPs for each token. Attention adds two products of
    H * Dh numbers in each layer, for each token attended to: all, or those in a sliding window. A
    backward pass costs two forward passes. Of E experts, each token chooses k: N tokens read
    E * (1 - (1 - k / E)^N) of them.
    """
    E = getattr(config, "num_experts", getattr(config, "num_local_experts", 1))
    chosen = getattr(config, "num_experts_per_tok", 1)
    size, head, shared, experts = count_weights(module, config)
    used = shared + experts * chosen / E  # weights of the blocks that a token is multiplied with
    bytes_each = jnp.dtype(dtype).itemsize
    in_block, in_head = BYTES_OF_WEIGHT.get(quantize, (bytes_each, bytes_each))

    def bytes_read(tokens):
        some = 1 - (1 - chosen / E) ** tokens
        return in_block * (shared + experts * some) + in_head * head

    layers = jax.eval_shape(lambda: module.init_cache(config, 1, T, dtype)).layers
    Dh = layers[0][0].shape[-1]
    keys = sum(keys_of(config, len(layers), T))  # which the last token attends to
    seen = 4 * config.num_attention_heads * Dh * keys  # FLOPs of attention for a token
    cache = B * sum(2 * k.size * k.dtype.itemsize for k, *_ in layers)
    return Costs(
        size=size,
        depth=len(layers),
        weights=bytes_read(B),
        cache=cache,
        prefill=B * (2 * used * T + seen * T + 2 * head),
        prefill_bytes=bytes_read(B * T),
        decode=B * (2 * (used + head) + seen),
        decode_bytes=bytes_read(B) + cache,
        train=3 * B * T * (2 * (used + head) + seen),
        train_bytes=3 * bytes_read(B * T),
    )


def keys_of(config, layers: int, T: int) -> list[int]:
    """How many keys a token of T attends to in each layer; the causal mask is not counted."""
    window = getattr(config, "sliding_window", None) or T
    kinds = getattr(config, "layer_types", ["sliding_attention"] * layers)
    return [min(T, window) if kind == "sliding_attention" else T for kind in kinds]


def count_weights(module, config) -> tuple[int, int, int, int]:
    """(all parameters, weights of the head, of other matrices that all tokens use, of experts)."""
    size = head = shared = experts = 0
    for path, param in nnx.to_flat_state(module.skeleton(config)[1]):
        size += param.size
        if path[0] in ("wte", "embed_tokens") and not head:
            head = param.size  # the token table is the head, too
        elif path[0] == "lm_head":
            head = param.size  # unless the model has a head of its own
        elif path[-1] == "kernel" and "experts" in path:
            experts += param.size
        elif path[-1] == "kernel":
            shared += param.size
    return size, head, shared, experts


# Data sheets: bfloat16 FLOP/s, memory bandwidth, bytes of memory, bytes/s to the other chips.
CHIPS = {
    "a100": (312e12, 2.039e12, 80e9, 300e9),
    "h100": (989e12, 3.35e12, 80e9, 450e9),
    "h200": (989e12, 4.8e12, 141e9, 450e9),
    "v5e": (197e12, 0.819e12, 16e9, 200e9),
    "v5p": (459e12, 2.765e12, 95e9, 600e9),
    "v6e": (918e12, 1.64e12, 32e9, 448e9),
}


def plan(args, dtype) -> None:
    """What a preset needs at least on N chips, from its config and the data sheet alone."""
    config = find_config(args)
    for B, T, chips in itertools.product(args.batch, args.length, args.chips):
        needs = costs(importlib.import_module(args.model), config, B, T, "bfloat16")
        shape = {
            "batch": B,
            "length": T,
            "chips": f"{chips} {args.kind}",
            "dtype": "bfloat16",
            "device": None,  # it runs on none
        }
        width = getattr(config, "n_embd", None) or config.hidden_size
        plan_training(args, needs, B, T, width, chips, shape)
        plan_decoding(args, needs, B, chips, shape)
        plan_scaling(args, needs, chips, shape)


def plan_training(args, needs: Costs, B: int, T: int, width: int, chips: int, shape) -> None:
    """FSDP: bfloat16 weights are all-gathered twice and gradients reduce-scattered once.

    The float32 state stays sharded: weights, gradients and two moments, 16 bytes a parameter. With
    gradient checkpointing, the input of each block is kept, and a step costs a forward pass more.
    """
    flops, bandwidth, _, link = CHIPS[args.kind]
    times = {
        "matrix multiplications": 4 / 3 * needs.train / chips / flops,
        "communication": 6 * needs.size * (chips - 1) / chips / link,
        "memory bandwidth": 28 * needs.size / chips / bandwidth,
    }
    longest = max(times, key=times.get)
    held = (16 * needs.size + 2 * needs.depth * width * T * B) / chips
    record_plan(args, "train", held, times[longest], B * T, longest, shape)


def plan_decoding(args, needs: Costs, B: int, chips: int, shape) -> None:
    """Tensor parallelism: each chip reads its part of the weights and of the KV cache."""
    _, bandwidth, _, _ = CHIPS[args.kind]
    held = (2 * needs.size + needs.cache) / chips
    seconds = needs.decode_bytes / chips / bandwidth
    record_plan(args, "decode", held, seconds, B, "memory bandwidth", shape)


def record_plan(args, what, held, seconds, tokens, longest, shape) -> None:
    _, _, memory, _ = CHIPS[args.kind]
    fits = "does not fit"
    if held <= memory:
        fits = f"fits {memory / 1e9:.0f} GB"
    name = weights_name(args)
    record(args, f"{what}: memory", name, [held / 1e9], "GB a chip", **shape, of=fits)
    limit = f"limited by {longest}"
    record(args, f"{what}: step", name, [1e3 * seconds], "ms", **shape, of=limit)
    record(args, f"{what}: speed", name, [tokens / seconds], "tokens/s", **shape)


def plan_scaling(args, needs: Costs, chips: int, shape) -> None:
    """Data parallelism whose all-reduce of float32 gradients waits for the whole backward pass."""
    flops, _, _, link = CHIPS[args.kind]
    work = needs.train / chips / flops
    sums = 8 * needs.size * (chips - 1) / chips / link
    share = work / (work + sums)
    of = f"{number(1e3 * work)} ms matmul, {number(1e3 * sums)} ms all-reduce"
    record(args, "data parallel", weights_name(args), [share], "of linear", **shape, of=of)


# ------------------------------------ Subjects: this project's ------------------------------------


def random_model(module, config, dtype, param_dtype, mesh=None, quantize=None, **options):
    """A model with normal(0.02) weights, drawn on the device, each in the type it is stored in."""
    options = {"dtype": dtype, "param_dtype": param_dtype, **options}
    _, state = module.skeleton(config, **options)
    graphdef, loaded = module.skeleton(config, quantize, **options)
    params = {module.join(parts): param for parts, param in nnx.to_flat_state(loaded)}

    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    for i, (path, param, *_) in enumerate(module.named_parameters(state)):
        if path.endswith("scale"):
            drawn = jnp.ones(param.shape, param.dtype)
        else:
            drawn = 0.02 * draw(jax.random.key(i), param.shape, param.dtype)
        values = {path: drawn}
        if path not in params:
            values = module.quantize_tensor(path, drawn, quantize)
        module.place(params, values, mesh, config)
    return nnx.merge(graphdef, loaded)


def make_meshes(parallel: str, devices: list, heads: int, needed: float) -> list:
    """The meshes to measure: of 1, 2 and 4 devices, or of one and of what --parallel asks for.

    needed: bytes of the model. auto is data, or tensor where one device is too small for them;
    that device is then left out.
    """
    fits = needed <= memory_of(devices[0])
    if parallel == "auto":
        parallel = "data" if fits else "tensor"
        than = "less" if fits else "more"
        print(f"--parallel {parallel}: the state takes {than} than the memory of one device")

    if parallel in ("pmap", "data", "fsdp", "tensor"):
        counts = [n for n in (1, 2, 4) if n <= len(devices)]
        meshes = [jax.sharding.Mesh(np.array(devices[:n]), [parallel]) for n in counts]
    else:
        many = make_mesh(parallel, devices, heads)
        single = np.reshape(devices[:1], [1] * len(many.shape))
        meshes = [jax.sharding.Mesh(single, many.axis_names), many]
    return [mesh for mesh in meshes if fits or mesh.size > 1]


class Ours:
    """This project's side of a comparison.

    Devices along the mesh's axis `tensor` share their rows; others have rows of their own.
    """

    def __init__(self, args, dtype, mesh=None):
        self.args = args
        self.dtype = dtype
        self.quantize = args.quantize
        self.mesh = mesh
        self.axes = {}
        self.name = "ours"
        if mesh is not None:
            self.axes = dict(mesh.shape)
            self.name = ",".join(f"{axis}:{n}" for axis, n in self.axes.items())
        self.size = math.prod(self.axes.values())  # devices
        self.groups = self.size // self.axes.get("tensor", 1)  # of devices that share their rows

        self.module = importlib.import_module(args.model)
        self.config = find_config(args)
        if args.chunked:
            self.module.LONG = 1

    @cached_property
    def model(self):
        """The model, with its parameters in the type it computes in, or quantized."""
        quantize = self.quantize
        device = jax.config.jax_default_device or jax.devices()[0]
        if quantize is None and self.dtype == "bfloat16" and device.platform == "cpu":
            quantize = "bfloat16"  # as sample.py does: the same weights, widened faster
        return self.read(self.dtype, quantize)

    def read(self, param_dtype, quantize=None):
        """The model of --weights, with its parameters in that type."""
        how = {
            "dtype": self.dtype,
            "param_dtype": param_dtype,
            "remat": self.args.remat,
            "mesh": self.mesh,
            "quantize": quantize,
        }
        if self.args.weights == "random":
            return random_model(self.module, self.config, **how)
        return self.module.load(folder_of(self.args), **how)

    def prefill(self, prompts):
        """A call that makes the first token after each prompt."""
        return self.generate(prompts, 1)

    def generate(self, prompts, n: int):
        """A call that makes n tokens after each prompt."""
        if self.mesh is not None:
            return self.generate_on_mesh(prompts, n)
        args = self.args
        return partial(
            self.module.generate,
            self.model,
            prompts,
            n,
            key=jax.random.key(0),
            temperature=args.temperature or 0,
            top_k=args.top_k,
            top_p=args.top_p,
        )

    def generate_on_mesh(self, prompts, n: int):
        """A call that does what the model file's `generate` does, as one program on the mesh."""
        module = self.module
        tokens, positions, S = module.batch_prompts(self.config, prompts, n)
        graphdef, state = nnx.split(self.model)
        how = {
            "top_k": self.args.top_k,
            "sampling": {
                "temperature": self.args.temperature or None,
                "top_p": self.args.top_p,
                "min_p": None,
                "repetition_penalty": None,
            },
        }

        def generate(state, tokens, positions, keys):
            cache = module.init_cache(self.config, len(tokens), S, self.dtype)
            cache, token = module.prefill(graphdef, state, cache, tokens, positions, keys, **how)
            new = token[:, None]
            while new.shape[1] < n:
                steps = min(module.STEPS, n - new.shape[1])
                cache, more = module.decode(
                    graphdef, state, cache, new[:, -1], keys, steps=steps, **how
                )
                new = jnp.concatenate([new, more[:, :steps]], axis=1)
            return new

        keys = jax.random.split(jax.random.key(0), len(prompts))
        rows = self.place(tokens, positions, keys)
        run = self.compiled(generate, (state, *rows), axes=(None, 0, 0, 0), out=0)
        return lambda: np.asarray(run(state, *rows)).reshape(-1, n).tolist()

    def compiled(self, function, inputs, axes, out, donate=()):
        """A function's program for such inputs, on the mesh. axes, out: where pmap has devices."""
        mesh = self.mesh
        program = jax.jit(function, donate_argnums=donate)
        if "pmap" in self.axes:
            program = jax.pmap(
                function,
                axis_name="pmap",
                in_axes=axes,
                out_axes=out,
                devices=[*mesh.devices.flat],
                donate_argnums=donate,
            )
            mesh = None
        with jax.set_mesh(mesh):
            return program.lower(*inputs).compile()

    def place(self, *arrays) -> list:
        """Arrays of rows, sharded over all axes but tensor; pmap wants an axis of devices first."""
        if "pmap" in self.axes:
            arrays = [x.reshape(self.groups, -1, *x.shape[1:]) for x in arrays]
        where = None
        if self.mesh is not None:
            rows = tuple(axis for axis in self.axes if axis != "tensor")
            where = jax.NamedSharding(self.mesh, jax.P(rows))
        return [jax.device_put(x, where) for x in arrays]

    def train(self, rows):
        """A call that makes a step of AdamW on rows of T + 1 tokens, and returns the loss.

        Weights and optimizer are in float32.
        """
        graphdef, params = nnx.split(self.read("float32"))
        [tokens] = self.place(np.array(rows))
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
        opt_state = optimizer.init(params)
        spread = jax.tree.map(lambda p: p.sharding, params)
        how = Training(graphdef, optimizer, spread, self.mesh, self.axes, self.args)
        step = self.compiled(
            partial(train_step, how),
            (params, opt_state, tokens),
            axes=(None, None, 0),
            out=None,
            donate=(0, 1),
        )

        def run():
            nonlocal params, opt_state
            params, opt_state, loss = step(params, opt_state, tokens)
            return loss.item()

        return run


@dataclass
class Training:
    """What `train_step` needs beside its arrays."""

    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    spread: Any  # the sharding of each parameter
    mesh: Any
    axes: dict  # of the mesh
    args: argparse.Namespace


def train_step(how: Training, params, opt_state, tokens):
    """One update of the weights -> (params, opt_state, loss)."""
    # Gradient accumulation: the batch in parts, [parts, rows, T + 1].
    parts = tokens.reshape(-1, how.args.accumulate, tokens.shape[-1]).swapaxes(0, 1)
    loss_and_gradients = jax.value_and_grad(partial(mean_loss, how))

    def add(total, part):
        return jax.tree.map(jnp.add, total, loss_and_gradients(params, part)), None

    total = loss_and_gradients(params, parts[0])
    if len(parts) > 1:
        total, _ = jax.lax.scan(add, total, parts[1:])
    loss, gradients = jax.tree.map(lambda x: x / len(parts), total)

    if "pmap" in how.axes:
        loss, gradients = jax.lax.pmean((loss, gradients), "pmap")
    updates, opt_state = how.optimizer.update(gradients, opt_state, params)
    params = optax.apply_updates(params, updates)
    if how.mesh is not None and "pmap" not in how.axes:
        params = jax.lax.with_sharding_constraint(params, how.spread)
    return params, opt_state, loss


def mean_loss(how: Training, params, tokens):
    """The mean cross-entropy of rows of T + 1 tokens."""
    if "fsdp" in how.axes:
        params = jax.tree.map(partial(all_gather, how), params, how.spread)
    model = nnx.merge(how.graphdef, params)
    x, _ = model.hidden(tokens[:, :-1])  # [B, T, D]
    targets = tokens[:, 1:]  # [B, T]

    def losses(rows):
        x, targets = rows
        return optax.softmax_cross_entropy_with_integer_labels(model.head(x), targets)

    if how.args.loss_parts == 1:
        return losses((x, targets)).mean()

    # The logits of some positions at a time; they are computed again in the backward pass.
    positions = math.ceil(targets.shape[1] / how.args.loss_parts)
    rows = [x.swapaxes(0, 1), targets.swapaxes(0, 1)]  # [T, B, D], [T, B]
    return jax.lax.map(jax.checkpoint(losses), rows, batch_size=positions).mean()


def all_gather(how: Training, param, sharding):
    """A parameter that FSDP shards, whole where it is used; parts along `tensor` stay parts."""
    spec = jax.P(*(axis if axis == "tensor" else None for axis in sharding.spec))
    return jax.lax.with_sharding_constraint(param, jax.NamedSharding(how.mesh, spec))


# --------------------------------------- Subjects: the peers --------------------------------------


# What transformers, and the libraries that it calls, raise for a checkpoint that they do not read.
REFUSALS = (
    *(OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError),
    SafetensorError,
    StrictDataclassError,
)


class Unquantized(Ours):
    """Our model without --quantize."""

    def __init__(self, args, dtype, folder):
        super().__init__(args, dtype)
        self.name = "unquantized"
        self.quantize = None


class Transformers:
    """Hugging Face's transformers on PyTorch, with the same weights; eager, or compiled."""

    groups = 1

    def __init__(self, args, dtype, folder, compiled=False):
        import torch
        from transformers import AutoModelForCausalLM

        self.args = args
        self.torch = torch
        self.compiled = compiled
        self.name = "transformers-compile" if compiled else "transformers"
        self.device = torch_device()
        self.dtype = getattr(torch, dtype)
        torch.backends.cuda.matmul.allow_tf32 = True  # as JAX does

        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype)
        except REFUSALS as error:
            raise OSError(f"transformers does not read {folder}: {error}") from error
        self.model = model.to(self.device)
        self.model.generation_config.eos_token_id = None  # nothing ends a text before n tokens
        self.forward = torch.compile(self.model) if compiled else self.model

    def prefill(self, prompts):
        """A call that makes the likeliest token after each prompt, and fills a KV cache."""
        ids = self.torch.tensor(prompts, device=self.device)

        def run():
            with self.torch.no_grad():
                logits = self.forward(ids, use_cache=True, logits_to_keep=1).logits
                return logits.argmax(-1).tolist()

        return run

    def generate(self, prompts, n: int):
        """A call that makes n tokens after each prompt; shorter ones are padded on the left."""
        args = self.args
        T = max(map(len, prompts))
        padded = [[-1] * (T - len(prompt)) + prompt for prompt in prompts]
        rows = self.torch.tensor(padded, device=self.device)
        options = {
            "attention_mask": (rows >= 0).long(),
            "max_new_tokens": n,
            "pad_token_id": 0,
            "do_sample": bool(args.temperature),
            "temperature": args.temperature or 1.0,
            "top_k": args.top_k or 0,
            "top_p": args.top_p or 1.0,
            "cache_implementation": "static" if self.compiled else None,
        }
        return lambda: self.model.generate(rows.clamp(0), **options).tolist()

    def train(self, rows):
        """A call that makes a step of AdamW, as ours: no dropout, float32 weights."""
        torch = self.torch
        model = self.model.float()
        ids = torch.tensor(rows).to(self.device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

        def run():
            with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
                logits = self.forward(ids[:, :-1], use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return run


def torch_device() -> str:
    """PyTorch's name of the device that JAX uses."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


class CTranslate2:
    """OpenNMT's CTranslate2, with the same weights, which its own converter writes. No training."""

    name = "ctranslate2"
    groups = 1

    def __init__(self, args, dtype, folder):
        import ctranslate2

        self.args = args
        self.kept = tempfile.TemporaryDirectory()
        converter = ctranslate2.converters.TransformersConverter(str(folder))
        stored = args.quantize or dtype
        converter.convert(self.kept.name, quantization=stored, force=True)
        self.vocabulary = json.loads(Path(self.kept.name, "vocabulary.json").read_text())

        # The converter writes null for tokens that a model does not have, and cannot read it.
        file = Path(self.kept.name, "config.json")
        names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), self.vocabulary[0])
        file.write_text(json.dumps(json.loads(file.read_text()) | names))
        self.generator = ctranslate2.Generator(
            self.kept.name, torch_device(), compute_type=stored, intra_threads=os.cpu_count()
        )

    def prefill(self, prompts):
        """A call that makes the first token after each prompt."""
        return self.generate(prompts, 1)

    def generate(self, prompts, n: int):
        """A call that makes n tokens after each prompt."""
        args = self.args
        words = [[self.vocabulary[token] for token in prompt] for prompt in prompts]
        top_k = 1  # greedy
        if args.temperature:
            top_k = args.top_k or 0
        return partial(
            self.generator.generate_batch,
            words,
            max_length=n,
            min_length=n,
            include_prompt_in_result=False,
            end_token=[],
            sampling_topk=top_k,
            sampling_topp=args.top_p or 1,
            sampling_temperature=args.temperature or 1,
        )


class LlamaCpp:
    """llama.cpp, as a server in this process, with the same weights in a GGUF file. No training."""

    name = "llama.cpp"
    groups = 1

    def __init__(self, args, dtype, folder):
        import xllamacpp

        if jax.default_backend() != "cpu":
            raise OSError("--vs llama.cpp is measured on a CPU: add --device cpu")
        self.args = args
        tokens = max(args.length) + args.new_tokens + 1  # of the longest text
        kind = GGML_KINDS[args.quantize or dtype]
        file = Path(args.scratch, "llama.cpp.gguf")
        write_gguf(importlib.import_module(args.model), folder, file, kind, tokens)

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE  # read, not mapped
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = os.cpu_count()
        params.cpuparams_batch.n_threads = os.cpu_count()
        params.n_parallel = max(args.batch)
        params.n_ctx = params.n_parallel * tokens
        if kind == "F32":  # otherwise the KV cache is in float16, its default
            params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
            params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32

        # No KV cache is kept for later prompts that begin alike, and no log is printed.
        params.cache_ram_mib = 0
        params.n_ctx_checkpoints = 0
        params.verbosity = -1
        self.server = xllamacpp.Server(params)

    def prefill(self, prompts):
        """A call that makes the first token after each prompt."""
        return self.generate(prompts, 1)

    def generate(self, prompts, n: int):
        """A call that makes n tokens after each prompt; the server runs them as one batch."""
        args = self.args
        sampling = {"samplers": ["top_k"], "top_k": 1}  # greedy
        if args.temperature:
            sampling = {
                "samplers": ["top_k", "temperature", "top_p"],
                "temperature": args.temperature,
                "top_k": args.top_k or 0,
                "top_p": args.top_p or 1,
            }
        request = {"prompt": prompts, "max_tokens": n, "cache_prompt": False, **sampling}

        def run():
            rows = self.server.handle_completions(request)["choices"]
            return [[int(token) for token in row["text"].split()] for row in rows]

        return run


# How llama.cpp holds the matrices, by --quantize or --dtype. Its F16 was faster than its BF16.
GGML_KINDS = {
    "float32": "F32",
    "bfloat16": "F16",
    "float16": "F16",
    "int8": "Q8_0",  # integers of 8 bits; 32 neighbours in a row share a scale
    "int4": "Q4_0",  # integers of 4 bits
}


def write_gguf(module, folder: Path, file: Path, kind: str, tokens: int) -> None:
    """Writes a checkpoint as a GGUF file, with llama.cpp's names, layouts and metadata.

    kind: of the matrices; a value of GGML_KINDS. tokens: of the longest text.
    OSError: llama.cpp has no such model.
    """
    import gguf

    model_type = module.read_config(folder).to_hf()["model_type"]
    architectures = {hf: ggml for ggml, hf in module.GGUF_KINDS.items()}
    if model_type not in architectures or model_type == "qwen3_moe":
        raise OSError(
            "--vs llama.cpp is for GPT-2, Llama, Mistral, Gemma and Qwen without experts, "
            f"not {model_type}"
        )

    model = module.load(folder, dtype="float32")
    architecture = architectures[model_type]
    writer = gguf.GGUFWriter(file, architecture)
    add_metadata(writer, module, model.config)

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    layers = getattr(model.config, module.GGUF_KEYS["block_count"])
    names = gguf.get_tensor_name_map(numbers[architecture], layers)
    for path, param, name, _ in module.named_parameters(nnx.state(model)):
        renamed = names.get_name(name, try_suffixes=(".weight", ".bias"))
        tensor = ggml_layout(architecture, path, np.asarray(param[...]), model.config)
        held = gguf.GGMLQuantizationType[ggml_kind(module, path, tensor, kind)]
        data = gguf.quants.quantize(np.ascontiguousarray(tensor), held)
        writer.add_tensor(renamed, data, raw_dtype=held)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_read_back(module, file, model.config, tokens)


def add_metadata(writer, module, config) -> None:
    """Adds what llama.cpp must know of a model beside its tensors."""
    values = config.to_hf()
    if "n_inner" in values:
        values["n_inner"] = config.n_inner or 4 * config.n_embd
    for key, name in (module.GGUF_KEYS | module.GGUF_OPTIONAL).items():
        value = values.get(name)
        if value is None or "expert" in key:
            continue
        add = writer.add_uint32
        if re.search("rope|epsilon|softcapping|scale", key):
            add = writer.add_float32
        add(f"{writer.arch}.{key}", value)
    if "head_dim" in values:
        writer.add_value_length(config.head_dim)

    # Gemma: every n-th layer attends to all tokens, the others to a sliding window.
    if writer.arch.startswith("gemma") and "layer_types" in values:
        n = len(config.layer_types) + 1  # no layer does
        if "full_attention" in config.layer_types:
            n = config.layer_types.index("full_attention") + 1
        writer.add_uint32(f"{writer.arch}.attention.sliding_window_pattern", n)

    # RoPE scaling: a factor for all frequencies, as in Gemma 3, or one for each, as in Llama 3.1.
    if getattr(config, "rope_factor", 1) != 1:
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(config.rope_factor)
    scaling = values.get("rope_scaling") or {}
    if scaling.get("rope_type") == "llama3":
        inv_freq = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        divisors = inv_freq / module.scale_low_frequencies(inv_freq, scaling)
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))

    # This kind of vocabulary has no token that ends a text. The text of a token is its id and a
    # blank, so that `LlamaCpp.generate` can read the ids in a text.
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list([f"{token} " for token in range(config.vocab_size)])


def ggml_layout(architecture: str, path: str, tensor, config):
    """A parameter as llama.cpp lays it out."""
    if path.endswith("kernel"):
        tensor = tensor.T  # [in, out] -> [out, in]
    if architecture in ("llama", "smollm3", "granite") and re.search("[qk]_proj", path):
        # RoPE rotates neighbours there, and here row i of a head with row i + Dh / 2.
        halves = tensor.reshape(-1, 2, config.head_dim // 2, *tensor.shape[1:])
        tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
    if architecture.startswith("gemma") and path.endswith("scale"):
        tensor = tensor + 1
    return tensor


def ggml_kind(module, path: str, tensor, kind: str) -> str:
    """How a tensor is held where matrices are held in a kind of numbers."""
    if tensor.ndim == 1 or path.startswith("wpe"):
        return "F32"
    if kind.startswith("Q") and tensor.shape[-1] % 32 != 0:
        return "F16"
    if kind == "Q4_0" and path in module.VOCABULARY:
        # As here. Files of Q4_0 mostly have Q6_K instead, which the package gguf cannot write.
        return "Q8_0"
    return kind


# Fields of a Config that do not change what a model computes.
NO_MATTER = (
    r"n_inner|initializer_range|router_aux_loss_coef|no_rope_layer_interval|\w+_(pdrop|token_id)"
)


def check_read_back(module, file: Path, config, tokens: int) -> None:
    """OSError where a GGUF file cannot say what a config does, and llama.cpp has another model.

    A sliding window that holds all tokens of the longest text does not matter.
    """
    found = module.read_config(file)
    written = config.to_hf()
    for name, value in vars(config).items():
        if name == "layer_types" and name not in written:
            continue  # of a Mistral: they follow from sliding_window
        window = name == "sliding_window" and value is not None and value >= tokens
        same = getattr(found, name) == value
        if not same and not window and not re.fullmatch(NO_MATTER, name):
            raise OSError(f"--vs llama.cpp: a GGUF file cannot say {name} {value!r}")


# What --vs takes.
PEERS = {
    "transformers": Transformers,
    "ctranslate2": CTranslate2,
    "llama.cpp": LlamaCpp,
    "transformers-compile": partial(Transformers, compiled=True),
    "unquantized": Unquantized,
}

# --------------------------------------------- Speed ----------------------------------------------

# The work of a run, in the unit of the limit that it meets first; and the letters in it.
FORMULAS = {
    "prefill": {
        "FLOP/s": "B (2 N T + 4 L H Dh T^2 + 2 V D) FLOPs",
        "B/s": "bytes of the weights",
    },
    "decode": {
        "FLOP/s": "B (2 (N + V D) + 4 L H Dh T) FLOPs",
        "B/s": "bytes of the weights and of the KV cache, half full",
    },
    "train": {
        "FLOP/s": "3 B T (2 (N + V D) + 4 L H Dh T) FLOPs",
        "B/s": "3 times the bytes of the weights",
    },
}
LETTERS = (
    "B sequences of T tokens; L blocks of H heads, Dh numbers each; N weights in their matrices; "
    "D numbers in the residual stream; V tokens in the vocabulary"
)


def measure_speed(args, dtype, task: str) -> None:
    """Tokens/s of prefill, decode or training steps, beside what the machine allows."""
    subjects = find_subjects(args, dtype, task)
    limits = Limits(dtype)
    for B, T in itertools.product(args.batch, args.length):
        seconds, reached = time_subjects(args, task, subjects, limits, B, T)
        report_speed(args, dtype, task, subjects, seconds, reached, B, T)

    if len(subjects) == 1:
        memory = (peak_memory() - limits.nbytes) / 1e9
        how = {"dtype": dtype, "how": args.how}
        record(args, f"memory of {task}", subjects[0].name, [memory], "GB", **how)


def find_subjects(args, dtype, task: str) -> list:
    """What is measured: ours, on one device or on each mesh of --parallel, then those of --vs."""
    if args.parallel == "no":
        subjects = [Ours(args, dtype)]
    else:
        module = importlib.import_module(args.model)
        config = find_config(args)
        bytes_each = jnp.dtype(dtype).itemsize
        if task == "train":
            bytes_each = 16  # float32: the weight, its gradient, and two moments
        needed = bytes_each * costs(module, config, 1, 1, dtype).size
        meshes = make_meshes(args.parallel, args.devices, config.num_attention_heads, needed)
        subjects = [Ours(args, dtype, mesh) for mesh in meshes]
    return subjects + [PEERS[name](args, dtype, merged_folder(args, dtype)) for name in args.vs]


def time_subjects(args, task: str, subjects, limits: Limits, B: int, T: int) -> tuple[dict, dict]:
    """({subject: seconds of each run}, {unit: what the machine reached in each run}).

    A run of decode is one token for each sequence: n more tokens take the time of n + 1 tokens,
    less the shortest time of the first.
    """
    n = args.new_tokens
    config = subjects[0].config
    calls = {}
    for subject in subjects:
        rows = B * subject.groups
        if task == "decode":
            prompts = some_prompts(args, config, rows, T)
            calls[subject.name, "first"] = subject.generate(prompts, 1)
            calls[subject.name, "all"] = subject.generate(prompts, n + 1)
        elif task == "prefill":
            calls[subject.name, "all"] = subject.prefill(some_prompts(args, config, rows, T))
        elif hasattr(subject, "train"):
            calls[subject.name, "all"] = subject.train(some_prompts(args, config, rows, T + 1))

    took = in_turn(calls | limits.calls, args.runs)
    reached = {unit: [work / s for s in took[unit]] for unit, work in limits.work.items()}
    if args.profile:
        traced = {key: call for key, call in calls.items() if key[0] == subjects[0].name}
        with jax.profiler.trace(args.profile):
            in_turn(traced, 1, warm=0)

    seconds = {name: took[name, part] for name, part in calls if part == "all"}
    if task == "decode":
        for name, whole in seconds.items():
            first = min(took[name, "first"])
            seconds[name] = [(each - first) / n for each in whole]
    return seconds, reached


def some_prompts(args, config, B: int, T: int) -> list[list[int]]:
    """B prompts of T random tokens; with --ragged each is an eighth of T shorter than the last."""
    rng = np.random.default_rng(0)
    lengths = [T] * B
    if args.ragged:
        lengths = [max(1, T - (i % 8) * T // 8) for i in range(B)]
    return [rng.integers(0, config.vocab_size, length).tolist() for length in lengths]


def report_speed(args, dtype, task: str, subjects, seconds, reached, B: int, T: int) -> None:
    """Records the tokens/s of each subject, and the share of the machine's limit that ours is."""
    ours = subjects[0]
    shape = {"batch": B, "length": T, "dtype": dtype, "how": args.how}

    tokens = {}
    for subject in subjects:
        if subject.name in seconds:
            each = 1 if task == "decode" else T  # tokens of a sequence in a run
            work = B * subject.groups * each
            tokens[subject.name] = [work / took for took in seconds[subject.name]]

    took = ours.size * np.median(seconds[ours.name])  # seconds of all devices together
    seen = T + args.new_tokens // 2 if task == "decode" else T
    needs = costs(ours.module, ours.config, B * ours.groups, seen, dtype, args.quantize)
    theory = share_of_limit(task, needs, took, reached)
    compare(args, task, tokens, "tokens/s", shape, **theory)

    if args.parallel != "no":
        report_scaling(args, task, subjects, tokens, shape)
    if task == "prefill" and B == 1:
        waits = [1e3 * each for each in seconds[ours.name]]
        record(args, "first token", ours.name, waits, "ms", **shape)
    if task == "train":
        rows = [speed / T for speed in tokens[ours.name]]
        record(args, "rows", ours.name, rows, "rows/s", **shape)


def share_of_limit(task: str, needs: Costs, took: float, reached: dict) -> dict:
    """What is recorded of a run's limit: the one of the two that allows less, and the share of it.

    took: seconds; reached: {unit: what the machine reached in each run}.
    """
    flops = getattr(needs, task)
    nbytes = getattr(needs, f"{task}_bytes")
    intensity = flops / nbytes

    # Reading the weights and the KV cache, or computing.
    limits = {unit: np.median(speeds) for unit, speeds in reached.items()}
    unit = "FLOP/s" if limits["FLOP/s"] < intensity * limits["B/s"] else "B/s"
    work = {"FLOP/s": flops, "B/s": nbytes}[unit]
    return {
        "formula": f"share = {FORMULAS[task][unit]} / time / limit",
        "limits": limits,
        "limit_range": [min(reached[unit]), max(reached[unit])],
        "share": work / took / limits[unit],
        "of": with_prefix(limits[unit], unit),
        "in_cache": unit == "B/s" and nbytes <= cache_size(),
        "flops": flops / took,
        "intensity": intensity,
    }


def cache_size() -> int:
    """The bytes of the processor's largest cache; 0 where that is not known, as on a GPU."""
    if jax.config.jax_default_device.platform != "cpu":
        return 0
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    kibibytes = [int(file.read_text().strip().removesuffix("K")) for file in files]
    return 1024 * max(kibibytes, default=0)


def compare(args, metric: str, values: dict, unit: str, shape: dict, **theory) -> None:
    """Records what each subject reached, and the ratio of ours to each of the others, run by run.

    values: {subject: a figure for each run}, with ours first; theory: of ours.
    """
    for i, (who, found) in enumerate(values.items()):
        more = theory if i == 0 else {}
        record(args, metric, who, found, unit, **shape, **more)

    if "ours" in values:
        for who, found in values.items():
            if who != "ours":
                ratios = [a / b for a, b in zip(values["ours"], found, strict=True)]
                record(args, metric, f"ours / {who}", ratios, "times", **shape)


def report_scaling(args, task: str, subjects, tokens: dict, shape: dict) -> None:
    """Records how near several devices come to that many times the speed of the fewest."""
    fewest, *others = subjects
    for more in others:
        share = fewest.size / more.size
        pairs = zip(tokens[more.name], tokens[fewest.name], strict=True)
        ratios = [share * a / b for a, b in pairs]
        record(args, f"{task}, scaling", more.name, ratios, "of linear", **shape)


# -------------------------------- Compilation, loading and starting -------------------------------


def measure_compilation(args, dtype) -> None:
    """Seconds that a first run takes longer than a second: compiling, or reading the cache."""
    ours = Ours(args, dtype)
    B, T = args.batch[0], args.length[0]
    run = ours.generate(some_prompts(args, ours.config, B, T), 2)  # prefill and decode
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

    cold = []
    warm = []
    for _ in range(args.runs):
        with tempfile.TemporaryDirectory() as folder:
            jax.config.update("jax_compilation_cache_dir", folder)
            cold.append(compiling_seconds(run))
            warm.append(compiling_seconds(run))  # from the folder that the first one filled
    for metric, seconds in [("compile, cold", cold), ("compile, cached", warm)]:
        record(args, metric, "ours", seconds, "s", batch=B, length=T, dtype=dtype)


def compiling_seconds(run: Callable) -> float:
    """How much longer a first run takes than a second, with no program in memory."""
    compilation_cache.reset_cache()
    jax.clear_caches()
    first, second = in_turn({"run": run}, 2, warm=0)["run"]
    return first - second


def run_apart(*program) -> str:
    """Runs a Python program in a process of its own, and returns what it printed."""
    command = [sys.executable, *map(str, program)]
    done = subprocess.run(command, text=True, capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def measure_loading(args, dtype) -> None:
    """Seconds from a folder to the first token, without imports or compilation; and the memory."""
    folders = {"ours": folder_of(args)}
    if "transformers" in args.vs:
        folders["transformers"] = merged_folder(args)
    found = {name: [] for name in folders}
    for _ in range(args.runs + 1):
        for name, runs in found.items():
            options = [*sys.argv[1:], "--weights", folders[name], "--once", name]
            seconds, memory = run_apart(__file__, *options).split()
            runs.append((float(seconds), float(memory)))

    # The first round compiles.
    seconds = {name: [run[0] for run in runs[1:]] for name, runs in found.items()}
    memory = {name: [run[1] for run in runs[1:]] for name, runs in found.items()}
    compare(args, "load", seconds, "s", {"dtype": dtype})
    compare(args, "memory of load", memory, "GB", {"dtype": dtype})


def load_once(args, dtype) -> None:
    """In a process that `measure_loading` starts: loads the model, prints seconds and GB."""
    jax.config.update("jax_compilation_cache_dir", args.scratch)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    make = Ours
    if args.once == "transformers":
        from transformers import AutoModelForCausalLM  # noqa: F401  (imports are not timed)

        make = partial(Transformers, folder=folder_of(args))

    start = timeit.default_timer()
    first_token = make(args, dtype).prefill([[1] * 8])
    first_token()
    print(timeit.default_timer() - start, resident_memory() / 1e9)


STARTING = """
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({folder!r}, trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype={dtype!r}).to({device!r})
ids = tokenizer({prompt!r}, return_tensors="pt").input_ids.to({device!r})
new = model.generate(ids, max_new_tokens=32, do_sample=False, pad_token_id=0)
print(tokenizer.decode(new[0]))
"""


def measure_start(args, dtype) -> None:
    """Seconds of a whole process that writes 32 tokens, its programs compiled before."""
    prompt = "ROMEO:"
    ours = [HERE / "sample.py", "--model", args.model, "--weights", folder_of(args)]
    ours += ["--prompt", prompt]
    ours += ["--max-new-tokens", 32, "--temperature", 0, "--dtype", dtype]
    ours += ["--compile-cache", args.scratch]
    if args.device:
        ours += ["--device", args.device]
    calls = {"ours": partial(run_apart, *ours)}
    if "transformers" in args.vs:
        folder = str(merged_folder(args))
        device = torch_device()
        theirs = STARTING.format(folder=folder, prompt=prompt, dtype=dtype, device=device)
        calls["transformers"] = partial(run_apart, "-c", theirs)
    compare(args, "start", in_turn(calls, args.runs), "s", {"dtype": dtype})


# -------------------------------------- Is it the same model? -------------------------------------


def both_models(args, dtype) -> tuple:
    """(ours, transformers', our tokenizer, the text of --text or --dataset)."""
    ours = Ours(args, dtype)
    tokenizer = ours.module.tokenizer(folder_of(args))
    _ = ours.model  # is read first, as it says in one line what is wrong with a file
    text = __doc__
    if args.text:
        text = Path(args.text).read_text()
    if args.dataset:
        from datasets import load_dataset

        text = "\n\n".join(load_dataset(*args.dataset.split(":"), split="test")["text"])
    theirs = Transformers(args, dtype, merged_folder(args))
    return ours, theirs, tokenizer, text


BESIDE = "ours beside transformers"  # whose figures these are

# How far logits of the same model may be apart by rounding alone: |a - b| / |b|, over all of them.
# The tiny models come to 4e-7 in float32 and to 0.006 in bfloat16, where a Mixtral's router may
# choose another expert for a token, too: 0.014.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.03, "float16": 0.03}


def validate(args, dtype) -> None:
    """Ours against transformers: token ids, residual stream, logits, greedy text; and a verdict."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Products in the precision that was asked for; both round more by default on a GPU or TPU.
    jax.config.update("jax_default_matmul_precision", "highest")
    ours, theirs, tokenizer, text = both_models(args, dtype)
    theirs.torch.backends.cuda.matmul.allow_tf32 = False
    ids = tokenizer.encode(text)

    # AutoTokenizer may rebuild a tokenizer.json by the rules of a class, and give other ids.
    folder = ours.module.tokenizer_folder(folder_of(args))
    their_class = AutoTokenizer
    where = {"pretrained_model_name_or_path": folder}
    if ours.module.is_gguf(folder):
        where = {"pretrained_model_name_or_path": folder.parent, "gguf_file": folder.name}
    elif (folder / "tokenizer.json").exists():
        their_class = PreTrainedTokenizerFast
    their_ids = their_class.from_pretrained(**where).encode(text)
    record_agreement(args, dtype, "token ids", ids, their_ids)

    same_ids = ids == their_ids
    ids = ids[: min(256, ours.config.max_position_embeddings - args.new_tokens)]
    apart = compare_activations(args, dtype, ours, theirs, ids)

    prompt = ids[:32]
    both = continuations(ours, theirs, prompt, args.new_tokens, temperature=0.0)
    mine, others = both.values()
    record_agreement(args, dtype, "greedy tokens", mine, others)

    allowed = TOLERANCES[dtype]
    faults = []
    if not same_ids:
        faults.append("other token ids")
    if not apart <= allowed:  # nan is no agreement
        faults.append("other logits")
    counts = dtype == "float32"  # half precision may lead to other texts
    if counts and mine != others and not nearly_tied(theirs, prompt, mine, others, allowed):
        faults.append("other greedy tokens")
    record_verdict(args, dtype, faults, apart)


def record_verdict(args, dtype, faults: list[str], apart: float) -> None:
    """The last line of `validate`: whether it is the same model as in transformers."""
    verdict = "the same model as in transformers"
    if faults:
        verdict = f"NOT the same model as in transformers: {', '.join(faults)}"
    verdict += (
        f" (logits {number(apart)} of their norm apart, rounding allows {TOLERANCES[dtype]:g})"
    )
    record(args, "verdict", BESIDE, [float(not faults)], "same", dtype=dtype, of=verdict)


def record_agreement(args, dtype, metric: str, mine: list[int], others: list[int]) -> None:
    """Records how many tokens are the same up to the first that differs."""
    agreed = common_prefix(mine, others)
    unit = f"of {len(others):,} the same"
    record(args, metric, BESIDE, [agreed], unit, dtype=dtype)


def common_prefix(mine: list[int], others: list[int]) -> int:
    """How many tokens two lists begin with that are the same."""
    pairs = zip(mine, others, strict=False)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
    return len(list(same))


def nearly_tied(theirs, prompt: list[int], mine: list[int], others: list[int], tolerance) -> bool:
    """Whether rounding can make one greedy text of the other: where they part, logits tie."""
    agreed = common_prefix(mine, others)
    tokens = theirs.torch.tensor([prompt + others[:agreed]], device=theirs.device)
    with theirs.torch.no_grad():
        logits = theirs.model(tokens).logits[0, -1].double()
    gap = logits[others[agreed]] - logits[mine[agreed]]
    return gap.item() <= 2 * tolerance * logits.abs().max().item()


def compare_activations(args, dtype, ours, theirs, ids: list[int]) -> float:
    """Records the largest differences: residual stream after each block, and logits.

    Returns |a - b| / |b| of the logits.
    """
    mine = []
    call = ours.module.Block.__call__

    def call_and_keep(*inputs):
        x, past = call(*inputs)
        mine.append(x)
        return x, past

    ours.module.Block.__call__ = call_and_keep
    logits = ours.model(jnp.array([ids]))
    rows = theirs.torch.tensor([ids], device=theirs.device)
    with theirs.torch.no_grad():
        out = theirs.model(rows, output_hidden_states=True)

    # The last of transformers' hidden states is normed, and the first is the embedding.
    pairs = []
    for i, (a, b) in enumerate(zip(mine[:-1], out.hidden_states[1:-1], strict=True)):
        pairs.append((f"after block {i}", a, b))
    pairs.append(("logits", logits, out.logits))

    for name, a, b in pairs:
        a = np.asarray(a, np.float64)
        b = b.double().cpu().numpy()
        cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
        largest = np.abs(b).max()
        of = f"numbers up to {number(largest)}, cosine {cosine:.9f}"
        difference = np.abs(a - b).max()
        record(args, name, BESIDE, [difference], "apart at most", dtype=dtype, of=of)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def continuations(ours, theirs, prompt: list[int], n: int, temperature: float) -> dict:
    """n tokens after a prompt, as each of the two draws them."""
    theirs.torch.manual_seed(0)
    new = {}
    for subject in (ours, theirs):
        subject.args.temperature = temperature
        tokens = subject.generate([prompt], n)()
        new[subject.name] = tokens[0][-n:]
    return new


def measure_loss(args, dtype) -> None:
    """Cross-entropy and perplexity of a text, for ours and for transformers.

    Windows of at most 1,024 tokens overlap by half. In each, the tokens that the window before it
    did not have are counted.
    """
    ours, theirs, tokenizer, text = both_models(args, dtype)
    ids = tokenizer.encode(text)
    length = min(1024, ours.config.max_position_embeddings)
    graphdef, state = nnx.split(ours.model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens)[0, :-1])

    total = {"ours": 0.0, "transformers": 0.0}
    counted = 1
    while counted < len(ids):
        start = max(0, counted - length // 2)
        window = ids[start : start + length]
        new = slice(counted - start - 1, len(window) - 1)

        padded = np.array([window + [0] * (length - len(window))])  # one shape, one program
        logits = forward(state, padded)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, padded[0, 1:])
        total["ours"] += losses[new].sum().item()
        total["transformers"] += losses_of_torch(theirs, window)[new].sum().item()
        counted = start + len(window)

    over = f"over {len(ids) - 1:,} tokens"
    for who, loss in total.items():
        loss /= len(ids) - 1
        record(args, "loss", who, [loss], "nats per token", dtype=dtype)
        record(args, "perplexity", who, [np.exp(loss)], over, dtype=dtype)


def losses_of_torch(theirs: Transformers, window: list[int]):
    """The cross-entropy of each token but the first, by transformers."""
    torch = theirs.torch
    tokens = torch.tensor(window, device=theirs.device)
    with torch.no_grad():
        logits = theirs.model(tokens[None]).logits[0, :-1].float()
        return torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")


def compare_texts(args, dtype) -> None:
    """Greedy and sampled texts of both side by side, and how much each repeats itself."""
    ours, theirs, tokenizer, text = both_models(args, dtype)
    if not args.text:
        text = "Once upon a time"
    prompt = tokenizer.encode(text)[:64]
    for how, temperature in [("greedy", 0.0), ("sampled", 1.0)]:
        both = continuations(ours, theirs, prompt, args.new_tokens, temperature)
        for who, new in both.items():
            print(f"--- {how}, {who}\n{tokenizer.decode(prompt + new)}", flush=True)
            record_repetition(args, dtype, how, who, new)


def record_repetition(args, dtype, how: str, who: str, new: list[int]) -> None:
    """distinct-n, the share of different n-grams; and the share of tokens that just occurred."""
    for n in range(1, min(4, len(new) + 1)):
        grams = [tuple(new[i : i + n]) for i in range(len(new) - n + 1)]
        distinct = len(set(grams)) / len(grams)
        record(args, f"{how}: distinct-{n}", who, [distinct], f"of {n}-grams", dtype=dtype)
    repeated = [token in new[max(0, i - 16) : i] for i, token in enumerate(new)]
    share = sum(repeated) / len(new)
    record(args, f"{how}: repetition", who, [share], "of the tokens", dtype=dtype)


# -------------------------------------- Tables and pictures ---------------------------------------


WIDTH = 100  # columns of a table or a line, at most
NARROW = 80  # columns of a table of our figures alone, for one shape of a batch
BUSY = 1.5  # runs whose highest figure is more than this times the lowest: something else ran


def print_tables(records: list[dict]) -> None:
    """The records as Markdown tables, the formulas behind the shares, and the verdicts."""
    verdicts = [found for found in records if found["metric"] == "verdict"]
    figures = [found for found in records if found["metric"] != "verdict"]
    for group in group_by(setting, figures):
        print(setting(group[0]))
        for part in split_to_fit(group, ["task", "metric", "unit"]):
            print(*table(part), "", sep="\n")

    lines = legend(figures)
    for line in lines:
        print(wrap(line))
    if lines and verdicts:
        print()
    for found in verdicts:
        print(setting(found), wrap(f"verdict: {found['of']}"), sep="\n")


MEMORY = "memory: the most that the device has held; for a CPU, the process"

# What a reader may ask about a row, by its task and the beginning of its name.
MEANINGS = {
    "prefill": {"first token": "first token: the time of a prefill", "memory": MEMORY},
    "decode": {"memory": MEMORY},
    "train": {"rows": "rows: sequences per second in training", "memory": MEMORY},
    "compile": {
        "compile": "compile: how much longer a first run takes than a second; cached: with the "
        "program in the compile cache"
    },
    "load": {"load": "load: from a folder to the first token, without imports and compilation"},
    "start": {"start": "start: a whole process that writes 32 tokens, compiled before"},
    "validate": {
        "logits": "apart at most: the largest difference of a single number; in the verdict it is "
        "|a - b| / |b| over all logits"
    },
    "compare": {
        "greedy: distinct": "distinct-n: the share of n-grams that are different",
        "greedy: repetition": "repetition: the share of tokens that also stand among the 16 before",
    },
    "plan": {
        "train": "train: FSDP with gradient checkpointing",
        "decode": "decode: tensor parallelism",
        "data parallel": "data parallel: training without FSDP and gradient checkpointing, where "
        "the all-reduce waits for the matrix multiplications (matmul); 1 is a speed linear in the "
        "number of chips",
    },
}


def legend(records: list[dict]) -> list[str]:
    """What stands below the tables: what rows and shares mean."""
    lines = []
    for found in records:
        for start, meaning in MEANINGS.get(found["task"], {}).items():
            if found["metric"].startswith(start):
                lines.append(meaning)

    formulas = [f"{found['metric']}: {found['formula']}" for found in records if "formula" in found]
    if formulas:
        lines += [*formulas, LETTERS]
    if any(found.get("in_cache") and above_all(found) for found in records):
        lines.append("above 100% of the memory bandwidth: the model fits the processor's cache")
    return list(dict.fromkeys(lines))


def above_all(found: dict) -> bool:
    """Whether more than 100% of a limit is printed."""
    return round(found["share"], 2) > 1


def wrap(text: str) -> str:
    """Prose in lines of the terminal's width; of 80 columns where there is no terminal."""
    width = min(WIDTH, shutil.get_terminal_size().columns)
    return textwrap.fill(text, width, break_on_hyphens=False, break_long_words=False)


def split_to_fit(records: list[dict], keys: list[str]) -> list[list[dict]]:
    """The records of each table: all in one, or, where that is too wide, split by one key more."""
    widest = max(map(len, table(records)))
    names = {found["who"] for found in records}
    shapes = {tokens_cell(found) for found in records} - {""}  # memory has none
    limit = WIDTH
    if len(names) == 1 and len(shapes) <= 1 and records[0]["task"] not in NOTES:
        limit = NARROW
    if widest <= limit or not keys:
        return [records]
    key, *others = keys
    groups = group_by(lambda found: found[key], records)
    return [part for group in groups for part in split_to_fit(group, others)]


def group_by(key: Callable, records: list[dict]) -> list[list[dict]]:
    """The records in groups of the same key, in the order in which the keys first come."""
    groups = {}
    for found in records:
        groups.setdefault(key(found), []).append(found)
    return list(groups.values())


def setting(found: dict) -> str:
    """What stands above a table: the kind of task, model, weights, dtype, device and options."""
    parts = [f"{found['model']} ({found['weights']})"]
    parts += [found[key] for key in ("dtype", "device", "how") if found.get(key)]
    kind = ""
    if found["task"] in NOTES:
        kind = f"{found['task']}: "
    return kind + ", ".join(parts)


# Tasks with tables of their own, and the heading of their last column. The others share theirs.
NOTES = {"validate": "of", "eval": "", "compare": "", "plan": "which"}


def table(records: list[dict]) -> list[str]:
    """A table's lines. What is the same in all rows stands above it, in place of a column."""
    value = "median" if max(found["runs"] for found in records) > 1 else "value"
    note = NOTES.get(records[0]["task"], "share of the limit")
    columns = {
        "figure": [found["metric"] for found in records],
        "who": ["" if found["who"] == found["weights"] else found["who"] for found in records],
        "tokens": [tokens_cell(found) for found in records],
        "chips": [found.get("chips", "") for found in records],
        value: [number(found["value"]) for found in records],
        "range": [range_cell(found) for found in records],
        "unit": [found["unit"] for found in records],
        note: [note_cell(found) for found in records],
    }
    common = []
    for name in ("figure", "who", "tokens", "chips", "unit"):
        cells = set(columns[name]) - {""}
        if len(cells) < 2:
            del columns[name]
            common += [f"{cell} tokens" if name == "tokens" else cell for cell in cells]
    columns = {name: cells for name, cells in columns.items() if any(cells)}

    lines = []
    if common:
        lines.append(", ".join(common))
    return [*lines, "", *markdown(columns, right=(value, "range"))]


def markdown(columns: dict[str, list[str]], right) -> list[str]:
    """A Markdown table; the columns named in `right` are aligned to the right."""
    laid_out = []
    for name, cells in columns.items():
        width = max(map(len, [name, *cells]))
        if name in right:
            rule = "-" * (width - 1) + ":"
            laid_out.append([name.rjust(width), rule, *[cell.rjust(width) for cell in cells]])
        else:
            rule = "-" * width
            laid_out.append([name.ljust(width), rule, *[cell.ljust(width) for cell in cells]])
    return [f"| {' | '.join(row)} |" for row in zip(*laid_out, strict=True)]


def tokens_cell(found: dict) -> str:
    """The shape of a batch, such as 8 x 1,024 tokens."""
    if "length" not in found:
        return ""
    return f"{found['batch']:,} x {found['length']:,}"


def range_cell(found: dict) -> str:
    """The lowest and the highest of several runs."""
    if found["runs"] == 1:
        return ""
    return f"{number(found['low'])}-{number(found['high'])}"


def note_cell(found: dict) -> str:
    """The share of the limit, or what else is to be said of a figure."""
    if "share" in found:
        return f"{found['share']:.0%} of {found['of']}"
    return found.get("of", "")


def number(x: float) -> str:
    """A number with three digits that count: 0.0243, 54.0, 159, 1,319; a whole one as it is."""
    if abs(x) >= 999.5 or x == round(x):
        return f"{x:,.0f}"
    return f"{x:#.3g}".rstrip(".")


def with_prefix(x: float, unit: str) -> str:
    """A number of FLOP/s or B/s, in giga or tera."""
    if x >= 1e12:
        return f"{number(x / 1e12)} T{unit}"
    return f"{number(x / 1e9)} G{unit}"


def warn_if_busy(records: list[dict]) -> None:
    """Says on stderr which runs differ by more than they do on a machine that does nothing else.

    And which shares are of a limit whose own runs differ so, or that was exceeded.
    """
    advice = "Let nothing else run, or take more --runs"
    wide = {}
    shares = {}
    for found in records:
        metric = found["metric"]
        if found["runs"] > 1 and found["high"] > BUSY * found["low"]:
            wide.setdefault(metric, f"{metric} {range_cell(found)} {found['unit']}")
        if "share" in found and not limit_holds(found):
            shares.setdefault(metric, f"{metric} {note_cell(found)}")

    if wide:
        differ = ", ".join(wide.values())
        print(wrap(f"bench.py: the machine was busy: {differ}. {advice}"), file=sys.stderr)
    if shares:
        meant = ", ".join(shares.values())
        line = f"a limit was measured too low, and its shares mean nothing: {meant}. {advice}"
        print(wrap(f"bench.py: {line}"), file=sys.stderr)


def limit_holds(found: dict) -> bool:
    """Whether the runs of a figure's limit agree, and the figure is not above it.

    A model in the processor's cache may exceed the bandwidth of the memory.
    """
    low, high = found["limit_range"]
    possible = found["in_cache"] or not above_all(found)
    return possible and high <= BUSY * low


def write_results(out: Path, records: list[dict]) -> None:
    """results.jsonl, the machine's line first, and roofline.png."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(found) for found in [about_this_machine(), *records]]
    (out / "results.jsonl").write_text("\n".join(lines) + "\n")
    points = [found for found in records if "intensity" in found]
    if points:
        draw_roofline(points, out / "roofline.png")


def about_this_machine() -> dict:
    """The versions of the packages, the processor, and the command."""
    packages = ("jax", "torch", "transformers", "ctranslate2", "xllamacpp")
    about = {name: metadata.version(name) for name in packages if find_spec(name)}
    processor = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    about["cpu"] = f"{os.cpu_count()} x {processor[1] if processor else '?'}"
    about["command"] = shlex.join(["bench.py", *sys.argv[1:]])
    return about


def draw_roofline(records: list[dict], file: Path) -> None:
    """FLOP/s over FLOPs per byte: each of our figures, below the limit of the same runs."""
    from matplotlib.figure import Figure  # not in the processes whose memory is measured

    axes = Figure(figsize=(8, 5)).subplots()
    labels = point_labels(records)
    for i, (found, label) in enumerate(zip(records, labels, strict=True)):
        x = found["intensity"]
        limit = roof(found["limits"], x)
        color = f"C{i % 10}"
        marker = "os^Dv<>P"[i % 8]
        axes.loglog(x, found["flops"], marker, color=color, fillstyle="none", label=label)
        axes.loglog(x, limit, "_", color=color, markersize=14)
        axes.loglog([x, x], [found["flops"], limit], ":", color=color)

    # A line for each measurement of the limits: where they differ, the machine did.
    for limits in [found["limits"] for found in records]:
        ends = [0.1, limits["FLOP/s"] / limits["B/s"], 10_000]
        axes.loglog(ends, [roof(limits, x) for x in ends], color="0.8", zorder=0)

    names = {found["weights"] for found in records}
    title = f"on {records[0]['device']}"
    if len(names) == 1:
        title = f"{names.pop()} {title}"
    axes.set_title(title)
    axes.set_xlabel("arithmetic intensity: FLOPs per byte of weights and KV cache")
    axes.set_ylabel("FLOP/s")
    axes.legend(
        fontsize=8,
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        frameon=False,
        title="share of its limit (bar), which was\nmeasured in the same runs (gray)",
        title_fontsize=8,
        alignment="left",
    )
    axes.figure.savefig(file, dpi=120, bbox_inches="tight")


def roof(limits: dict, intensity: float) -> float:
    """The FLOP/s that the limits allow at so many FLOPs per byte."""
    return min(limits["FLOP/s"], intensity * limits["B/s"])


def point_labels(records: list[dict]) -> list[str]:
    """A label for each point: what tells it from the others, and its share of the limit."""
    rows = []
    for found in records:
        what = f"{found['metric']} {tokens_cell(found)}"
        rows.append([what, *[found[key] for key in ("who", "model", "weights", "dtype", "how")]])
    varies = [len(set(column)) > 1 for column in zip(*rows, strict=True)]

    labels = []
    counts = {}
    for found, (what, *rest) in zip(records, rows, strict=True):
        differing = [text for text, other in zip(rest, varies[1:], strict=True) if other and text]
        label = ", ".join([what, *differing])
        counts[label] = counts.get(label, 0) + 1
        if counts[label] > 1:
            label += f", again ({counts[label]})"
        share = found["flops"] / roof(found["limits"], found["intensity"])
        labels.append(f"{label}: {share:.0%}")
    return labels


# ------------------------------------------- Checkpoints ------------------------------------------


def folder_of(args, dtype="float32") -> Path:
    """The folder of --weights; for random ones, one that is written now."""
    module = importlib.import_module(args.model)
    if args.weights == "tiny":
        return HERE / "tiny" / args.model
    if args.weights != "random":
        folder = module.fetch(args.weights)
        check_family(module, folder)
        return folder

    folder = Path(args.scratch, dtype)
    if not folder.exists():
        module.save(random_model(module, find_config(args), dtype, dtype), folder)
    return folder


def merged_folder(args, dtype="float32") -> Path:
    """The folder of `folder_of`; for an adapter or a GGUF file, one that is written now."""
    module = importlib.import_module(args.model)
    folder = folder_of(args, dtype)
    if not module.is_adapter(folder) and not module.is_gguf(folder):
        return folder

    merged = Path(args.scratch, "merged")
    if not merged.exists():
        model = module.load(folder, dtype="float32")
        module.save(model, merged, module.tokenizer(folder))
    return merged


def find_config(args):
    """The config of --weights, or of --preset where the weights are random."""
    module = importlib.import_module(args.model)
    random = args.weights == "random"
    name = args.preset if random else args.weights
    if name in module.PRESETS and (random or args.task == ["plan"]):
        return module.PRESETS[name].config
    folder = Path(name) if random else folder_of(args)
    return module.read_config(folder)


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

DTYPES = ["auto", "float32", "bfloat16", "float16"]


def parse_command_line() -> argparse.Namespace:
    """The command line, checked as far as that needs neither a model nor a device."""
    parser = argparse.ArgumentParser(
        prog="bench.py", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.error = fail
    add_task_flags(parser)
    add_model_flags(parser)
    add_sampling_flags(parser)
    add_training_flags(parser)
    add_text_flags(parser)
    add_plan_flags(parser)
    add_machine_flags(parser)
    add_output_flags(parser)

    args = parser.parse_args()
    check_choices(args)
    check_numbers(args)
    fill_defaults(args)
    check_weights(args)
    check_training_flags(args)
    check_packages(args)
    return args


def words(text: str) -> list[str]:
    return text.split(",")


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def add_task_flags(parser):
    task = parser.add_argument_group("tasks")
    task.add_argument(
        "--task",
        type=words,
        default=["prefill", "decode", "train"],
        metavar="TASK,...",
        help=f"of {', '.join(tasks())} (default: prefill,decode,train)",
    )
    task.add_argument("--suite", choices=["cpu", "gpu", "tpu"], help="the tasks in benchmarks/")
    task.add_argument(
        "--vs", type=words, default=[], metavar="NAME,...", help=f"of {', '.join(PEERS)}"
    )
    task.add_argument(
        "--batch", type=numbers, default=[1], metavar="N,...", help="sequences (default: 1)"
    )
    task.add_argument(
        "--length", type=numbers, default=[32], metavar="N,...", help="tokens of each (default: 32)"
    )
    add_number(task, "--new-tokens", 64, "tokens that decode generates after a prompt")
    add_number(task, "--runs", 5, "runs; the median counts")
    add_number(task, "--limit", 600, "seconds that a task may take")


def add_model_flags(parser):
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MODELS, help="model file (default: gpt2)")
    model.add_argument(
        "--weights",
        type=not_empty,
        help="tiny, random, a Hub id or a folder (default: as in sample.py)",
    )
    model.add_argument(
        "--preset", metavar="ID", help="random weights of this size; or the model to plan for"
    )
    model.add_argument(
        "--dtype",
        type=words,
        default=["auto"],
        metavar="DTYPE,...",
        help="float32, bfloat16, float16 or auto: by the device (default: auto)",
    )
    model.add_argument(
        "--quantize",
        choices=["int8", "int4"],
        help="hold our weights in 8 or 4 bits; those of ctranslate2 and llama.cpp, too",
    )


def add_sampling_flags(parser):
    sampling = parser.add_argument_group("decode")
    sampling.add_argument(
        "--temperature", type=float, metavar="X", help="as in sample.py (default: greedy)"
    )
    sampling.add_argument("--top-k", type=int, metavar="N", help="as in sample.py")
    sampling.add_argument("--top-p", type=float, metavar="X", help="as in sample.py")
    sampling.add_argument("--ragged", action="store_true", help="prompts of different lengths")


def add_training_flags(parser):
    training = parser.add_argument_group("train")
    add_number(training, "--accumulate", 1, "gradient accumulation: parts of a batch")
    add_number(training, "--loss-parts", 1, "parts in which the logits are computed")
    training.add_argument("--remat", action="store_true", help="gradient checkpointing")
    training.add_argument(
        "--chunked", action="store_true", help="attend in chunks of keys, whatever the length"
    )


def add_text_flags(parser):
    text = parser.add_argument_group("validate, eval, compare")
    text.add_argument("--text", metavar="FILE", help="the text (default: this program's help)")
    text.add_argument(
        "--dataset",
        metavar="NAME[:SUBSET]",
        help="a dataset on the Hub, its test split; needs the package datasets",
    )


def add_plan_flags(parser):
    plan = parser.add_argument_group("plan")
    plan.add_argument(
        "--chips",
        type=numbers,
        default=[8, 64, 512],
        metavar="N,...",
        help="how many (default: 8,64,512)",
    )
    plan.add_argument("--kind", choices=CHIPS, default="h100", help="default: %(default)s")


def add_machine_flags(parser):
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device", help="cpu, gpu or tpu; gpu:1 is the second GPU (default: the best there is)"
    )
    machine.add_argument(
        "--parallel",
        default="no",
        metavar="MODE",
        help="pmap, data, fsdp, tensor or auto, on 1, 2 and 4 devices; or data:2,tensor:2, beside "
        "one device. --batch is that of each device (with tensor, of each group)",
    )


def add_output_flags(parser):
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for results.jsonl and roofline.png"
    )
    output.add_argument(
        "--profile",
        metavar="FOLDER",
        help="trace a run of each of our figures, for Perfetto or xprof",
    )
    # Of the process of a task: where it writes its records; of a single load: whose it is.
    output.add_argument("--scratch", help=argparse.SUPPRESS)
    output.add_argument("--once", help=argparse.SUPPRESS)


def add_number(group, flag: str, default: int, about: str):
    """A flag with a number; its help ends with the default."""
    group.add_argument(
        flag, type=int, default=default, metavar="N", help=f"{about} (default: %(default)s)"
    )


def check_choices(args):
    for flag, chosen, choices in [
        ("--task", args.task, tasks()),
        ("--vs", args.vs, PEERS),
        ("--dtype", args.dtype, DTYPES),
    ]:
        if not set(chosen) <= set(choices):
            fail(f"{flag} must be of {', '.join(choices)}")
    if not re.fullmatch(PARALLEL, args.parallel):
        fail("--parallel must be pmap, or like data, tensor:2 or data:2,tensor:4")
    if args.preset and args.weights not in (None, "random") and not args.suite:
        fail("--preset is for random weights: leave --weights out")
    if args.vs and args.parallel != "no":
        fail("--vs compares on one device: leave --parallel out")
    if "unquantized" in args.vs and not args.quantize:
        fail("--vs unquantized is for --quantize")
    if args.quantize == "int4" and "ctranslate2" in args.vs:
        fail("--vs ctranslate2: it has int8, but not int4")
    if args.quantize and not set(args.task) <= {"prefill", "decode", "load", "compile"}:
        fail("--quantize is for --task prefill, decode, load and compile")
    if args.ragged and args.task != ["decode"]:
        fail("--ragged is for --task decode")


def check_numbers(args):
    for flag, values in [
        ("--batch", args.batch),
        ("--length", args.length),
        ("--chips", args.chips),
        ("--new-tokens", [args.new_tokens]),
        ("--runs", [args.runs]),
        ("--limit", [args.limit]),
        ("--accumulate", [args.accumulate]),
        ("--loss-parts", [args.loss_parts]),
    ]:
        if min(values) < 1:
            fail(f"{flag} must be 1 or more")
    if args.top_k is not None and args.top_k < 1:
        fail("--top-k must be 1 or more")
    if args.temperature is not None and not args.temperature >= 0:
        fail("--temperature must be 0 (the likeliest token) or more")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        fail("--top-p must be above 0 and at most 1")


def fill_defaults(args):
    """The defaults that depend on other flags."""
    args.every_model = args.task == ["plan"] and not (args.model or args.preset)
    args.chosen_weights = args.weights
    if args.preset and not args.weights:
        args.chosen_weights = "random"

    args.weights = args.chosen_weights
    if args.weights is None and args.model is None:
        args.weights = "tiny"
    if args.model is None:
        args.model = model_of_checkpoint(args)
    first = next(iter(importlib.import_module(args.model).PRESETS))
    args.weights = args.weights or first
    args.preset = args.preset or first

    args.training = [name for name in ("remat", "chunked") if getattr(args, name)]
    for name in ("accumulate", "loss_parts"):
        parts = getattr(args, name)
        if parts > 1:
            args.training.append(f"{name.replace('_', '-')} {parts}")
    quantized = [f"{args.quantize} weights"] if args.quantize else []
    args.how = " + ".join([*quantized, *args.training, *decoding_options(args)])


def decoding_options(args) -> list[str]:
    """What the prompts and the sampler are asked for, where it is not the default."""
    options = ["ragged"] if args.ragged else []
    if args.temperature:
        for name in ("temperature", "top_k", "top_p"):
            value = getattr(args, name)
            if value is not None:
                options.append(f"{name.replace('_', '-')} {value:g}")
    return options


def model_of_checkpoint(args) -> str:
    """The model file of --weights or --preset."""
    if args.weights not in (None, "tiny", "random"):
        return model_of(args.weights)
    if args.preset and os.path.isdir(args.preset):
        return model_of(args.preset)
    for name in MODELS:
        if args.preset in importlib.import_module(name).PRESETS:
            return name
    return "gpt2"


def check_weights(args):
    presets = importlib.import_module(args.model).PRESETS
    if args.preset not in presets and not Path(args.preset, "config.json").exists():
        known = ", ".join(presets)
        fail(f"--preset must be of {known}, or a folder with a config.json")
    plans_preset = args.task == ["plan"] and args.weights in presets
    if args.weights not in ("tiny", "random") and not plans_preset and not args.scratch:
        check_checkpoint(args)  # once, and not by each task
    if args.weights == "random":
        needs_text = {"validate", "eval", "compare", "start"} & set(args.task)
        if needs_text or "ctranslate2" in args.vs:
            fail("random weights have no tokenizer: name --weights")
    if args.text:
        file = Path(args.text)
        with explained(OSError, "--text cannot be read: {}"):  # such as a name that is too long
            if not file.is_file() or file.stat().st_size < 10:
                fail(f"--text {file}: there is no such file, or next to nothing in it")
    with explained(OSError, "--out cannot be used: {}"):
        if args.out and args.out.is_file():
            fail(f"--out {args.out} is a file: name a folder")


def check_checkpoint(args):
    """Exits where --weights are no checkpoint of the model file, or one that is quantized."""
    module = importlib.import_module(args.model)
    with explained(module.InputError, "{}"):
        folder = module.fetch(args.weights, weights=False)
        check_family(module, folder)
        module.read_config(folder)
        held = module.read_quantization(folder)
    if held is not None:
        fail(
            f"{args.weights} holds its weights in {held}: name the checkpoint that they were made "
            "from, with --quantize"
        )


def check_training_flags(args):
    if any(batch % args.accumulate for batch in args.batch):
        fail("--accumulate must divide --batch")
    if args.training and (args.task != ["train"] or args.vs):
        fail("--remat, --chunked, --accumulate, --loss-parts: for --task train, without --vs")


def check_packages(args):
    """Fails where a package is missing that only this needs."""
    needed = set(args.vs) & {"ctranslate2"}
    if "llama.cpp" in args.vs:
        needed |= {"gguf", "xllamacpp"}
    with_torch = {"transformers", "transformers-compile", "validate", "eval", "compare"}
    if with_torch & {*args.task, *args.vs}:
        needed.add("torch")
    if args.dataset:
        needed.add("datasets")
    missing = [name for name in sorted(needed) if not find_spec(name)]
    if missing:
        fail(f"that needs {' and '.join(missing)}: pip install {' '.join(missing)}")


if __name__ == "__main__":
    run_program(main)
