"""GPT-2 XL, 1.5 billion parameters: loading takes little more memory than the model itself.

Needs 6.3 GB of disk, 8 GB of memory and some minutes: pytest -m slow
"""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from flax import nnx
from reference import ROOT
from safetensors.numpy import save_file

import gpt2

PARAMETERS, _, _, XL = gpt2.PRESETS["openai-community/gpt2-xl"]


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    """A random float32 checkpoint in shards of 1 GB, of which one at a time is in memory."""
    folder, rng, weight_map, shard = tmp_path_factory.mktemp("xl"), np.random.default_rng(0), {}, {}

    def flush():
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    shapes = nnx.state(nnx.eval_shape(lambda: gpt2.Model(XL, rngs=nnx.Rngs(0))))
    for _, param, name, _ in gpt2.named_parameters(shapes):
        shard[name] = rng.random(param.shape, np.float32) * 0.04 - 0.02
        if sum(tensor.nbytes for tensor in shard.values()) > 1e9:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(XL.to_hf()))
    yield folder
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_the_peak_of_memory_is_that_of_the_parameters_and_little_more(xl, dtype, size):
    """15 % of the parameters and 400 MB, of which Python with jax and flax takes about 300."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(f"""
        import json, re, time, gpt2, jax, numpy as np
        from pathlib import Path
        from safetensors import safe_open
        start, folder = time.time(), Path({str(xl)!r})
        model = gpt2.load(folder, dtype={dtype!r})
        jax.block_until_ready(model.wte.embedding[...])
        seconds = time.time() - start
        peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        for layer in (0, 47):
            name = f"transformer.h.{{layer}}.mlp.c_fc.weight"
            files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
            with safe_open(folder / files[name], "np") as file:
                stored = file.get_tensor(name).astype({dtype!r})
            np.testing.assert_array_equal(model.h[layer].mlp.c_fc.kernel[...], stored)
        print(peak * 1024, seconds)
    """)], env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}, capture_output=True,
        text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    peak, seconds = map(float, done.stdout.split())
    print(f"{dtype}: {peak / 1e9:.2f} GB at the peak, loaded in {seconds:.1f} s")
    assert peak <= 1.15 * PARAMETERS * size + 400e6
