"""Triton kernels of the attention operators, `theria.attention.triton_fused` launches them.

Every kernel is one pass over the tiles of the score matrix that lie in the band. A *row* pass gives a tile
of queries to a program, which visits the keys they see; a *column* pass gives it a tile of keys. Programs
write what no other program writes, so results do not depend on the order they run in. Everything is
accumulated in float32; half precision is only what the matrix units are fed.

``no_type_check`` keeps the tests' run-time type checks, which wrap functions, from hiding their source.
"""
