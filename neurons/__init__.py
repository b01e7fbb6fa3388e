"""LLM in a flash: feed-forward neurons that stay on disk until a token needs them.

Behind a ReLU most neurons of a feed-forward layer output zero for a token. A predictor names the
few that may not; the ones that are not in memory are read, and the others are left on disk. Names:

    record   a neuron's weights on disk, contiguous, so that one read brings them
    entry    memory that holds one record
    window   the number of latest tokens whose neurons stay in memory
    pack     the directory that flash.py writes: records, predictors, manifest

A pack is made once: flash.py trains the predictors (calibration/predictor.py), lays the neurons
out as records (records.RecordFormat) and writes the pack (pack.py).

A token then goes this way. feed_forward.SparseFeedForward asks its predictor for neuron ids.
records.NeuronCache says which of them are in memory and which entries the others may overwrite.
source.NeuronSource reads the missing records into those entries, with one io_uring call for a
layer (uring.py); products.Products computes the entries in memory meanwhile, and the new ones when
they have arrived. A long prompt activates most neurons: a layer then reads all its records in file
order, in chunks.

budget.py decides, when a model is loaded, how many entries each layer gets, how many reads are in
flight and how large a gap is read across. It measures this machine's disk and products and takes
the plan with the lowest expected seconds per token that fits into --dram_budget.

Start at feed_forward.py. Source: "LLM in a flash" (arXiv 2312.11514).
"""
