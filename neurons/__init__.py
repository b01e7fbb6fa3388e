"""LLM in a flash: feed-forward neurons that stay on disk until a token needs them.

Behind a ReLU most neurons of a feed-forward layer output zero for a token. A predictor names the
neurons that may be active. Of these, the neurons that are not in memory are read; all others stay
where they are. Names:

    record   a neuron's weights on disk, contiguous, so that one read brings them
    entry    memory that holds one record
    window   the number of latest tokens whose neurons stay in memory
    request  a read of neighbouring records of the file
    depth    the number of requests that the disk has at a time
    gap      unneeded records between two needed ones that one request still reads
    pack     the directory that flash.py writes: records, predictors, manifest

A pack is made once: flash.py trains the predictors (calibration/predictor.py), lays the neurons
out as records (records.RecordFormat) and writes the pack (pack.py).

For each token, feed_forward.SparseFeedForward asks its predictor for neuron ids.
records.NeuronCache looks up which of these neurons are in memory, and which entries the missing
neurons overwrite. source.NeuronSource reads the missing records into these entries, with one
io_uring call for a layer (uring.py). During the reads products.Products computes the neurons in
memory; it computes the new ones when they have arrived. A long prompt activates most neurons: a
layer then reads all its records in file order, in chunks.

When a model is loaded, costs.py measures this machine's disk and products, and budget.py chooses
how many entries each layer gets, the depth and the gap: the plan with the lowest expected seconds
per token that fits into --dram_budget.

Start at feed_forward.py. Source: "LLM in a flash" (arXiv 2312.11514).
"""
