"""Prompts to answers, in ids: a jitted prefill, then a jitted decode loop over a cache.

In: lists of prompt ids, sharded params, and how to choose a token. Out: lists of answer ids.
Text never enters; whoever wants to stop at a string passes `should_stop`, which is asked every
few tokens on the host. Prompts are padded on the right to a bucket, and padding is never seen:
a token's slot in the cache is its position, and a token sees no later slot than its own.

    prompts            cache slots after prefill    after one more token each
    a b c              a b c .  .  .                a b c x .  .
    d                  d .  .  .  .  .              d y .  .  .  .      (. is never seen)

Where a longer row has other frequencies from its first token on (`DecoderConfig.recompute_from`),
its part of the cache is computed anew when it becomes longer, as if it were decoded alone.
"""

import dataclasses
import functools
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_sft.model.block import Cache
from jax_sft.model.decoder import Decoder, empty_cache, logits
from jax_sft.model.types import DecoderConfig
from jax_sft.sharding import constrain

MAX_ROWS = 64  # prompts decoded at once
PROMPT_BUCKET = 16  # prompts are padded to a multiple of this, so that few lengths compile
DRAW_BLOCK = 256  # tokens of the vocabulary in a block; about the root of its size
STOP_CHECK_INTERVAL = 8  # tokens between two looks at the stop strings


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits; the names are those of `transformers`.

    Applied in this order: repetition_penalty, temperature, top_k, top_p.

    Attributes:
        max_new_tokens: tokens an answer may have.
        do_sample: draw from the distribution; False takes the likeliest token.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together reach this probability; 1.0 for all.
        repetition_penalty: logits of tokens already in the row are divided by it where
            positive and multiplied where negative (CTRL, Keskar et al. 2019, section 4.1).
    """

    max_new_tokens: int = 40
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        kinds = {
            "max_new_tokens": (numbers.Integral, "a whole number"),
            "do_sample": (bool, "True or False"),
            "temperature": (numbers.Real, "a number"),
            "top_k": (numbers.Integral, "a whole number"),
            "top_p": (numbers.Real, "a number"),
            "repetition_penalty": (numbers.Real, "a number"),
        }
        for name, (kind, expected) in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
                raise ValueError(f"{name}={value!r} must be {expected}")
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {expected}")


class Decoding(NamedTuple):
    """The state of the decode loop.

    Attributes:
        cache: keys and values of prompt and answer so far.
        logits_BV: float32, of the token to choose next.
        answer_BG: int32, the answers so far; unwritten slots are -1.
        seen_BV: bool, tokens in the row so far; [B, 0] where no penalty asks for it.
        done_B: bool, rows that have stopped.
        num_new: int32 scalar, tokens made so far.
    """

    cache: Cache
    logits_BV: jax.Array
    answer_BG: jax.Array
    seen_BV: jax.Array
    done_B: jax.Array
    num_new: jax.Array


def generate_ids(
    decoder: Decoder,
    params: dict,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    stop_ids: Sequence[int],
    seed: int,
    num_batch_shards: int = 1,
    should_stop: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Generates one answer for each prompt.

    A row's draws depend on the seed and on its place in `prompts`, not on its neighbours.

    Args:
        decoder: the module, dropout off.
        params: its parameters, on the mesh set by `jax.set_mesh` if there is one.
        prompts: non-empty lists of token ids.
        sampling: how tokens are chosen.
        stop_ids: tokens that end an answer; the one that did is the answer's last.
        seed: base of the draws, in [0, 2**32).
        num_batch_shards: devices that rows are split over.
        should_stop: tells from an answer's ids whether it has ended.

    Returns:
        The answers' ids, in the order of the prompts.

    Raises:
        ValueError: as `check_prompts`, or the seed is out of its range.
    """
    check_prompts(prompts, config=decoder.config, max_new_tokens=sampling.max_new_tokens)
    if not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r} must be a whole number in [0, 2**32)")
    answers = []
    for start in range(0, len(prompts), MAX_ROWS):
        rows = prompts[start : start + MAX_ROWS]
        num_rows = rows_at_once(len(rows), num_batch_shards)
        padded = [*rows, *([rows[-1]] * (num_rows - len(rows)))]
        row_ids_B = np.arange(start, start + num_rows, dtype=np.int32)
        loop = functools.partial(
            _decode,
            decoder,
            params,
            row_ids_B,
            np.uint32(seed),
            sampling=sampling,
            stop_ids=tuple(int(i) for i in stop_ids),
        )
        recompute = functools.partial(_recompute_rows, decoder, params, padded, num_batch_shards)
        state, prompt_lens_B = _start(decoder, params, padded, sampling, len(rows))
        crossings_B = _crossings(prompt_lens_B, decoder.config.recompute_from)
        answer_BG = _run(loop, recompute, state, prompt_lens_B, crossings_B, sampling, should_stop)
        answers += [_written(answer_G) for answer_G in answer_BG[: len(rows)]]
    return [_until_stop(answer, stop_ids) for answer in answers]


