"""Benchmarks: each module is one command that prints a table; see README.md here."""

import pecn  # noqa: F401  keeps the libraries' notes out of the tables
