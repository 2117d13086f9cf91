"""Data on the host: from files to batches of arrays.

`load_examples` tokenizes files (or a dataset of the `datasets` library) once and caches the tokens
on disk; `train_batches` and `eval_batches` make batches of fixed shapes from them.

    options = DataOptions("sequence_classification", max_length=4096)
    data = load_examples("train.jsonl", options, tokenizer=tokenizer)
    for batch in train_batches(data, batch_size=8, seed=0, epochs=3):
        ...
"""

from lsg_flax.buckets import default_buckets as default_buckets
from lsg_flax.data.answers import AnswerSpan as AnswerSpan
from lsg_flax.data.answers import WindowAnswers as WindowAnswers
from lsg_flax.data.answers import answer_places as answer_places
from lsg_flax.data.answers import best_spans as best_spans
from lsg_flax.data.answers import merge_windows as merge_windows
from lsg_flax.data.answers import window_answers as window_answers
from lsg_flax.data.batches import EvalBatch as EvalBatch
from lsg_flax.data.batches import EvalBatches as EvalBatches
from lsg_flax.data.batches import TrainBatches as TrainBatches
from lsg_flax.data.batches import eval_batches as eval_batches
from lsg_flax.data.batches import train_batches as train_batches
from lsg_flax.data.cache import INPUT as INPUT
from lsg_flax.data.cache import NEGATIVE as NEGATIVE
from lsg_flax.data.cache import POSITIVE as POSITIVE
from lsg_flax.data.cache import READ as READ
from lsg_flax.data.cache import TARGET as TARGET
from lsg_flax.data.cache import RowInfo as RowInfo
from lsg_flax.data.cache import TokenizedDataset as TokenizedDataset
from lsg_flax.data.cache import spread as spread
from lsg_flax.data.cut import Cut as Cut
from lsg_flax.data.cut import cut_of as cut_of
from lsg_flax.data.files import KINDS as KINDS
from lsg_flax.data.files import DataRow as DataRow
from lsg_flax.data.files import DatasetPart as DatasetPart
from lsg_flax.data.files import DatasetSource as DatasetSource
from lsg_flax.data.files import OnError as OnError
from lsg_flax.data.files import Problems as Problems
from lsg_flax.data.files import TextUnit as TextUnit
from lsg_flax.data.files import files_at as files_at
from lsg_flax.data.files import is_dataset_name as is_dataset_name
from lsg_flax.data.files import open_source as open_source
from lsg_flax.data.load import labels_for as labels_for
from lsg_flax.data.load import load_examples as load_examples
from lsg_flax.data.load import unknown_labels as unknown_labels
from lsg_flax.data.options import Columns as Columns
from lsg_flax.data.options import DataOptions as DataOptions
from lsg_flax.data.options import readable_tasks as readable_tasks
from lsg_flax.data.packing import Packing as Packing
from lsg_flax.data.packing import pack_rows as pack_rows
