"""Triton kernels: the hot paths of the reference modules again, at the speed of the memory.

Each gives what the torch module gives.
"""
