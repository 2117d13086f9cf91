"""What a model writes for held-out texts, scored against what people wrote.

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
    """The options of `generate` for one text of each row.

    Args:
        given: those of the user; what is not among them is the checkpoint's.
        longest: tokens that are written where neither says how many.

    Raises:
        ValueError: for options that do not fit together or the model, and where nothing says how
            long a text may be.
    """
    options: Any = {"num_return_sequences": 1} | _language_first(tokenizer) | dict(given)
    if not {"max_length", "max_new_tokens"} & choose_options(model.config, options).keys():
        if longest is None:
            raise ValueError(
                "nothing says how long the texts may become that are written for eval_data: give "
                "generation: {max_length: N}, or max_target_length."
            )
        options["max_new_tokens"] = longest
    check_options(model, options)
    return options


def _language_first(tokenizer: Tokenizer) -> dict[str, int]:
    """What texts in the tokenizer's language begin with: mBART's targets end with its token, which
    the shift puts before them; mBART-50's have it as their first."""
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
    """`rouge_scores` of what `generate` writes for the texts of all rows, against the data's
    targets, whole as they stand there. As many lengths of inputs, as many compilations.

    Args:
        batches: of data whose rows have a target.
        options: of `generate`, one text for each row.
        mesh: where `params` lie.

    Returns:
        The scores, each with "eval_" before its name.
    """
    written: list[str] = []
    references: list[str] = []
    for number, (batch, rows) in enumerate(batches):
        real = rows >= 0  # [B]
        # An empty row would be written to the end.
        shown = np.where(real, np.arange(len(rows)), 0)
        ids, mask = (batch[name][shown] for name in ("input_ids", "attention_mask"))
        key = jax.random.fold_in(jax.random.key(batches.seed), number)
        # The batch has the length of a bucket already.
        run: Any = {**options, "key": key, "bucket": 1, "mesh": mesh}
        tokens = generate(model, params, ids, mask, **run)
        written += tokenizer.batch_decode(
            tokens[real], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        references += [batches.dataset.info(row).record["target"] for row in rows[real]]
    scores = rouge_scores(written, references)
    return {f"eval_{name}": value for name, value in scores.items()}
