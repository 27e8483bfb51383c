"""What survives a reboot: systemd units and the files of firewalld.

Imports `engines`, `record` and what they may import. Nothing here changes the rules in the kernel.
"""
