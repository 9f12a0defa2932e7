"""All we know of DeepGEMM: the installed copy, and how each cache generation names and keeps a kernel."""

from typing import Literal

#: The two layouts of DeepGEMM's cache: up to 2.6, and from 2.8 on.
Generation = Literal["legacy", "deepjit"]
