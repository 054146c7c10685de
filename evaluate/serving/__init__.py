"""Parts of `evaluate.serve`: checks of requests, the queue in front of the model, HTTP and WebSocket."""

from .batching import Answer, Batcher
from .queries import Query, RequestReader
from .server import Limits, PolicyServer

__all__ = ["Answer", "Batcher", "Limits", "PolicyServer", "Query", "RequestReader"]
