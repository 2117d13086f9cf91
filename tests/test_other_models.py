"""LSG attention in Flax's own layers, in NNX and in the examples' models."""

import functools
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_data import GOLDEN

import lsg_flax
from lsg_flax import LSGConfig
from lsg_flax.adapters import AttentionFn
from lsg_flax.attention import lsg_attention, lsg_attention_reference

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "other_models.md"
CONFIG = LSGConfig(block_size=4, sparse_block_size=4, sparsity_factor=2)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
WIDTH, HEADS = 8, 2
LENGTHS = jnp.array([8, 5])[:, None]  # real tokens of each sequence


def layer(attention_fn=None, **options) -> nn.Module:
    function = {} if attention_fn is None else {"attention_fn": attention_fn}
    return nn.MultiHeadDotProductAttention(HEADS, **function, **options)


@pytest.fixture(scope="module")
def params():
    return jax.jit(layer().init)(jax.random.key(0), jnp.zeros((1, 2, WIDTH)))


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, x, mask=None):
    return module.apply(params, x, mask=mask)


def tokens(length: int, *batch: int):
    return jax.random.normal(jax.random.key(length), (*(batch or (2,)), length, WIDTH))


def flax_masks(length: int, causal: bool):
    """One mask of a padded batch in the forms that Flax users write."""
    real = jnp.arange(length)[None] < LENGTHS * length // 8
    pairs = nn.make_attention_mask(real, real)  # float32: Flax reads nonzero as seen
    order = nn.make_causal_mask(real) if causal else None
    every_head = jnp.broadcast_to(pairs, (2, HEADS, length, length))
    return real, [real[:, None, None], nn.combine_masks(pairs, order), every_head]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("global_tokens", ["first_token", "none"])
def test_up_to_two_blocks_it_is_the_layer_without_it(params, causal, global_tokens):
    lsg = layer(AttentionFn(CONFIG, causal, global_tokens))

    @jax.jit
    def both(params, x, real, masks):
        order = nn.make_causal_mask(real) if causal else None
        padding = nn.combine_masks(real[:, None, None], order)
        expected = [*[layer().apply(params, x, mask=padding)] * len(masks), None]
        expected[-1] = layer().apply(params, x, mask=order)
        return [lsg.apply(params, x, mask=mask) for mask in (*masks, None)], expected

    for length in (1, 8):
        real, masks = flax_masks(length, causal)
        for i, (ours, expected) in enumerate(
            zip(*both(params, tokens(length), real, masks), strict=True)
        ):
            seen = np.asarray(real) | (i == len(masks))  # the last call is without a mask
            np.testing.assert_allclose(ours[seen], expected[seen], **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_longer_it_is_the_reference_pattern(params, causal):
    length = 21
    x, (real, masks) = tokens(length), flax_masks(length, causal)
    options = {"config": CONFIG, "causal": causal, "global_tokens": "first_token"}

    def reference(query, key, value, mask=None):
        return lsg_attention_reference(query, key, value, mask[:, 0, 0], **options)

    def loss(params, layer, mask):
        out = layer.apply(params, x, mask=mask)
        return (jnp.where(real[..., None], out, 0.0) ** 2).sum(), out

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, expected), expected_gradient = run(params, layer(reference), masks[0])
    seen = np.asarray(real)
    for mask in masks[:2]:
        (_, ours), gradient = run(params, layer(AttentionFn(CONFIG, causal)), mask)
        np.testing.assert_allclose(ours[seen], expected[seen], **TOLERANCE)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
            gradient,
            expected_gradient,
        )
    dense = apply(layer(), params, x, masks[1])
    assert np.abs(dense - expected)[seen].max() > 1e-3  # the pattern is another one


def test_any_number_of_batch_axes(params):
    lsg, x = layer(AttentionFn(CONFIG)), tokens(13, 2, 3)
    real = jnp.arange(13)[None, None] < jnp.array([[13], [7]])[..., None]  # [2, 1, 13]
    ours = apply(lsg, params, x, real[:, :, None, None])
    each = apply(lsg, params, x[1, 2][None], real[1][:, None, None])
    np.testing.assert_allclose(ours[1, 2, :7], each[0, :7], **TOLERANCE)
    np.testing.assert_allclose(apply(lsg, params, x[0, 0]), ours[0, 0], **TOLERANCE)


