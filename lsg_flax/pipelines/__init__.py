"""Text in, answers out, with Hugging Face's habits."""

from lsg_flax.pipelines.broken import BrokenLines as BrokenLines
from lsg_flax.pipelines.broken import line_number as line_number
from lsg_flax.pipelines.broken import unskipped as unskipped
from lsg_flax.pipelines.broken import warn_of_skipped as warn_of_skipped
from lsg_flax.pipelines.embeddings import TEXTS as TEXTS
from lsg_flax.pipelines.embeddings import VECTORS as VECTORS
from lsg_flax.pipelines.embeddings import Embedder as Embedder
from lsg_flax.pipelines.embeddings import TextLines as TextLines
from lsg_flax.pipelines.embeddings import check_suffix as check_suffix
from lsg_flax.pipelines.embeddings import pool as pool
from lsg_flax.pipelines.embeddings import read_texts as read_texts
from lsg_flax.pipelines.embeddings import write_vectors as write_vectors
from lsg_flax.pipelines.files import ANSWERS as ANSWERS
from lsg_flax.pipelines.files import DocumentFile as DocumentFile
from lsg_flax.pipelines.files import Written as Written
from lsg_flax.pipelines.files import check_fields as check_fields
from lsg_flax.pipelines.files import predict_file as predict_file
from lsg_flax.pipelines.pipeline import Pipeline as Pipeline
from lsg_flax.pipelines.pipeline import pipeline as pipeline
from lsg_flax.pipelines.spans import QuestionAnswering as QuestionAnswering
from lsg_flax.pipelines.spans import TokenClassification as TokenClassification
from lsg_flax.pipelines.tasks import FeatureExtraction as FeatureExtraction
from lsg_flax.pipelines.tasks import FillMask as FillMask
from lsg_flax.pipelines.tasks import PipelineTask as PipelineTask
from lsg_flax.pipelines.tasks import TextClassification as TextClassification
