"""Training data from pictures of a user's own: questions about clean pictures in, degraded pictures with traces out.

sources, stream    rows of a file or of the Hub, text filters, sampling
pictures           one picture: filters, hashes, its degraded version
duplicates         pictures that are nearly one
pathways           whether a row restores, and the balance of both
teachers, writers  who writes traces, and what becomes of what they wrote
cost               what that will cost, told before
plan, build        the settings, and the run that a killed process can take up again
"""
