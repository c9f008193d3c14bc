"""The entry of a Space: the page, with its own models alone."""

from clear_adapters.ui import build_demo, launch

if __name__ == "__main__":
    launch(build_demo())
