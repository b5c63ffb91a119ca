"""Serve a model over HTTP: the OpenAI protocol, named memories and a chat page."""

from rmkv_cli.serving.limits import Limits
from rmkv_cli.serving.server import Server, bind, is_loopback, serve
from rmkv_cli.serving.service import Service

__all__ = ["Limits", "Server", "Service", "bind", "is_loopback", "serve"]
