"""The HTTP edge: OpenAI schemas, routes, SSE, text <-> tokens, metrics. Never imports torch."""

__version__ = "0.1.0"
