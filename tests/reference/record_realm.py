"""Record REALM's part of tests/golden/ from the PyTorch reference, in its environment.

    python tests/reference/record_realm.py    adds it to what is there, or records it anew

Axes: n batch, c candidates or blocks, t tokens.
"""

import numpy as np
import worker
from recorder import GOLDEN, VOCABULARY, normal, ragged, record_alone, token_ids

FILE = "model_realm"
SIZES = dict(
    model_type="realm",
    vocab_size=VOCABULARY,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=16,
    max_position_embeddings=48,
    retriever_proj_size=5,
    num_candidates=3,
    span_hidden_size=6,
    max_span_width=4,
    reader_beam_size=3,
    searcher_beam_size=5,
    num_block_records=4,
    pad_token_id=0,
)
CLASSES = {
    "realm_embedder": ("RealmEmbedder", {}),
    "realm_scorer": ("RealmScorer", {}),
    "realm_scorer_of_two": ("RealmScorer", dict(own_query_embedder=True)),
    "realm_knowledge_augmented_encoder": ("RealmKnowledgeAugEncoder", {}),
    "realm_reader": ("RealmReader", {}),
}
GRADIENTS_OF = {
    "realm_embedder": ("realm.embeddings.word_embeddings.weight", "cls.dense.weight"),
    "realm_scorer": (
        "embedder.realm.encoder.layer.0.attention.self.query.weight",
        "embedder.cls.LayerNorm.weight",
    ),
    "realm_scorer_of_two": ("embedder.realm.pooler.dense.weight", "query_embedder.cls.dense.bias"),
    "realm_knowledge_augmented_encoder": (
        "realm.embeddings.word_embeddings.weight",
        "cls.predictions.transform.dense.weight",
    ),
    "realm_reader": (
        "realm.encoder.layer.1.output.LayerNorm.weight",
        "qa_outputs.dense_intermediate.weight",
        "qa_outputs.layer_normalization.bias",
    ),
}


def texts(*lead, prefix=""):
    """Ragged tokens, their mask and segments."""
    t = lead[-1]
    mask = ragged(int(np.prod(lead[:-1])), t).reshape(lead)
    segments = np.broadcast_to(np.arange(t) > t // 3, lead)
    arrays = dict(
        input_ids=np.where(mask, token_ids(*lead), 0),
        attention_mask=mask,
        token_type_ids=segments & mask,
    )
    return {f"{prefix}{name}": array.astype(np.int32) for name, array in arrays.items()}


def blocks(t, beams=3, found=5):
    """The blocks of a question, with up to two answers each."""
    whole = {name: array[1:] for name, array in texts(found + 1, t).items()}  # the first is long
    inside = (whole["token_type_ids"] == 1) & (np.arange(t) < t - 1)
    first = t // 3 + 1
    starts = np.array([[first, first + 2], [-1, -1], [first + 1, -1], [-1, -1], [first, -1]])
    widths = np.array([[0, 3], [0, 0], [2, 0], [0, 0], [1, 0]])
    return {name: array[:beams] for name, array in whole.items()} | dict(
        relevance_score=normal(found),
        block_mask=inside,
        start_positions=starts,
        end_positions=np.where(starts < 0, -1, starts + widths),
        has_answers=(starts >= 0).any(1),
    )


def record(recorder):
    for seed, (folder, (cls, fields)) in enumerate(CLASSES.items()):
        case = dict(kind="make_model", out=folder, config=SIZES, seed=seed, scale=0.3, **fields)
        worker.run_case(case | {"class": cls}, {}, GOLDEN)

    def add(folder, name, inputs, **options):
        cls, fields = CLASSES[folder]
        if any(n.startswith("weight_") for n in inputs):
            options["grad_of"] = GRADIENTS_OF[folder]
        run = {"class": cls, "checkpoint": folder} | fields | options
        recorder.add(FILE, f"model_{folder}_{name}", "model", inputs, **run)

    record_comparisons(add)
    labels = np.where(np.arange(13) % 3 == 1, token_ids(2, 13), -100)
    labels[:, 5:] = -100  # the shortest row has five tokens
    encoder, inputs = "realm_knowledge_augmented_encoder", texts(2, 3, 13)
    scored = inputs | dict(relevance_score=normal(2, 3) * 2, labels=labels)
    some = dict(mlm_mask=(labels != -100).astype(np.int32))
    loss = dict(weight_loss=np.float32(1))
    add(encoder, "logits", inputs)
    add(encoder, "loss", scored | loss)
    add(encoder, "loss_of_some", scored | some | loss)
    add(encoder, "loss_of_none", scored | dict(mlm_mask=np.zeros((2, 13), np.int32)))
    record_readings(add, loss)


def record_comparisons(add):
    weight = dict(weight_projected_score=normal(2, 5))
    add("realm_embedder", "padded", texts(2, 11) | weight)
    add(
        "realm_embedder",
        "hidden_states",
        dict(input_ids=token_ids(1, 4)),
        output_hidden_states=True,
    )
    candidates = texts(2, 3, 9, prefix="candidate_")
    weight = dict(weight_relevance_score=normal(2, 3))
    for folder in ("realm_scorer", "realm_scorer_of_two"):
        add(folder, "padded", texts(2, 11) | candidates | weight)
    embeds = dict(candidate_inputs_embeds=normal(6, 9, 12))
    add("realm_scorer", "embeds", texts(2, 11) | embeds)


def record_readings(add, loss):
    reader, inputs = "realm_reader", blocks(15)
    labels = ("start_positions", "end_positions", "has_answers")
    add(reader, "spans", {n: a for n, a in inputs.items() if n not in labels})
    add(reader, "loss", inputs | loss)
    none = dict(start_positions=np.full((5, 2), -1), end_positions=np.full((5, 2), -1))
    add(reader, "no_answers", inputs | none | dict(has_answers=np.zeros(5, bool)) | loss)
    beyond = dict(start_positions=np.full((5, 1), 15), end_positions=np.full((5, 1), 17))
    add(reader, "answers_beyond_the_end", inputs | beyond)
    one = inputs | {n: inputs[n][:1] for n in ("input_ids", "attention_mask", "token_type_ids")}
    add(reader, "one_beam", one | loss, config=dict(reader_beam_size=1))
    wide = dict(inputs, end_positions=inputs["end_positions"] + 3 * (inputs["end_positions"] > 0))
    add(reader, "answers_wider_than_spans", wide)


if __name__ == "__main__":
    record_alone(record, FILE)
