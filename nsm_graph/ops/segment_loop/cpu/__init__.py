"""The segment loop for processors: forward and backward of the whole sequence, one kernel each.

Examples never exchange data, so each thread takes a few at a time through all their segments,
with everything a step touches in the second-level cache. Every product goes through the register
tile of :mod:`nsm_graph.ops.cpu.matmul`; attention keeps its weights as [keys, queries], so that a
softmax runs down columns, lane by lane. What a step made is kept for backward, or made again.
"""

from nsm_graph.ops.segment_loop.cpu.arrays import Cells as Cells
from nsm_graph.ops.segment_loop.cpu.arrays import Made as Made
from nsm_graph.ops.segment_loop.cpu.arrays import Rows as Rows
from nsm_graph.ops.segment_loop.cpu.arrays import Scratch as Scratch
from nsm_graph.ops.segment_loop.cpu.arrays import Segments as Segments
from nsm_graph.ops.segment_loop.cpu.arrays import TokenGrads as TokenGrads
from nsm_graph.ops.segment_loop.cpu.arrays import Tokens as Tokens
from nsm_graph.ops.segment_loop.cpu.arrays import Weights as Weights
from nsm_graph.ops.segment_loop.cpu.backward import backward_kernel as backward_kernel
from nsm_graph.ops.segment_loop.cpu.forward import forward_kernel as forward_kernel
from nsm_graph.ops.segment_loop.cpu.history import record_size as record_size
