"""A server of one model, by the API that OpenAI's clients speak: JSON over HTTP.

wire.py says what requests and replies look like, routes.py answers them, server.py is the HTTP around it: limits, keys,
clients that leave. scheduler.py gives requests their turn between the steps of decoding, rows.py holds the rows that
are decoded together, and draws.py chooses each row's next token by its own settings.
"""
