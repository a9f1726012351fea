"""Models: transformers, ResNets, and the network that is trained.

All of them are called alike: `model(x, train, start=..., stop=...)`. With `start`, x is what block
`start` receives, and what precedes it is left out; with `stop`, what block `stop` would receive is
returned. Block `depth` is everything after the last block.
"""

# The modules that x passes before the first block; "" has the parameters that are in no module.
BEFORE_BLOCKS = ("", "embedding", "patches", "stem", "norm_stem")
