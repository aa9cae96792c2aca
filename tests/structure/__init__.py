"""The structure of the packages, read from the code: `python -m tests.structure` prints its figures."""
