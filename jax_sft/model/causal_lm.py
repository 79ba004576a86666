"""CausalLM: a decoder, its parameters, its `transformers` config and its tokenizer, together.

What `FlaxAutoModelForCausalLM` was before `transformers` dropped its Flax classes: load a
folder or hub name, call it for logits, generate text, save it back. Parameters live on a mesh
from the first byte; training takes them from here and gives them back here to be saved.
"""

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from transformers import GenerationConfig, PreTrainedTokenizerBase

from jax_sft import sampler, sharding
from jax_sft.data.samples import load_eval_prompts
from jax_sft.data.tokenization import check_stop_sequences, decode_outputs, prompt_ids
from jax_sft.data.tokenizer import has_tokenizer, load_tokenizer, special_stop_ids, token_id
from jax_sft.model import adapter_files, lora, pretrained
from jax_sft.model.config_fields import new_config, set_fields
from jax_sft.model.decoder import Decoder, init_params, logical_axes, logits
from jax_sft.model.families import find_family, read_config
from jax_sft.model.placement import Placement

DROPOUT_RATES = ("embed_dropout", "attention_dropout", "residual_dropout")
ADAPTER = "adapter"  # the folder of the adapters, in that of the model they are merged into


class CausalLM:
    """A causal language model on a mesh.

    Attributes:
        config: the `transformers` config.
        generation_config: the `transformers` generation config.
        tokenizer: the tokenizer, or None.
        decoder: the Flax module.
        mesh: the mesh that the parameters live on.
        params: nested dict of arrays, named as in `Decoder`.
        folder: the folder that it was opened from, or None.
        adapters: low-rank adapters beside its kernels, or None.
        attention_reason: why attention's backend is not the platform's own, or "".
        base_model: hub name or folder, as it was given.
        source_dtypes: the checkpoint's dtype of each of its tensors, kept on export.
    """

    def __init__(
        self,
        config: Any,
        *,
        placement: Placement,
        tokenizer: PreTrainedTokenizerBase | None = None,
        generation_config: GenerationConfig | None = None,
        dropout_fields: Iterable[str] = (),
        peft_config: Mapping[str, Any] | None = None,
    ) -> None:
        mesh = placement.mesh or sharding.make_mesh(data=1, fsdp=-1, sequence=1, tensor=1)
        self.family = find_family(config)
        decoder_config = read_config(config)
        # Hub configs carry the dropout of pre-training; fine-tuning drops only where asked to.
        off = (name not in set(dropout_fields) for name in self.family.dropout_fields)
        rates = dict.fromkeys(itertools.compress(DROPOUT_RATES, off), 0.0)
        decoder_config = dataclasses.replace(decoder_config, **rates)
        self.config, self.tokenizer, self.mesh = config, tokenizer, mesh
        self.generation_config = generation_config or GenerationConfig.from_model_config(config)
        self.adapters: lora.Adapters | None = None
        if peft_config is not None:
            self.adapters = lora.read_peft_config(
                peft_config,
                self.family.tensors(decoder_config),
                model_type=config.model_type,
                num_layers=decoder_config.num_layers,
            )
        numerics, self.attention_reason = placement.numerics(decoder_config, mesh)
        self.decoder = Decoder(
            decoder_config,
            dataclasses.replace(numerics, adapters=self.adapters),
            vocab_padding=-decoder_config.vocab_size % sharding.num_shards(mesh, "vocab"),
            num_frozen_layers=placement.num_frozen_layers(decoder_config.num_layers),
        )
        self.folder: Path | None = None
        self.base_model: str | None = None
        self._adapter_folder: Path | None = None
        self.params: dict | None = None
        self.source_dtypes: dict[str, str] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        placement: Placement | None = None,
        dtype: str | None = None,
        param_dtype: str | None = None,
    ) -> "CausalLM":
        """Loads a `transformers` model: config, weights (safetensors), tokenizer.

        Args:
            path: a folder, or a hub name where the hub can be reached; or those of a PEFT
                adapter, which says itself what its base model is.
            tokenizer: None loads the one beside the model, if there is one.
            placement: mesh and dtypes; None for all devices and the automatic dtypes.
            dtype: of activations and products, in the place of the placement's: "float32" or
                "bfloat16".
            param_dtype: of the parameters, likewise.

        Returns:
            The model, its parameters on the mesh.

        Raises:
            ValueError: the folder, a tensor or an option is missing or not as expected.
        """
        if not isinstance(path, str | Path):
            raise ValueError(f"path is {path!r}: pass a model's folder, or a hub name")
        asked = {"dtype": dtype, "param_dtype": param_dtype}
        changes = {name: value for name, value in asked.items() if value is not None}
        placement = dataclasses.replace(placement or Placement(), **changes)
        model = cls.open(path, tokenizer=tokenizer, placement=placement)
        model.load()
        return model

    @classmethod
    def open(
        cls,
        path: str | Path | None,
        *,
        fields: dict[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        placement: Placement | None = None,
        peft_config: Mapping[str, Any] | None = None,
    ) -> "CausalLM":
        """Reads what a model is, and leaves its weights to `load` or `init`.

        Args:
            path: a folder or a hub name, of a model or of a PEFT adapter; None for a model
                made of `fields` alone.
            fields: `transformers` config fields, by name: those to change, or all of them,
                `model_type` among them. A dropout rate applies only if it is named here.
            tokenizer: None loads the one beside the model, if there is one. For a model made
                of fields it gives the vocabulary's size and the special tokens.
            placement: mesh and dtypes; None for all devices and the automatic dtypes.
            peft_config: fields of PEFT's LoraConfig, by name: adapters to add. An adapter's
                folder has its own.

        Raises:
            ValueError: the folder or an option is not as expected.
        """
        fields, placement = fields or {}, placement or Placement()
        kept = {"placement": placement, "dropout_fields": fields}
        if path is None:
            config = new_config(fields, tokenizer=tokenizer)
            return cls(config, tokenizer=tokenizer, peft_config=peft_config, **kept)
        folder, adapter_folder = pretrained.resolve_folder(path), None
        if adapter_files.is_adapter_folder(folder):
            adapter_folder = folder
            if peft_config is not None:
                raise ValueError(
                    f"{adapter_folder} holds an adapter, which has its own peft_config: leave"
                    " model.peft_config out to go on training it"
                )
            peft_config = adapter_files.read_adapter_config(adapter_folder)
            path = adapter_files.base_model(adapter_folder)
            folder = pretrained.resolve_folder(path)
        config = pretrained.read_config(folder)
        set_fields(config, fields)
        for place in (adapter_folder, folder):  # an adapter may have added to the tokenizer
            if tokenizer is None and place and has_tokenizer(place):
                tokenizer = load_tokenizer(place)
        generation_config = None
        if (folder / "generation_config.json").is_file():
            generation_config = pretrained.read_generation_config(folder)
        model = cls(
            config,
            tokenizer=tokenizer,
            generation_config=generation_config,
            peft_config=peft_config,
            **kept,
        )
        model.folder, model.base_model = folder, str(path)
        model._adapter_folder = adapter_folder
        return model

    def load(self, *, seed: int = 0) -> None:
        """Reads the parameters of the folder that was opened, straight to their devices.

        Args:
            seed: of new adapters.

        Raises:
            ValueError: a file or a tensor is missing or not as expected.
        """
        assert self.folder is not None, "opened without a folder"
        base, adapters = lora.split(self.param_structs())
        config = self.decoder.config
        params, self.source_dtypes = pretrained.load_params(
            self.folder, self.family, config=config, like=base
        )
        if self.adapters is not None and self._adapter_folder is not None:
            loaded = adapter_files.load_adapters(
                self._adapter_folder, self.family, self.adapters, config=config, like=adapters
            )
            params = lora.join(params, loaded)
        elif self.adapters is not None:
            drawn = self._draw(seed, only_adapters=True)
            params = self._with_magnitudes(lora.join(params, drawn))
        self.params = params

    def init(self, seed: int) -> None:
        """Draws random parameters: the same for the same seed, on any mesh."""
        self.params = self._with_magnitudes(self._draw(seed, only_adapters=False))

    def _draw(self, seed: int, *, only_adapters: bool) -> dict:
        decoder = self.decoder

        def draw(key: jax.Array) -> dict:
            params = nn.unbox(init_params(decoder, key))
            return lora.split(params)[1] if only_adapters else params

        structs = self.param_structs()
        structs = lora.split(structs)[1] if only_adapters else structs
        shardings = jax.tree.map(lambda struct: struct.sharding, structs)
        with jax.set_mesh(self.mesh):
            return jax.jit(draw, out_shardings=shardings)(jax.random.key(seed))

    def _with_magnitudes(self, params: dict) -> dict:
        """Sets what DoRA starts from; it is known only when the kernels are."""
        if self.adapters is None or not self.adapters.dora:
            return params
        shardings = jax.tree.map(lambda struct: struct.sharding, self.param_structs())
        with jax.set_mesh(self.mesh):
            set_magnitudes = jax.jit(
                lora.with_magnitudes, out_shardings=shardings, donate_argnums=0
            )
            return set_magnitudes(params)

    def param_structs(self) -> dict:
        """Returns each parameter's shape, dtype and sharding, as `jax.ShapeDtypeStruct`s."""
        shapes, axes = logical_axes(self.decoder)

        def place(path: tuple, struct: jax.ShapeDtypeStruct, names: tuple) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            where = sharding.param_sharding(self.mesh, path=name, shape=struct.shape, axes=names)
            return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=where)

        return jax.tree_util.tree_map_with_path(place, shapes, axes)

    @property
    def training_decoder(self) -> Decoder:
        """The decoder with dropout on, where a rate above 0 was asked for."""
        dropout = any(getattr(self.decoder.config, rate) for rate in DROPOUT_RATES)
        dropout |= self.adapters is not None and self.adapters.dropout > 0
        numerics = dataclasses.replace(self.decoder.numerics, dropout=dropout)
        return self.decoder.clone(numerics=numerics)

    @property
    def num_params(self) -> int:
        """The base model's parameters, without the vocabulary's padding."""
        return self.count_params(lambda path: not lora.is_adapter(path))

    def count_params(self, is_meant: Callable[[str], bool]) -> int:
        """Counts the parameters whose slash-joined path is meant, without any padding."""
        padding, count = self.decoder.vocab_padding, 0
        for path, struct in pretrained.by_path(self.param_structs()).items():
            if is_meant(path):
                num_rows = struct.shape[0] - padding * path.startswith(("embed/tokens", "head/"))
                count += num_rows * math.prod(struct.shape[1:])
        return count

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the tokenizer's EOS and those of the generation config."""
        known = self.generation_config.eos_token_id
        ids = set(known if isinstance(known, list) else [] if known is None else [known])
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            ids.add(self.tokenizer.eos_token_id)
        return sorted(i for i in ids if 0 <= i < self.decoder.config.vocab_size)

    def stop_at(self, tokens: Iterable[str]) -> None:
        """Makes tokens end answers too, here and in what `save_pretrained` writes.

        Args:
            tokens: the tokenizer's names for them, such as "<|im_end|>".
        """
        new = {token_id(token, self.tokenizer) for token in tokens} - set(self.stop_ids)
        if new:
            self.generation_config.eos_token_id = sorted({*self.stop_ids, *new})

    def __call__(
        self,
        tokens_BT: Any,
        positions_BT: Any | None = None,
        segment_ids_BT: Any | None = None,
    ) -> jax.Array:
        """Computes the logits of each next token.

        Args:
            tokens_BT: int ids in [0, vocabulary size).
            positions_BT: int, each token's position in its segment; None counts from 0.
            segment_ids_BT: int; tokens see earlier tokens of their own segment only. None: one
                segment a row.

        Returns:
            logits_BTV, float32.

        Raises:
            ValueError: no whole numbers, arrays of other shapes, an id outside the vocabulary, or
                a position that the model has not.
        """
        tokens_BT = _integers("tokens_BT", tokens_BT)
        if len(tokens_BT.shape) != 2 or not tokens_BT.size:
            raise ValueError(f"tokens_BT has shape {list(tokens_BT.shape)}: pass [rows, tokens]")
        if positions_BT is None:
            T = tokens_BT.shape[1]
            positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32)[None], tokens_BT.shape)
        if segment_ids_BT is None:
            segment_ids_BT = np.ones(tokens_BT.shape, np.int32)
        positions_BT = _integers("positions_BT", positions_BT, shape=tokens_BT.shape)
        segment_ids_BT = _integers("segment_ids_BT", segment_ids_BT, shape=tokens_BT.shape)
        _check_range("token id", tokens_BT, self.decoder.config.vocab_size)
        _check_range("position", positions_BT, self.decoder.config.num_positions)
        with jax.set_mesh(self.mesh):
            logits_BTV = _logits(
                self.decoder,
                self.params,
                jnp.asarray(tokens_BT, jnp.int32),
                jnp.broadcast_to(jnp.asarray(positions_BT, jnp.int32), tokens_BT.shape),
                jnp.broadcast_to(jnp.asarray(segment_ids_BT, jnp.int32), tokens_BT.shape),
            )
        return logits_BTV[..., : self.decoder.config.vocab_size]

    def generate(
        self,
        prompts: Sequence[str | Sequence],
        *,
        stop_sequences: Sequence[str] | None = (),
        seed: int = 0,
        add_bos: bool | None = None,
        add_eos: bool | str = True,
        **gen_kwargs: Any,
    ) -> list[str]:
        """Continues each prompt.

        Args:
            prompts: texts, [prompt, output, ..., prompt] texts, or conversations: lists of
                messages, which the tokenizer's chat template renders.
            stop_sequences: strings that end an output; they are cut off.
            seed: base of the draws, in [0, 2**32); the same seed gives the same outputs.
            add_bos: as in training (config.tokenizer.add_bos).
            add_eos: as in training (config.tokenizer.add_eos).
            **gen_kwargs: fields of `sampler.Sampling`, such as max_new_tokens=40.

        Returns:
            The outputs, without their prompts, in order.

        Raises:
            ValueError: there is no tokenizer, or a prompt or a value does not fit.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: pass one to from_pretrained(...)")
        if isinstance(prompts, str):
            raise ValueError(f"prompts is the string {prompts[:40]!r}: pass a list of strings")
        ids = [
            prompt_ids(prompt, self.tokenizer, add_bos=add_bos, add_eos=add_eos)
            for prompt in load_eval_prompts(prompts)[0]
        ]
        return self.generate_from_ids(
            ids, stop_sequences=stop_sequences or (), seed=seed, gen_kwargs=gen_kwargs
        )

    def generate_from_ids(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        stop_sequences: Sequence[str],
        seed: int,
        gen_kwargs: dict[str, Any],
    ) -> list[str]:
        """Continues prompts given as ids; see `generate`."""
        known = [field.name for field in dataclasses.fields(sampler.Sampling)]
        for name in gen_kwargs:
            if name not in known:
                raise ValueError(f"gen_kwargs has no {name!r}: choose among {known}")

        check_stop_sequences(stop_sequences)

        def should_stop(answer: list[int]) -> bool:
            text = self.tokenizer.decode(answer, skip_special_tokens=True)
            return any(stop in text for stop in stop_sequences)

        with jax.set_mesh(self.mesh):
            answers = sampler.generate_ids(
                self.decoder,
                self.params,
                prompts,
                sampling=sampler.Sampling(**gen_kwargs),
                stop_ids=self.stop_ids + special_stop_ids(stop_sequences, self.tokenizer),
                seed=seed,
                num_batch_shards=sharding.num_shards(self.mesh, "batch"),
                should_stop=should_stop if stop_sequences else None,
            )
        return decode_outputs(answers, self.tokenizer, stop_sequences=stop_sequences)

    def save_pretrained(self, folder: str | Path, *, dtype: str | None = None) -> None:
        """Writes a folder that `transformers` loads: weights, configs, tokenizer.

        Adapters are merged into the kernels, and in the folder's adapter/ they stand by
        themselves, as `save_adapter` writes them.

        Args:
            folder: made if missing; files of the same names are replaced.
            dtype: "float32", "bfloat16" or "float16"; None keeps each tensor's dtype in the
                checkpoint it came from, and the parameters' own where there was none.
        """
        written_dtype = pretrained.save_params(
            Path(folder),
            self.family,
            config=self.decoder.config,
            params=self._merged_params(),
            source_dtypes=self.source_dtypes,
            dtype=dtype,
        )
        if jax.process_index() == 0:
            config = copy.copy(self.config)
            config.dtype = written_dtype
            config.save_pretrained(folder)
            self.generation_config.save_pretrained(folder)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
        if self.adapters is not None:
            self.save_adapter(Path(folder) / ADAPTER)

    def save_adapter(self, folder: str | Path) -> None:
        """Writes the adapters as a folder that `peft` loads, with the tokenizer.

        Args:
            folder: made if missing; files of the same names are replaced.

        Raises:
            ValueError: the model has no adapters, or the folder cannot be written.
        """
        if self.adapters is None:
            raise ValueError("this model has no adapters: set model.peft_config to train some")
        adapter_files.save_adapters(
            Path(folder),
            self.family,
            self.adapters,
            config=self.decoder.config,
            params=lora.split(self.params)[1],
            base_model=self.base_model,
        )
        if jax.process_index() == 0 and self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def _merged_params(self) -> dict:
        """The base model's parameters, with the adapters in them."""
        if self.adapters is None:
            return self.params
        base, _ = lora.split(self.param_structs())
        shardings = jax.tree.map(lambda struct: struct.sharding, base)
        merge = functools.partial(lora.merge, adapters=self.adapters)
        with jax.set_mesh(self.mesh):
            return jax.jit(merge, out_shardings=shardings)(self.params)


def _integers(name: str, values: Any, *, shape: tuple[int, ...] | None = None) -> Any:
    """The values as an array, which stays on its devices if it is there; of a shape, if given."""
    array = values if isinstance(values, jax.Array) else np.asarray(values)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} is of {array.dtype}: pass whole numbers")
    if shape is not None and array.shape not in (shape, (1, shape[1])):
        raise ValueError(f"{name} has shape {array.shape}: pass that of tokens_BT, {shape}")
    return array


def _check_range(what: str, values: Any, end: int) -> None:
    """Refuses what JAX would clamp; what is on the devices is not brought back for it."""
    if isinstance(values, jax.Array):
        return
    for value in (int(values.min()), int(values.max())):
        if not 0 <= value < end:
            raise ValueError(f"{what} {value} is outside the model's range: it has {end}, from 0")


@functools.partial(jax.jit, static_argnums=(0,))
def _logits(
    decoder: Decoder,
    params: dict,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
) -> jax.Array:
    hidden_BTD, _ = decoder.apply({"params": params}, tokens_BT, positions_BT, segment_ids_BT)
    return logits(decoder.config, params, hidden_BTD)