def compile_sampler(
    decoder: Decoder,
    params: dict,
    *,
    num_prompts: int,
    prompt_len: int,
    sampling: Sampling,
    stop_ids: Sequence[int],
    num_batch_shards: int = 1,
) -> Iterator[jax.stages.Compiled]:
    """Compiles what `generate_ids` runs, without any array.

    Args:
        decoder: the module, dropout off.
        params: tree of `jax.ShapeDtypeStruct` with shardings, on the mesh set by `jax.set_mesh`.
        num_prompts: how many are given.
        prompt_len: tokens of the longest.
        sampling: how tokens are chosen.
        stop_ids: tokens that end an answer.
        num_batch_shards: devices that rows are split over.

    Yields:
        The prefill, and then the decode loop, each compiled when it is asked for.
    """
    num_rows = rows_at_once(num_prompts, num_batch_shards)
    ints_B = jax.ShapeDtypeStruct((num_rows,), jnp.int32)
    longest = _bucket(prompt_len, decoder.config, sampling)
    prompts_BP = jax.ShapeDtypeStruct((num_rows, longest), jnp.int32)
    lowered = _prefill.lower(decoder, params, prompts_BP, ints_B, sampling=sampling)
    prefill = lowered.compile()
    yield prefill
    state = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        lowered.out_info,
        prefill.output_shardings,
    )
    decode = _decode.lower(
        decoder,
        params,
        ints_B,
        np.uint32(0),
        state,
        ints_B,
        np.int32(0),
        sampling=sampling,
        stop_ids=tuple(int(i) for i in stop_ids),
    )
    yield decode.compile()


def rows_at_once(num_prompts: int, num_batch_shards: int) -> int:
    """Returns how many rows are decoded at once: prompts, and copies until they divide."""
    return -(-min(num_prompts, MAX_ROWS) // num_batch_shards) * num_batch_shards


def check_prompts(
    prompts: Sequence[Sequence[int]], *, config: DecoderConfig, max_new_tokens: int
) -> None:
    """Checks that answers to these prompts can be generated.

    Raises:
        ValueError: a prompt is empty, has an id outside the vocabulary, or with its answer
            exceeds the model's positions.
    """
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{i}] has no token: pass some text, or set add_bos=True")
        if max(prompt) >= config.vocab_size:
            raise ValueError(
                f"prompts[{i}] has token id {max(prompt)}, but the model's vocabulary has "
                f"{config.vocab_size} entries: use the model's own tokenizer"
            )
        if len(prompt) + max_new_tokens > config.num_positions:
            raise ValueError(
                f"prompts[{i}] has {len(prompt)} tokens, and with max_new_tokens={max_new_tokens} "
                f"exceeds the model's {config.num_positions} positions: shorten the prompt or "
                "lower max_new_tokens"
            )


def _start(
    decoder: Decoder, params: dict, prompts: list, sampling: Sampling, num_real: int
) -> tuple[Decoding, np.ndarray]:
    prompt_lens_B = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = _bucket(int(prompt_lens_B.max()), decoder.config, sampling)
    prompts_BP = np.zeros((len(prompts), longest), np.int32)
    for row_P, prompt in zip(prompts_BP, prompts, strict=True):
        row_P[: len(prompt)] = prompt
    state = _prefill(decoder, params, prompts_BP, prompt_lens_B, sampling=sampling)
    is_filler_B = np.arange(len(prompts)) >= num_real
    return state._replace(done_B=jnp.asarray(is_filler_B)), prompt_lens_B


