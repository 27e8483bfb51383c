"""The command line: `main` finds the command. May import everything; nothing imports it.

Its rooms, each importing those before it: `printing`, `complete`, `options`, `commands`. Modules are imported when a
command needs them, because Python's imports are most of what a user waits for.
"""
