"""Makes a small LSG-BART with random weights and its own tokenizer, for machines that cannot
download a pretrained one. It shows that everything runs, and how fast; it knows nothing yet."""

import pathlib
from collections.abc import Iterable

import jax
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import lsg_flax

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # BART's, in its order
NAMES = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")


def train_tokenizer(
    texts: Iterable[str], *, vocabulary: int, length: int
) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE as BART's: `<s>` and `</s>` around a text of at most `length` tokens."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=letters,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, model_max_length=length, **dict(zip(NAMES, SPECIAL, strict=True))
    )


def write_small_bart(
    folder: pathlib.Path,
    texts: Iterable[str],
    *,
    width: int = 128,
    vocabulary: int = 4000,
    length: int = 4096,
    seed: int = 0,
) -> pathlib.Path:
    """Writes a checkpoint of 2 + 2 layers that reads `length` tokens, with a tokenizer trained on
    `texts`. Returns the folder."""
    tokenizer = train_tokenizer(texts, vocabulary=vocabulary, length=length)
    config = lsg_flax.EncoderDecoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": max(width // 32, 1) for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": 4 * width for side in ("encoder", "decoder")},
        max_position_embeddings=length,
        decoder_start_token_id=2,
        forced_bos_token_id=0,
        scale_embedding=True,
        lsg=lsg_flax.LSGConfig(),
    )
    model = lsg_flax.Model(config, "conditional_generation")
    start = jax.jit(model.init)(jax.random.key(seed), **model.example_inputs())
    lsg_flax.save_pretrained(folder, model, start["params"], tokenizer)
    return folder