def _bucket(prompt_len: int, config: DecoderConfig, sampling: Sampling) -> int:
    """The length that prompts up to `prompt_len` are padded to."""
    longest = -(-prompt_len // PROMPT_BUCKET) * PROMPT_BUCKET
    return min(longest, config.num_positions - sampling.max_new_tokens)


def _crossings(prompt_lens_B: np.ndarray, recompute_from: int | None) -> np.ndarray:
    """After how many new tokens each row's cache is to be computed anew; 0 or less for never."""
    if recompute_from is None:
        return np.zeros_like(prompt_lens_B)
    return recompute_from + 1 - prompt_lens_B


def _run(
    loop: Callable,
    recompute: Callable,
    state: Decoding,
    prompt_lens_B: np.ndarray,
    crossings_B: np.ndarray,
    sampling: Sampling,
    should_stop: Callable[[list[int]], bool] | None,
) -> np.ndarray:
    num_most = sampling.max_new_tokens
    checks = {*range(STOP_CHECK_INTERVAL, num_most, STOP_CHECK_INTERVAL)} if should_stop else set()
    crossings = {int(number) for number in crossings_B if 0 < number < num_most}
    for until in sorted({num_most} | checks | crossings):
        state = loop(state, prompt_lens_B, np.int32(until))
        # Replicated, so that every process reads the same answers and takes the same decision.
        answer_BG, done_B = jax.device_get((state.answer_BG, state.done_B))
        if should_stop and (until in checks or until == num_most):
            done_B = np.array(done_B)
            for row in np.flatnonzero(~done_B):
                done_B[row] = should_stop(_written(answer_BG[row]))
            state = state._replace(done_B=jnp.asarray(done_B))
        if done_B.all():
            break
        if until in crossings:
            state = recompute(state, answer_BG, ~done_B & (crossings_B == until))
    return answer_BG


def _recompute_rows(
    decoder: Decoder,
    params: dict,
    prompts: list,
    num_batch_shards: int,
    state: Decoding,
    answer_BG: np.ndarray,
    crosses_B: np.ndarray,
) -> Decoding:
    """Computes some rows' part of the cache anew, one row of each of the batch's shards at a time.

    Row r of B stands in shard r // (B/N), at r % (B/N), so that no row leaves its devices:

        rows 0 .. 7 on N = 2 shards     0 1 2 3 | 4 5 6 7
        where 1, 2 and 6 cross          first (1, 5), of which only 1; then (2, 6)
    """
    row_len = decoder.config.recompute_from + 1
    crosses_NM = crosses_B.reshape(num_batch_shards, -1)
    rows_NM = np.arange(len(crosses_B)).reshape(num_batch_shards, -1)
    for place in np.flatnonzero(crosses_NM.any(axis=0)):
        crosses_N = crosses_NM[:, place]
        tokens_NT = np.zeros((num_batch_shards, row_len), np.int32)
        for shard in np.flatnonzero(crosses_N):
            row = rows_NM[shard, place]
            tokens_NT[shard] = [*prompts[row], *_written(answer_BG[row])]
        state = _recompute(decoder, params, state, tokens_NT, crosses_N, np.int32(place))
    return state


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("sampling",))
def _prefill(
    decoder: Decoder,
    params: dict,
    prompts_BP: jax.Array,
    prompt_lens_B: jax.Array,
    *,
    sampling: Sampling,
) -> Decoding:
    B, P = prompts_BP.shape
    prompts_BP = constrain(prompts_BP, "batch", None)
    positions_BP = jnp.broadcast_to(jnp.arange(P)[None], (B, P))
    cache = empty_cache(decoder.config, B, P + sampling.max_new_tokens, decoder.numerics.dtype)
    is_prompt_BP = positions_BP < prompt_lens_B[:, None]
    hidden_BPD, cache = decoder.apply(
        {"params": params}, prompts_BP, positions_BP, is_prompt_BP.astype(jnp.int32), cache
    )
    last_B1D = jnp.take_along_axis(hidden_BPD, (prompt_lens_B - 1)[:, None, None], axis=1)
    logits_BV = logits(decoder.config, params, last_B1D)[:, 0]
    num_seen = logits_BV.shape[1] if sampling.repetition_penalty != 1.0 else 0
    seen_BV = jnp.zeros((B, num_seen), bool)
    if num_seen:
        # Padding writes to an entry behind the vocabulary, which is dropped.
        ids_BP = jnp.where(is_prompt_BP, prompts_BP, num_seen)
        seen_BV = seen_BV.at[jnp.arange(B)[:, None], ids_BP].set(True, mode="drop")
    return Decoding(
        cache=cache,
        logits_BV=logits_BV,
        answer_BG=jnp.full((B, sampling.max_new_tokens), -1, jnp.int32),
        seen_BV=seen_BV,
        done_B=jnp.zeros((B,), bool),
        num_new=jnp.int32(0),
    )


