"""Doors for code written for the original projects: their module paths, names and signatures.

Each package here mirrors one project; the modules beside them hold what several of those projects share.
"""
