"""Whether redirected connections arrive on this very host: real ones, told apart, and explained where they are lost.

Imports the rooms below it, down to `system`. Nothing it puts on the host outlives the command, however that ends.
"""
