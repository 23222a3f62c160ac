"""`litgpt chat`."""
