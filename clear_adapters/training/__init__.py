"""Training: objectives, one thin `transformers.Trainer` subclass, recipes as files."""
