"""The config of an RMKV in transformers; goes into an exported folder as it is."""

from transformers import PreTrainedConfig


class RMKVConfig(PreTrainedConfig):
    """The keys of `rmkv_cli.config.ModelConfig`, which config.json holds all of, and transformers' own."""

    model_type = "rmkv"
