"""Models that are larger than the device's memory: weights, KV cache and activations on tiers.

There are three tiers: the device, host memory and disk. If the device is the CPU, the first two are
the same memory. A Policy (policy.py) states which share of the weights, of the KV cache and of the
activations is on each tier, and how the rows of a batch are cut into micro-batches. Micro-batches
pass through a layer one after the other, so that its weights are loaded once for all of them.

How data flows. offload.py, at the root, replaces the model's list of layers. The model's loop asks
it for layer j; prefetch.Prefetcher returns the buffer that has the layer, while a TransferWorker
reads layer j + 1 into the other buffer. The bytes come from host memory or, by
direct_io.DirectFile, from the checkpoint's file or from a scratch file. The cache of each layer is
cut into cells, one for each micro-batch (kv_cache.py). Cells are read into buffers of their own and
used there, and their new slots are written back. With attention on the host (host_attention.py),
queries are copied to the host, and the cache need not be copied to the device. On a GPU every
TransferWorker copies in a CUDA stream of its own; an event on each buffer tells when its memory may
be overwritten.

How a policy is found. probe.py measures the disk, the copies and one block of the model on this
machine. planner.py predicts from these times how long each resource is busy under a policy, and
searches for the policy with the most tokens per second within the memory; plan.py, at the root,
calls them for the commands. links.py predicts the rates of several devices; no other file here uses
it.

Start at policy.py, then prefetch.py, then offload.py.

Source: FlexGen (arXiv 2303.06865), sections 3 and 4.
"""
