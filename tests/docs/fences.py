# SPDX-License-Identifier: MIT
"""Fenced blocks of a page in markdown."""

import re

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.M | re.S)


def blocks(text, language="python"):
    """What stands in the blocks of this language."""
    return [code for name, code in FENCE.findall(text) if name == language]
