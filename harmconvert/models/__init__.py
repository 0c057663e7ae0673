"""Networks of the paper that timm does not have; each module registers its networks with timm when it is imported.

What belongs here: architectures that the paper trains. What does not: weights (`samples`) and building a network by its
name (`sources`).
"""
