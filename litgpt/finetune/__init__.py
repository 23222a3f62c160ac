"""The finetuning commands: each a signature and a method; the run itself is job.py, its loop training.py."""
