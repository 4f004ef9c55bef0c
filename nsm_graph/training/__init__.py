"""Training: typed configs, one loop, atomic checkpoints. Needs the `train` extra."""

from nsm_graph.training.checkpoint import load_checkpoint as load_checkpoint
from nsm_graph.training.checkpoint import save_checkpoint as save_checkpoint
from nsm_graph.training.config import Config as Config
from nsm_graph.training.config import DataConfig as DataConfig
from nsm_graph.training.config import ModelConfig as ModelConfig
from nsm_graph.training.config import TrainConfig as TrainConfig
