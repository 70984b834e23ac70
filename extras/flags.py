"""The types of numbers on the command line of an extra: `type=at_least(1)`, `type=seed`."""

import argparse
import math


def at_least(low, kind=int, below=math.inf):
    """A function for argparse: text -> a number of `kind` in [low, below), or a refusal."""

    def number(text):
        value = kind(text)
        if low <= value < below:
            return value
        raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {below})")

    return number


seed = at_least(0, int, 2**63)  # what torch.manual_seed takes
