"""Text in, answers out, with Hugging Face's habits."""

from lsg_flax.pipelines.embeddings import Embedder as Embedder
from lsg_flax.pipelines.files import ANSWERS as ANSWERS
from lsg_flax.pipelines.files import BrokenLines as BrokenLines
from lsg_flax.pipelines.files import predict_file as predict_file
from lsg_flax.pipelines.pipeline import pipeline as pipeline
from lsg_flax.pipelines.tasks import PipelineTask as PipelineTask
