"""What several commands take: the conventions of all, flags of a policy, of confirming, of probing, and kumactl's.

Imports `printing`, `complete`, and what reads and carries out such options.
"""
