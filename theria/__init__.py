"""theria: learning that depends on gradients of gradients through attention, and models with a memory.

The library needs PyTorch and Triton only. The Lightning application that trains its models stands beside
it in ``lightning_modules``, ``datamodules`` and ``callbacks``.
"""
