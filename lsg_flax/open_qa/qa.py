"""Open-domain question answering: a question's embedding retrieves blocks of a corpus, and a reader
finds the answer in them. (RealmForOpenQA of transformers 4.37; arXiv 2002.08909)

Axes: B batch (one question), T tokens, D model width (here of the projection).
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Int

from lsg_flax import hub
from lsg_flax.checks import require
from lsg_flax.convert_from_torch import params_to_torch
from lsg_flax.files import differences
from lsg_flax.hub import Tokenizer
from lsg_flax.models import Model, ModelOutput, Params, RealmConfig
from lsg_flax.open_qa import pairs, reading
from lsg_flax.open_qa.embeddings import BLOCK_EMBEDDINGS, write_embeddings
from lsg_flax.open_qa.folder import OpenQAParts, write_folder
from lsg_flax.open_qa.reading import Retrieved, best_span
from lsg_flax.open_qa.records import Records, open_records
from lsg_flax.open_qa.search import Search, Stored, device_search

_STEP = 32  # questions are padded to multiples of it

Question = dict[str, Int[np.ndarray, "B T"]]
Answers = Sequence[Sequence[int]]  # ids, without special tokens


class OpenQAOutput(NamedTuple):
    """The result of a call: the reader's output and the answer's ids, [T], as in transformers'
    RealmForOpenQAOutput; and the numbers of the retrieved blocks, best first."""

    reader_output: ModelOutput
    predicted_answer_ids: Int[np.ndarray, " T"]
    block_ids: Int[np.ndarray, " beam"]


class Answer(NamedTuple):
    """An answer, its score (the sum of the reader's and the retriever's), and its block."""

    answer: str
    score: float
    block_id: int
    text: str


@dataclass(frozen=True, eq=False)
class OpenQA:
    """A retriever and a reader with an index of text blocks: transformers' RealmForOpenQA (arXiv
    2002.08909).

    Attributes:
        embedder, reader: models of the tasks "embedder" and "reader".
        params: their parameters, {"embedder": ..., "reader": ...}.
        tokenizer: the tokenizer of both.
        records: the texts of the blocks.
        embeddings: embeddings of the blocks, [blocks, D]; rows are read when needed.
        search: finds the best blocks for an embedding.

    Raises:
        ValueError: for parts that do not fit together.
    """

    embedder: Model
    reader: Model
    params: Params
    tokenizer: Tokenizer
    records: Records
    embeddings: Stored
    search: Search

    def __post_init__(self):
        """Checks that the parts fit together."""
        pairs.checked_config(self.reader, "reader", self.tokenizer)
        width = pairs.checked_config(self.embedder, "embedder", self.tokenizer).retriever_proj_size
        require(
            tuple(self.embeddings.shape) == (len(self.records), width),
            f"{self.records.place} has {len(self.records)} blocks and the embedder's embeddings "
            f"have {width} features, but the index has shape {tuple(self.embeddings.shape)}: "
            "they belong to another corpus or embedder; `lsg-flax index` computes new ones.",
        )
        longest = self.reader.max_length
        for name in ("reader_seq_len", "max_span_width"):
            length = getattr(self.config, name)
            require(
                length <= longest,
                f"{name}={length} is more than the {longest} tokens that the reader reads; lower "
                "it in config.json, or convert the reader with lsg_flax.convert_checkpoint.",
            )

    @property
    def config(self) -> RealmConfig:
        """The reader's config, which has the sizes of the beams."""
        assert isinstance(self.reader.config, RealmConfig)
        return self.reader.config

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        *,
        reader: str | os.PathLike | None = None,
        search: Callable[[Stored], Search] = device_search,
        dtype: Dtype = jnp.float32,
    ) -> "OpenQA":
        """Loads a RealmForOpenQA with its block_records.npy and tokenizer.

        Args:
            folder: folder or hub id.
            reader: folder or hub id of another reader, such as its conversion to LSG; by default
                that of `folder`.
            search: makes the search from the embeddings, such as `faiss_search`, or
                `functools.partial(device_search, mesh=mesh, dtype=jnp.bfloat16)`.
            dtype: of the models' computation.

        Raises:
            FileNotFoundError: if there is no checkpoint, tokenizer or block_records.npy.
            ValueError: for records that are a pickle, parts that do not fit together, and as
                `lsg_flax.from_pretrained`.
        """
        checkpoint = hub.open_checkpoint(folder)
        embeddings = checkpoint.tensors.get(BLOCK_EMBEDDINGS)
        if not isinstance(embeddings, Stored):
            raise ValueError(
                f"{folder} has no tensor {BLOCK_EMBEDDINGS!r}, the embeddings of blocks; make a "
                "folder that has them with `lsg-flax index`."
            )
        parts = checkpoint.tokenizer, open_records(checkpoint.root), embeddings
        if parts[0] is None:
            raise FileNotFoundError(f"{folder} has no tokenizer; copy its files there.")
        first, params = checkpoint.load("embedder", dtype=dtype)
        of_reader = checkpoint if reader is None else hub.open_checkpoint(reader)
        second, others = of_reader.load("reader", dtype=dtype)
        params = {"embedder": params, "reader": others}
        return cls(first, second, params, *parts, search(embeddings))

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes a folder that `from_pretrained` and transformers' RealmForOpenQA can load; if
        anything fails, nothing is written.

        Raises:
            ValueError: if embedder and reader have different configs, because the folder has only
                one.
            OSError: if it cannot be written.
        """
        models = {"embedder": self.embedder, "reader": self.reader}
        configs = [hub.config_values(model) | {"architectures": []} for model in models.values()]
        names = [path for path, *_ in differences(*configs)]
        require(
            not names,
            f"embedder and reader differ in {names}, but a folder has only one config.json; save "
            "the reader with lsg_flax.save_pretrained, and pass its folder to "
            "OpenQA.from_pretrained(reader=).",
        )
        tensors = {
            f"{name}.{tensor}": values
            for name, model in models.items()
            for tensor, values in params_to_torch(self.params[name], model).items()
        }
        parts = OpenQAParts(tensors, configs[0], self.tokenizer, self.records)
        write_folder(folder, parts, lambda file: write_embeddings(file, self.embeddings))

    def __call__(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        answer_ids: Answers | None = None,
        train: bool = False,
        *,
        key: jax.Array | None = None,
    ) -> OpenQAOutput:
        """Retrieves blocks for one question and finds the answer in them.

        Args:
            input_ids, attention_mask, token_type_ids: the question, [1, T].
            answer_ids: the right answers as lists of ids; with them the output has losses.
            train: whether to retrieve searcher_beam_size blocks instead of reader_beam_size.
            key: random key of dropout in training; None for no dropout.

        Returns:
            The reader's output, the ids of the best answer, and the numbers of the retrieved
            blocks.

        Raises:
            ValueError: for more than one question, a question without words, answers that are empty
                or wider than max_span_width, and a beam that is larger than the index.
        """
        question, config = self._question(input_ids, attention_mask, token_type_ids), self.config
        found = self.retrieve(question, answer_ids, train=train)
        ids, inputs = (
            found.pairs.input_ids,
            reading.reader_inputs(found, config, self.reader.max_length),
        )
        models = {"embedder": self.embedder, "reader": self.reader}
        key = key if train else None
        output = reading.read_blocks(self.params, question, found.vectors, inputs, key, **models)
        lengths = {"padded": inputs["input_ids"].shape[1], "length": ids.shape[1]}
        output = reading.without_padding(output, **lengths, width=config.max_span_width)
        block, start, end = best_span(output)
        return OpenQAOutput(output, ids[block, start : end + 1], found.blocks)

    def answer(self, question: str) -> Answer:
        """Returns the best answer to a question, its score, and the number and text of its block.

        Raises:
            ValueError: for a question without words or longer than the embedder reads, and scores
                that are not finite.
        """
        ids, mask, types = self.encode(question).values()
        output, ids, blocks = self(ids, mask, types)
        block, score = int(blocks[best_span(output)[0]]), np.max(np.asarray(output.reader_logits))
        require(
            bool(np.isfinite(score)),
            f"the best score of {question!r:.60} is {score}: parameters or embeddings of blocks "
            "are not finite; use another checkpoint, and build its index again.",
        )
        text = self.tokenizer.decode(ids)
        return Answer(text, float(score), block, *self.records.texts([block]))

    def encode(self, question: str) -> Question:
        """Returns a question's arrays, [1, T], padded to one of a few lengths; raises ValueError if
        it is too long, and for a tokenizer that is not the checkpoint's."""
        encoded = self.tokenizer([question], return_token_type_ids=True, return_tensors="np")
        names = ("input_ids", "attention_mask", "token_type_ids")
        return self._question(*(encoded[name] for name in names))

    def retrieve(
        self,
        question: Question,
        answer_ids: Answers | None = None,
        *,
        train: bool = False,
        params: Params | None = None,
    ) -> Retrieved:
        """Retrieves blocks for a question, and finds the answers in them.

        Args:
            question: `input_ids`, `attention_mask` and `token_type_ids`, [1, T].
            answer_ids, train: as in the call.
            params: the embedder's parameters; by default its own.

        Raises:
            ValueError: as the call.
        """
        config, tokenizer = self.config, self.tokenizer
        beam = config.searcher_beam_size if train else config.reader_beam_size
        require(
            beam >= config.reader_beam_size,
            f"searcher_beam_size={beam} is less than reader_beam_size={config.reader_beam_size}; "
            "the reader reads the best blocks of the searcher: raise it in config.json.",
        )
        if answer_ids is not None:
            pairs.check_answers(answer_ids, config.max_span_width)
        ids = question["input_ids"][question["attention_mask"] > 0]
        text = pairs.question_text(tokenizer, ids)
        params = self.params["embedder"] if params is None else params
        embedded = reading.embed_question(params, question, embedder=self.embedder)
        blocks = self.search(np.asarray(embedded), beam).blocks[0]
        rows = [np.asarray(self.embeddings[n : n + 1], np.float32) for n in blocks.tolist()]
        texts, places = self.records.texts(blocks.tolist()), None
        found = pairs.encode_pairs(tokenizer, text, texts, config.reader_seq_len)
        if answer_ids is not None:
            sep = tokenizer.sep_token_id
            places = pairs.block_has_answer(found.input_ids, answer_ids, sep=sep)
        return Retrieved(blocks, np.concatenate(rows), found, places)

    def _question(self, input_ids, attention_mask, token_type_ids) -> Question:
        ids = np.asarray(input_ids)
        limit, words = self.embedder.max_length, self.embedder.config.vocab_size
        require(
            ids.ndim == 2 and ids.shape[0] == 1 and 0 < ids.shape[1] <= limit,
            f"input_ids {ids.shape} must be one question, [1, tokens], of at most {limit} tokens; "
            "ask one question per call, and shorten long ones.",
        )
        require(
            int(ids.min()) >= 0 and int(ids.max()) < words,
            f"input_ids are in {ids.min()}..{ids.max()}, but vocab_size={words} allows "
            f"0..{words - 1}; tokenizer and checkpoint do not belong together.",
        )
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
        types = np.zeros_like(ids) if token_type_ids is None else np.asarray(token_type_ids)
        kinds = [f"{x.dtype} {x.shape}" for x in (ids, mask, types)]
        require(
            ids.dtype.kind in "iu" and ids.shape == mask.shape == types.shape,
            f"input_ids, attention_mask and token_type_ids are {', '.join(kinds)}; ids must be "
            "integers, and all three must have one shape.",
        )
        fill = ((0, 0), (0, min(-ids.shape[1] % _STEP, limit - ids.shape[1])))
        arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        return {name: np.pad(array.astype(np.int32), fill) for name, array in arrays.items()}
