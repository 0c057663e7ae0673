"""Deliberate faults: malicious files, full disks, killed processes, unusual networks and numbers.

The fast suite tries a seeded sample of each; ``make faults`` tries all of them and counts them (README, SECURITY.md).
"""
