"""What any careful program needs from the operating system: programs, child processes, files, logs, errors.

Imports nothing else of tpctl. Nothing here knows what a policy or a redirection is.
"""
