"""The memory: a bank of state nodes, its importance, and the edits of the node set."""

from nsm_graph.memory.edit import NodeEdit as NodeEdit
from nsm_graph.memory.edit import apply_edit as apply_edit
from nsm_graph.memory.editor import EditEvent as EditEvent
from nsm_graph.memory.editor import MemoryEditor as MemoryEditor
from nsm_graph.memory.importance import attention_sharpness as attention_sharpness
from nsm_graph.memory.importance import gradient_signal as gradient_signal
from nsm_graph.memory.importance import routing_mass as routing_mass
from nsm_graph.memory.importance import update_norm as update_norm
from nsm_graph.memory.manager import StateManager as StateManager
from nsm_graph.memory.policy import Every as Every
from nsm_graph.memory.policy import Grow as Grow
from nsm_graph.memory.policy import GrowTo as GrowTo
from nsm_graph.memory.policy import MemoryView as MemoryView
from nsm_graph.memory.policy import Merge as Merge
from nsm_graph.memory.policy import OnPlateau as OnPlateau
from nsm_graph.memory.policy import Proposal as Proposal
from nsm_graph.memory.policy import Prune as Prune
from nsm_graph.memory.policy import Split as Split
