"""Imported in a process, this makes the samples of its validations short, since most tests do not look at them."""

from rmkv_cli.evaluation import sample

sample.TEXT_TOKENS = 16
