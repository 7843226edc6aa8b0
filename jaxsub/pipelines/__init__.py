"""Programs as functions: a Config dataclass and run(config, workdir), one file a program."""
