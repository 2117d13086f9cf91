"""Scores of the texts that a model generates for held-out rows, against the rows' targets.

Axes: B batch.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lsg_flax.data import EvalBatches
from lsg_flax.generation import GenerateOptions, check_options, choose_options, generate
from lsg_flax.hub import Tokenizer
from lsg_flax.models import Model, Params
from lsg_flax.training.scores import Scores, rouge_scores


def writing_options(
    model: Model, tokenizer: Tokenizer, given: Mapping[str, Any], longest: int | None
) -> GenerateOptions:
    """Returns the options of `generate`, with one text for each row.

    Args:
        given: options of the user; others are the checkpoint's.
        longest: most new tokens if neither of them limits the length.

    Raises:
        ValueError: for options that do not fit each other or the model, and if nothing limits the
            length of a text.
    """
    options: Any = {"num_return_sequences": 1} | _language_first(tokenizer) | dict(given)
    if not {"max_length", "max_new_tokens"} & choose_options(model.config, options).keys():
        if longest is None:
            raise ValueError(
                "nothing limits the length of the texts that are generated for eval_data; give "
                "generation: {max_length: N}, or max_target_length."
            )
        options["max_new_tokens"] = longest
    check_options(model, options)
    return options


def _language_first(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the option that starts texts with the tokenizer's language token, if it has one.

    mBART's targets end with that token, and the shift puts it in front of them; mBART-50's targets
    begin with it.
    """
    language = getattr(tokenizer, "tgt_lang", None)
    if language is None:
        return {}
    token = tokenizer.convert_tokens_to_ids(language)
    first = tokenizer(text_target="a")["input_ids"][0] == token
    return {"forced_bos_token_id" if first else "decoder_start_token_id": token}


def written_scores(
    model: Model,
    params: Params,
    batches: EvalBatches,
    tokenizer: Tokenizer,
    *,
    options: GenerateOptions,
    mesh: jax.sharding.Mesh | None = None,
) -> Scores:
    """Returns the `rouge_scores` of the texts that `generate` writes for all rows, against the
    rows' whole targets (not truncated). Each length of inputs is compiled once.

    Args:
        batches: batches of data whose rows have a target.
        options: options of `generate`, with one text for each row.
        mesh: mesh that `params` are sharded over.

    Returns:
        The scores; each name begins with "eval_".
    """
    written: list[str] = []
    references: list[str] = []
    for number, (batch, rows) in enumerate(batches):
        real = rows >= 0  # [B]
        # For an empty row `generate` would write until the length limit.
        shown = np.where(real, np.arange(len(rows)), 0)
        ids, mask = (batch[name][shown] for name in ("input_ids", "attention_mask"))
        key = jax.random.fold_in(jax.random.key(batches.seed), number)
        # The batch is already padded to a bucket.
        run: Any = {**options, "key": key, "bucket": 1, "mesh": mesh}
        tokens = generate(model, params, ids, mask, **run)
        written += tokenizer.batch_decode(
            tokens[real], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        references += [batches.dataset.info(row).record["target"] for row in rows[real]]
    scores = rouge_scores(written, references)
    return {f"eval_{name}": value for name, value in scores.items()}
