"""One module per command, named as the command; those of a command below another one have both names.

May import everything; only `tpctl.cli.main` imports it, by name.
"""
