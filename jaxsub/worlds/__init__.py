"""Collections of known truth, made in seconds: one module a world.

A world has `DESCRIPTION` (one sentence), `TRUTH` (what a correct analysis says with the default options), `Options`
and `make(options, seed, folder)`, which writes `folder`/models and `folder`/labels.json. Where it has
`evaluation(options, seed) -> _evaluation.Evaluation` too, its models and merges of them can be scored. The fields of
TRUTH:

    verdict             of every layer in `layers`
    flags               flags those layers must carry
    layers              names the verdict is about; the others are too small to tell (N - 1 >= D)
    lineages            sizes of the lineages, largest first
    lora_starts         sizes of the groups of adapters that start from one A, largest first
    duplicates          number of models that are bit-identical to an earlier one
    near_duplicates     number of pairs that are near copies but not equal
"""
