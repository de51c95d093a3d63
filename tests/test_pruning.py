"""train.py --prune: which weights become 0 and when, that they stay 0, and what is written."""

import functools
import importlib
import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from helpers.reference import ROOT
from helpers.small import complaint
from safetensors import safe_open
from test_parallel import assert_same_curve, on_devices
from test_train import some_settings, some_tokens
from transformers import AutoModelForCausalLM

import gpt2
import train

TEXT = "".join(f"The {n} of {n * n} said: 'I'll go', and went {n % 7} miles.\n" for n in range(400))
SMALL = (
    "--layers 2 --heads 2 --width 32 --block 16 --batch 4 --steps 40 --eval-every 10 "
    "--save-every 10 --keep 9 --device cpu --tokens char"
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    (folder / "text.txt").write_text(TEXT)
    return folder


SEVERAL = """
import json, sys, train
for line in sys.stdin:
    sys.argv = ["train.py", *json.loads(line)]
    assert train.main() == 0
"""


@pytest.fixture(scope="module")
def train_several(shared):
    """Runs train.py with each list of flags, all in one process -> what they printed."""

    def call(*lines, devices=1):
        lines = [["--data", shared / "text.txt", *line] for line in lines]
        done = subprocess.run(
            [sys.executable, "-c", SEVERAL],
            input="\n".join(json.dumps([str(word) for word in line]) for line in lines),
            cwd=ROOT,
            env=on_devices(devices) | {"XDG_CACHE_HOME": str(shared / "cache")},
            text=True,
            capture_output=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr
        return done

    return call


def tensors(folder):
    """name -> float32 tensor of all that a checkpoint holds; numpy's reader knows no bfloat16."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key).float().numpy() for key in file.keys()}  # noqa: SIM118


def matrices(folder, model="gpt2"):
    """name -> matrix [out, in] of each linear layer in the blocks, but for a Mixtral's router."""
    found = {}
    for name, tensor in tensors(folder).items():
        in_block = re.search(r"\.(h|layers)\.\d+\.", name)
        if in_block and tensor.ndim == 2 and not name.endswith(".gate.weight"):
            found[name] = tensor.T if model == "gpt2" else tensor  # its Conv1D stores [in, out]
    return found


def share_of_zeros(folder, **options):
    return {name: np.mean(matrix == 0) for name, matrix in matrices(folder, **options).items()}


def rows_of(out, name):
    """(step, value) of the rows of metrics.jsonl that have this value."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row[name]) for row in rows if name in row]


def first_loss(stdout):
    return float(re.findall(r"validation loss before step 1: (\d+\.\d{4})", stdout)[-1])


# ------------------------------------------------------------------------------------ which weights


def test_the_smallest_weights_become_0_and_of_equal_ones_the_first():
    kernel = jnp.float32([[3, -1, 2], [-2, 5, 0.5]])
    pruned = train.prune(None, kernel, 3)
    np.testing.assert_array_equal(pruned, [[3, 0, 0], [-2, 5, 0]])
    np.testing.assert_array_equal(train.prune(None, kernel, 0), kernel)
    np.testing.assert_array_equal(train.prune(None, kernel, 5), [[0, 0, 0], [0, 5, 0]])


def test_two_of_four_inputs_of_each_output_stay_and_the_smallest_go_first():
    """A column is an output. In the second one, all weights are small, but only two may go."""
    kernel = jnp.float32([[9, 0.1], [-8, 0.2], [7, -0.3], [6, 0.4]])
    for count, expected in [
        (0, [[9, 0.1], [-8, 0.2], [7, -0.3], [6, 0.4]]),
        (1, [[9, 0], [-8, 0.2], [7, -0.3], [6, 0.4]]),
        (3, [[9, 0], [-8, 0], [7, -0.3], [0, 0.4]]),
        (4, [[9, 0], [-8, 0], [0, -0.3], [0, 0.4]]),
    ]:
        np.testing.assert_array_equal(train.prune((2, 4), kernel, count), np.float32(expected))


def test_one_of_four_means_that_one_stays():
    share, group = train.read_pruning("1:4")
    kernel = jax.random.normal(jax.random.key(0), (8, 6))
    pruned = np.asarray(train.prune(group, kernel, round(share * kernel.size)))
    assert ((pruned.reshape(2, 4, 6) != 0).sum(axis=1) == 1).all()


@pytest.mark.parametrize("prune", ["0.5", "2:4"])
def test_of_a_stack_of_experts_each_matrix_is_pruned_by_itself(prune):
    """One of much smaller weights loses no more of them than the others."""
    share, group = train.read_pruning(prune)
    stack = (
        jax.random.normal(jax.random.key(0), (3, 8, 6)) * jnp.float32([1, 1e-3, 1])[:, None, None]
    )
    count = train.counts_of(share, stack)
    assert count == 24
    pruned = train.prune(group, stack, count)
    for matrix, alone in zip(pruned, stack, strict=True):
        np.testing.assert_array_equal(matrix, train.prune(group, alone, count))


@pytest.mark.parametrize("kind", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 999, 5000, 9999])
def test_as_many_are_smallest_as_asked_for_even_where_many_are_equal(kind, count):
    """A checkpoint in bfloat16 has few different values."""
    values = np.abs(np.random.default_rng(0).normal(size=(100, 100))).astype(kind)
    values = values.astype(np.float32)
    found = np.asarray(train.smallest(jnp.asarray(values), count))
    order = np.argsort(values.ravel(), kind="stable")
    assert set(np.flatnonzero(found)) == set(order[:count])


@pytest.mark.parametrize("name", train.MODELS)
def test_the_matrices_of_the_blocks_are_pruned_and_no_router_table_or_head(name):
    model_file = importlib.import_module(name)
    sizes = {"layers": 1, "heads": 2, "width": 16, "context": 8, "vocab_size": 64}
    if name in ("mistral", "qwen"):
        sizes["experts"] = 4
    config = replace(model_file.Config.small(**sizes), tie_word_embeddings=False)
    params = nnx.state(model_file.Model(config, rngs=nnx.Rngs(0)))
    changed = train.change_matrices(lambda p: p + 1, params)
    before = {path: param[...] for path, param, *_ in model_file.named_parameters(params)}
    after = {path: param[...] for path, param, *_ in model_file.named_parameters(changed)}
    found = {path for path in before if (before[path] != after[path]).any()}
    kernels = {path for path in before if path.endswith(".kernel")}
    routers = {"layers.0.block_sparse_moe.gate.kernel", "layers.0.mlp.gate.kernel"}
    assert found == kernels - {"lm_head.kernel", *routers} and len(found) >= 4
    assert bool(routers & kernels) == (name in ("mistral", "qwen"))


# --------------------------------------------------------------------------------------------- when


def pruned_run(prune, steps, resumed_at=0, lora=0):
    """What `prune_when_due` needs, and the shares that it asks for: {step: share}."""
    shares = {}
    params = nnx.state(
        gpt2.Model(gpt2.Config.small(layers=1, heads=1, width=8, context=8), rngs=nnx.Rngs(0))
    )
    args = Namespace(prune=prune, steps=steps, lora=lora)
    run = Namespace(args=args, state={"params": params}, step=resumed_at, resumed_at=resumed_at)

    def prune_step(state, counts):
        kernel = state["params"]["h"][0]["mlp"]["c_fc"]["kernel"]
        shares[run.step] = counts["h"][0]["mlp"]["c_fc"]["kernel"].get_value() / kernel.size
        return state

    run.prune_step = prune_step
    while run.step < steps:
        run.step += 1
        train.prune_when_due(run)
    return shares


def test_the_share_rises_by_the_cubic_schedule_in_three_quarters_of_the_run():
    shares = pruned_run("0.5", 4000)
    assert [*shares] == [*range(100, 3001, 100)]
    for step, share in shares.items():
        # Zhu and Gupta 2017, equation 1, from 0; a matrix here has 256 weights.
        expected = 0.5 + (0 - 0.5) * (1 - step / 3000) ** 3
        assert share == pytest.approx(expected, abs=0.5 / 256)
    assert shares[3000] == 0.5
    assert pruned_run("2:4", 4000) == shares


@pytest.mark.parametrize(("steps", "last"), [(1, 1), (2, 1), (3, 2), (41, 30), (50, 37)])
def test_short_runs_end_as_sparse_as_long_ones(steps, last):
    shares = pruned_run("0.75", steps)
    assert max(shares) == last and shares[last] == 0.75


def test_a_run_that_is_resumed_with_fewer_steps_ends_as_sparse():
    """It had 4,000 steps and is at 1,500; of 1,600, pruning would have ended at 1,200."""
    assert pruned_run("0.5", 1600, resumed_at=1500) == {1501: 0.5}


@pytest.mark.parametrize(("prune", "lora"), [(None, 0), ("keep", 0), ("0.5", 4)])
def test_nothing_is_pruned_during_other_runs(prune, lora):
    assert pruned_run(prune, 40, lora=lora) == {}


def test_a_loss_that_rises_while_weights_are_pruned_does_not_end_the_run(tmp_path):
    metrics = train.Metrics(tmp_path, 0)
    losses = [1.0] * 30 + [4.0] * 30
    rows = [{"step": n, "loss": loss, "norm": 1.0} for n, loss in enumerate(losses, 1)]
    metrics.rows = rows[:40]
    assert "after 1.00" in metrics.divergence() and not metrics.divergence(after=30)
    metrics.rows = rows[30:] + [{**rows[-1], "step": n, "loss": 9.0} for n in range(61, 71)]
    assert "after 4.00" in metrics.divergence(after=30)
    metrics.rows[-1]["loss"] = np.nan
    assert "the loss is nan" in metrics.divergence(after=99)


def test_patience_compares_only_models_that_are_as_sparse_as_they_will_be():
    """While weights are pruned, the loss rises, and none of these models is asked for."""
    args = Namespace(patience=1, prune="0.5", lora=0, steps=40)
    run = Namespace(args=args, metrics=Namespace(rows=[]), out_of_patience=False)
    found = {}
    for run.step, loss in [(10, 1.0), (20, 2.0), (30, 3.0), (40, 3.5)]:
        run.metrics.rows.append({"step": run.step, "val_loss": loss})
        due = train.Due(log=True, evaluate=True, save=False, stop=False)
        train.heed_patience(run, due)
        found[run.step] = (due.save, run.out_of_patience)
    assert found == {10: (False, False), 20: (False, False), 30: (True, False), 40: (True, True)}


# ------------------------------------------------------------------------------------ zeros stay 0


def steps_with_pruning(optimizer, **options):
    """Yields the state after each of six steps; after the third, half of the weights are pruned."""
    settings = some_settings(optimizer=optimizer, prune="0.5", lr=1e-2, ema=0.9, **options)
    config = gpt2.Config.small(layers=1, heads=2, width=16, context=16, vocab_size=50)
    graphdef, params = nnx.split(gpt2.Model(config, rngs=nnx.Rngs(0)))
    transform, _ = train.make_optimizer(settings)
    mesh = jax.sharding.Mesh(jax.devices()[:1], "data")
    state = train.first_state(settings, transform, params, mesh)
    build_model = train.make_build_model(
        mesh, graphdef, jnp.float32, state["params"], nnx.State({})
    )
    config = train.StepConfig(build_model, transform, None, settings.ema)
    step, _ = train.compile_steps(config, mesh, state)
    prune_step = train.compile_pruning(settings.prune, state)

    batch = train.next_tokens(some_tokens().reshape(settings.accumulate, 1, -1, 17))
    for number in range(6):
        if number == 3:
            state = prune_step(state, train.counts_of(0.5, state["params"]))
        state, _ = step(state, nnx.State({}), batch, jax.random.key(0))
        yield jax.device_get(state)


@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_a_pruned_weight_stays_exactly_0_and_so_does_its_mean(optimizer):
    """Momentum from before would move it, and so would the steps of Muon and Lion."""
    *_, before, first, _, last = steps_with_pruning(optimizer)
    for tree in ("params", "ema"):
        assert train.count_zeros(before[tree])[0] == 0
        zeros, size = train.count_zeros(first[tree])
        assert size == 16 * (48 + 16 + 64 + 64) and zeros == size / 2
        assert train.count_zeros(last[tree]) == (zeros, size)
    for one, other in [("params", "params"), ("params", "ema")]:
        same = train.change_matrices(lambda a, b: (a == 0) == (b == 0), first[one], last[other])
        assert train.count_zeros(same)[0] == 0  # the same weights are 0
    moved = train.change_matrices(lambda a, b: (a == b) & (a != 0), first["params"], last["params"])
    assert train.count_zeros(moved)[0] == train.count_zeros(moved)[1]  # and all others move


def test_with_gradient_accumulation_they_stay_0_too():
    *_, last = steps_with_pruning("adamw", accumulate=3)
    zeros, size = train.count_zeros(last["params"])
    assert zeros == size / 2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_gradient_of_a_pruned_weight_counts_for_no_other(optimizer):
    """Neither for clipping nor in Muon's orthogonalization."""
    kernel = jnp.float32([[1, 0, 4], [2, 3, 5]])
    params = {"h": {0: {"mlp": {"kernel": kernel}}}}
    transform, _ = train.make_optimizer(some_settings(prune="0.5", optimizer=optimizer))

    def update(gradient_of_pruned):
        gradient = jnp.float32([[0.1, gradient_of_pruned, 0.3], [0.2, -0.1, 0.1]])
        gradients = jax.tree.map(lambda _: gradient, params)
        updates, _ = transform.update(gradients, transform.init(params), params)
        return np.asarray(updates["h"][0]["mlp"]["kernel"])

    np.testing.assert_array_equal(update(0), update(1e6))
    np.testing.assert_array_equal(update(0) == 0, kernel == 0)


# ------------------------------------------------------------------------------ what a run leaves


@pytest.fixture(scope="module")
def runs(train_several, tmp_path_factory):
    """Folders: a GPT-2 pruned to a half, a Llama to 2:4, and what was printed."""
    folder = tmp_path_factory.mktemp("runs")
    done = train_several(
        [*SMALL.split(), "--prune", "0.5", "--out", folder / "half"],
        [*SMALL.split(), "--prune", "2:4", "--out", folder / "groups", "--ema", "0.9"],
    )
    return Namespace(
        half=folder / "half", groups=folder / "groups", stdout=done.stdout, stderr=done.stderr
    )


def test_the_share_of_zeros_is_exact_in_each_matrix_and_nothing_else_is_0(runs):
    shares = share_of_zeros(runs.half)
    assert len(shares) == 8 and set(shares.values()) == {0.5}
    others = tensors(runs.half).keys() - matrices(runs.half).keys()
    assert all(tensors(runs.half)[name].all() for name in others if not name.endswith("wte.weight"))


def assert_two_of_four(folder, model="gpt2"):
    """Along the inputs, as NVIDIA's kernels need it."""
    for name, matrix in matrices(folder, model).items():
        groups = matrix.reshape(len(matrix), -1, 4)
        assert ((groups == 0).sum(axis=2) == 2).all(), name


def test_two_of_four_inputs_are_0_in_the_file(runs):
    assert len(matrices(runs.groups)) == 8
    assert_two_of_four(runs.groups)
    with pytest.raises(AssertionError):
        assert_two_of_four(runs.half)


def test_transformers_loads_the_folder_and_computes_the_same(runs):
    tokens = np.random.default_rng(0).integers(30, size=(2, 16))
    for folder in (runs.half, runs.groups):
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens)).logits.numpy()
        # Float32 sums of 32 to 128 products in another order: some units of the sixth digit.
        np.testing.assert_allclose(gpt2.load(folder)(tokens), expected, rtol=0, atol=2e-5)


