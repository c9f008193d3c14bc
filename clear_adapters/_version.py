"""The version of the package: the build reads it from here, and so does every file that records provenance."""

__version__ = "0.1.0.dev0"
