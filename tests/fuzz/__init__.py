"""Random input by the thousand. Law: a result that is right, or one error of the library.

`FUZZ_CASES=100000 python -m pytest tests/fuzz` runs that many of each kind; a case is a function of
its number, and the number is in the message of a case that fails.
"""

import os

CASES = int(os.environ.get("FUZZ_CASES", "150"))
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))  # number of the first case
NUMBERS = range(FIRST, FIRST + CASES)
