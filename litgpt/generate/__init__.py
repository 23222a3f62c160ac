"""Token ids from token ids: sampling, the engine, sessions, and the commands on top."""
