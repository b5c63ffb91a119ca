"""From local files to token documents on disk, and from those to endless lanes of rows.

Nothing is imported here: the tokenizing worker processes come through this package and must start fast.
"""
