"""The models: one encoder, its heads, the families of checkpoints it reads."""

from lsg_flax.models.config import EncoderConfig as EncoderConfig
from lsg_flax.models.config_json import class_names as class_names
from lsg_flax.models.encoder import Remat as Remat
from lsg_flax.models.families import FAMILIES as FAMILIES
from lsg_flax.models.families import Family as Family
from lsg_flax.models.families import Key as Key
from lsg_flax.models.families import ToLSG as ToLSG
from lsg_flax.models.families import family_of as family_of
from lsg_flax.models.families import model_type_of as model_type_of
from lsg_flax.models.families import modern_name as modern_name
from lsg_flax.models.model import Model as Model
from lsg_flax.models.outputs import Batch as Batch
from lsg_flax.models.outputs import ModelOutput as ModelOutput
from lsg_flax.models.outputs import Params as Params
from lsg_flax.models.task import IGNORED as IGNORED
from lsg_flax.models.task import PROBLEM_SCORERS as PROBLEM_SCORERS
from lsg_flax.models.task import SCORES as SCORES
from lsg_flax.models.task import TASKS as TASKS
from lsg_flax.models.task import Examples as Examples
from lsg_flax.models.task import Loss as Loss
from lsg_flax.models.task import ProblemType as ProblemType
from lsg_flax.models.task import Scorer as Scorer
from lsg_flax.models.task import Target as Target
from lsg_flax.models.task import Task as Task