def test_sparsity_is_in_the_lines_in_the_metrics_and_in_the_last_report(runs):
    assert re.findall(r"step +(\d+)/40 .* sparsity +([\d.]+)%", runs.stderr)[:4] == [
        ("10", "35.2"),
        ("20", "48.1"),
        ("30", "50.0"),
        ("40", "50.0"),
    ]
    report = "sparsity: 50.0% of the 24,576 weights in the blocks' matrices are 0\n"
    assert runs.stdout.count(report) == 2
    assert "0.0% of the 24,576 weights in the blocks' matrices are 0; after step 30 50.0%" in (
        runs.stdout
    )
    recorded = [share for _, share in rows_of(runs.half, "sparsity")]
    assert recorded == pytest.approx([0.3519, 0.4815, 0.5, 0.5], abs=1e-4)


def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(runs, train_several, tmp_path):
    """Once while weights are pruned, and once when all of them are."""
    lines = []
    for step in (20, 30):
        out = shutil.copytree(runs.groups, tmp_path / str(step))
        (out / "model.safetensors").unlink()
        flags = ["--prune", "2:4", "--ema", "0.9", "--out", out, "--resume", step]
        lines.append([*SMALL.split(), *flags])
    train_several(*lines)
    for step in (20, 30):
        for file in ("model.safetensors", "metrics.jsonl"):
            assert (tmp_path / str(step) / file).read_bytes() == (runs.groups / file).read_bytes()


