"""ONE BATCH → ANSWERS: an OpenAI-compatible server in which the rows of one batch may each use another adapter.

requests  ─▶  app (gate, keys, limits, adapters)  ─▶  engine (the batch, over the bank)  ─▶  pieces of the answers

The life of a request, and what the server promises, is docs/serving.md.
"""
