"""One module per subcommand, imported when it runs: ``add_arguments(parser)``, ``run(args)``."""
