"""Engines: each turns a policy into kernel state, reads kernel state back, and removes it."""
