"""Record every class of SqueezeBERT, its losses and all its gradients, into tests/golden/ from the
PyTorch reference, in its environment.

    python tests/reference/record_squeezebert.py    adds them to what is there, or records them anew

Axes: n batch, t tokens.
"""

import functools

import numpy as np
import worker
from recorder import GOLDEN, VOCABULARY, normal, ragged, record_alone, token_ids

FILE = "model_squeezebert"
LABELS, CHOICES, T = 3, 3, 13
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=12,
    embedding_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=20,
    layer_norm_eps=1e-3,  # of embeddings and heads: the encoder has its own
    q_groups=2,
    k_groups=3,
    v_groups=4,
    post_attention_groups=1,
    intermediate_groups=6,
    output_groups=12,
    num_labels=LABELS,
)
TOKEN_LABELS = np.where(ragged(2, T), token_ids(2, T), -100).astype(np.int32)
# The class behind SqueezeBert, its outputs and their shapes, and labels.
CLASSES = {
    "base": ("Model", dict(last_hidden_state=(2, T, 12), pooler_output=(2, 12)), {}),
    "masked_lm": ("ForMaskedLM", dict(logits=(2, T, VOCABULARY)), dict(labels=TOKEN_LABELS)),
    "sequence_classification": (
        "ForSequenceClassification",
        dict(logits=(2, LABELS)),
        dict(labels=np.array([2, 0], np.int32)),
    ),
    "token_classification": (
        "ForTokenClassification",
        dict(logits=(2, T, LABELS)),
        dict(labels=np.where(TOKEN_LABELS < 0, -100, TOKEN_LABELS % LABELS)),
    ),
    "question_answering": (
        "ForQuestionAnswering",
        dict(start_logits=(2, T), end_logits=(2, T)),
        dict(start_positions=np.array([1, 3]), end_positions=np.array([4, 6])),
    ),
    "multiple_choice": (
        "ForMultipleChoice",
        dict(logits=(2, CHOICES)),
        dict(labels=np.array([1, 2], np.int32)),
    ),
}


def add(recorder, task, name, inputs=None, without=(), **fields):
    """A run of a class on ragged tokens."""
    suffix, outputs, labels = CLASSES[task]
    mask = ragged(2, T)
    lead = (2, CHOICES, T) if task == "multiple_choice" else (2, T)
    mask = np.broadcast_to(mask.reshape(2, *[1] * (len(lead) - 2), T), lead)
    arguments = dict(
        input_ids=np.where(mask, token_ids(*lead), 0).astype(np.int32),
        attention_mask=mask.astype(np.int32),
        token_type_ids=(np.arange(T) > 4).astype(np.int32) * np.ones(lead, np.int32),
    )
    arguments |= labels if inputs is None else inputs
    arguments = {k: v for k, v in arguments.items() if k not in without}
    if "grad_of" in fields:
        for output, shape in outputs.items():
            weight = normal(*shape) / 8
            if shape[:2] == (2, T):  # as a loss, padding has none
                weight = weight * ragged(2, T).reshape(2, T, *[1] * (len(shape) - 2))
            arguments[f"weight_{output}"] = weight.astype(np.float32)
    fields |= {"class": f"SqueezeBert{suffix}", "checkpoint": f"squeezebert_plain_{task}"}
    recorder.add(FILE, f"{FILE}_{task}_{name}", "model", arguments, **fields)


def record(recorder):
    for seed, (task, (suffix, *_)) in enumerate(CLASSES.items()):
        folder = f"squeezebert_plain_{task}"
        fields = SIZES | (dict(num_labels=2) if task == "question_answering" else {})
        case = dict(kind="make_model", out=folder, config=fields, seed=seed, scale=0.3)
        worker.run_case(case | {"class": f"SqueezeBert{suffix}"}, {}, GOLDEN)
        (GOLDEN / folder / "generation_config.json").unlink(missing_ok=True)
        add(recorder, task, "gradients", grad_of="all", output_hidden_states=task == "base")
    base = functools.partial(add, recorder, "base")
    base("position_ids", dict(position_ids=np.arange(T, dtype=np.int32)[None, ::-1] + 7))
    base("inputs_embeds", dict(inputs_embeds=normal(2, T, 12)), ("input_ids", "token_type_ids"))
    base("alone", without=("attention_mask", "token_type_ids"))
    targets = normal(2, LABELS)
    for problem, labels in (
        ("regression", targets),
        ("multi_label_classification", (targets > 0).astype(np.float32)),
    ):
        config = dict(problem_type=problem)
        add(recorder, "sequence_classification", problem, dict(labels=labels), config=config)


if __name__ == "__main__":
    record_alone(record, FILE)