@pytest.mark.wide
def test_the_weights_of_the_lowest_loss_are_looked_for_among_those_that_are_sparse_enough(
    runs, train_several, tmp_path
):
    """Without most of its weights the loss of a trained model is higher than at first."""
    flags = "--block 16 --batch 4 --steps 12 --eval-every 3 --save-every 3 --keep 20"
    flags = f"{flags} --device cpu --prune 0.97".split()
    done = train_several([*flags, "--weights", runs.half, "--out", tmp_path])
    losses = dict(rows_of(tmp_path, "val_loss"))
    assert min(losses, key=losses.get) < 9 <= max(losses)
    assert train.open_checkpoints(tmp_path, 20).best_step() >= 9
    assert min(share_of_zeros(tmp_path).values()) > 0.96
    assert "sparsity: 97.0%" in done.stdout


# -------------------------------------------------------------------------------- LoRA, and keep


@pytest.fixture(scope="module")
def adapted(train_several, runs, tmp_path_factory):
    """A function: name of a run that goes on from a checkpoint -> its folder, what it printed."""
    folder = tmp_path_factory.mktemp("adapted")
    flags = "--block 16 --batch 4 --steps 6 --eval-every 3 --save-every 0 --lr 1e-2 --device cpu"
    lora = ["--lora", "4", "--merge"]
    flags_of = {
        "lora": ["--weights", "tiny", "--prune", "2:4", *lora],
        "after lora": ["--weights", folder / "lora", "--prune", "keep"],
        "keep": ["--weights", runs.half, "--prune", "keep"],
        "keep lora": ["--weights", runs.half, "--prune", "keep", *lora],
        "dense": ["--weights", runs.half],
        "dense lora": ["--weights", runs.half, *lora],
    }

    @functools.cache
    def run(name):
        out = folder / name
        if name == "after lora":
            run("lora")
        done = train_several([*flags.split(), *flags_of[name], "--out", out])
        return Namespace(out=out, stdout=done.stdout)

    return run


