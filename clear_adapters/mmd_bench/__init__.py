"""MMD-Bench: its sets built from the base benchmarks, its tasks run and scored, its tables and figures.

METHOD of the sets and rules: arXiv 2604.04780 and its released generators. `tasks` holds the benchmarks as data,
`build` makes the sets, `run` asks a model, `score` counts, `report` shows.
"""
