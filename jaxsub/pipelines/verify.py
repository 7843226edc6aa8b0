"""`jaxsub verify`: every byte of a bundle as it was written, or the files that are not."""

import dataclasses

from jaxsub import errors


@dataclasses.dataclass(frozen=True)
class Config:
    """What to check."""

    bundle: str = ""  # folder that fit wrote


def run(config, *, write):
    """Writes one line a problem, or that there is none.

    Raises:
        ConfigError: no bundle given.
        InputError: it is damaged, or none at all.
    """
    from jaxsub.bundle import files

    if not config.bundle:
        raise errors.ConfigError("no bundle: give --bundle=FOLDER")
    problems = files.verify(config.bundle)
    for name, what in problems:
        write(f"{errors.quote(name)}: {what}\n")
    if problems:
        raise errors.InputError(config.bundle, f"damaged: {len(problems)} file(s)", hint="get it again, or fit again")
    write("whole: every file is as it was written\n")
