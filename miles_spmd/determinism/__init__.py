"""What a run did, in digests: kept as a hash chain, compared in words. `tensors` and `kernel` alone import torch."""
