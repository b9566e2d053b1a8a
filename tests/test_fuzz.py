"""A sample of tests/bench_fuzz.py: odd files and flags end in the right result, or in one line that names them."""
from bench_fuzz import FAMILIES, sample

# Those that need no trained run and mostly stop early. The bench has them all.
QUICK = ["dataset", "keys", "header", "run bytes", "image", "special", "tiff", "flags"]


def test_what_is_odd_is_refused_in_one_line_or_read_rightly():
    assert set(QUICK) <= set(FAMILIES)
    faults = sample(QUICK, n=2, seed=1000)
    assert not faults, "\n\n".join(f"{family} {seed}: {end}\n{said[-600:]}" for family, seed, end, said in faults)
