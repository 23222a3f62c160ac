"""Scores of a model where it lies: on lm-eval's tasks, and on a text."""
