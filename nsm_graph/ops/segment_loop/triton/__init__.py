"""The segment loop for GPUs: two kernels, one program for each example."""

from nsm_graph.ops.segment_loop.triton.backward import backward_kernel as backward_kernel
from nsm_graph.ops.segment_loop.triton.forward import forward_kernel as forward_kernel
