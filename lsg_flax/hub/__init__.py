"""Checkpoints as folders of Hugging Face: opened, saved, made to read long documents."""

from lsg_flax.hub.beside import is_model_file as is_model_file
from lsg_flax.hub.checkpoint import Checkpoint as Checkpoint
from lsg_flax.hub.checkpoint import open_checkpoint as open_checkpoint
from lsg_flax.hub.download import CONFIG_FILES as CONFIG_FILES
from lsg_flax.hub.download import TOKENIZER_ALONE as TOKENIZER_ALONE
from lsg_flax.hub.download import resolve as resolve
from lsg_flax.hub.load import convert_checkpoint as convert_checkpoint
from lsg_flax.hub.load import from_pretrained as from_pretrained
from lsg_flax.hub.load import make_lsg as make_lsg
from lsg_flax.hub.pytorch_code import in_pytorch as in_pytorch
from lsg_flax.hub.save import config_values as config_values
from lsg_flax.hub.save import keep_documents as keep_documents
from lsg_flax.hub.save import save_pretrained as save_pretrained
from lsg_flax.hub.sentence_files import Pooling as Pooling
from lsg_flax.hub.sentence_files import SentenceSettings as SentenceSettings
from lsg_flax.hub.sentence_files import read_sentence_settings as read_sentence_settings
from lsg_flax.hub.sentence_files import write_sentence_settings as write_sentence_settings
from lsg_flax.hub.to_lsg import LSGOptions as LSGOptions
from lsg_flax.hub.tokenizer_files import Tokenizer as Tokenizer
from lsg_flax.hub.tokenizer_files import read_tokenizer as read_tokenizer
from lsg_flax.hub.weights import BIN as BIN
from lsg_flax.hub.weights import CONFIG as CONFIG
from lsg_flax.hub.weights import INDEX as INDEX
from lsg_flax.hub.weights import WEIGHTS as WEIGHTS
from lsg_flax.hub.weights import StoredTensor as StoredTensor
from lsg_flax.hub.weights import Tensors as Tensors
