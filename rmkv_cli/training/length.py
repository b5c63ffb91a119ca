"""Length of training, converted from epochs to tokens."""

from pathlib import Path

from rmkv_cli.config import Config
from rmkv_cli.data.manifest import Manifest
from rmkv_cli.errors import UserError


def with_length(config: Config) -> Config:
    """Return the config with `train.tokens` computed from `train.epochs`, if that is set.

    An epoch is one pass over the training split of the prepared data.

    Raises:
        UserError: the config also sets another number of tokens, or the data are not prepared.
    """
    train = config.train
    if train.epochs is None:
        return config
    if train.data is None:
        raise UserError(
            "train.epochs needs prepared data, because the length of a stream is not known; run `rmkv data mix` and "
            "give its folder with --data, or set train.tokens instead"
        )
    tokens_per_epoch = Manifest.load(Path(train.data)).splits["train"].tokens
    tokens = max(1, round(train.epochs * tokens_per_epoch))
    if "tokens" in train.model_fields_set and train.tokens != tokens:
        raise UserError(
            f"train.epochs = {train.epochs:g} of {train.data} is {tokens:,} tokens, but train.tokens = "
            f"{train.tokens:,}; set only one of them"
        )
    return config.model_copy(update={"train": train.model_copy(update={"tokens": tokens})})
