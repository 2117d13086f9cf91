"""Training: losses, scores, the step, the loop, and fine-tuning from files."""

from lsg_flax.training.finetune import Finetuned as Finetuned
from lsg_flax.training.finetune import finetune as finetune
from lsg_flax.training.loop import BatchesAt as BatchesAt
from lsg_flax.training.loop import Preempted as Preempted
from lsg_flax.training.loop import TrainState as TrainState
from lsg_flax.training.loop import fit as fit
from lsg_flax.training.loop import init_state as init_state
from lsg_flax.training.loop import make_train_step as make_train_step
from lsg_flax.training.losses import loss_fn as loss_fn
from lsg_flax.training.metrics import evaluate as evaluate
from lsg_flax.training.optimizers import make_optimizer as make_optimizer
from lsg_flax.training.settings import Group as Group
from lsg_flax.training.settings import Help as Help
from lsg_flax.training.settings import Precision as Precision
from lsg_flax.training.settings import Settings as Settings
from lsg_flax.training.settings import check_names as check_names
from lsg_flax.training.settings import read_settings as read_settings
from lsg_flax.training.states import SaveError as SaveError
from lsg_flax.training.states import restore_state as restore_state
from lsg_flax.training.states import save_state as save_state
from lsg_flax.training.states import saved_steps as saved_steps
