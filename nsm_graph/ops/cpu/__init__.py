"""What every Numba kernel is made of: vectors, compilation with a disk cache, threads.

Only this package and the files named ``cpu.py`` import Numba, and nothing imports them before a
kernel is first called.
"""
