"""RMKV: a causal language model with a fixed recurrent memory, and the toolkit for its whole life."""
