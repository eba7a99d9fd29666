from miles_spmd.platform import cpu

cpu.install()  # before any module here imports megatron or transformers
