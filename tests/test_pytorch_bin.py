"""Weights that are not safetensors: pytorch_model.bin, read without torch and without running what
is in it, and flax_model.msgpack, of transformers' former Flax classes."""

import codecs
import json
import os
import pickle
import zipfile
from collections import OrderedDict

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import serialization
from helpers.families import OPT, once
from helpers.flax_classes import flax_parameters, msgpack_of
from helpers.reference import assert_same_model, read_hf, write_random
from safetensors.numpy import save_file


@pytest.fixture
def folder(plain, tmp_path):
    """A folder with the plain checkpoint's config.json, and no weights yet."""
    (tmp_path / "config.json").write_text((plain.folder / "config.json").read_text())
    return tmp_path


def torch_tensors(family, path, **tensors):
    """What the model file reads from a file that torch.save writes."""
    torch.save(tensors, path)
    return {name: read() for name, read in family.module.torch_tensors_in(path).items()}


# -------------------------------------------------------------------------------- pytorch_model.bin


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.core_gpt2_only
def test_a_bin_file_gives_the_model_of_the_safetensors(family, plain, tmp_path, dtype):
    hf = read_hf(family, plain.folder, getattr(torch, dtype))
    hf.save_pretrained(tmp_path)
    expected = family.module.load(tmp_path, dtype=jnp.float32)
    (tmp_path / "model.safetensors").unlink()
    state, table = hf.state_dict(), hf.get_input_embeddings().weight
    assert state["lm_head.weight"].data_ptr() == table.data_ptr()  # two names of one storage
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same_model(family.module.load(tmp_path, dtype=jnp.float32), expected)


