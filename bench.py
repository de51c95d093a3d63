"""Measures any of the model files: speed and memory, beside the machine's limits and beside others.

    python bench.py                                      # the bundled tiny GPT-2; no network
    python bench.py --model gpt2 --task prefill,decode,train,load,start
    python bench.py --model llama --weights random --preset meta-llama/Llama-2-7b-hf --task decode
    python bench.py --model gpt2 --vs transformers,ctranslate2       # in turn, and as ratios
    python bench.py --model opt --weights FOLDER --task validate     # the same as transformers?
    python bench.py --model llama --task plan --preset meta-llama/Llama-2-7b-hf --chips 8

Each task runs in a process of its own and measures the limits of the machine too: the rate of large
matrix products, and how fast a large array is read. A figure is the median of --runs runs, beside
the lowest and the highest. --out FOLDER keeps them as JSON lines, with a picture of the roofline.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

HERE = Path(__file__).resolve().parent
MODELS = [n for n in ("gpt2", "opt", "llama", "gemma", "mistral") if (HERE / f"{n}.py").exists()]

# ---------------------------------------------------------------------------------------- measuring

def fail(message):
    """One line that says what is wrong and what to do; exit code 2."""
    print("bench.py: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)

def in_turn(calls: dict, runs: int, warm=1) -> dict:
    """Seconds that each call takes, `runs` times after `warm` ones. One run of each, then the next:
    a machine that becomes slower does so for all. A call is (prepare, run), of which run(what
    prepare returns) counts; it must wait for its result."""
    seconds = {name: [] for name in calls}
    for i in range(warm + runs):
        for name, (prepare, run) in calls.items():
            prepared = prepare()
            start = time.perf_counter()
            run(prepared)
            if i >= warm:
                seconds[name].append(time.perf_counter() - start)
    return seconds

nothing = dict  # what a call without preparation prepares

def measure_limits(dtype, runs: int) -> dict:
    """What this device reaches: FLOP/s in products of two square matrices of `dtype`, and bytes/s
    in sums over an array that fits no cache."""
    n, size = (2048, 2**30) if jax.default_backend() == "cpu" else (8192, 2**32)
    matrix, numbers = jnp.ones((n, n), dtype), jnp.ones(size // 4, jnp.float32)
    product, total = jax.jit(jnp.matmul), jax.jit(jnp.sum)
    seconds = in_turn({
        "gemm": (nothing, lambda _: product(matrix, matrix).block_until_ready()),
        "read": (nothing, lambda _: total(numbers).block_until_ready())}, runs)
    return {"FLOP/s": 2 * n**3 / statistics.median(seconds["gemm"]),
            "B/s": size / statistics.median(seconds["read"])}

def peak_memory() -> int:
    """The bytes that the device held at most, or on a CPU this process."""
    if stats := jax.devices()[0].memory_stats():
        return stats["peak_bytes_in_use"]
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

def record(args, metric, who, values, unit, **more):
    """Writes a figure as a line of JSON, for the process that started this one."""
    with open(Path(args.scratch, "records"), "a") as file:
        print(json.dumps({
            "metric": metric, "who": who, "value": statistics.median(values), "low": min(values),
            "high": max(values), "runs": len(values), "unit": unit, "model": args.model,
            "weights": args.preset if args.weights == "random" else args.weights,
            "device": jax.devices()[0].device_kind, **more}), file=file)

# -------------------------------------------------------------------------------------- model costs

def skeleton(module, config, **options):
    """(graphdef, state) of a model of which only the shapes are there."""
    rngs = SimpleNamespace(params=partial(jax.random.key, 0))  # nothing is drawn
    return nnx.split(nnx.eval_shape(lambda: module.Model(config, rngs=rngs, **options)))

def costs(module, config, B: int, T: int, dtype):
    """What theory says of B rows of T tokens, from the shapes alone: operations and bytes. For each
    token a weight of a matrix takes part in 2 operations, and attention adds 2 products of H * Dh
    for each token that is seen, in each layer; a look-up of a vector is none. Of E experts, of
    which a token takes k, B tokens read E (1 - (1 - k / E)^B) on average, if choices are even."""
    E, chosen = (getattr(config, f"num_{name}", 1) for name in ("local_experts", "experts_per_tok"))
    size = used = read = head = 0
    for path, p in nnx.to_flat_state(skeleton(module, config)[1]):
        size += p.size
        if path[-1] == "kernel" and path[0] != "lm_head":
            expert = "experts" in path
            used += p.size * (chosen / E if expert else 1)
            read += p.size * (1 - (1 - chosen / E) ** B if expert else 1)
        elif path[0] in ("wte", "embed_tokens", "lm_head"):  # in this order: an own head replaces
            head = p.size  # the table as what makes the logits
    layers = jax.eval_shape(lambda: module.init_cache(config, 1, T, dtype)).layers
    heads = getattr(config, "n_head", 0) or config.num_attention_heads
    look = 4 * len(layers) * heads * layers[0][0].shape[-1]  # for each token that is seen
    weights = (read + head) * jnp.dtype(dtype).itemsize
    cache = B * sum(2 * k.size * k.dtype.itemsize for k, *_ in layers)
    return SimpleNamespace(
        size=size, weights=weights, cache=cache,
        prefill=B * (2 * used * T + look * T * T + 2 * head), prefill_bytes=weights,
        decode=B * (2 * (used + head) + look * T), decode_bytes=weights + cache,
        train=3 * B * T * (2 * (used + head) + look * T), train_bytes=3 * weights)

# ----------------------------------------------------------------------------------------- subjects

def random_model(module, config, dtype, param_dtype=None):
    """A model with normal(0.02) weights, drawn on the device, each in the type it is stored in."""
    graphdef, state = skeleton(module, config, dtype=dtype, param_dtype=param_dtype or dtype)
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    for i, (path, param) in enumerate(nnx.to_flat_state(state)):
        key = jax.random.fold_in(jax.random.key(0), i)
        param.set_value(jnp.ones(param.shape, param.dtype) if path[-1] == "scale"
                        else 0.02 * draw(key, param.shape, param.dtype))
    return nnx.merge(graphdef, state)

GREEDY = dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"))

class Ours:
    """This project's side of a comparison."""
    name = "ours"
    def __init__(self, args, dtype):
        self.args, self.dtype, self.module = args, dtype, importlib.import_module(args.model)
        self.config, self.model = find_config(args), self.read(dtype)

    def read(self, param_dtype):
        """The model of --weights, with its parameters in that type."""
        if self.args.weights == "random":
            return random_model(self.module, find_config(self.args), self.dtype, param_dtype)
        return self.module.load(folder_of(self.args), dtype=self.dtype, param_dtype=param_dtype)

    def prefill(self, prompts):
        """The first token after each prompt; all of one length."""
        module, tokens, (B, T) = self.module, np.array(prompts), np.shape(prompts)
        graphdef, state = nnx.split(self.model)
        keys = jax.random.split(jax.random.key(0), B)
        return (lambda: jax.block_until_ready(
                    module.init_cache(self.config, B, -(-T // 128) * 128, self.model.dtype)),
                lambda cache: np.asarray(module.prefill(
                    graphdef, state, cache, tokens, None, keys, GREEDY, top_k=None)[1]))

    def generate(self, prompts, n):
        """n tokens after each prompt."""
        options = {"temperature": self.args.temperature or 0, "top_k": self.args.top_k,
                   "top_p": self.args.top_p, "key": jax.random.key(0)}
        return nothing, lambda _: self.module.generate(self.model, prompts, n, **options)

    def train(self, rows):
        """A step of AdamW on rows of T + 1 tokens; weights and optimizer in float32."""
        tokens, (graphdef, params) = np.array(rows), nnx.split(self.read("float32"))
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
        def mean_loss(params):
            logits = nnx.merge(graphdef, params)(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
        @partial(jax.jit, donate_argnums=(0, 1))
        def step(params, opt_state):
            loss, gradients = jax.value_and_grad(mean_loss)(params)
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss
        held = [params, optimizer.init(params)]
        def run(_):
            held[0], held[1], loss = step(*held)
            loss.block_until_ready()
        return nothing, run

class Transformers:
    """Hugging Face's transformers on PyTorch, on the same weights; eager, or compiled."""
    def __init__(self, args, dtype, folder, compiled=False):
        import torch
        from transformers import AutoModelForCausalLM
        self.args, self.compiled, self.torch = args, compiled, torch
        self.name, self.device = "transformers" + "-compile" * compiled, torch_device()
        self.dtype = getattr(torch, dtype)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype)
        self.model = model.to(self.device).eval()

    def prefill(self, prompts):
        """The likeliest token after each prompt, and a cache for what would follow."""
        ids = self.torch.tensor(prompts, device=self.device)
        forward = self.torch.compile(self.model) if self.compiled else self.model
        def run(_):
            with self.torch.no_grad():
                forward(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1).tolist()
        return nothing, run

    def generate(self, prompts, n):
        """n tokens after each prompt; shorter ones are padded on the left."""
        T, args = max(map(len, prompts)), self.args
        ids, mask = (self.torch.tensor(rows, device=self.device) for rows in (
            [[0] * (T - len(p)) + p for p in prompts],
            [[0] * (T - len(p)) + [1] * len(p) for p in prompts]))
        how = {"max_new_tokens": n, "min_new_tokens": n, "pad_token_id": 0,
               "do_sample": bool(args.temperature)}
        if args.temperature:
            how |= {"temperature": args.temperature, "top_k": args.top_k or 0,
                    "top_p": args.top_p or 1.0}
        if self.compiled:
            how["cache_implementation"] = "static"
        return nothing, lambda _: self.model.generate(ids, attention_mask=mask, **how).tolist()

    def train(self, rows):
        """A step of AdamW, as ours: without dropout, in half precision with float32 weights."""
        torch, model, ids = self.torch, self.model.float(), self.torch.tensor(rows).to(self.device)
        forward = torch.compile(model) if self.compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
        def run(_):
            with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
                logits = forward(ids[:, :-1], use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
        return nothing, run

class CTranslate2:
    """OpenNMT's CTranslate2, on the same weights, which its own converter writes."""
    name = "ctranslate2"
    def __init__(self, args, dtype, folder):
        import ctranslate2
        self.args, self.kept = args, tempfile.TemporaryDirectory()
        converter = ctranslate2.converters.TransformersConverter(str(folder))
        converter.convert(self.kept.name, quantization=dtype, force=True)
        self.vocabulary = json.loads(Path(self.kept.name, "vocabulary.json").read_text())
        config = Path(self.kept.name, "config.json")  # has null for tokens that a model has not
        names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), self.vocabulary[0])
        config.write_text(json.dumps(json.loads(config.read_text()) | names))
        self.generator = ctranslate2.Generator(self.kept.name, torch_device(), compute_type=dtype,
                                               intra_threads=os.cpu_count())

    def generate(self, prompts, n):
        """n tokens after each prompt."""
        words = [[self.vocabulary[token] for token in prompt] for prompt in prompts]
        how = {"max_length": n, "min_length": n, "include_prompt_in_result": False, "end_token": []}
        if self.args.temperature:
            how |= {"sampling_topk": self.args.top_k or 0, "sampling_topp": self.args.top_p or 1,
                    "sampling_temperature": self.args.temperature}
        return nothing, lambda _: self.generator.generate_batch(words, **how)
    prefill = partialmethod(generate, n=1)

PEERS = {"transformers": Transformers, "ctranslate2": CTranslate2,
         "transformers-compile": partial(Transformers, compiled=True)}

def subjects(args, dtype) -> list:
    """This project, and those of --vs on the same weights."""
    return [Ours(args, dtype), *(PEERS[name](args, dtype, folder_of(args, dtype))
                                 for name in args.vs)]

# -------------------------------------------------------------------------------------------- tasks

def some_prompts(args, config, B, T):
    """B prompts of T random tokens; with --ragged each is an eighth of T shorter than the last."""
    rng = np.random.default_rng(0)
    lengths = [max(1, T - (i % 8) * T // 8) if args.ragged else T for i in range(B)]
    return [rng.integers(0, config.vocab_size, n).tolist() for n in lengths]

def compare(args, metric, values: dict, unit, shape, **theory):
    """Records what each subject reached, and of each pair of runs how ours compares."""
    for who, found in values.items():
        record(args, metric, who, found, unit, **shape, **(theory if who == "ours" else {}))
    for who in [*values][1:]:  # ours is the first
        ratios = [a / b for a, b in zip(values["ours"], values[who], strict=True)]
        record(args, metric, f"ours / {who}", ratios, "times", **shape)

FORMULAS = {
    "prefill": "share = (2 N T + 4 L H Dh T^2 + 2 V D) B operations / time / limit",
    "train": "share = 3 (2 (N + V D) + 4 L H Dh T) B T operations / time / limit",
    "decode": "share = bytes of weights and of the cache as it is on average / time / limit"}

def bench_speed(args, dtype, task):
    """Tokens/s of prompts (up to the first new token), of new tokens, or of training steps. n new
    tokens take the time of n + 1 less that of the first."""
    n, everyone, found = args.new_tokens, subjects(args, dtype), []
    ours, decode = everyone[0], task == "decode"
    for B, T in itertools.product(args.batch, args.length):
        prompts = some_prompts(args, ours.config, B, T + (task == "train"))
        if decode:
            both = in_turn({(one.name, m): one.generate(prompts, m)
                            for one in everyone for m in (1, n + 1)}, args.runs)
            seconds = {one.name: [(longer - first) / n for first, longer in
                                  zip(both[one.name, 1], both[one.name, n + 1], strict=True)]
                       for one in everyone}
        else:
            seconds = in_turn({one.name: getattr(one, task)(prompts) for one in everyone
                               if hasattr(one, task)}, args.runs)
        theory = costs(ours.module, ours.config, B, T + n // 2 if decode else T, dtype)
        found.append((B, T, seconds, vars(theory)))
    record(args, f"memory of {task}", "ours", [peak_memory() / 1e9], "GB at most", dtype=dtype)
    limits = measure_limits(dtype, args.runs)  # last, as this takes memory too
    for B, T, seconds, theory in found:
        limit, of = ("B/s", "the sum") if decode else ("FLOP/s", "the product")
        middle = statistics.median(seconds["ours"])
        shape = {"batch": B, "length": T, "dtype": dtype}
        tokens = {who: [B * (1 if decode else T) / s for s in times]
                  for who, times in seconds.items()}
        compare(args, task, tokens, "tokens/s", shape, formula=FORMULAS[task], limits=limits,
                share=theory["decode_bytes" if decode else task] / middle / limits[limit],
                of=f"{limits[limit] / 1e9:,.1f} G{limit} of {of}", flops=theory[task] / middle,
                intensity=theory[task] / theory[task + "_bytes"])
        if task == "prefill" and B == 1:
            record(args, "first token", "ours", seconds["ours"], "s", **shape)
        if task == "train":
            record(args, "rows", "ours", [B / s for s in seconds["ours"]], "rows/s", **shape)

def bench_compile(args, dtype):
    """Seconds that a first run takes longer than a second: both programs are compiled or read."""
    ours, [B, *_], [T, *_] = Ours(args, dtype), args.batch, args.length
    _, run = ours.generate(some_prompts(args, ours.config, B, T), 2)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    found = {"compile, cold": [], "compile, from the cache": []}
    for _ in range(args.runs):
        with tempfile.TemporaryDirectory() as folder:
            jax.config.update("jax_compilation_cache_dir", folder)
            for seconds in found.values():
                compilation_cache.reset_cache()
                jax.clear_caches()
                first, second = (in_turn({"": (nothing, run)}, 1, warm=0)[""][0] for _ in "12")
                seconds.append(first - second)
    for metric, seconds in found.items():
        record(args, metric, "ours", seconds, "s", batch=B, length=T, dtype=dtype)

STARTING = """
from transformers import AutoModelForCausalLM, AutoTokenizer
codec = AutoTokenizer.from_pretrained({folder!r})
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype={dtype!r}).to({device!r})
ids = codec({prompt!r}, return_tensors="pt").input_ids.to({device!r})
print(codec.decode(model.generate(ids, max_new_tokens=32, do_sample=False, pad_token_id=0)[0]))
"""

def run_apart(*program) -> str:
    """Runs a Python program in a process of its own -> what it printed."""
    done = subprocess.run([sys.executable, *map(str, program)], cwd=HERE, text=True,
                          capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout

def bench_load(args, dtype):
    """Seconds from a folder to a token, without imports, with a warm compile cache; and memory."""
    if args.once:  # in one of the processes that the lines below start
        jax.config.update("jax_compilation_cache_dir", args.scratch)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        kind = {"ours": Ours}.get(args.once) or partial(PEERS[args.once], folder=folder_of(args))
        if args.once != "ours":
            from transformers import AutoModelForCausalLM  # noqa: F401  (not to be timed)
        start = time.perf_counter()
        prepare, run = kind(args, dtype).prefill([[1] * 8])
        run(prepare())
        return print(time.perf_counter() - start, peak_memory() / 1e9)
    folder, who = folder_of(args), ["ours", *set(args.vs) & {"transformers"}]
    found = {name: [] for name in who}
    for name in (args.runs + 1) * who:
        again = [*sys.argv[1:], "--weights", folder, "--once", name]
        found[name].append([float(word) for word in run_apart(__file__, *again).split()])
    seconds, memory = ({name: [run[i] for run in runs[1:]] for name, runs in found.items()}
                       for i in (0, 1))
    compare(args, "load", seconds, "s", {"dtype": dtype})
    compare(args, "memory of load", memory, "GB at most", {"dtype": dtype})
    theory = costs(importlib.import_module(args.model), find_config(args), 1, 8, dtype)
    over = [1e9 * held / theory.size / jnp.dtype(dtype).itemsize for held in memory["ours"]]
    record(args, "memory / parameters", "ours", over, "times")

def bench_start(args, dtype):
    """Seconds of the whole process that writes 32 tokens; the compile cache is cold, then warm."""
    words = {"folder": str(folder_of(args)), "prompt": "ROMEO:", "dtype": dtype,
             "device": torch_device()}
    with tempfile.TemporaryDirectory() as cache:
        ours = partial(run_apart, "sample.py", "--model", args.model, "--weights", words["folder"],
                       "--prompt", words["prompt"], "--max-new-tokens", 32, "--temperature", 0,
                       "--dtype", dtype, "--compile-cache")
        calls = {"cold": (nothing, lambda _: ours(f"{cache}/{time.time_ns()}")),
                 "ours": (nothing, lambda _: ours(f"{cache}/warm"))}
        if "transformers" in args.vs:
            peer = partial(run_apart, "-c", STARTING.format(**words))
            calls["transformers"] = nothing, lambda _: peer()
        seconds = in_turn(calls, args.runs)
    record(args, "start, nothing compiled", "ours", seconds.pop("cold"), "s", dtype=dtype)
    compare(args, "start", seconds, "s", {"dtype": dtype})

# ------------------------------------------------------------------------ the same as transformers?

def both_models(args, dtype):
    """(ours, transformers' model, our tokenizer, the text of --text) of a checkpoint."""
    ours, text = Ours(args, dtype), Path(args.text).read_text() if args.text else __doc__
    if args.dataset:
        from datasets import load_dataset
        text = "\n\n".join(load_dataset(*args.dataset.split(":"), split="test")["text"])
    theirs = Transformers(args, dtype, folder_of(args)).model.cpu()
    return ours, theirs, ours.module.tokenizer(folder_of(args)), text

def continuations(ours, theirs, prompt, n, temperature):
    """n tokens after a prompt, as each of the two draws them."""
    import torch
    [new] = ours.module.generate(ours.model, [prompt], n, key=jax.random.key(0),
                                 temperature=temperature)
    torch.manual_seed(0)
    other = theirs.generate(torch.tensor([prompt]), do_sample=temperature > 0, top_k=0, top_p=1.0,
                            attention_mask=torch.ones(1, len(prompt), dtype=int),
                            max_new_tokens=n, min_new_tokens=n, pad_token_id=0, temperature=1.0)
    return {"ours": new, "transformers": other[0, len(prompt) :].tolist()}

def bench_validate(args, dtype):
    """Ours against transformers: tokens, the stream after each block, logits, greedy tokens."""
    import torch
    from transformers import AutoTokenizer
    ours, theirs, codec, text = both_models(args, dtype)
    ids, expected = (tokens.encode(text) for tokens in (
        codec, AutoTokenizer.from_pretrained(folder_of(args))))
    record(args, "tokens of the text", "same ids", [float(ids == expected)], f"of {len(ids)}")
    ids = ids[: min(256, ours.config.max_position_embeddings - args.new_tokens)]
    stream, call = [], ours.module.Block.__call__
    def kept(*inputs):
        out = call(*inputs)
        stream.append(out[0])
        return out
    ours.module.Block.__call__ = kept
    logits = ours.model(jnp.array([ids]))
    with torch.no_grad():
        out = theirs(torch.tensor([ids]), output_hidden_states=True)
    layers = zip(stream[:-1], out.hidden_states[1:-1], strict=True)  # the last of theirs is normed
    named = [(f"after block {i}", *pair) for i, pair in enumerate(layers)]
    for name, a, b in [*named, ("logits", logits, out.logits)]:
        a, b = np.asarray(a, np.float64), b.double().numpy()
        cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
        record(args, name, "difference", [np.abs(a - b).max()], "at most", dtype=dtype,
               of=f"numbers up to {np.abs(b).max():.3g}, cosine {cosine:.9f}")
    new = continuations(ours, theirs, ids[:32], args.new_tokens, 0.0)
    pairs = enumerate(zip(*new.values(), strict=True))
    agreed = next((i for i, (a, b) in pairs if a != b), args.new_tokens)
    record(args, "greedy tokens", "same until", [agreed], f"of {args.new_tokens}", dtype=dtype)

def bench_eval(args, dtype):
    """Mean loss and perplexity of a text: in windows of the context, each of which begins half a
    context before the end of the last and counts the tokens that the last one did not have."""
    import torch
    ours, theirs, codec, text = both_models(args, dtype)
    ids, C = codec.encode(text), min(1024, ours.config.max_position_embeddings)
    graphdef, state = nnx.split(ours.model)
    @jax.jit
    def losses_of(state, tokens):  # [1, T] -> [T - 1]
        logits = jax.nn.log_softmax(nnx.merge(graphdef, state)(tokens)[0, :-1])
        return -jnp.take_along_axis(logits, tokens[0, 1:, None], axis=-1)[:, 0]
    total, counted = {"ours": 0.0, "transformers": 0.0}, 1
    while counted < len(ids):
        start = max(0, counted - C // 2)
        window = ids[start : start + C]
        fresh = slice(counted - start - 1, len(window) - 1)
        padded = np.array([window + [0] * (C - len(window))])  # one length for all: one program
        total["ours"] += float(losses_of(state, padded)[fresh].sum())
        with torch.no_grad():
            logits = theirs(torch.tensor([window])).logits[0, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]),
                                                       reduction="none")
        total["transformers"] += float(losses[fresh].sum())
        counted = start + len(window)
    for who, loss in total.items():
        loss /= len(ids) - 1
        record(args, "loss", who, [loss], "nats a token", dtype=dtype)
        record(args, "perplexity", who, [math.exp(loss)], f"of {len(ids) - 1} tokens", dtype=dtype)

def bench_compare(args, dtype):
    """Greedy and sampled texts of both side by side, and how much each repeats itself."""
    ours, theirs, codec, text = both_models(args, dtype)
    prompt = codec.encode(text if args.text else "Once upon a time")[:64]
    for how, temperature in [("greedy", 0.0), ("sampled", 1.0)]:
        both = continuations(ours, theirs, prompt, args.new_tokens, temperature)
        for who, new in both.items():
            print(f"--- {how}, {who}\n{codec.decode(prompt + new)}", flush=True)
            for n in range(1, min(4, len(new) + 1)):
                grams = list(zip(*(new[i:] for i in range(n)), strict=False))
                record(args, f"{how}: distinct-{n}", who, [len(set(grams)) / len(grams)],
                       f"of runs of {n}")
            repeated = sum(token in new[max(0, i - 16) : i] for i, token in enumerate(new))
            record(args, f"{how}: repetition", who, [repeated / len(new)], "seen in the 16 before")

# --------------------------------------------------------------------------------------------- plan

CHIPS = {  # data sheets: bfloat16 FLOP/s, memory bytes/s, bytes of memory, bytes/s to other chips
    "a100": (312e12, 2.039e12, 80e9, 300e9), "h100": (989e12, 3.35e12, 80e9, 450e9),
    "h200": (989e12, 4.8e12, 141e9, 450e9), "v5e": (197e12, 0.819e12, 16e9, 200e9),
    "v5p": (459e12, 2.765e12, 95e9, 600e9), "v6e": (918e12, 1.64e12, 32e9, 448e9)}

def bench_plan(args, dtype):
    """What a preset needs at least on N chips, from its config alone. Training is split as by FSDP:
    bfloat16 weights are gathered twice and gradients scattered once; float32 weights, gradients and
    AdamW's moments stay split; only the stream between blocks is kept. Decoding splits weights and
    cache by tensor parallelism."""
    module, config, N = importlib.import_module(args.model), find_config(args), args.chips
    flops, bandwidth, memory, link = CHIPS[args.kind]
    depth = getattr(config, "n_layer", 0) or config.num_hidden_layers
    width = getattr(config, "n_embd", 0) or config.hidden_size
    for B, T in itertools.product(args.batch, args.length):
        c = costs(module, config, B, T, "bfloat16")
        times = {"products": c.train / N / flops, "links": 6 * c.size * (N - 1) / N / link,
                 "memory": 28 * c.size / N / bandwidth}
        step = max(times.values())
        shape = {"batch": B, "length": T, "chips": f"{N} {args.kind}"}
        for what, held, seconds, tokens, of in [
            ("train", (16 * c.size + 2 * depth * width * T * B) / N, step, B * T,
             f"held by the {max(times, key=times.get)}"),
            ("decode", (2 * c.size + c.cache) / N, c.decode_bytes / N / bandwidth, B,
             "held by the memory"),
        ]:
            fits = "fits" if held < memory else f"does not fit {memory / 1e9:.0f} GB"
            record(args, f"{what}: memory", "plan", [held / 1e9], "GB a chip", of=fits, **shape)
            record(args, f"{what}: step", "plan", [1e3 * seconds], "ms", of=of, **shape)
            record(args, f"{what}: speed", "plan", [tokens / seconds], "tokens/s", **shape)

TASKS = {task: partial(bench_speed, task=task) for task in FORMULAS} | {
    name.removeprefix("bench_"): task for name, task in globals().items()
    if name.startswith("bench_") and name != "bench_speed"}

# ------------------------------------------------------------------------------------------- output

def write_table(records: list[dict]):
    """The records as a Markdown table, and the formulas behind the shares of the limits."""
    number = lambda x: f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"  # noqa: E731
    rows = [["figure", "who", "of", "median", "spread", "unit", "share of the limit"]]
    for found in records:
        shape = [f"{found[key]}{name}" for key, name in [
            ("batch", " x"), ("length", " tokens,"), ("dtype", ""), ("chips", "")] if key in found]
        spread = f"{number(found['low'])} - {number(found['high'])}" * (found["runs"] > 1)
        share = f"{found['share']:.0%} of " if "share" in found else ""
        rows.append([found["metric"], found["who"], " ".join(shape).strip(","),
                     number(found["value"]), spread, found["unit"], share + found.get("of", "")])
    widths = [max(len(row[i]) for row in rows) for i in range(7)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print(f"| {' | '.join(cells)} |")
    for metric, formula in {r["metric"]: r["formula"] for r in records if "formula" in r}.items():
        print(f"{metric}: {formula}")

def draw(records: list[dict], file: Path):
    """The roofline, operations/s over operations a byte, with a point for each of our figures."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for found in records:
        axes.loglog(found["intensity"], found["flops"], "o", label=f"{found['metric']}, "
                    f"{found['batch']} x {found['length']} tokens, {found['dtype']}")
    for dtype, found in {found["dtype"]: found for found in records}.items():
        product, read = found["limits"]["FLOP/s"], found["limits"]["B/s"]
        ends = [0.1, product / read, 10 * product / read]
        axes.loglog(ends, [min(product, read * x) for x in ends], color="gray")
        axes.text(ends[-1], product, f"products, {dtype}", ha="right", va="bottom")
    axes.set(xlabel="operations for each byte of weights and cache", ylabel="operations/s",
             title=f"{found['weights']} on {found['device']}")
    axes.legend(fontsize=7)
    figure.savefig(file, dpi=120, bbox_inches="tight")

# --------------------------------------------------------------------------------- the command line

def folder_of(args, dtype="float32") -> Path:
    """The folder of --weights; for random ones, one that is written now."""
    module = importlib.import_module(args.model)
    if args.weights == "tiny":
        return HERE / "tiny" / args.model
    if args.weights != "random":
        return module.fetch(args.weights)
    folder = Path(args.scratch, dtype)
    if not folder.exists():
        module.save(random_model(module, find_config(args), dtype), folder)
    return folder

def find_config(args):
    """The config of --weights, or of --preset where they are random."""
    module = importlib.import_module(args.model)
    if args.weights == "random" or (args.task == ["plan"] and args.weights in module.PRESETS):
        return module.PRESETS[args.preset if args.weights == "random" else args.weights][-1]
    return module.Config.from_hf(json.loads((folder_of(args) / "config.json").read_text()))

def torch_device() -> str:
    """PyTorch's name for the device that JAX computes on."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"

def arguments():
    """The command line, read and checked."""
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add, words = fail, parser.add_argument, lambda text: text.split(",")
    numbers = lambda text: list(map(int, text.split(",")))  # noqa: E731
    add("--model", choices=MODELS, help="which file (default: gpt2)")
    add("--weights", metavar="WEIGHTS", help="tiny, random, a Hub id or a folder (default: random "
        "with --preset, else the first preset of --model; tiny without either)")
    add("--preset", metavar="ID", help="whose size random weights have, or what is planned for")
    add("--task", type=words, metavar="TASK,...", default=["prefill", "decode", "train"],
        help=f"of {', '.join(TASKS)} (default: prefill,decode,train)")
    add("--suite", choices=["gpu", "tpu"], help="the set of figures to record of such a machine")
    add("--batch", type=numbers, default=[1], metavar="N,...", help="rows (default: 1)")
    add("--length", type=numbers, default=[32], metavar="N,...", help="tokens (default: 32)")
    for name, default, about in [
        ("--new-tokens", 64, "after a prompt"), ("--runs", 5, "of which the median counts"),
        ("--chips", 1, "for plan"), ("--limit", 600, "seconds that a task may take")]:
        add(name, type=int, default=default, metavar="N", help=f"{about} (default: {default})")
    add("--ragged", action="store_true", help="prompts of different lengths, for decode")
    for name, kind in [("--temperature", float), ("--top-k", int), ("--top-p", float)]:
        add(name, type=kind, metavar="X", help="as in sample.py (default: greedy)")
    add("--vs", type=words, default=[], metavar="NAME,...", help=f"of {', '.join(PEERS)}")
    add("--text", metavar="FILE", help="for validate, eval and compare")
    add("--dataset", metavar="NAME[:SUBSET]", help="its test split, through the package datasets")
    add("--kind", choices=CHIPS, default="h100", help="for plan (default: h100)")
    add("--dtype", type=words, default=[""], metavar="DTYPE,...", help="default: as in sample.py")
    add("--device", choices=["cpu", "gpu", "tpu"], help="default: the best there is")
    add("--out", type=Path, metavar="FOLDER", help="for results.jsonl and roofline.png")
    for name in ("--scratch", "--once"):  # in the processes of single tasks, and of single loads
        add(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    presets = importlib.import_module(args.model or "gpt2").PRESETS
    given = args.weights or ("random" if args.preset else "")
    args.weights = given or (next(iter(presets)) if args.model else "tiny")
    args.model, args.preset = args.model or "gpt2", args.preset or next(iter(presets))
    args.needed = {name if name == "ctranslate2" else "torch" for name in args.vs} | {
        "torch" for task in args.task if task in ("validate", "eval", "compare")}
    sizes = [*args.batch, *args.length, args.new_tokens, args.runs, args.chips]
    for fits, rule in [
        ({*args.task} <= TASKS.keys(), f"--task must be of {', '.join(TASKS)}"),
        ({*args.vs} <= PEERS.keys(), f"--vs must be of {', '.join(PEERS)}"),
        ({*args.dtype} <= {"", "float32", "bfloat16", "float16"}, "--dtype: see --help"),
        (args.preset in presets, f"--preset must be of {', '.join(presets)}"),
        (not args.text or Path(args.text).is_file(), f"--text {args.text}: there is no such file"),
        (min(sizes) >= 1, "batches, lengths, tokens, runs and chips must be 1 or more"),
        (not args.ragged or args.task == ["decode"], "--ragged is for --task decode"),
        *[(importlib.util.find_spec(name), f"that needs {name}: pip install {name}")
          for name in args.needed]]:
        if not fits:
            fail(rule)
    return args

def measure(args):
    """A single task, in a process of its own."""
    if args.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if args.device not in (None, jax.default_backend()):
        fail(f"there is no {args.device} here: JAX finds {jax.default_backend()}")
    [task], [dtype] = args.task, args.dtype
    try:
        context = find_config(args).max_position_embeddings
    except (OSError, ValueError) as error:  # of the Hub, of the folder, or an InputError
        fail(f"--weights {args.weights}: {error}")
    need = max(args.length) + args.new_tokens * (task in ("decode", "compile"))
    if need > context:
        fail(f"{need} tokens do not fit the context of {context}: choose another --length")
    TASKS[task](args, dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))

def main(args) -> int:
    """Starts a process for each task, collects what they print -> the exit code."""
    parts = [["--task", task, "--dtype", dtype] for task in args.task for dtype in args.dtype]
    if args.suite:
        lines = (HERE / "benchmarks/gpu.txt").read_text().splitlines()
        parts = [["--weights", "random", *shlex.split(line)] for line in lines]
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    records, code = [], 0
    for part in parts:
        print(f"bench.py: {' '.join(part)}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, __file__, *sys.argv[1:], *part, "--scratch", scratch]
            try:
                code = max(code, abs(subprocess.run(command, timeout=args.limit).returncode))
            except subprocess.TimeoutExpired:
                print(f"bench.py: given up after {args.limit} s", file=sys.stderr)
                code = 1
            if (file := Path(scratch, "records")).exists():
                records += map(json.loads, file.read_text().splitlines())
    write_table(records)
    if args.out and records:
        about = {name: importlib.metadata.version(name) for name in ("jax", "flax", *args.needed)}
        about |= {"command": shlex.join(["bench.py", *sys.argv[1:]]), "cpus": os.cpu_count()}
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "results.jsonl").write_text("\n".join(map(json.dumps, [about, *records])))
        if points := [found for found in records if "intensity" in found]:
            draw(points, args.out / "roofline.png")
    return code

if __name__ == "__main__":
    args = arguments()
    sys.exit(measure(args) if args.scratch else main(args))
