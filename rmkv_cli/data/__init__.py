"""From files and data sets to tokenized documents, and from documents to endless lanes of training rows.

This package imports nothing, because the tokenizing worker processes import it and must start fast.
"""
