"""The queries of globals in the fused kernels: they lie behind the tokens in all arrays, and see
every token and each other.

The heads of a group are computed at once, as rows [heads * queries, 128] with zeros in the lanes of
other heads, against a few blocks of keys at a time. Causal globals are not computed: as in the
reference, their context is their query.

Axes: B batch, N heads, T tokens, S keys, Q queries of a block, O rows (the queries of a group's
heads one below the other).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Shaped

from lsg_flax.kernels import tpu_select as select
from lsg_flax.kernels.dropout import kept_at
from lsg_flax.kernels.tpu_plan import GROUP, FusedArrays, FusedPlan, OnChip
from lsg_flax.kernels.tpu_step import HIDDEN, LEAST, NOTHING, Step, scaled

CHUNK = 16  # blocks of keys at a time: fewer wait longer for each other, more compile longer
STREAM = 0x5BD1E995  # makes dropout's seed another than that of tokens


class Block(NamedTuple):
    """A block of such queries: the number of its first, its place among the blocks of its step, and
    how many rows it has there, not all of which need be queries."""

    first: int
    place: int
    rows: int


class KeyRun(NamedTuple):
    """A run of keys: its row on the chip, what is added to the scores of each, and their numbers
    for dropout."""

    start: Array | int
    hidden: Float[Array, "1 S"]
    numbers: Int[Array, "1 S"]


Carry = Any


def forward(plan: FusedPlan, step: Step, inputs: FusedArrays, memory: OnChip, outputs) -> None:
    """Writes the context and log-normalisers of the globals that are in this step."""
    for number, row, count in select.blocks_behind(plan):
        block = Block(row - plan.blocks * plan.block, number % GROUP, count)

        @pl.when(step.first == number // GROUP * GROUP)
        def _(block=block):
            _forward(plan, step, block, inputs, memory, outputs)


def backward(plan: FusedPlan, step: Step, inputs: FusedArrays, results, of_query, scratch) -> None:
    """Writes the gradients of the globals' queries that are in this step, and adds what keys and
    values get of them."""
    for number, row, count in select.blocks_behind(plan):
        block = Block(row - plan.blocks * plan.block, number % GROUP, count)

        @pl.when(step.first == number // GROUP * GROUP)
        def _(block=block):
            _backward(plan, step, block, inputs, results, of_query, scratch)


def _forward(plan, step: Step, block: Block, inputs, memory: OnChip, outputs) -> None:
    query = _rows(plan, block, inputs.query)
    here = _here(plan, block)
    if plan.spec.causal:
        outputs[0][0, here, :] = query
        return
    own = _stacked(plan, [scaled(plan, query, head) for head in range(plan.group_heads)])

    def one_run(run: KeyRun, carry: Carry) -> Carry:
        key, value = (x[pl.ds(run.start, run.hidden.shape[1]), :] for x in memory[:2])
        scores = select.product(own, key, (1, 1)) + run.hidden  # [O, S]
        top = jnp.maximum(scores.max(axis=1, keepdims=True), HIDDEN / 2)
        top = top if carry is None else jnp.maximum(top, carry[0])
        weights = jnp.exp(scores - top)
        whole = weights.sum(axis=1, keepdims=True)
        if plan.spec.dropout_rate:
            weights *= _dropped(plan, step, block, inputs.seeds, run)
        context = select.product(weights.astype(plan.dtype), value, (1, 0))  # [O, 128]
        if carry is not None:
            shrink = jnp.exp(carry[0] - top)
            whole, context = whole + carry[1] * shrink, context + carry[2] * shrink
        return top, whole, context

    top, whole, context = _over_keys(plan, inputs, one_run)
    context = context / jnp.maximum(whole, LEAST)
    normaliser = jnp.where(whole > 0, top + jnp.log(jnp.maximum(whole, LEAST)), NOTHING)
    outputs[0][0, here, :] = _join(plan, context).astype(plan.dtype)
    for head, part in enumerate(jnp.split(normaliser, plan.group_heads)):
        column = jnp.pad(part, ((0, plan.block - block.rows), (0, 0)))
        outputs[1][0, head, block.place : block.place + 1, :] = select.to_row(column)


def _backward(plan, step: Step, block: Block, inputs, results, of_query, scratch) -> None:
    gradient, here = _rows(plan, block, results.gradient), _here(plan, block)
    if plan.spec.causal:
        of_query[0, here, :] = gradient
        return
    heads = range(plan.group_heads)
    query, context = (_rows(plan, block, x) for x in (inputs.query, results.context))
    own = _stacked(plan, [scaled(plan, query, head) for head in heads])
    mine = [select.of_head(plan, head) for head in heads]
    own_gradient = _stacked(plan, [jnp.where(m, gradient, 0).astype(plan.dtype) for m in mine])
    both = gradient.astype(jnp.float32) * context.astype(jnp.float32)
    delta = _stacked(plan, [jnp.where(m, both, 0.0).sum(axis=1, keepdims=True) for m in mine])
    at = slice(block.place, block.place + 1)
    columns = [select.to_column(results.normaliser[0, head, at, :]) for head in heads]
    normaliser = _stacked(plan, [column[: block.rows] for column in columns])  # [O, 1]

    def one_run(run: KeyRun, carry: Carry) -> Carry:
        there = pl.ds(run.start, run.hidden.shape[1])
        key, value = (x[there, :] for x in scratch.memory[:2])
        scores = select.product(own, key, (1, 1)) + run.hidden
        weights = jnp.exp(jnp.minimum(scores - normaliser, 0.0))
        of_weights, kept = select.product(own_gradient, value, (1, 1)), weights
        if plan.spec.dropout_rate:
            factor = _dropped(plan, step, block, inputs.seeds, run)
            kept, of_weights = weights * factor, of_weights * factor
        of_scores = (weights * (of_weights - delta)).astype(plan.dtype)
        scratch.sums.keys[there, :] += select.product(of_scores, own, (0, 0))
        scratch.sums.values[there, :] += select.product(
            kept.astype(plan.dtype), own_gradient, (0, 0)
        )
        total = select.product(of_scores, key, (1, 0))
        return total if carry is None else carry + total

    total = _join(plan, _over_keys(plan, inputs, one_run)) * plan.scale
    of_query[0, here, :] = total.astype(plan.dtype)


def _here(plan: FusedPlan, block: Block):
    return pl.ds(block.place * plan.block, block.rows)


def _rows(plan: FusedPlan, block: Block, ref) -> Float[Array, "Q 128"]:
    """The block of an array; zeros behind the last global, where there may be anything."""
    rows = ref[0, _here(plan, block), :]
    there = block.first + select.places((block.rows, 1), 0) < plan.behind
    return jnp.where(there, rows, 0).astype(rows.dtype)


def _stacked(plan: FusedPlan, parts: list[Array]) -> Shaped[Array, "O _"]:
    return parts[0] if plan.group_heads == 1 else jnp.concatenate(parts, axis=0)


def _join(plan: FusedPlan, rows: Float[Array, "O 128"]) -> Float[Array, "Q 128"]:
    return select.join_heads(plan, jnp.split(rows, plan.group_heads))


def _over_keys(
    plan: FusedPlan, inputs: FusedArrays, one_run: Callable[[KeyRun, Carry], Carry]
) -> Carry:
    """`one_run` on the globals and then on all tokens: a few blocks at a time, the last ones as
    many as the others, without those that were there before."""
    blocks, size = plan.blocks, plan.block
    count = min(blocks, CHUNK)

    def hidden(rows: list[Array]) -> Float[Array, "1 S"]:
        return (jnp.concatenate(rows, axis=1) - 1.0) * -HIDDEN

    def one_chunk(number, carry: Carry) -> Carry:
        wanted = number * count
        first = jnp.minimum(wanted, blocks - count)
        rows = [
            jnp.where(first + i >= wanted, inputs.real[0, pl.ds(first + i, 1), :], 0.0)
            for i in range(count)
        ]
        numbers = plan.shared + first * size + select.places((1, count * size), 1)
        start = pl.multiple_of((first + plan.first_key_block) * size, size)
        return one_run(KeyRun(start, hidden(rows), numbers), carry)

    behind = select.blocks_behind(plan)
    rows = [inputs.real[0, n : n + 1, :rows] for n, _, rows in behind]
    run = KeyRun(plan.shared_row, hidden(rows), select.places((1, plan.shared), 1))
    return lax.fori_loop(0, -(-blocks // count), one_chunk, one_run(run, None))


def _dropped(plan: FusedPlan, step: Step, block: Block, seeds, run: KeyRun) -> Float[Array, "O S"]:
    """Dropout's factors, by the place in the whole call."""
    keys, queries = plan.shared + plan.blocks * plan.block, select.places((block.rows, 1), 0)
    own = [
        (step.row * plan.all_heads + number) * plan.behind + block.first + queries
        for number in step.numbers
    ]
    place = (_stacked(plan, own) * keys + run.numbers).astype(jnp.uint32)
    return kept_at(place, (seeds[0], seeds[1] ^ jnp.uint32(STREAM)), plan.spec.dropout_rate)
