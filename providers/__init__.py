"""Adapters to LLM vendors: plain Python and httpx, no Django, Celery or Redis."""