def test_merged_adapters_keep_the_zeros_and_change_what_is_left(adapted):
    assert_two_of_four(adapted("lora").out)
    base = matrices(ROOT / "tiny/gpt2")
    for name, matrix in matrices(adapted("lora").out).items():
        kept = matrix != 0
        assert (matrix != base[name])[kept].mean() > 0.99
        # Pruned was what was smallest in the base: the adapters are trained after it.
        groups = np.abs(base[name]).reshape(len(matrix), -1, 4)
        weights = np.where(kept, np.inf, np.abs(base[name])).reshape(groups.shape)
        assert (np.sort(weights, axis=2)[..., :2] == np.sort(groups, axis=2)[..., :2]).all()


def test_the_adapters_are_trained_and_evaluated_with_the_zeros_that_are_written(adapted):
    _, last = rows_of(adapted("lora").out, "val_loss")[-1]
    written = first_loss(adapted("after lora").stdout)  # on the same batches
    assert last == pytest.approx(written, abs=2e-4)
    assert last < first_loss(adapted("lora").stdout) - 0.1


@pytest.mark.parametrize("name", ["keep", pytest.param("keep lora", marks=pytest.mark.wide)])
def test_zeros_of_a_checkpoint_stay_if_they_are_to_be_kept(name, runs, adapted):
    before, after = matrices(runs.half), matrices(adapted(name).out)
    for key, matrix in after.items():
        np.testing.assert_array_equal(matrix == 0, before[key] == 0)
        assert (matrix != before[key]).sum() > 0.4 * matrix.size
    zeros = "50.0% of the 24,576 weights in the blocks' matrices are 0"
    assert f"prune  {zeros}, and stay 0" in adapted(name).stdout
    assert f"sparsity: {zeros}" in adapted(name).stdout


