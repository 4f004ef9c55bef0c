"""nsm_graph: a memory of state nodes for sequences and graphs, as PyTorch Geometric layers."""

from nsm_graph import memory as memory
from nsm_graph import mmsb as mmsb
from nsm_graph import nn as nn
from nsm_graph import ops as ops
from nsm_graph import topology as topology
from nsm_graph.models import MachineOutput as MachineOutput
from nsm_graph.models import MachineState as MachineState
from nsm_graph.models import NeuralStateMachine as NeuralStateMachine
from nsm_graph.partition import Partition as Partition
from nsm_graph.relation import Relation as Relation

__version__ = "0.1.0"
