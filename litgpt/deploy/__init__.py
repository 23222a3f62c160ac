"""`litgpt serve`: a model over HTTP."""
