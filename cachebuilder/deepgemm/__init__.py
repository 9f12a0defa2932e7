"""All we know of DeepGEMM: the installed copy, and how each cache generation names and keeps a kernel."""