@functools.partial(
    jax.jit,
    static_argnums=(0,),
    static_argnames=("sampling", "stop_ids"),
    donate_argnames=("state",),
)
def _decode(
    decoder: Decoder,
    params: dict,
    row_ids_B: jax.Array,
    seed: jax.Array,
    state: Decoding,
    prompt_lens_B: jax.Array,
    until: jax.Array,
    *,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
) -> Decoding:
    """Makes tokens until each row has stopped, or `until` tokens are made."""
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), row_ids_B)
    rows_B = jnp.arange(row_ids_B.shape[0])

    def go_on(state: Decoding) -> jax.Array:
        return (state.num_new < until) & ~jnp.all(state.done_B)

    def make_token(state: Decoding) -> Decoding:
        step_keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, state.num_new)
        token_B = choose_token(state.logits_BV, state.seen_BV, step_keys_B, sampling=sampling)
        answer_B = jnp.where(state.done_B, -1, token_B)
        is_stop_B = jnp.isin(token_B, jnp.array(stop_ids, jnp.int32))
        positions_B1 = (prompt_lens_B + state.num_new)[:, None]
        hidden_B1D, cache = decoder.apply(
            {"params": params},
            token_B[:, None],
            positions_B1,
            jnp.ones_like(positions_B1),
            state.cache,
        )
        seen_BV = state.seen_BV
        if seen_BV.shape[1]:
            seen_BV = seen_BV.at[rows_B, token_B].set(True)
        return Decoding(
            cache=cache,
            logits_BV=logits(decoder.config, params, hidden_B1D)[:, 0],
            answer_BG=state.answer_BG.at[:, state.num_new].set(answer_B),
            seen_BV=seen_BV,
            done_B=state.done_B | is_stop_B,
            num_new=state.num_new + 1,
        )

    state = jax.lax.while_loop(go_on, make_token, state)
    return state._replace(
        answer_BG=constrain(state.answer_BG, None, None), done_B=constrain(state.done_B, None)
    )


