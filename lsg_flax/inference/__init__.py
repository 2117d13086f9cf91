"""Batched inference: predictors, resumable result files, exported programs."""

from lsg_flax.buckets import default_buckets as default_buckets
from lsg_flax.inference.encodings import Encoding as Encoding
from lsg_flax.inference.export import export_model as export_model
from lsg_flax.inference.export_texts import export_texts as export_texts
from lsg_flax.inference.lines import Document as Document
from lsg_flax.inference.lines import ResumableLines as ResumableLines
from lsg_flax.inference.lines import Unfinished as Unfinished
from lsg_flax.inference.lines import json_line as json_line
from lsg_flax.inference.predictor import IN_FLIGHT as IN_FLIGHT
from lsg_flax.inference.predictor import Predictor as Predictor
from lsg_flax.inference.predictor import Result as Result
from lsg_flax.inference.predictor import predict as predict
from lsg_flax.inference.program import Runnable as Runnable
from lsg_flax.inference.program import Select as Select
from lsg_flax.inference.program import outputs_of as outputs_of
from lsg_flax.inference.results import output_line as output_line
from lsg_flax.inference.results import predict_lines as predict_lines
from lsg_flax.inference.results import predict_to_jsonl as predict_to_jsonl
