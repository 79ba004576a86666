"""Import and export of GPT-2 folders of a few kilobytes, written here tensor by tensor."""

import dataclasses
import fnmatch
import functools
import json
import os
import re
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_runs import flags_for

from jax_sft import sharding
from jax_sft.model import pretrained
from jax_sft.model.decoder import Decoder, logical_axes
from jax_sft.model.families.gpt2 import FAMILY
from jax_sft.model.layers import Numerics
from jax_sft.model.name_table import BlockReader
from jax_sft.model.types import DecoderConfig, Layer, Norm
from jax_sft.model.weight_files import WeightFiles

READ = WeightFiles.read
READ_BLOCK = BlockReader.__call__
V, S, L, D, H, C, F = 9, 8, 3, 8, 4, 2, 32
CONFIG = DecoderConfig(
    layers=(Layer(),) * L,
    width=D,
    num_heads=H,
    num_kv_heads=H,
    head_width=C,
    mlp_width=F,
    vocab_size=V,
    num_positions=S,
    activation="gelu_new",
    norm=Norm("layer", 1e-5, bias=True),
    attention_scale=C**-0.5,
    tied_head=True,
    init_std=0.02,
    residual_init_std=0.02,
    positions="learned",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
UNTIED = dataclasses.replace(CONFIG, tied_head=False)
LAYER_SHAPES = {
    "ln_1.weight": (D,),
    "ln_1.bias": (D,),
    "attn.c_attn.weight": (D, 3 * D),
    "attn.c_attn.bias": (3 * D,),
    "attn.c_proj.weight": (D, D),
    "attn.c_proj.bias": (D,),
    "ln_2.weight": (D,),
    "ln_2.bias": (D,),
    "mlp.c_fc.weight": (D, F),
    "mlp.c_fc.bias": (F,),
    "mlp.c_proj.weight": (F, D),
    "mlp.c_proj.bias": (D,),
}


def make_tensors(*, tied=True, dtype=np.float32):
    """Random tensors under the names that transformers writes."""
    shapes = {"transformer.wte.weight": (V, D), "transformer.wpe.weight": (S, D)}
    for layer in range(L):
        for name, shape in LAYER_SHAPES.items():
            shapes[f"transformer.h.{layer}.{name}"] = shape
    shapes |= {"transformer.ln_f.weight": (D,), "transformer.ln_f.bias": (D,)}
    if not tied:
        shapes["lm_head.weight"] = (V, D)
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_folder(folder, tensors):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_config(folder):
    fields = {"vocab_size": V, "n_positions": S, "n_embd": D, "n_layer": L, "n_head": H}
    fields |= {"model_type": "gpt2", "bos_token_id": 0, "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(fields))


def write_shards(folder, tensors):
    write_folder(folder, tensors)
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file_name = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@functools.cache
def structs(config, num_frozen_layers, dtype, **mesh_sizes):
    if mesh_sizes:
        mesh = sharding.make_mesh(
            **({"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1} | mesh_sizes)
        )
    else:
        auto = (jax.sharding.AxisType.Auto,) * 4
        one_device = jax.devices()[:1]
        mesh = jax.make_mesh((1,) * 4, sharding.MESH_NAMES, axis_types=auto, devices=one_device)
    padding = -V % sharding.num_shards(mesh, "vocab")
    decoder = Decoder(config, Numerics(param_dtype=dtype), padding, num_frozen_layers)

    def place(struct, names):
        where = sharding.param_sharding(mesh, path="", shape=struct.shape, axes=names)
        return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=where)

    return jax.tree.map(place, *logical_axes(decoder))


def load(
    folder,
    *,
    config=CONFIG,
    num_frozen_layers=0,
    dtype=jnp.float32,
    staging_bytes=1 << 30,
    **mesh_sizes,
):
    """Loads on one device, or a mesh of all; returns (params, dtypes, config)."""
    like = structs(config, num_frozen_layers, dtype, **mesh_sizes)
    params, dtypes = pretrained.load_params(
        folder, FAMILY, config=config, like=like, staging_bytes=staging_bytes
    )
    for leaf, struct in zip(jax.tree.leaves(params), jax.tree.leaves(like), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (
            struct.shape,
            struct.dtype,
            struct.sharding,
        )
    return params, dtypes, config


def assert_fits(params, tensors, *, num_frozen_layers=0):
    """Compares parameters with the tensors, laid out by hand."""
    dtype = params["final_norm"]["scale"].dtype
    same = lambda ours, theirs: np.testing.assert_array_equal(  # noqa: E731
        np.asarray(ours), theirs.astype(dtype), strict=True
    )
    same(params["embed"]["tokens"][:V], tensors["transformer.wte.weight"])
    assert not np.any(np.asarray(params["embed"]["tokens"][V:], np.float32))
    same(params["embed"]["positions"], tensors["transformer.wpe.weight"])
    same(params["final_norm"]["bias"], tensors["transformer.ln_f.bias"])
    if "lm_head.weight" in tensors:
        same(params["head"]["kernel"][:V], tensors["lm_head.weight"])
    for layer in range(L):
        stack = "frozen_layers" if layer < num_frozen_layers else "layers"
        at = layer if layer < num_frozen_layers else layer - num_frozen_layers
        block = jax.tree.map(lambda leaf, at=at: leaf[at], params[stack])
        theirs = {name: tensors[f"transformer.h.{layer}.{name}"] for name in LAYER_SHAPES}
        fused, fused_bias = theirs["attn.c_attn.weight"], theirs["attn.c_attn.bias"]
        for i, name in enumerate(("query", "key", "value")):
            columns = slice(i * D, (i + 1) * D)
            same(block["attention"][name]["kernel"], fused[:, columns].reshape(D, H, C))
            same(block["attention"][name]["bias"], fused_bias[columns].reshape(H, C))
        same(block["attention"]["out"]["kernel"], theirs["attn.c_proj.weight"].reshape(H, C, D))
        same(block["attention"]["out"]["bias"], theirs["attn.c_proj.bias"])
        same(block["mlp"]["up"]["kernel"], theirs["mlp.c_fc.weight"])
        same(block["mlp"]["up"]["bias"], theirs["mlp.c_fc.bias"])
        same(block["mlp"]["down"]["kernel"], theirs["mlp.c_proj.weight"])
        same(block["mlp_norm"]["scale"], theirs["ln_2.weight"])
        same(block["attention_norm"]["bias"], theirs["ln_1.bias"])


@pytest.mark.parametrize(
    ("num_frozen_layers", "mesh_sizes"),
    [(0, {}), (2, {"fsdp": 8}), (0, {"fsdp": 2, "tensor": 4}), (L, {"data": 2, "fsdp": 4})],
    ids=str,
)
def test_import_on_any_mesh(tmp_path, mesh_sizes, num_frozen_layers):
    tensors = make_tensors(tied=False)
    write_folder(tmp_path, tensors)
    params, *_ = load(tmp_path, config=UNTIED, num_frozen_layers=num_frozen_layers, **mesh_sizes)
    assert_fits(params, tensors, num_frozen_layers=num_frozen_layers)


@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("target", [jnp.float32, jnp.bfloat16])
def test_import_casts_and_remembers_dtypes(tmp_path, source, target):
    tensors = make_tensors(dtype=np.dtype(source))
    params, dtypes, *_ = load(write_folder(tmp_path, tensors), dtype=target)
    assert_fits(params, tensors)
    # Nothing here holds what float64 does, and an export does not pretend to.
    assert dtypes == dict.fromkeys(tensors, "float32" if source == "float64" else source)


def test_import_from_shards(tmp_path):
    tensors = make_tensors()
    params, *_ = load(write_shards(tmp_path, tensors))
    assert_fits(params, tensors)


@pytest.mark.parametrize(
    ("num_numbers", "mesh_sizes"),
    [(2 * D * F + 1, {}), (D * F - 1, {}), (F - 1, {}), (F, {"fsdp": 2, "tensor": 4})],
    ids=str,
)
def test_import_in_small_pieces_stays_within_its_budget(
    tmp_path, monkeypatch, mesh_sizes, num_numbers
):
    tensors = make_tensors()
    write_folder(tmp_path, tensors)
    sizes = []

    def read(self, index):
        block = READ_BLOCK(self, index)
        sizes.append(block.size)
        return block

    monkeypatch.setattr(BlockReader, "__call__", read)
    params, *_ = load(tmp_path, staging_bytes=16 * num_numbers, **mesh_sizes)
    assert_fits(params, tensors)
    assert num_numbers / 2 < max(sizes) <= num_numbers  # of float32, with what it came from


def test_pieces_are_cut_along_the_first_axes():
    assert pretrained._tile([12, 768, 3072], 5_000_000) == [2, 768, 3072]
    assert pretrained._tile([12, 768, 3072], 1_000_000) == [1, 325, 3072]
    assert pretrained._tile([12, 768, 3072], 3000) == [1, 1, 3000]
    assert pretrained._tile([12, 768, 3072], 1 << 40) == [12, 768, 3072]
    assert pretrained._tile([12], 0) == [1]


def test_sharded_import_reads_every_byte_once(tmp_path, monkeypatch):
    tensors = make_tensors()
    write_folder(tmp_path, tensors)
    sizes = {}

    def read(self, name, index):
        values = READ(self, name, index)
        sizes[name] = sizes.get(name, 0) + values.nbytes
        return values

    monkeypatch.setattr(WeightFiles, "read", read)
    load(tmp_path, fsdp=8)
    assert sizes == {name: tensor.nbytes for name, tensor in tensors.items()}


def test_import_takes_what_other_writers_leave(tmp_path):
    tensors = make_tensors()
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, S, S), np.float32)
    bare["h.1.attn.masked_bias"] = np.float32([-1e4])
    bare["lm_head.weight"] = tensors["transformer.wte.weight"]
    params, dtypes, *_ = load(write_folder(tmp_path, bare))
    assert_fits(params, tensors)
    assert set(dtypes) == set(tensors)


def test_a_tied_head_stands_in_for_the_embedding_or_equals_it(tmp_path):
    tensors = make_tensors()
    embedding = tensors["transformer.wte.weight"]
    others = {name: value for name, value in tensors.items() if value is not embedding}
    params, *_ = load(write_folder(tmp_path / "a", others | {"lm_head.weight": embedding}))
    assert_fits(params, tensors)
    write_folder(tmp_path / "b", tensors | {"lm_head.weight": embedding + 1})
    with pytest.raises(ValueError, match="lm_head.weight differs.*tie_word_embeddings=False"):
        load(tmp_path / "b")


def test_all_that_does_not_fit_is_listed_at_once(tmp_path):
    tensors = make_tensors()
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    tensors["transformer.h.0.attn.c_attn.weight"] = np.zeros((D, 2 * D), np.float32)
    tensors["transformer.wpe.weight"] = np.zeros((S, D), np.int8)
    tensors["classifier.weight"] = np.zeros(2, np.float32)
    with pytest.raises(ValueError) as caught:
        load(write_folder(tmp_path, tensors))
    message = str(caught.value)
    assert "1 missing: transformer.h.1.mlp.c_fc.weight" in message
    assert "1 unknown: classifier.weight" in message
    assert f"transformer.h.0.attn.c_attn.weight [{D}, {2 * D}] instead of [{D}, {3 * D}]" in message
    assert "transformer.wpe.weight (I8)" in message
    assert str(tmp_path) in message
    assert "\n" not in message


def test_all_names_are_listed_up_to_two_hundred(tmp_path):
    tensors = make_tensors()
    kept = "transformer.wte.weight"
    write_folder(tmp_path, {kept: tensors[kept]})
    with pytest.raises(ValueError, match=f"{3 + 12 * L} missing: ") as caught:
        load(tmp_path)
    assert [name for name in tensors if name not in str(caught.value)] == [kept]
    write_folder(tmp_path, tensors | {f"extra.{i}": np.zeros(1, np.float32) for i in range(250)})
    with pytest.raises(ValueError, match="250 unknown: extra.0, .* and 50 more"):
        load(tmp_path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: truncate(f / "model.safetensors"), r"model.safetensors is no whole"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), r"model.safetensors is no whole"),
        (lambda f: (f / "model.safetensors").unlink(), r"has no weights.*random"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            r"only as pytorch_model.bin.*save_pretrained",
        ),
    ],
    ids=["truncated", "empty", "none", "pickle"],
)
def test_a_folder_that_is_no_model(tmp_path, harm, message):
    harm(write_folder(tmp_path, make_tensors()))
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
            "index.json names model-00002-of-00002.safetensors, which the folder lacks",
        ),
        (lambda f: truncate(f / "model-00002-of-00002.safetensors"), "model-00002.* is no whole"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "is no index"),
    ],
    ids=["missing", "truncated", "index"],
)
def test_damaged_shards(tmp_path, harm, message):
    harm(write_shards(tmp_path, make_tensors()))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no config.json"),
        ("{", "config.json cannot be read"),
        ("[]", "config.json cannot be read"),
        ('{"model_type": "?"}', "config.json cannot be read"),
        (
            '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}',
            "model_type 'own' is unknown to transformers: it is code.*auto_map.*never run",
        ),
    ],
)
def test_a_config_that_is_none(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        pretrained.read_config(tmp_path)
    assert "\n" not in str(caught.value)
    write_config(tmp_path)
    assert pretrained.read_config(tmp_path).n_embd == D


def test_code_beside_a_known_model_is_not_run(tmp_path):
    write_config(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["auto_map"] = {"AutoConfig": "own.Config"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "own.py").write_text("raise RuntimeError('run')")
    assert type(pretrained.read_config(tmp_path)).__name__ == "GPT2Config"


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_of_a_hub_model_only_what_is_loaded_comes_down(tmp_path, monkeypatch, has_safetensors):
    """A folder stands in for the hub."""
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    kept = ["config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "tokenizer.model"]
    if has_safetensors:
        kept += ["adapter_model.safetensors", "model-00001-of-00001.safetensors"]
    else:
        kept += ["flax_model.msgpack"]
    left = ["consolidated.safetensors", "pytorch_model.bin", "tf_model.h5"]
    hub.mkdir()
    for name in [*kept, *left, "flax_model.msgpack"]:
        (hub / name).write_text("x")

    def download(name, *, allow_patterns):
        assert name == "owner/model"
        cache.mkdir(exist_ok=True)
        for path in hub.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                (cache / path.name).write_bytes(path.read_bytes())
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert pretrained.resolve_folder("owner/model") == cache
    assert sorted(path.name for path in cache.iterdir()) == sorted(kept)


def test_paths_that_are_no_model(tmp_path):
    (tmp_path / "file").write_text("x")
    for path, message in [
        (tmp_path / "missing", "does not exist; pass a folder"),
        (tmp_path / "file", "is a file; pass a folder"),
        ("no-such-model", "hub.*pass a folder"),
        ("a/b", "hub.*pass a folder"),
        ("a/b/c", "does not exist"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            pretrained.read_config(path)
        assert re.search(rf"{path}\b", str(caught.value))
        assert "\n" not in str(caught.value)


def save(loaded, folder, **options):
    params, dtypes, config = loaded
    return pretrained.save_params(
        folder, FAMILY, config=config, params=params, source_dtypes=dtypes, **options
    )


def read_all(folder):
    files = WeightFiles(folder)
    return {
        name: files.read(name, tuple(slice(0, size) for size in spec.shape))
        for name, spec in files.specs.items()
    }


def assert_same_tensors(actual, expected):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert actual[name].shape == value.shape, name
        assert actual[name].tobytes() == value.tobytes(), name


MIXED = {"ln": np.float32, "attn": ml_dtypes.bfloat16, "w": np.float16}


@pytest.mark.parametrize("mesh_sizes", [{}, {"fsdp": 2, "tensor": 4}], ids=str)
@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16", "mixed"])
def test_export_gives_back_the_bits(tmp_path, source, mesh_sizes):
    tensors = make_tensors(tied=source != "mixed")
    for name, value in tensors.items():
        mixed = next((dtype for part, dtype in MIXED.items() if part in name), np.float32)
        tensors[name] = value.astype(mixed if source == "mixed" else jnp.dtype(source))
    write_folder(tmp_path / "in", tensors)
    config = UNTIED if source == "mixed" else CONFIG
    loaded = load(tmp_path / "in", config=config, num_frozen_layers=1, **mesh_sizes)
    assert save(loaded, tmp_path / "out") == ("float16" if source == "mixed" else source)
    assert_same_tensors(read_all(tmp_path / "out"), tensors)
    (written,) = (tmp_path / "out").iterdir()
    assert written.name == "model.safetensors"
    assert int.from_bytes(written.read_bytes()[:8], "little") % 8 == 0  # aligned for readers
    if source != "mixed":  # the library's own reader, where numpy knows the dtype
        assert_same_tensors(load_file(written), tensors)


def test_export_in_a_given_dtype(tmp_path):
    tensors = make_tensors()
    loaded = load(write_folder(tmp_path / "in", tensors))
    assert save(loaded, tmp_path / "out", dtype="bfloat16") == "bfloat16"
    expected = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    assert_same_tensors(read_all(tmp_path / "out"), expected)
    with pytest.raises(ValueError, match="dtype 'int8' is unknown"):
        save(loaded, tmp_path / "other", dtype="int8")
    assert not (tmp_path / "other").exists()


def test_export_without_source_dtypes_takes_the_parameters(tmp_path):
    tensors = make_tensors(dtype=ml_dtypes.bfloat16)
    params, _, config = load(write_folder(tmp_path / "in", tensors), dtype=jnp.bfloat16)
    save((params, {}, config), tmp_path / "out")
    assert_same_tensors(read_all(tmp_path / "out"), tensors)


def test_export_in_shards(tmp_path):
    tensors = make_tensors()
    loaded = load(write_folder(tmp_path / "in", tensors))
    total = sum(value.nbytes for value in tensors.values())
    save(loaded, tmp_path / "out", max_shard_bytes=total // 3)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) in (3, 4)
    assert shards[0].name == f"model-00001-of-0000{len(shards)}.safetensors"
    for shard in shards:
        assert sum(value.nbytes for value in load_file(shard).values()) <= total // 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    for name, file_name in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file_name)
    assert_same_tensors(read_all(tmp_path / "out"), tensors)


def test_export_replaces_weights_and_nothing_else(tmp_path):
    tensors = make_tensors()
    loaded = load(write_folder(tmp_path / "in", tensors))
    out = tmp_path / "out"
    write_shards(out, {name: value + 1 for name, value in tensors.items()})
    (out / "notes.txt").write_text("mine")
    (out / ".unfinished").mkdir()  # of a process that was killed
    save(loaded, out)
    assert sorted(p.name for p in out.iterdir()) == ["model.safetensors", "notes.txt"]
    assert_same_tensors(read_all(out), tensors)
    save(loaded, out, max_shard_bytes=1000)
    assert not (out / "model.safetensors").exists()
    assert_same_tensors(read_all(out), tensors)


def test_a_failed_export_leaves_the_old_weights(tmp_path, monkeypatch):
    tensors = make_tensors()
    loaded = load(write_folder(tmp_path, tensors))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(pretrained, "gather_tensor", fail)
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(OSError, match="No space"):
            save(loaded, folder)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_export_that_reads_back_otherwise_is_an_error(tmp_path, monkeypatch):
    write_weights = pretrained.write_weights

    def flip_the_last_byte(folder, *args, **kwargs):
        write_weights(folder, *args, **kwargs)
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    write_folder(tmp_path / "source", make_tensors())
    loaded = load(tmp_path / "source")
    monkeypatch.setattr(pretrained, "write_weights", flip_the_last_byte)
    with pytest.raises(OSError, match="reads back other than it was written"):
        save(loaded, tmp_path / "copy")


def test_export_to_a_place_that_is_no_folder(tmp_path):
    loaded = load(write_folder(tmp_path / "in", make_tensors()))
    with pytest.raises(ValueError, match="cannot be written"):
        save(loaded, tmp_path / "in" / "model.safetensors" / "out")


def test_transformers_reads_the_shards(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import GPT2LMHeadModel

    tensors = make_tensors()
    loaded = load(write_folder(tmp_path, tensors))
    write_config(tmp_path)
    expected = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    save(loaded, tmp_path, max_shard_bytes=2000)
    model, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.arange(S)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens).logits, expected(tokens).logits)


TWO_PROCESSES = """
    import sys
    from pathlib import Path
    import jax
    port, rank, folder = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
    import test_pretrained as t
    folder, sizes = Path(folder), []
    t.WeightFiles.read = lambda *args: sizes.append(t.READ(*args)) or sizes[-1]
    loaded = t.load(folder / "in", num_frozen_layers=1, fsdp=2, tensor=2)
    num_bytes = sum(values.nbytes for values in sizes)  # saving reads back what it wrote
    t.save(loaded, folder / "out")
    assert (folder / "out" / "model.safetensors").is_file()
    print("read", num_bytes)
"""


def test_two_processes_read_their_bytes_and_write_together(tmp_path):
    tensors = make_tensors()
    write_folder(tmp_path / "in", tensors)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.getcwd(), os.path.dirname(__file__)]),
        "XLA_FLAGS": flags_for(2),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(TWO_PROCESSES), str(port), rank, str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    total = sum(value.nbytes for value in tensors.values())
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        num_bytes = int(output.splitlines()[-1].removeprefix("read "))
        assert num_bytes < 0.6 * total  # half of the matrices, all of the norms
    assert_same_tensors(read_all(tmp_path / "out"), tensors)
