"""Files that vLLM's processes read, in an environment without this package; each stands alone."""
