"""Killed anywhere, failing anywhere, at once: what docs/reliability.md claims, shown.

`python -m tests.crash` tries every point and prints figures; the tests in this package try a sample.
"""