@once
def test_shards_of_bin_files_give_the_same_model_as_one(family, plain, folder):
    tensors, weight_map = list(plain.hf32.state_dict().items()), {}
    for i, part in enumerate([tensors[:5], tensors[5:20], tensors[20:]], 1):
        file = f"pytorch_model-{i:05d}-of-00003.bin"
        torch.save(dict(part), folder / file)
        weight_map |= dict.fromkeys(dict(part), file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_model(family.module.load(folder), plain.model)
    (folder / file).unlink()
    with pytest.raises(family.module.InputError, match=file):
        family.module.load(folder)


@once
def test_tensors_of_all_kinds_and_layouts_are_read(family, tmp_path):
    base = torch.arange(60).reshape(10, 6)
    expected = {
        "double": base.double() / 7,
        "float": base / 7,
        "half": (base / 7).half(),
        "bfloat16": (base / 7).bfloat16(),
        "integers": base,
        "booleans": base > 9,
        "transposed": (base / 7).T,
        "slice": base[3:7, 2:5],
        "every second": base[1::2, ::3],
        "expanded": base[2:3].expand(4, 6),
        "number": torch.tensor(2.5),
        "empty": base[:0],
        "parameter": torch.nn.Parameter(base / 7),
        "the whole of the slice": base,
    }
    found = torch_tensors(family, tmp_path / "some.bin", **expected)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype.name == str(tensor.dtype).removeprefix("torch."), name
        np.testing.assert_array_equal(found[name].astype(float), tensor.detach().double(), name)


@once
def test_an_ordered_dictionary_with_metadata_is_read(family, tmp_path):
    """What state_dict() of a module is, before transformers makes a plain dict of it."""
    state = torch.nn.Linear(3, 2).state_dict()
    assert isinstance(state, OrderedDict) and state._metadata
    torch.save(state, tmp_path / "some.bin")
    tensors = family.module.torch_tensors_in(tmp_path / "some.bin")
    np.testing.assert_array_equal(tensors["weight"](), state["weight"])


# ------------------------------------------------------------------------------- files that do harm


class Call:
    """An object whose pickle says: call this function with these arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def harm(kind, proof):
    """An object whose unpickling makes the file `proof`, or could."""
    command = f"touch {proof}"
    return {
        "os.system": Call(os.system, command),
        "eval": Call(eval, f"open({str(proof)!r}, 'w')"),
        "exec": Call(exec, f"open({str(proof)!r}, 'w')"),
        "open": Call(open, str(proof), "w"),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "codecs.open": Call(codecs.open, str(proof), "w"),
        "codecs.encode": Call(codecs.encode, "text", "latin1"),
        "numpy.save": Call(np.save, str(proof), 1.0),
        "numpy.memmap": Call(np.memmap, str(proof), "u1", "w+", 0, (3,)),
        "torch.load": Call(torch.load, str(proof)),
        "OrderedDict.fromkeys": Call(OrderedDict.fromkeys, ["key"]),
    }[kind]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("os.system", "posix.system"),
        ("eval", "builtin.*eval"),
        ("exec", "builtin.*exec"),
        ("open", "open"),
        ("getattr", "__import__|getattr"),
        ("codecs.open", "codecs.open"),
        ("codecs.encode", "codecs.encode"),
        ("numpy.save", "numpy.*save"),
        ("numpy.memmap", "numpy.*memmap"),
        ("torch.load", "torch.*load"),
        ("OrderedDict.fromkeys", "getattr|OrderedDict.fromkeys"),
    ],
)
@once
def test_a_file_that_wants_to_run_something_is_refused_and_runs_nothing(
    family, folder, kind, named, protocol
):
    proof = folder / "proof"
    torch.save(
        {"weight": torch.ones(2), "more": harm(kind, proof)},
        folder / "pytorch_model.bin",
        pickle_protocol=protocol,
    )
    with pytest.raises(family.module.InputError, match=f"asks for .*({named}),"):
        family.module.load(folder)
    assert not proof.exists()


@pytest.mark.parametrize("kind", ["os.system", "eval", "open", "numpy.save"])
def test_without_that_refusal_the_file_would_have_been_made(kind, tmp_path):
    pickle.loads(pickle.dumps(harm(kind, tmp_path / "proof"), 2))
    assert list(tmp_path.glob("proof*"))


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (9, (2,), (1,)),
        (0, (11,), (1,)),
        (0, (2, 2), (9, 1)),
        (-1, (2,), (1,)),
        (1, (3,), (-1,)),
        (2**40, (1,), (1,)),
        (0, (2,), (2**60,)),
        (0, (2**60, 4), (1, 1)),
    ],
    ids=str,
)
@once
def test_a_tensor_outside_of_its_storage_is_refused(family, tmp_path, offset, shape, strides):
    storage = torch.arange(10.0)._typed_storage()
    tensor = Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, {})
    with pytest.raises(ValueError, match=r"strides|offset"):
        torch_tensors(family, tmp_path / "some.bin", tensor=tensor)
    inside = Call(torch._utils._rebuild_tensor_v2, storage, 8, (2,), (1,), False, {})
    found = torch_tensors(family, tmp_path / "some.bin", tensor=inside)
    assert found["tensor"].tolist() == [8, 9]


@once
def test_a_storage_that_the_file_made_up_is_refused(family, tmp_path):
    """As objects, its bytes would be taken for addresses; and of no bytes numpy checks no bound."""
    made_up = Call(torch._utils._rebuild_tensor_v2, ("O", "some/data.pkl"), 0, (1,), (1,))
    with pytest.raises(family.module.InputError, match="no numbers"):
        torch_tensors(family, tmp_path / "some.bin", tensor=made_up)
    empty = Call(
        torch._utils._rebuild_tensor_v2, torch.zeros(0)._typed_storage(), 0, (9,), (1,), False, {}
    )
    with pytest.raises(family.module.InputError, match="no numbers"):
        torch_tensors(family, tmp_path / "some.bin", tensor=empty)


@once
def test_a_file_of_a_pytorch_before_1_6_gives_the_same_model(family, plain, folder):
    """DialoGPT and other fine-tunes of 2019 and 2020 have only that."""
    state = plain.hf32.state_dict()
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same_model(family.module.load(folder), plain.model)


@once
def test_tensors_of_all_kinds_are_read_from_an_older_file(family, tmp_path):
    base = torch.arange(60).reshape(10, 6)
    expected = {
        "half": (base / 7).half(),
        "integers": base,
        "transposed": (base / 7).T,
        "slice": base[3:7, 2:5],
        "bytes": (base % 7).byte(),
    }
    file = tmp_path / "some.bin"
    torch.save(expected, file, _use_new_zipfile_serialization=False)
    found = family.module.torch_tensors_in(file)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name]().astype(float), tensor.double(), name)


@pytest.mark.parametrize("is_zip", [True, False], ids=["since 1.6", "before"])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.9, 0.999])
@once
def test_a_file_that_was_cut_short_is_refused(family, plain, folder, is_zip, share):
    file = folder / "pytorch_model.bin"
    torch.save(plain.hf32.state_dict(), file, _use_new_zipfile_serialization=is_zip)
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(family.module.InputError, match=r"pytorch_model\.bin is damaged"):
        family.module.load(folder)


@once
def test_integers_where_weights_are_meant_are_refused(family, plain, folder):
    """They are quantized, and the scales are elsewhere."""
    state = {name: (100 * tensor).byte() for name, tensor in plain.hf32.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(family.module.InputError, match="is uint8: quantized weights"):
        family.module.load(folder)


@once
def test_a_flipped_byte_is_noticed_when_the_tensor_is_read(family, plain, folder):
    file = folder / "pytorch_model.bin"
    torch.save(plain.hf32.state_dict(), file)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(family.module.InputError, match="is damaged or cut short: Bad CRC"):
        family.module.load(folder)


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), None, {1: torch.ones(2)}])
@once
def test_what_is_no_table_of_tensors_is_refused(family, folder, content):
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(family.module.InputError, match="holds no tensors by their names"):
        family.module.load(folder)


@once
def test_another_zip_file_is_refused(family, folder):
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("holiday.txt", "no weights here")
    with pytest.raises(family.module.InputError, match=r"no data\.pkl"):
        family.module.load(folder)


# -------------------------------------------- flax_model.msgpack, and what else Flax classes wrote


@pytest.fixture
def msgpack(plain, folder):
    """The plain checkpoint as a flax_model.msgpack; the path of the file."""
    file = folder / "flax_model.msgpack"
    file.write_bytes(msgpack_of(flax_parameters(plain.hf32)))
    return file


@pytest.mark.core_gpt2_only
def test_flax_classes_named_their_parameters_so(plain):
    shapes = {path: value.shape for path, value in flax_parameters(plain.hf32).items()}
    path, shape = {
        "gpt2": ("transformer.h.1.mlp.c_fc.kernel", (192, 48)),  # Conv1D: [out, in]
        "opt": ("model.decoder.layers.1.fc1.kernel", (48, 192)),
        "llama": ("model.layers.1.mlp.up_proj.kernel", (48, 80)),
        "gemma": ("model.layers.1.mlp.up_proj.kernel", (48, 80)),
        "mistral": ("model.layers.1.mlp.up_proj.kernel", (48, 80)),
        "qwen": ("model.layers.1.mlp.up_proj.kernel", (48, 80)),
    }[plain.family.name]
    assert shapes[path] == shape
    norm = {"gpt2": "transformer.ln_f.scale", "opt": "model.decoder.final_layer_norm.scale"}
    assert norm.get(plain.family.name, "model.norm.weight") in shapes


@pytest.mark.parametrize("name", ["plain", "square head"])
@pytest.mark.core_gpt2_only
def test_a_msgpack_file_gives_the_model_of_the_safetensors(family, make_case, tmp_path, name):
    case = make_case(family, name)
    (tmp_path / "config.json").write_text((case.folder / "config.json").read_text())
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack_of(flax_parameters(case.hf32)))
    assert_same_model(family.module.load(tmp_path), case.model)


@pytest.mark.parametrize("name", ["norms after, narrow tokens", "own head, narrow tokens"])
@pytest.mark.wide
def test_a_msgpack_file_of_an_opt_with_projections_is_read(make_case, tmp_path, name):
    case = make_case(OPT, name)
    (tmp_path / "config.json").write_text((case.folder / "config.json").read_text())
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack_of(flax_parameters(case.hf32)))
    assert_same_model(OPT.module.load(tmp_path), case.model)


@once
def test_shards_of_msgpack_files_give_the_same_model_as_one(family, plain, folder):
    parameters = list(flax_parameters(plain.hf32).items())
    weight_map = {}
    for i, part in enumerate([parameters[:9], parameters[9:]], 1):
        file = f"flax_model-{i:05d}-of-00002.msgpack"
        (folder / file).write_bytes(msgpack_of(dict(part)))
        weight_map |= {path.replace(".", "/"): file for path, _ in part}
    (folder / "flax_model.msgpack.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_model(family.module.load(folder), plain.model)


@once
def test_safetensors_that_a_flax_class_wrote_give_the_same_model(family, plain, folder):
    """save_pretrained(folder, safe_serialization=True) of a Flax class."""
    parameters = flax_parameters(plain.hf32)
    contiguous = {path: np.ascontiguousarray(value) for path, value in parameters.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "flax"})
    assert_same_model(family.module.load(folder), plain.model)


@once
def test_a_msgpack_file_of_a_model_without_a_head_is_read(family, plain, folder):
    """FlaxGPT2Model wrote no prefix."""
    parameters = flax_parameters(plain.hf32)
    bare = {path.removeprefix("transformer."): value for path, value in parameters.items()}
    (folder / "flax_model.msgpack").write_bytes(msgpack_of(bare))
    assert_same_model(family.module.load(folder), plain.model)


@once
def test_a_msgpack_file_in_bfloat16_is_read(family, plain, folder):
    """As to_bf16 made it."""
    parameters = flax_parameters(plain.hf32)
    half = {path: value.astype(jnp.bfloat16) for path, value in parameters.items()}
    (folder / "flax_model.msgpack").write_bytes(msgpack_of(half))
    model = family.module.load(folder, dtype=jnp.bfloat16)
    assert_same_model(model, family.module.load(plain.folder, dtype=jnp.bfloat16))


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
@once
def test_a_msgpack_file_that_was_cut_short_is_refused(family, msgpack, share):
    data = msgpack.read_bytes()
    msgpack.write_bytes(data[: int(share * len(data))])
    with pytest.raises(family.module.InputError, match=r"flax_model\.msgpack is damaged"):
        family.module.load(msgpack.parent)


@pytest.mark.parametrize("content", [5, "text", [1, 2], {"model": {5: {"kernel": 1.0}}}], ids=str)
@once
def test_a_msgpack_file_of_something_else_is_refused(family, msgpack, content):
    msgpack.write_bytes(serialization.msgpack_serialize(content))
    with pytest.raises(family.module.InputError, match=r"flax_model\.msgpack is damaged"):
        family.module.load(msgpack.parent)


@once
def test_of_several_formats_safetensors_come_first_and_msgpack_last(family, tmp_path):
    """Each file has other weights, so that the model tells which one was read."""
    files = ["model.safetensors", "pytorch_model.bin", "flax_model.msgpack"]
    made = [
        write_random(family, family.config(), tmp_path / file, seed)
        for seed, file in enumerate(files, 1)
    ]
    folder = write_random(family, family.config(), tmp_path / "all", seed=1)
    torch.save(read_hf(family, made[1]).state_dict(), folder / "pytorch_model.bin")
    parameters = flax_parameters(read_hf(family, made[2]))
    (folder / "flax_model.msgpack").write_bytes(msgpack_of(parameters))
    for file, one in zip(files, made, strict=True):
        assert_same_model(family.module.load(folder), family.module.load(one))
        (folder / file).unlink()
    every_format = r"model\.safetensors or .*\.bin or .*\.msgpack"
    with pytest.raises(family.module.InputError, match=every_format):
        family.module.load(folder)
