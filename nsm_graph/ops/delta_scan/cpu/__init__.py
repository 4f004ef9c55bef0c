"""The delta scan for processors, token by token: a memory's columns are the lanes of vectors.

Blocks for kernels, and not a backend of their own: the steps of one segment stand in a thread's
cache, and so do the memories that backward needs again.
"""
