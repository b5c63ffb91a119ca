"""Exercises that small models learn in seconds."""

# One of two keys is asked for and has one of two values, so that a guess is right half of the time.
RECALL = {"kind": "recall", "keys": 2, "values": 2, "noise": 4, "segments": [0, 2], "segment_length": 8}
