"""RMKV, a causal language model with a fixed-size recurrent memory, and the tools to train, evaluate and serve it."""
