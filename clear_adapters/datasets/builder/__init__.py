"""Training data from pictures of a user's own: questions about clean pictures in, degraded pictures with traces out.

rows               what a source gives: rows, and those that cannot be used
sources, tables    rows of a file, text filters, sampling
stream             rows of the Hub
pictures           one picture: filters, hashes, its degraded version
pathways           whether a row restores, and the balance of both
teachers, writers  who writes traces, and what becomes of what they wrote
judging            whether an answer in other words is right
tracing            a teacher at work: tries, and what is on disk already
cost               what that will cost, told before
assembly           the work of a build: pictures, splits, paths, traces, files
summary            what it came to
plan, build        the settings, and the run that a killed process can take up again
"""
