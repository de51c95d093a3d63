"""Large models: loading takes little more memory than the parameters.

GPT-2 XL, 1.5 billion parameters in float32, and Llama 2 7B, 6.7 billion in bfloat16, both random.
Needs 14 GB of disk, 16 GB of memory and some minutes: pytest -m slow
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.reference import ROOT
from safetensors.numpy import save_file

import gpt2
import llama


def write_shards(module, config, folder, dtype):
    """A random checkpoint in shards of 1 GB, of which one at a time is in memory."""
    rng, weight_map, shard = np.random.default_rng(0), {}, {}

    def flush():
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    shapes = nnx.state(nnx.eval_shape(lambda: module.Model(config, rngs=nnx.Rngs(0))))
    for _, param, name, transposed in module.named_parameters(shapes):
        shape = param.shape[::-1] if transposed else param.shape
        shard[name] = (rng.random(shape, np.float32) * 0.04 - 0.02).astype(dtype)
        if sum(tensor.nbytes for tensor in shard.values()) > 1e9:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return folder


def run(program):
    """What a program of its own prints, which may call peak(): the bytes that it had at most."""
    program = (
        """
        import json, re, time, jax, numpy as np
        from pathlib import Path
        from safetensors import safe_open
        def peak():
            status = Path("/proc/self/status").read_text()
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1])
    """
        + program
    )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return [float(number) for number in done.stdout.split()]


def checkpoint(module, name, dtype):
    """A fixture: the folder of a random checkpoint in the shape of a published one."""

    @pytest.fixture(scope="module")
    def folder(tmp_path_factory):
        path = tmp_path_factory.mktemp("large")
        yield write_shards(module, module.PRESETS[name].config, path, dtype)
        shutil.rmtree(path)

    return folder


xl = checkpoint(gpt2, "openai-community/gpt2-xl", np.float32)
llama_7b = checkpoint(llama, "meta-llama/Llama-2-7b-hf", jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_loading_takes_the_memory_of_the_parameters_and_little_more(xl, dtype, size):
    """15% of the parameters and 400 MB, of which Python with jax and flax takes about 300."""
    peak, _ = run(f"""
        import gpt2
        start, folder = time.time(), Path({str(xl)!r})
        model = gpt2.load(folder, dtype={dtype!r})
        jax.block_until_ready(model.wte.embedding[...])
        print(peak(), time.time() - start)
        files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        for layer in (0, 47):
            name = f"transformer.h.{{layer}}.mlp.c_fc.weight"
            with safe_open(folder / files[name], "np") as file:
                stored = file.get_tensor(name).astype({dtype!r})
            np.testing.assert_array_equal(model.h[layer].mlp.c_fc.kernel[...], stored)
    """)
    parameters = gpt2.PRESETS["openai-community/gpt2-xl"].parameters
    assert peak <= 1.15 * parameters * size + 400e6


@pytest.mark.slow
def test_7b_in_bfloat16_loads_and_generates_in_little_more_memory_than_its_parameters(llama_7b):
    """Loading as above. Generating on a CPU takes the float32 copy of a block of its 32 and of the
    head too, so a quarter in place of 15%: a copy of all weights would be 27 GB."""
    loaded, generated, _, _ = run(f"""
        import llama
        start, folder = time.time(), Path({str(llama_7b)!r})
        model = llama.load(folder, dtype="bfloat16")
        jax.block_until_ready(model.lm_head.kernel[...])
        print(peak())
        loaded = time.time()
        [new] = llama.generate(model, [[1, 2, 3]], 4, key=jax.random.key(0))
        assert len(new) == 4
        print(peak(), loaded - start, time.time() - loaded)
    """)
    parameters = 2 * llama.PRESETS["meta-llama/Llama-2-7b-hf"].parameters
    assert loaded <= 1.15 * parameters + 400e6
    assert generated <= 1.25 * parameters + 400e6