@functools.partial(jax.jit, static_argnums=(0,), donate_argnames=("state",))
def _recompute(
    decoder: Decoder,
    params: dict,
    state: Decoding,
    tokens_NT: jax.Array,
    crosses_N: jax.Array,
    place: jax.Array,
) -> Decoding:
    """Gives the rows at one place of each shard the cache and logits of a full pass.

    Args:
        decoder: the module.
        params: its parameters.
        state: of the decode loop; its B rows are N shards of B/N.
        tokens_NT: all tokens so far of the rows that cross.
        crosses_N: bool, which of them do; the others stay as they are.
        place: of the rows within their shards.
    """
    N, T = tokens_NT.shape
    L, B, S, K, C = state.cache.keys_LBSKC.shape
    shape = (L, N, B // N, S, K, C)
    # What is written to a slot behind the last is dropped.
    positions_NT = jnp.where(crosses_N[:, None], jnp.arange(T)[None], S)
    rows = Cache(*(slots_LBSKC.reshape(shape)[:, :, place] for slots_LBSKC in state.cache))
    hidden_NTD, rows = decoder.apply(
        {"params": params}, tokens_NT, positions_NT, jnp.ones_like(positions_NT), rows
    )
    logits_NV = logits(decoder.config, params, hidden_NTD[:, -1:])[:, 0]
    cache = Cache(
        *(
            old_LBSKC.reshape(shape).at[:, :, place].set(new_LNSKC).reshape(old_LBSKC.shape)
            for old_LBSKC, new_LNSKC in zip(state.cache, rows, strict=True)
        )
    )
    logits_NMV = state.logits_BV.reshape(N, B // N, -1)
    logits_NV = jnp.where(crosses_N[:, None], logits_NV, logits_NMV[:, place])
    logits_BV = logits_NMV.at[:, place].set(logits_NV).reshape(state.logits_BV.shape)
    return state._replace(cache=cache, logits_BV=logits_BV)


def choose_token(
    logits_BV: jax.Array, seen_BV: jax.Array, keys_B: jax.Array, *, sampling: Sampling
) -> jax.Array:
    """Chooses each row's next token.

    Args:
        logits_BV: float32; -inf is never chosen.
        seen_BV: bool, tokens in the row so far; read only with a repetition penalty.
        keys_B: a PRNG key a row.
        sampling: how to choose.

    Returns:
        token_B, int32.
    """
    if sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
    if not sampling.do_sample or sampling.temperature == 0 or sampling.top_k == 1:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k:
        num_kept = min(sampling.top_k, logits_BV.shape[1])
        smallest_B1 = jax.lax.top_k(logits_BV, num_kept)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1.0:
        logits_BV = jnp.where(_is_in_nucleus(logits_BV, sampling.top_p), logits_BV, -jnp.inf)
    return draw(logits_BV, keys_B)


def draw(logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Draws a token from softmax(logits) for each row, by its cumulative distribution.

    First a block of the vocabulary is drawn, then a token in it, so that two random numbers a
    row are enough; on a CPU this is many times faster than a Gumbel number for every logit.

        probabilities   .1 .2 | .0 .4 | .3        blocks .3 .4 .3, cumulative .3 .7 1.
        first number    .65   -> the block .0 .4  cumulative in it .0 .4, scaled to 0. 1.
        second number   .2    -> its second token

    Args:
        logits_BV: float32, -inf where nothing may be drawn.
        keys_B: a PRNG key a row.

    Returns:
        token_B, int32.
    """
    uniform_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    mass_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    padding = -mass_BV.shape[1] % DRAW_BLOCK
    mass_BNM = jnp.pad(mass_BV, ((0, 0), (0, padding))).reshape(len(keys_B), -1, DRAW_BLOCK)
    block_B1 = _first_above(jnp.sum(mass_BNM, axis=-1), uniform_B2[:, :1])
    mass_BM = jnp.take_along_axis(mass_BNM, block_B1[..., None], axis=1)[:, 0]
    within_B1 = _first_above(mass_BM, uniform_B2[:, 1:])
    token_B = (block_B1 * DRAW_BLOCK + within_B1)[:, 0]
    mass_B = jnp.take_along_axis(mass_BM, within_B1, axis=1, mode="fill", fill_value=0.0)[:, 0]
    # Cumulative sums round: about once in 1e7 draws they lead to a token of no mass.
    return jax.lax.cond(
        jnp.all(mass_B > 0),
        lambda: token_B.astype(jnp.int32),
        lambda: jnp.where(mass_B > 0, token_B, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32),
    )


def _first_above(mass_BN: jax.Array, uniform_B1: jax.Array) -> jax.Array:
    """Returns, in [B, 1], where the cumulative mass first exceeds a share of the total."""
    cumulative_BN = jnp.cumsum(mass_BN, axis=-1)
    return jnp.sum(cumulative_BN <= uniform_B1 * cumulative_BN[:, -1:], axis=-1, keepdims=True)


def _is_in_nucleus(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """True for the likeliest tokens up to the one that reaches `top_p` (Holtzman et al. 2020)."""
    probabilities_BV = jax.nn.softmax(logits_BV, axis=-1)
    sorted_BV = -jnp.sort(-probabilities_BV, axis=-1)
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    num_kept_B1 = jnp.sum(before_BV < top_p, axis=-1, keepdims=True)
    smallest_B1 = jnp.take_along_axis(sorted_BV, num_kept_B1 - 1, axis=-1)
    return probabilities_BV >= smallest_B1


def _written(answer_G: np.ndarray) -> list[int]:
    return [int(token) for token in answer_G if token >= 0]


def _until_stop(answer: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Cuts behind the first stop token (rows stop together only at the host's next look)."""
    for i, token in enumerate(answer):
        if token in stop_ids:
            return answer[: i + 1]
    return answer
