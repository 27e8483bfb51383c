"""What should happen to traffic: the policy, and `decide()`, the specification that every engine agrees with.

Imports `system`. Pure: nothing here reads a file or asks the kernel.
"""