@pytest.mark.wide
@pytest.mark.parametrize("name", ["dense", "dense lora"])
def test_without_it_training_fills_them(name, adapted):
    assert max(share_of_zeros(adapted(name).out).values()) < 0.01
    assert "sparsity" not in adapted(name).stdout


# ---------------------------------------------------------------------------------- several devices


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("model", "modes", "flags"),
    [
        ("gpt2", ["no", "pmap", "fsdp:2,tensor"], "--prune 2:4 --ema 0.9"),
        pytest.param("llama", ["no", "data", "tensor"], "--prune 0.5", marks=pytest.mark.wide),
        pytest.param(
            "gpt2",
            ["no", "pmap", "fsdp"],
            "--prune 2:4 --weights tiny --lora 4 --merge",
            marks=pytest.mark.wide,
        ),
        slow("mistral", ["no", "pmap", "data", "fsdp", "tensor"], "--prune 2:4 --experts 4"),
        slow("gemma", ["no", "pmap", "data", "fsdp", "tensor"], "--prune 0.7 --optimizer muon"),
    ],
)
def test_every_mode_prunes_as_one_device_does(model, modes, flags, train_several, tmp_path):
    sizes = "--layers 1 --heads 4 --width 32 --tokens char"
    if "--weights" in flags:
        sizes = ""
    common = f"{sizes} --block 16 --batch 8 --steps 8 --eval-every 4 --lr 1e-3 --device cpu"
    lines = []
    for mode in modes:
        line = [*common.split(), "--save-every", 0, "--model", model, *flags.split()]
        lines.append([*line, "--parallel", mode, "--out", tmp_path / mode])
    train_several(*lines, devices=4)
    expected = share_of_zeros(tmp_path / "no", model=model)
    for mode in modes[1:]:
        assert share_of_zeros(tmp_path / mode, model=model) == expected
        assert_same_curve(tmp_path / mode, tmp_path / "no")
        if "2:4" in flags:
            assert_two_of_four(tmp_path / mode, model)


