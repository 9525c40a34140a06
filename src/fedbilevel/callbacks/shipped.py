"""The callbacks that ship with the library, a line each."""

# isort: off
from .progress import Progress as Progress
from .csv import CSV as CSV
from .checkpoint import Checkpoint as Checkpoint
from .early_stopping import EarlyStopping as EarlyStopping
from .tensorboard import TensorBoard as TensorBoard
from .wandb import WeightsAndBiases as WeightsAndBiases
