"""The configuration of REALM: BERT's, with the sizes of its retriever and reader."""

from dataclasses import dataclass
from typing import ClassVar

from lsg_flax.checks import Range, whole
from lsg_flax.models.config import EncoderConfig


@dataclass(frozen=True, kw_only=True)
class RealmConfig(EncoderConfig):
    """The config of a REALM model (arXiv 2002.08909), with the names and defaults of transformers'
    RealmConfig.

    Attributes:
        retriever_proj_size, span_hidden_size: features of an embedding, and of a span.
        num_candidates, num_block_records: number of candidates and blocks in PyTorch's buffers;
            here the shapes of the arrays decide.
        searcher_beam_size, reader_beam_size: number of blocks retrieved in training, and read.
        max_span_width: most tokens of an answer.
        reader_seq_len: largest number of tokens of a question and a block together.
        own_query_embedder: whether a scorer has a second embedder, for queries. PyTorch's
            config.json does not say so; it follows from the checkpoint's tensors.
    """

    RANGES: ClassVar[dict[str, Range]] = EncoderConfig.RANGES | {
        **dict.fromkeys(("retriever_proj_size", "span_hidden_size"), whole(1, 2**20)),
        **dict.fromkeys(("num_candidates", "reader_beam_size", "max_span_width"), whole(1, 2**20)),
        **dict.fromkeys(("reader_seq_len", "searcher_beam_size"), whole(1, 2**28)),
        "num_block_records": whole(0, 2**40),
        "reader_layer_norm_eps": Range(0.0, 1.0, "must be in [0, 1]"),
    }

    model_type: str = "realm"
    hidden_act: str = "gelu_new"
    pad_token_id: int | None = 1
    retriever_proj_size: int = 128
    num_candidates: int = 8
    span_hidden_size: int = 256
    max_span_width: int = 10
    reader_layer_norm_eps: float = 1e-3
    reader_beam_size: int = 5
    reader_seq_len: int = 320
    num_block_records: int = 13353718
    searcher_beam_size: int = 5000
    own_query_embedder: bool = False
