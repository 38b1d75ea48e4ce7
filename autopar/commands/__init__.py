"""The command line: one file per command. ``autopar.__main__`` puts them together."""
