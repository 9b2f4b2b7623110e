"""Training in several processes, each with the same parameters and its own share of each batch.

    torchrun --nproc-per-node=4 script.py

`mtl.Step` uses the default process group of `torch.distributed` if there is one. The gradients of all processes are
summed, and the losses divided by the counts of labels over all processes, so that a step in several processes is the
step of one process with the whole batch. `prepare` gives all processes the same model, `sync_batchnorm` lets batch norm
normalise with the whole batch, and `Sampler` divides the batches over the processes.
"""

from mtl.distributed.batch_norm import sync_batchnorm
from mtl.distributed.collectives import rank, world_size
from mtl.distributed.replicas import prepare
from mtl.distributed.sampler import Sampler

__all__ = ["Sampler", "prepare", "rank", "sync_batchnorm", "world_size"]
