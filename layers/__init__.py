"""The parts that model.py puts together: what a Transformer consists of, apart from its blocks.

args.py       ModelArgs, the shape of a model
basic.py      linear layers, embedding tables, norms, and operators for compiled code
positions.py  rotary positions with their scalings, and learned ones
kv_cache.py   the KV cache of a layer, and attention over it

Constructors of the model choose classes from tables (NORMS, POSITIONS, ...) by ModelArgs.
"""
