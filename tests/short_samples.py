"""Imported in a process, this makes the samples of its validations as short as they are in tests."""

from trained_run import SAMPLE_TOKENS

from rmkv_cli.evaluation import sample

sample.TEXT_TOKENS = SAMPLE_TOKENS