@pytest.mark.wide
@pytest.mark.parametrize("model", train.MODELS)
def test_every_family_is_pruned_and_transformers_reads_it(model, train_several, tmp_path):
    """In half precision, where small weights must not become 0 as well."""
    flags = "--steps 6 --prune 2:4 --save-dtype bfloat16 --accumulate 2"
    more = ["--experts", "4"] if model in ("mistral", "qwen") else []
    train_several([*SMALL.split(), *flags.split(), "--model", model, *more, "--out", tmp_path])
    assert_two_of_four(tmp_path, model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(30, size=(2, 16))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    ours = importlib.import_module(model).load(tmp_path, dtype=jnp.float32)(tokens)
    # As above; a Gemma's logits are larger.
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=5e-5)


# ------------------------------------------------------------------------------------- bad input


NO_SHARES = "0 1 1.5 -0.5 nan inf x 50% 4:2 2:2 2:0 0:4 2:-4 2:4:8"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *[(f"--prune {x}", f"--prune {x}: it must be a share above") for x in NO_SHARES.split()],
        ("--prune=", "it must be a share above 0 and below 1, a pattern such as 2:4"),
        ("--prune 2:3", "the 128 inputs of h.0.attn.c_attn do not split into groups of 3"),
        ("--prune keep", "--prune keep is for --weights with zeros"),
        ("--prune keep --weights tiny", "none of the 786,432 weights is 0: name a share"),
        ("--prune 0.5 --weights tiny --lora 4", "--prune with --lora needs --merge"),
    ],
)
def test_bad_input_is_one_line_that_says_what_is_wrong(
    flags, message, shared, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train, "CACHE", shared / "cache")
    common = f"train.py --device cpu --steps 1 --data {shared}/text.txt --out {tmp_path}/out"
    monkeypatch.setattr(sys, "argv", [*common.split(), *flags.split()])
    with pytest.raises(SystemExit) as stop:
        train.main()
    jax.config.update("jax_default_device", None)  # which main set
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert message in complaint(err) and not (tmp_path / "out").exists()


def test_a_run_is_resumed_with_the_same_target(runs, shared, monkeypatch, capsys):
    monkeypatch.setattr(train, "CACHE", shared / "cache")
    flags = [*SMALL.split(), "--data", shared / "text.txt", "--out", runs.half, "--resume"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags), "--prune", "0.6"])
    with pytest.raises(SystemExit) as stop:
        train.main()
    jax.config.update("jax_default_device", None)  # which main set
    assert stop.value.code == 2
    assert "has --prune 0.5: resume with that" in capsys.readouterr().err
