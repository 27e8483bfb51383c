"""The sequence of a change: install, apply, uninstall, rollback and confirmation, each all or nothing; and status.

Imports `persist` and what it may import. Nothing here knows the syntax of an engine.
"""
