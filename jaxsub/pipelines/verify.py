"""`jaxsub verify`: every byte of a bundle or a workdir as it was written, or the files that are not."""

import dataclasses
import os

from jaxsub import errors


@dataclasses.dataclass(frozen=True)
class Config:
    """What to check."""

    bundle: str = ""  # folder that fit wrote, or the workdir of fit or analyze

    POSITIONAL = "bundle"  # `jaxsub verify DIR`


def run(config, workdir=None, *, write):
    """Writes one line a problem, or that there is none.

    Args:
        config: Config.
        workdir: folder to check, in place of `config.bundle`.
        write: function that takes text.

    Raises:
        ConfigError: no folder given.
        InputError: it is damaged, or nothing that can be checked.
    """
    place = config.bundle or workdir
    if not place:
        raise errors.ConfigError("nothing to check: give --bundle=FOLDER, or --workdir=FOLDER")
    problems = _problems(place)
    for name, what in problems:
        write(f"{errors.quote(name)}: {what}\n")
    if problems:
        raise errors.InputError(place, f"damaged: {len(problems)} file(s)", hint="get it again, or run it again")
    write("whole: every file is as it was written\n")


def _problems(place):
    """[(file, what is wrong), ...] of a bundle, or of all that programs left in a workdir."""
    from jaxsub.bundle import files
    from jaxsub.pipelines import seal, workdir as workdirs

    inner = os.path.join(place, "bundle")
    is_analysis, is_fit = seal.is_there(place), os.path.lexists(inner)
    if not is_analysis and (not is_fit or os.path.lexists(os.path.join(place, files.MANIFEST))):
        return files.verify(place)
    found = seal.verify(place) if is_analysis else []
    if is_fit:
        found += [(f"bundle/{name}", what) for name, what in files.verify(inner)]
    is_there = os.path.lexists(os.path.join(place, workdirs.RECORD))
    if (is_there or not is_fit or not files.is_updated(inner)) and not workdirs.is_whole(place):
        found.append((workdirs.RECORD, "is not as it was written"))
    return found
