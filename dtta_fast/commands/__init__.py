"""The subcommands of `dtta`, one a file."""
