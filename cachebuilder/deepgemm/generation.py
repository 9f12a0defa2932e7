"""The two layouts of DeepGEMM's cache."""

from typing import Literal

#: Up to DeepGEMM 2.6, and from 2.8 on.
Generation = Literal["legacy", "deepjit"]
