"""Composition: the cell (one segment) and the machine (a whole ragged batch)."""

from nsm_graph.models.cell import StateMachineCell as StateMachineCell
from nsm_graph.models.machine import NeuralStateMachine as NeuralStateMachine
from nsm_graph.models.state import MachineOutput as MachineOutput
from nsm_graph.models.state import MachineState as MachineState
from nsm_graph.models.state import Record as Record
