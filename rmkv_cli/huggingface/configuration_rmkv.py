"""Config of an RMKV in transformers; copied unchanged into exported folders."""

from transformers import PreTrainedConfig


class RMKVConfig(PreTrainedConfig):
    """Keys of `rmkv_cli.config.ModelConfig`, all of which config.json contains, and those of transformers."""

    model_type = "rmkv"
