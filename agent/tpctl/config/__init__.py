"""From flags, variables and files to a policy: the table of options, their readers and sources, and `resolve()`.

Imports `system`, `spec` and `host`. Nothing here knows an engine.
"""
