"""Synthetic data: a recipe's requests, a model that answers them, a journal of the answers, and the filtered rows."""

from rmkv_cli.data.synthetic.generate import Report, generate_data
from rmkv_cli.data.synthetic.remote import remote_writer
from rmkv_cli.data.synthetic.requests import REFUSED, Answer, Request, Write

__all__ = ["REFUSED", "Answer", "Report", "Request", "Write", "generate_data", "remote_writer"]
