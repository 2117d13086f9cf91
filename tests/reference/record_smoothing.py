"""Record tests/golden/label_smoothing.npz from the PyTorch reference, in its environment (see
README.md): the losses of transformers' LabelSmoother, as its Trainer uses it, for recorded models.

    python tests/reference/record_smoothing.py

Arrays: epsilon; by the name of a case in golden.json with labels <name>/loss and, where
the model has a decoder, <name>/gradient, that of GRADIENT_OF.
"""

import json

import numpy as np
import worker
from recorder import GOLDEN
from transformers.trainer_pt_utils import LabelSmoother

EPSILON = 0.1
GRADIENT_OF = "model.decoder.layers.1.final_layer_norm.weight"
CASES = (
    "model_bert_masked_lm_t16_padded",
    "model_bert_token_classification_t16_padded",
    "model_bert_sequence_classification_t16_padded",
    "model_bert_multiple_choice_t16_padded",
    "model_bert_causal_lm_norm_t21_padded",
    "model_seq2seq_bart_conditional_generation_labels",
    "model_seq2seq_bart_plain_conditional_generation_labels",
    "model_seq2seq_mbart_conditional_generation_labels",
    "model_seq2seq_pegasus_conditional_generation_labels",
)


def record(name, case):
    """The Trainer takes the labels out of the inputs; its collator has given the decoder's."""
    with np.load(GOLDEN / case["file"]) as arrays:
        inputs = {n: worker.to_torch(arrays[key], None) for n, key in case["inputs"].items()}
    model, _ = worker.load_model(case, GOLDEN)
    model.eval()
    labels = inputs.pop("labels")
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    smoother, ahead = LabelSmoother(epsilon=EPSILON), "causal" in name
    loss = smoother(model(**inputs, return_dict=True), labels, shift_labels=ahead)
    arrays = {f"{name}/loss": worker.to_numpy(loss)}
    if "decoder_input_ids" in inputs:
        loss.backward()
        gradient = model.get_parameter(GRADIENT_OF).grad
        arrays[f"{name}/gradient"] = worker.to_numpy(gradient)
    return arrays


def main():
    manifest = json.loads((GOLDEN / "golden.json").read_text())
    arrays = {"epsilon": np.float32(EPSILON)}
    for name in CASES:
        arrays |= record(name, manifest[name])
    np.savez_compressed(GOLDEN / "label_smoothing.npz", **arrays)


if __name__ == "__main__":
    main()
