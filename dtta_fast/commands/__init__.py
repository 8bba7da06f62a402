"""The subcommands of `dtta`, one per file."""
