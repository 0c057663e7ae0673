"""Networks of the paper that timm does not have; each module registers its networks with timm when it is imported.

What belongs here: an architecture that the paper trains. What does not: weights (`samples`) and the wish to build one
by its name (`sources`).
"""
