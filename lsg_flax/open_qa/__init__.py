"""Open-domain question answering: block records, their embeddings, search and reader."""

from lsg_flax.open_qa.embeddings import BlockEmbedder as BlockEmbedder
from lsg_flax.open_qa.embeddings import embed_blocks as embed_blocks
from lsg_flax.open_qa.folder import build_index as build_index
from lsg_flax.open_qa.pairs import batch_encode_candidates as batch_encode_candidates
from lsg_flax.open_qa.pairs import block_has_answer as block_has_answer
from lsg_flax.open_qa.qa import Answer as Answer
from lsg_flax.open_qa.qa import OpenQA as OpenQA
from lsg_flax.open_qa.qa import OpenQAOutput as OpenQAOutput
from lsg_flax.open_qa.records import Records as Records
from lsg_flax.open_qa.records import open_records as open_records
from lsg_flax.open_qa.records import unpickle_records as unpickle_records
from lsg_flax.open_qa.records import write_records as write_records
from lsg_flax.open_qa.search import Beam as Beam
from lsg_flax.open_qa.search import Search as Search
from lsg_flax.open_qa.search import best_blocks as best_blocks
from lsg_flax.open_qa.search import device_search as device_search
from lsg_flax.open_qa.search import faiss_search as faiss_search
from lsg_flax.open_qa.train import Pretraining as Pretraining
from lsg_flax.open_qa.train import finetune as finetune
from lsg_flax.open_qa.train import pretrain as pretrain
from lsg_flax.open_qa.train import salient_spans as salient_spans
