"""Faults put in on purpose: hostile files, full disks, killed processes, odd networks and numbers.

The fast suite tries a seeded sample of each; ``make faults`` tries all of it and counts (README, SECURITY.md).
"""
