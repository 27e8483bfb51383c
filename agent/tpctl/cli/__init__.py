"""The command line, one module per command. May import everything; nothing imports it.

Modules are imported when a command needs them, because Python's imports are most of what a user waits for.
"""
