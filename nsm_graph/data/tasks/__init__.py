r"""Algorithmic sequence tasks: labelled sequences of symbols, made as they are needed.

>>> import torch
>>> task = make_task("s5")
>>> x, y = task.sample(128, 32, torch.Generator().manual_seed(0))
>>> x.shape, task.num_symbols, task.num_classes
(torch.Size([128, 32]), 120, 120)
>>> pieces = task.stream(2, 1_000_000, torch.Generator().manual_seed(0), piece=512)
>>> next(pieces)[0].shape
torch.Size([2, 512])
"""

from nsm_graph.data.tasks.arithmetic import ModularArithmetic as ModularArithmetic
from nsm_graph.data.tasks.base import IGNORED as IGNORED
from nsm_graph.data.tasks.base import SequenceTask as SequenceTask
from nsm_graph.data.tasks.bindings import Bindings as Bindings
from nsm_graph.data.tasks.brackets import ModularArithmeticBrackets as ModularArithmeticBrackets
from nsm_graph.data.tasks.copying import Copy as Copy
from nsm_graph.data.tasks.copying import SelectiveCopy as SelectiveCopy
from nsm_graph.data.tasks.groups import Group as Group
from nsm_graph.data.tasks.groups import WordProblem as WordProblem
from nsm_graph.data.tasks.groups import alternating_group as alternating_group
from nsm_graph.data.tasks.groups import symmetric_group as symmetric_group
from nsm_graph.data.tasks.induction import Induction as Induction
from nsm_graph.data.tasks.parity import Parity as Parity
from nsm_graph.data.tasks.recall import MultiQueryRecall as MultiQueryRecall
from nsm_graph.data.tasks.registry import TASKS as TASKS
from nsm_graph.data.tasks.registry import make_task as make_task