def window_mask():
    near = abs(jnp.arange(12)[:, None] - jnp.arange(12)[None]) < 3
    return near[None, None]


def one_head_hidden():
    return jnp.ones((2, HEADS, 1, 12), bool).at[:, 1, :, 0].set(False)


UNFIT = {
    "window": (window_mask(), False),
    "causal, but not said": (nn.make_causal_mask(jnp.ones((2, 12))), False),
    "window under causal": (window_mask(), True),
    "heads differ": (one_head_hidden(), False),
    "a real token sees nothing": (jnp.ones((1, 1, 12, 12)).at[..., 5, :].set(0), False),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_mask_that_cannot_be_carried_out_raises_and_is_nan_under_jit(params, name):
    mask, causal = UNFIT[name]
    lsg, x = layer(AttentionFn(CONFIG, causal)), tokens(12)
    with pytest.raises(ValueError, match="hides more than padding"):
        lsg.apply(params, x, mask=mask)
    assert bool(jnp.isnan(apply(lsg, params, x, mask)).all())


def test_what_cannot_be_carried_out_raises(params):
    lsg, x = layer(AttentionFn(CONFIG)), tokens(12)
    for shape in ((2, 1, 12, 1), (2, 3, 12, 12), (5, 1, 1, 12), (1, 2, 1, 12, 12)):
        with pytest.raises(ValueError, match=re.escape(f"mask {shape} does not fit")):
            lsg.apply(params, x, mask=jnp.ones(shape))
    with pytest.raises(ValueError, match=r"12 queries and 3 keys"):
        lsg.apply(params, x, tokens(3))
    with pytest.raises(ValueError, match="sow_weights"):
        lsg.apply(params, x, sow_weights=True)
    with pytest.raises(ValueError, match="default_matmul_precision"):
        layer(AttentionFn(CONFIG), precision="highest").apply(params, x)


def test_dropout_is_the_layers(params):
    lsg = layer(AttentionFn(CONFIG), dropout_rate=0.4)
    x, key = tokens(13), jax.random.key(3)

    def direct(query, key_, value):
        return lsg_attention(
            *(query, key_, value),
            config=CONFIG,
            global_tokens="first_token",
            dropout_rate=0.4,
            dropout_key=key,
        )

    @functools.partial(jax.jit, static_argnums=2)
    def run(params, x, deterministic):
        return lsg.apply(params, x, deterministic=deterministic, dropout_rng=key)

    dropped = run(params, x, False)
    np.testing.assert_array_equal(dropped, apply(layer(direct), params, x))
    kept = apply(layer(AttentionFn(CONFIG)), params, x)
    np.testing.assert_array_equal(run(params, x, True), kept)
    assert np.abs(dropped - kept).max() > 1e-3


def test_half_precision_follows_the_layer(params):
    lsg = layer(AttentionFn(CONFIG), dtype=jnp.bfloat16)
    ours = apply(lsg, params, tokens(13))
    assert ours.dtype == jnp.bfloat16
    exact = apply(layer(AttentionFn(CONFIG)), params, tokens(13))
    np.testing.assert_allclose(np.asarray(ours, np.float32), exact, atol=0.03)


def test_layers_made_alike_are_equal():
    assert layer(AttentionFn(CONFIG)) == layer(AttentionFn(CONFIG))
    assert hash(AttentionFn(CONFIG)) != hash(AttentionFn(CONFIG, causal=True))


# -------------------------------------------------------------------------------------------- NNX


@pytest.mark.parametrize("key_heads", [HEADS, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_nnx_attention(causal, key_heads):
    def make(**options):
        return nnx.MultiHeadAttention(
            *(HEADS, WIDTH), num_kv_heads=key_heads, decode=False, rngs=nnx.Rngs(0), **options
        )

    dense, lsg = make(), make(attention_fn=AttentionFn(CONFIG))
    real = jnp.arange(8)[None] < LENGTHS
    seen, mask = np.asarray(real), jnp.broadcast_to(real[:, None, None], (2, 1, 8, 8))
    ours = nnx.jit(lambda m, x: m(x, mask=real[:, None, None], is_causal=causal))(lsg, tokens(8))
    dense_mask = mask & jnp.tri(8, dtype=bool)[None, None] if causal else mask
    expected = nnx.jit(lambda m, x: m(x, mask=dense_mask))(dense, tokens(8))
    np.testing.assert_allclose(ours[seen], expected[seen], **TOLERANCE)

    @nnx.jit
    def gradient(module, x):
        return nnx.grad(lambda m: (m(x, is_causal=causal) ** 2).sum())(module)

    leaves = jax.tree.leaves(gradient(lsg, tokens(21)))
    assert leaves and all(np.isfinite(leaf).all() for leaf in leaves)
    assert any(np.abs(leaf).max() > 0 for leaf in leaves)


@pytest.mark.slow
def test_to_nnx_gives_the_numbers_of_apply(script):
    attention_in_nnx = script("attention_in_nnx")

    model, params = lsg_flax.from_pretrained(GOLDEN / "bert_base")
    ids = np.random.default_rng(0).integers(5, 31, (2, 43))
    module = attention_in_nnx.to_nnx(model, params, nnx.Rngs(dropout=0))
    run = nnx.jit(lambda m, train: m(ids, train=train).last_hidden_state, static_argnums=1)
    expected = jax.jit(model.apply)({"params": params}, ids).last_hidden_state
    np.testing.assert_array_equal(run(module, False), expected)
    state = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    assert jax.tree.structure(state) == jax.tree.structure(params)
    first, second = (run(module, True) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3  # NNX counts its dropout keys on


# --------------------------------------------------------------------------------- the examples


@pytest.mark.slow
def test_example_in_flax_runs(script, capsys):
    attention_in_flax = script("attention_in_flax")

    attention_in_flax.main(300, 16)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("  256") and float(lines[0].split()[-1]) < 1e-5
    assert lines[1].startswith("  300") and float(lines[1].split()[-1]) > 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:weights for task")
def test_example_in_nnx_learns(script, capsys):
    attention_in_nnx = script("attention_in_nnx")

    attention_in_nnx.main(str(GOLDEN / "bert_to_convert_512"), length=300, steps=3, rate=2e-2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("0.0e+00")
    losses = [float(re.search(r"loss ([\d.]+)", line)[1]) for line in lines[1:]]
    assert losses[-1] < losses[0] - 0.02


def test_decoder_is_causal(script):
    """No logit depends on the position vectors of later tokens; each does on its own."""
    causal_decoder = script("causal_decoder")

    model = causal_decoder.Decoder(CONFIG, length=21, width=8)
    ids = causal_decoder.windows(np.arange(256, dtype=np.uint8), 21, 1, seed=0)[:, :-1]
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]

    @jax.jit
    def jacobian(positions):
        def logits(positions):
            return model.apply({"params": {**params, "positions": positions}}, ids)[0]

        def of_tokens(positions):
            return (logits(positions) * jnp.cos(jnp.arange(257.0))[None]).sum(axis=-1)

        return jnp.abs(jax.jacrev(of_tokens)(positions)).sum(axis=-1)  # [T out, T in]

    with jax.numpy_rank_promotion("allow"):  # jacrev
        size = np.asarray(jacobian(params["positions"]))
    assert (np.triu(size, 1) == 0).all()
    assert (np.diag(size) > 0).all() and (size[:, 0] > 0).all()


@pytest.mark.slow
def test_decoder_example_learns(script, capsys):
    causal_decoder = script("causal_decoder")

    causal_decoder.main(steps=10, length=192)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["LSG", "full"]
    for line in lines:
        before, after = map(float, re.search(r"([\d.]+) -> ([\d.]+)", line).groups())
        assert after < before - 0.5


def test_document_runs_from_top_to_bottom():
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    code = compile("\n".join(blocks), str(DOCUMENT), "exec")
    jax.eval_shape(lambda: exec(code, {}))  # its assertions are about shapes


@pytest.mark.parametrize("name", ["attention_in_flax", "attention_in_nnx", "causal_decoder"])
def test_examples_are_short(name):
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) <= 100
